"""Bad input must end in one message that names what is wrong: soon, and before anything compiles.

`refused` runs a call that must raise one of the errors that the command line prints; `fails` runs a
command line. Each row of the tables in this folder is one bad input, with what its message names.
"""

import contextlib
import json
import os
import signal

import jax
import pytest

from align_jax import main as command_line
from align_jax.errors import DataError, ModelError, RewardError, RunError
from align_jax.text import printable

SECONDS = 20  # more than any row takes; what hangs, fails

_compiled: list[str] = []


def _count_compilations(event: str, duration: float, **_) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(event)


jax.monitoring.register_event_duration_secs_listener(_count_compilations)


@pytest.fixture(autouse=True)
def nothing_compiles():
    """No row may compile anything."""
    before = len(_compiled)
    yield
    assert len(_compiled) == before, "something was compiled before the input was checked"


@contextlib.contextmanager
def time_limit(seconds=SECONDS):
    def expired(*_):
        raise AssertionError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_message(message, names):
    """One line that is not too long, naming everything it must."""
    assert message and "\n" not in message and len(message) < 1500, message[:2000]
    for name in names:
        assert name in message, message


@pytest.fixture
def refused():
    """Runs a call that must end in an error for the user; returns its message."""

    def check(call, *names):
        with time_limit(), pytest.raises((RunError, DataError, ModelError, RewardError)) as caught:
            call()
        message = str(caught.value)
        check_message(message, names)
        return message

    return check


@pytest.fixture
def fails(capsys):
    """Runs a command that must end in one message and status 2; returns the message."""

    def check(arguments, *names):
        capsys.readouterr()
        with time_limit():
            assert command_line.main(arguments) == 2
        error = capsys.readouterr().err
        [line] = [line for line in error.splitlines() if line.startswith("align-jax: error: ")]
        assert "Traceback" not in error
        assert line == printable(line)
        check_message(line, names)
        return line

    return check


@pytest.fixture
def unprivileged(tmp_path):
    """Runs the body as a user who may not read everything, where the tests run as root."""

    @contextlib.contextmanager
    def as_nobody():
        if os.geteuid() != 0:
            yield
            return
        for folder in (tmp_path, *tmp_path.parents):
            if folder.owner() == "root" and folder.is_relative_to("/tmp"):
                folder.chmod(folder.stat().st_mode | 0o055)
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    return as_nobody


@pytest.fixture
def write_lines(tmp_path):
    """Writes records as JSON lines; returns the path."""

    def write(records, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write
