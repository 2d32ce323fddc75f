"""A run from Python, finished or still running: `align_jax.open_run(workdir)`."""

import json
import os
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from align_jax.algorithms import OF_RUNS, settings_of
from align_jax.data.samples import Sample
from align_jax.errors import RunError
from align_jax.settings import Settings
from align_jax.text import nearest
from align_jax.training import pretrained
from align_jax.training.metrics import read_metrics
from align_jax.training.workdir import read_config


def open_run(workdir: str | os.PathLike) -> "Run":
    """The run in a directory; `RunError` if there is none, or if its config is refused."""
    return Run(workdir)


class Run:
    """What a run has left so far. Every call reads the directory again.

    Attributes:
      path: its directory.
      config: its settings, typed.
    """

    def __init__(self, workdir: str | os.PathLike):
        self.path = Path(workdir).expanduser()
        content = read_config(self.path)
        if "algorithm" not in content:
            raise RunError(f"{self.path} is not the workdir of a run: it holds a model.")
        self.config: Settings = settings_of(content)

    def __repr__(self) -> str:
        state = "running or stopped" if self.summary is None else "finished"
        return f"Run({str(self.path)!r}, {self.config.algorithm}, {state})"

    @property
    def summary(self) -> dict[str, Any] | None:
        """What was evaluated at the end (`finished.json`); None until then."""
        file = self.path / "finished.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def metrics(self) -> list[dict[str, float]]:
        """One dict a logged step: `step`, `wall_time` and metrics by name; empty before the first.

        Raises:
          RunError: the run is made of runs, which have their own.
        """
        if (self.path / "metrics.jsonl").exists():
            return read_metrics(self.path)
        if self.config.algorithm in OF_RUNS:
            parts = sorted(file.parent for file in self.path.glob("**/metrics.jsonl"))
            names = ", ".join(str(part.relative_to(self.path)) for part in parts)
            raise RunError(
                f"{self.path} is made of runs, which have metrics of their own: open one of "
                f"{names or 'them (none has begun)'}."
            )
        return []

    def load_model(self, *, mesh: Mesh | None = None) -> Any:
        """The trained model: a `Transformer`, its adapters merged, or a `rewards.RewardModel`.

        A run made of runs has the model of its result.

        Args:
          mesh: where it is to lie; None is the run's own mesh.

        Raises:
          RunError: no checkpoint yet, or a run that trains no model.
          ModelError: a reward model's run that has not finished.
        """
        found = pretrained.run_at(self.path)
        assert found is not None  # its config has been read
        if found.algorithm == "sample":
            raise RunError(
                f"{found.folder} trained no model; it sampled from {found.config.model}."
            )
        mesh = mesh or pretrained.open_mesh(found.config)
        if found.algorithm == "reward_model":
            from align_jax.rewards.model import RewardModel

            return RewardModel.load(found.folder, mesh=mesh)
        return pretrained.load_pretrained(found.config, str(found.folder), mesh)

    def load_tokenizer(self) -> Any:
        """The tokenizer of the model that was trained."""
        return pretrained.load_pretrained_tokenizer(str(self.path))

    def samples(self, name: str | None = None) -> list[Sample]:
        """Lines of `samples/NAME.jsonl`, or of all such files in the order of their names.

        Raises:
          RunError: no file of that name (the nearest is named), or no samples at all.
        """
        files = {file.stem: file for file in sorted((self.path / "samples").glob("*.jsonl"))}
        if not files:
            raise RunError(f"{self.path} has no samples (yet): samples/ holds none.")
        if name is not None and name not in files:
            raise RunError(f"{self.path} has no samples {name!r}.{nearest(name, files)}")
        chosen = files.values() if name is None else [files[name]]
        return [
            json.loads(line)
            for file in chosen
            for line in file.read_text(encoding="utf-8").split("\n")
            if line
        ]
