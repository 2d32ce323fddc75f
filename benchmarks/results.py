"""What benchmarks share: runs of experiments, and their sections of docs/results.md."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from align_jax.files import write_file

ROOT = Path(__file__).parents[1]


def train(config: Path, workdir: Path, overrides: Sequence[str]) -> None:
    """Runs an experiment in a process of its own; what is finished is not run again."""
    command = [sys.executable, "-m", "align_jax", "train"]
    command += [f"--config={config}", f"--workdir={workdir}", *overrides]
    subprocess.run(command, check=True, cwd=ROOT)


def write_section(name: str, text: str) -> None:
    """Puts `text` between the marks of `name`, at the end of the document if it has none yet."""
    file = ROOT / "docs" / "results.md"
    document = file.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if begin not in document:
        document += f"\n{begin}\n{end}\n"
    before, after = document.split(begin)[0], document.split(end)[1]
    write_file(file, f"{before}{begin}\n{text.strip()}\n{end}{after}".encode())
