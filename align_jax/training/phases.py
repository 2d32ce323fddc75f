"""Phases of a run that end in a file: a phase whose file is there is not run again."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from align_jax.distributed import hosts
from align_jax.errors import RunError
from align_jax.files import write_file, write_json

Record = dict[str, Any]
Chunk = Callable[[], list[Record]]


class Phases:
    """Runs a phase once: its records go to `samples/NAME.jsonl`, its seconds to `seconds.json`.

    Without a directory nothing is kept, and every phase is run. The first host's files say what is
    done; the others are told the records.
    """

    def __init__(self, directory: Path | None):
        self._directory = directory and directory / "samples"
        self.seconds: dict[str, float] = {}
        if self._directory is not None and self._seconds_file.exists():
            self.seconds = json.loads(self._seconds_file.read_text(encoding="utf-8"))
        self.seconds = hosts.broadcast_json(self.seconds)

    @property
    def _seconds_file(self) -> Path:
        return self._directory / "seconds.json"

    def _file(self, name: str) -> Path:
        return self._directory / f"{name}.jsonl"

    def done(self, name: str) -> bool:
        return self._directory is not None and _exists(self._file(name))

    def run(self, name: str, phase: Callable[[], list[Record]]) -> list[Record]:
        if self._directory is None:
            started = time.monotonic()
            records = phase()
            self.seconds[name] = time.monotonic() - started
            return records
        if not self.done(name):
            self._write(self._file(name), phase, name)
        return self.read(name)

    def run_in_chunks(
        self,
        name: str,
        prepare: Callable[[], tuple[Sequence[Chunk], Callable[[list[Record]], list[Record]]]],
    ) -> list[Record]:
        """`run` of a phase that is made of chunks: a kill loses the one it comes in.

        Args:
          prepare: returns the chunks, each of which makes its part of the records, and what makes
            the records of the phase of all of theirs. A chunk whose file is there is not run again.
        """
        folder = self._directory / f".{name}"
        if not self.done(name):
            chunks, finish = prepare()
            records: list[Record] = []
            for number, chunk in enumerate(chunks):
                file = folder / f"{number:05d}.jsonl"
                if not _exists(file):
                    self._write(file, chunk, name)
                records += _read(file)
            self._write(self._file(name), lambda: finish(records), name)
        hosts.on_first_host(lambda: shutil.rmtree(folder, ignore_errors=True))
        return self.read(name)

    def _write(self, file: Path, make: Callable[[], list[Record]], name: str) -> None:
        """Writes the records that `make` returns, and first how long the phase has taken so far."""
        started = time.monotonic()
        records = make()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

        def write() -> None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._seconds_file, self.seconds)
            lines = "".join(json.dumps(record) + "\n" for record in records)
            write_file(file, lines.encode("utf-8"))

        hosts.on_first_host(write)

    def read(self, name: str) -> list[Record]:
        file = self._file(name)
        if not self.done(name):
            raise RunError(f"{file} is not there: the run has not finished its phase {name!r}.")
        return _read(file)


def _exists(file: Path) -> bool:
    return hosts.on_first_host(file.exists)


def _read(file: Path) -> list[Record]:
    def read() -> list[Record]:
        lines = file.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line]

    return hosts.on_first_host(read)
