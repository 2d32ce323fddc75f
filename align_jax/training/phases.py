"""Phases of a run that end in a file: a phase whose file is there is not run again."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align_jax.distributed import hosts
from align_jax.errors import RunError
from align_jax.files import write_file, write_json

Record = dict[str, Any]


class Phases:
    """Runs a phase once: its records go to `samples/NAME.jsonl`, its seconds to `seconds.json`.

    The first host's files say what is done; the others are told the records.
    """

    def __init__(self, directory: Path):
        self._directory = directory / "samples"
        self._seconds_file = self._directory / "seconds.json"
        self.seconds: dict[str, float] = hosts.on_first_host(self._read_seconds)

    def _read_seconds(self) -> dict[str, float]:
        if not self._seconds_file.exists():
            return {}
        return json.loads(self._seconds_file.read_text(encoding="utf-8"))

    def _file(self, name: str) -> Path:
        return self._directory / f"{name}.jsonl"

    def done(self, name: str) -> bool:
        return hosts.on_first_host(self._file(name).exists)

    def run(self, name: str, phase: Callable[[], list[Record]]) -> list[Record]:
        """The records of `phase`, which every host calls unless it was done before."""
        if not self.done(name):
            started = time.monotonic()
            records = phase()
            self.seconds[name] = time.monotonic() - started
            hosts.on_first_host(lambda: self._write(name, records))
        return self.read(name)

    def _write(self, name: str, records: list[Record]) -> None:
        self._directory.mkdir(exist_ok=True)
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_json(self._seconds_file, self.seconds)
        write_file(self._file(name), lines.encode("utf-8"))

    def read(self, name: str) -> list[Record]:
        return hosts.on_first_host(lambda: self._read(name))

    def _read(self, name: str) -> list[Record]:
        file = self._file(name)
        if not file.exists():
            raise RunError(f"{file} is not there: the run has not finished its phase {name!r}.")
        lines = file.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
