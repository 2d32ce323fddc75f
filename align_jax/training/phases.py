"""Phases of a run that end in a file: a phase whose file is there is not run again."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align_jax.errors import RunError
from align_jax.files import write_file, write_json

Record = dict[str, Any]


class Phases:
    """Runs a phase once: its records go to `samples/NAME.jsonl`, its seconds to `seconds.json`.

    Without a directory nothing is kept, and every phase is run.
    """

    def __init__(self, directory: Path | None):
        self._directory = directory and directory / "samples"
        self.seconds: dict[str, float] = {}
        if self._directory is not None and self._seconds_file.exists():
            self.seconds = json.loads(self._seconds_file.read_text(encoding="utf-8"))

    @property
    def _seconds_file(self) -> Path:
        return self._directory / "seconds.json"

    def _file(self, name: str) -> Path:
        return self._directory / f"{name}.jsonl"

    def done(self, name: str) -> bool:
        return self._directory is not None and self._file(name).exists()

    def run(self, name: str, phase: Callable[[], list[Record]]) -> list[Record]:
        if not self.done(name):
            started = time.monotonic()
            records = phase()
            self.seconds[name] = time.monotonic() - started
            if self._directory is None:
                return records
            self._directory.mkdir(exist_ok=True)
            lines = "".join(json.dumps(record) + "\n" for record in records)
            write_json(self._seconds_file, self.seconds)
            write_file(self._file(name), lines.encode("utf-8"))
        return self.read(name)

    def read(self, name: str) -> list[Record]:
        file = self._file(name)
        if not self.done(name):
            raise RunError(f"{file} is not there: the run has not finished its phase {name!r}.")
        lines = file.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
