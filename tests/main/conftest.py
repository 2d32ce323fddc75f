"""What the tests of the command line share: failing with a message, and what must not happen."""

import pytest

from align_jax import main as command_line
from align_jax.algorithms import preference
from align_jax.training import offline, pretrained


@pytest.fixture
def fails(capsys):
    """Runs a command that must end in one message and exit status 2; returns the message."""

    def run(arguments):
        capsys.readouterr()
        assert command_line.main(arguments) == 2
        captured = capsys.readouterr()
        message = captured.err.strip().splitlines()[-1]
        assert message.startswith("align-jax: error: ")
        assert captured.err.count("align-jax: error") == 1 and "Traceback" not in captured.err
        return message

    return run


@pytest.fixture
def no_model(monkeypatch):
    """Nothing that costs anything may happen: no model is loaded."""
    monkeypatch.setattr(
        pretrained, "load_model", lambda *_, **__: pytest.fail("a model was loaded")
    )


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(offline, "fit_offline", lambda *_, **__: pytest.fail("training began"))
    monkeypatch.setattr(
        preference, "reference_log_probs", lambda *_: pytest.fail("the reference was computed")
    )
