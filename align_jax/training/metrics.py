"""Metrics of a run on disk and progress on the terminal."""

import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from align_jax.distributed import hosts
from align_jax.errors import RunError
from align_jax.files import irregular, parse_json, write_file

_FILE = "metrics.jsonl"
_RESERVED = ("step", "wall_time")


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, float]]:
    """Rows of WORKDIR/metrics.jsonl in the order written: {step, wall_time, metric: value, ...}.

    wall_time is in seconds since the epoch. A last line cut short by a kill is left out. Raises
    RunError if there is no such file or, naming it, another line is bad.
    """
    path = Path(workdir) / _FILE
    if found := irregular(path):
        raise RunError(f"{path} {found}; expected the file of a run's metrics.")
    if not path.exists():
        raise RunError(f"{path} does not exist: {workdir} is not the workdir of a run")
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            rows.append(_from_json(line))
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
            if number == len(lines):
                break
            raise RunError(
                f"{path}, line {number} is no row of metrics: {line[:80]!r}. Remove that line."
            ) from error
    return rows


def _from_json(line: bytes) -> dict[str, float]:
    row = parse_json(line.decode("utf-8"))
    if type(row["step"]) is not int:
        raise ValueError("a step is a whole number")
    # JSON has no NaN and no infinities: they are kept as strings.
    return {**{name: float(value) for name, value in row.items()}, "step": row["step"]}


def _to_json(row: Mapping[str, float]) -> str:
    kept = {name: value if math.isfinite(value) else str(value) for name, value in row.items()}
    return json.dumps(kept, allow_nan=False) + "\n"


class MetricWriter:
    """Writes metrics to WORKDIR/metrics.jsonl, to TensorBoard and, when asked, to Weights & Biases.

    A run continued from `resume_step` keeps the rows up to that step and drops what the
    interrupted run wrote after it, so that the file ends up with the steps of an uninterrupted
    run; with None the run starts over and all rows are dropped. TensorBoard hides the dropped
    steps likewise. Of several processes only the first writes. Raises RunError, before anything is
    changed, if `wandb_project` is given without wandb installed or metrics.jsonl is damaged.

    Attributes:
      rows: what this process kept and wrote; all there is if `workdir` is None.
    """

    def __init__(
        self,
        workdir: str | os.PathLike | None,
        *,
        resume_step: int | None = None,
        wandb_project: str | None = None,
    ):
        self.rows: list[dict[str, float]] = []
        self._file = self._tensorboard = self._wandb = None
        if workdir is None or not hosts.first():
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        kept = []
        if resume_step is not None and (workdir / _FILE).exists():
            kept = [row for row in read_metrics(workdir) if row["step"] <= resume_step]
        if wandb_project is not None:
            self._wandb = _start_wandb(workdir, wandb_project)
        lines = "".join(_to_json(row) for row in kept)
        write_file(workdir / _FILE, lines.encode("utf-8"))
        self.rows += kept
        self._file = (workdir / _FILE).open("a", encoding="utf-8")

        from tensorboardX import SummaryWriter

        self._tensorboard = SummaryWriter(
            str(workdir / "tensorboard"),
            purge_step=0 if resume_step is None else resume_step + 1,
            # Its names go by seconds: a run continued at once would overwrite its own events.
            filename_suffix=f".{os.getpid()}.{time.monotonic_ns()}",
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics (scalars, also jax arrays) of `step`: on disk when it returns."""
        values = {name: float(value) for name, value in metrics.items()}
        for name in _RESERVED:
            if name in values:
                raise ValueError(f"a metric may not be called {name!r}: every row has that field")
        row = {"step": int(step), "wall_time": time.time(), **values}
        self.rows.append(row)
        if self._file is None:
            return
        self._file.write(_to_json(row))
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=int(step))

    def close(self) -> None:
        """Closes the files; a second call does nothing."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _start_wandb(workdir: Path, project: str):
    try:
        import wandb
    except ImportError as error:
        raise RunError("logging to Weights & Biases needs a package: pip install wandb") from error
    # The id kept in the workdir lets a continued run go on with its own curves.
    id_file = workdir / "wandb_run_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex, encoding="utf-8")
    run_id = id_file.read_text(encoding="utf-8")
    return wandb.init(project=project, dir=str(workdir), id=run_id, resume="allow")
