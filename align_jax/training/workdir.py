"""A run's directory: whose it is, whether it is finished, and files that are whole or not there.

A run made of runs can be moved or copied as a whole: where the config of a part names what lies in
the same experiment, `config.json` has it relative to the part's directory, as "workdir:../sft".
Configs in memory have absolute paths; only `Workdir` and `read_config` know of the other form.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from align_jax.data.samples import PREFIX as SAMPLES
from align_jax.distributed import hosts
from align_jax.errors import DataError, RewardError, RunError
from align_jax.files import irregular, load_json, plain_values, refusal, write_json
from align_jax.settings import Settings
from align_jax.text import brief, one_line

_INSIDE = "workdir:"
_LOCK = "run.lock"
_BEAT = 5.0  # seconds between two heartbeats of a run
_SILENCE = 60.0  # seconds without a heartbeat after which a run counts as gone


class Result(NamedTuple):
    """What `train` of an algorithm returns.

    Attributes:
      model: the trained model.
      metrics: one dict a logged step: `step`, `wall_time` and metrics by name.
      summary: what was evaluated, as in `finished.json`.
      workdir: the run's directory, or None.
    """

    model: Any
    metrics: list[dict[str, float]]
    summary: dict[str, Any]
    workdir: Path | None


class Workdir:
    """The directory of one experiment, or of a run that is a part of one.

    Args:
      path: made if missing.
      config: the experiment; kept in `config.json`.
      root: the directory of the experiment that this is a part of; see `part`.

    Raises:
      RunError: the directory holds another experiment, or something that is no run at all.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        config: Settings,
        *,
        root: str | os.PathLike | None = None,
    ):
        self.path = _folder(path)
        self._root = _absolute(path if root is None else root)
        wanted = json.loads(json.dumps(config.to_dict(), default=plain_values))
        hosts.on_first_host(lambda: self._open(wanted, type(config)))

    def _open(self, wanted: dict[str, Any], settings: type[Settings]) -> None:
        found = "is a file" if os.path.isfile(self.path) else irregular(self.path)
        if found and not os.path.isdir(self.path):
            raise RunError(f"--workdir={self.path} {found}; give a directory.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._claim(wanted, settings)
        except OSError as error:
            reason = refusal(error)
            more = f", that is, {reason}" if reason else ""
            raise RunError(
                f"--workdir={self.path} cannot be used: {error.strerror}{more}."
            ) from error

    @classmethod
    def of(
        cls, workdir: "Workdir | str | os.PathLike | None", config: Settings
    ) -> "Workdir | None":
        """The directory that a caller names, if any, claimed for `config`."""
        if workdir is None or isinstance(workdir, cls):
            return workdir
        return cls(workdir, config)

    def part(self, name: str, config: Settings) -> "Workdir":
        """The directory NAME of a run that this one is made of; they are moved together."""
        return Workdir(self.directory(name), config, root=self._root)

    def directory(self, name: str) -> Path:
        """The absolute path of NAME in this directory, for the config of a part."""
        return _absolute(self.path) / name

    def _claim(self, wanted: dict[str, Any], settings: type[Settings]) -> None:
        file = self.path / "config.json"
        started = _has_begun(self.path)
        found = read_config(self.path) if file.exists() else None
        stored = _relative(wanted, _absolute(self.path), self._root)
        wanted = _resolved(stored, _absolute(self.path))
        different = _differences(_with_new_fields(found or {}, settings), wanted)
        if found is not None:
            # A stage that is still to begin may be corrected when those before it are paid for.
            order = found.get("order", [])
            if not isinstance(order, list) or not all(isinstance(name, str) for name in order):
                raise RunError(f"{file} is damaged: 'order' is {brief(order)}, no list of names.")
            waiting = [name for name in order if not _has_begun(self.path / name)]
            held = [d for d in different if d.removeprefix("config.").split(".")[0] not in waiting]
            if held and (started or "algorithm" not in found):
                raise RunError(
                    f"--workdir={self.path} belongs to another experiment: "
                    + "; ".join(held[:4])
                    + (f"; and {len(held) - 4} more" if len(held) > 4 else "")
                    + ". Give another --workdir, or the config it was started with to continue it."
                )
        elif started:
            raise RunError(
                f"--workdir={self.path} is not empty and holds no run (no config.json). Give an "
                "empty or a new directory."
            )
        if different:
            write_json(file, stored)

    def finished(self) -> dict[str, Any] | None:
        """What `finish` wrote, or None; what the first host finds is told to the others.

        Raises:
          RunError: the file is damaged.
        """
        return hosts.on_first_host(self._read_finished)

    def _read_finished(self) -> dict[str, Any] | None:
        try:
            return _load_object(self.path / "finished.json")
        except FileNotFoundError:
            return None
        except RunError as error:
            raise RunError(
                f"{error} Copy it there again; or remove it, and the same command goes on from "
                "the last checkpoint and writes it anew."
            ) from error

    def finish(self, summary: dict[str, Any]) -> None:
        """Marks the run as done, so that it is never run over unasked."""
        hosts.on_first_host(lambda: write_json(self.path / "finished.json", summary))


@contextlib.contextmanager
def only_run_in(folder: str | os.PathLike) -> Iterator[None]:
    """Holds the directory of a run, so that a second run in it is refused.

    The first host writes `run.lock`, with host, process and start, and touches it every few
    seconds; it is removed at the end. The lock of a process that is dead on this machine is taken
    over at once, another one after 60 seconds without a heartbeat. This process may hold a
    directory several times over. Reading a run (evaluating, exporting, sampling) needs no lock.

    Raises:
      RunError: another run holds the directory; names its host and process. On all hosts.
    """
    file = _absolute(folder) / _LOCK
    lock = _Lock(file)
    hosts.on_first_host(lock.acquire)
    try:
        yield
    finally:
        if hosts.first():
            lock.release()


class _Lock:
    """A lock file with a heartbeat; see `only_run_in`."""

    _held: set[Path] = set()  # by this process

    def __init__(self, file: Path):
        self._file = file
        self._ours = False
        self._over = threading.Event()

    def acquire(self) -> None:
        if self._file in self._held:
            return
        content = {"host": socket.gethostname(), "pid": os.getpid()}
        content |= {"process_start": _process_start(os.getpid()), "started": time.time()}
        self._content = json.dumps(content, indent=2) + "\n"
        try:
            while not self._create():
                self._take_over()
        except OSError as error:
            raise RunError(f"{self._file} cannot be written: {error.strerror}.") from error
        self._held.add(self._file)
        self._ours = True
        threading.Thread(target=self._beat, name="align_jax run.lock", daemon=True).start()

    def release(self) -> None:
        if not self._ours:
            return
        self._over.set()
        self._held.discard(self._file)
        if _text(self._file) == self._content:
            self._file.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            with self._file.open("x", encoding="utf-8") as lock:
                lock.write(self._content)
        except FileExistsError:
            return False
        return True

    def _take_over(self) -> None:
        """Removes the lock of a run that is gone; `RunError` if it is not."""
        text = _text(self._file)
        if text is None:
            return
        try:
            holder = json.loads(text)
            host, pid, start = holder["host"], int(holder["pid"]), holder["process_start"]
        except (ValueError, KeyError, TypeError):  # killed while it wrote
            host, pid, start = "an unknown host", 0, None
        here = host == socket.gethostname()
        dead = here and _process_start(pid) != start
        silent = self._silence()
        if not dead and (here and start is not None or silent < _SILENCE):
            raise RunError(
                f"another run is at work in {self._file.parent}: process {pid} on {host}, last "
                f"heard of {silent:.0f} seconds ago. Wait for it or stop it, or give another "
                f"--workdir. (If it is gone, {self._file.name} is taken over after "
                f"{_SILENCE:.0f} seconds without a heartbeat.)"
            )
        # Whoever renames the file has it alone: another run may be taking it over just now.
        mine = self._file.with_name(f".{_LOCK}.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            os.replace(self._file, mine)
            if _text(mine) != text:
                os.replace(mine, self._file)
                return
            mine.unlink()

    def _silence(self) -> float:
        """Seconds since the last heartbeat, by the clock of the disk: hosts' clocks may differ."""
        probe = self._file.with_name(f".{_LOCK}.{os.getpid()}.{threading.get_ident()}")
        try:
            probe.touch()
            return probe.stat().st_mtime - self._file.stat().st_mtime
        except FileNotFoundError:
            return 0.0
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._over.wait(_BEAT):
            if _text(self._file) == self._content:
                with contextlib.suppress(OSError):
                    os.utime(self._file)
                continue
            if self._over.is_set() or not self._file.parent.exists():
                return
            if not self._file.exists():  # removed by hand
                with contextlib.suppress(OSError):
                    self._create()
                continue
            print(
                f"\nalign-jax: error: another run has taken over {self._file.parent}, since this "
                "one gave no sign of life for a minute. This one ends, the other goes on.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)


def _process_start(pid: int) -> str | None:
    """When a process of this machine began, in clock ticks since boot; None if there is none.

    Numbers of processes are used again, their starts are not. "" where there is no /proc.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        return stat.rpartition(")")[2].split()[19]
    except OSError:
        if Path("/proc/self/stat").exists() or pid <= 0:
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return None


def _has_begun(folder: Path) -> bool:
    """Whether a run's directory holds more than its config.

    A run refused at start-up leaves only config.json, and its lock while it lasts; one killed while
    writing them leaves a temporary file. Neither has begun.
    """
    return folder.exists() and any(
        not one.name.startswith(("config.json", ".config.json.", _LOCK, f".{_LOCK}."))
        for one in folder.iterdir()
    )


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """The config of the run in a directory; `RunError` if there is none or it is damaged."""
    try:
        return _resolved(_load_object(_folder(path) / "config.json"), _absolute(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunError(f"{path} is not the workdir of a run: it has no config.json.") from error


def _folder(path: str | os.PathLike) -> Path:
    name = os.fspath(path)
    if not name:
        raise RunError("--workdir is empty; expected a directory.")
    if "\0" in name:
        raise RunError(f"--workdir={name!r} has a NUL, which no path can have.")
    return Path(name)


def _load_object(file: Path) -> dict[str, Any]:
    try:
        content = load_json(file)
    except ValueError as error:
        raise RunError(f"{file} is damaged: {one_line(str(error))}.") from error
    if not isinstance(content, dict):
        raise RunError(f"{file} is damaged: it holds a {type(content).__name__} and no object.")
    return content


def _with_new_fields(found: dict[str, Any], settings: type[Settings]) -> dict[str, Any]:
    """A stored config, with the defaults of fields that did not exist yet when it was stored."""
    if not (found and issubclass(settings, Settings)):
        return found
    try:
        complete = settings.from_dict(found).to_dict()
    except (RunError, RewardError, DataError):
        return found  # another algorithm's, or refused today: the differences are shown
    return json.loads(json.dumps(complete, default=plain_values))


def _absolute(path: str | os.PathLike) -> Path:
    # Not `resolve`: a part that is a link to another disk still lies in its experiment.
    return Path(os.path.abspath(path))


def _relative(value: Any, folder: Path, root: Path) -> Any:
    """A config with its absolute paths in `root` as seen from `folder`."""
    if isinstance(value, dict):
        return {name: _relative(one, folder, root) for name, one in value.items()}
    if isinstance(value, list):
        return [_relative(one, folder, root) for one in value]
    if isinstance(value, str):
        kind, path = _split(value)
        if os.path.isabs(path) and Path(path).is_relative_to(root):
            return kind + _INSIDE + Path(os.path.relpath(path, folder)).as_posix()
    return value


def _resolved(value: Any, folder: Path) -> Any:
    """The inverse of `_relative`, wherever the experiment lies now."""
    if isinstance(value, dict):
        return {name: _resolved(one, folder) for name, one in value.items()}
    if isinstance(value, list):
        return [_resolved(one, folder) for one in value]
    if isinstance(value, str):
        kind, path = _split(value)
        if path.startswith(_INSIDE):
            return kind + str(_absolute(folder / path.removeprefix(_INSIDE)))
    return value


def _split(value: str) -> tuple[str, str]:
    """A source `samples:PATH` as "samples:" and the path; of any other text the first is empty."""
    path = value.removeprefix(SAMPLES)
    return value[: len(value) - len(path)], path


def _differences(found: dict, wanted: dict, prefix: str = "config.") -> list[str]:
    out = []
    for key in sorted(found.keys() | wanted.keys()):
        a, b = found.get(key, "(absent)"), wanted.get(key, "(absent)")
        if isinstance(a, dict) and isinstance(b, dict):
            out += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key} is {a!r} there and {b!r} here")
    return out
