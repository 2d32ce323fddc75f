"""Which Python `launch/` installs for: `PYTHON=`, and what it says of one that will not do."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Stands in for an interpreter: `-m venv` copies it, and everything else is written to `calls`.
STAND_IN = """#!/bin/bash
case $* in
  *version_info*) echo {version} ;;
  *base_prefix*) echo {version} ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
esac
echo "{version} $*" >>"{calls}"
"""


@pytest.fixture
def launch(tmp_path):
    """Runs launch/local.sh of a copy of the repository with `PYTHON` set to a path or a word."""
    root = tmp_path / "copy"
    shutil.copytree(ROOT / "launch", root / "launch")
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root)

    def run(python):
        return subprocess.run(
            [root / "launch" / "local.sh", "experiments/sft.py"],
            env=os.environ | {"PYTHON": str(python)},
            capture_output=True,
            text=True,
        )

    return run


def stand_in(folder, version):
    path = folder / f"python{version}"
    path.write_text(STAND_IN.format(version=version, calls=folder / "calls"))
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("version", ["2.7", "3.9", "3.10"])
def test_a_python_that_is_too_old_is_refused(launch, tmp_path, version):
    done = launch(stand_in(tmp_path, version))
    assert done.returncode == 2
    expected = f"python{version} is Python {version}, and align_jax needs 3.11 or newer"
    assert expected in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("python", ["python-of-nowhere", ROOT / "LICENSE"])
def test_what_is_no_python_is_refused(launch, python):
    done = launch(python)
    assert done.returncode == 2
    assert f"PYTHON={python} is no Python that starts" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_python_named_makes_the_environment_and_another_makes_it_anew(launch, tmp_path):
    first, second = (stand_in(tmp_path, version) for version in ("3.11", "3.13"))
    calls = tmp_path / "calls"
    for python, version, anew in ((first, "3.11", False), (second, "3.13", True)):
        done = launch(python)
        assert done.returncode == 0, done.stderr
        assert ("which is made anew" in done.stderr) == anew
        made, *_ = [line for line in calls.read_text().splitlines() if "-m venv" in line]
        assert made.startswith(version)
        assert calls.read_text().splitlines()[-1].startswith(f"{version} -m align_jax train")
        calls.unlink()
    # The same again: nothing is installed.
    assert launch(second).returncode == 0
    assert "pip install" not in calls.read_text()
