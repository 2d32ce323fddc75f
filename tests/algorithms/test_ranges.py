"""Numbers that no setting may have, in every algorithm: refused before anything is read."""

import dataclasses
import math

import pytest

from align_jax.algorithms import ALGORITHMS, algorithm_of, sft
from align_jax.errors import RunError
from align_jax.training import offline
from align_jax.training.workdir import Workdir

# `stages` has no number of its own.
CONFIGS = {
    name: algorithm_of({"algorithm": name}).Config().to_dict()
    for name in ALGORITHMS
    if name != "stages"
}

# Any number will do, -1 means something, or (adapters) it is refused where they are made.
MAY_BE_NEGATIVE = ("missing_eos_score", "loss_options.margin", "mesh.", "lora.")


def numbers(values, prefix=""):
    """Dotted names of the numbers in a nested mapping; None stands for the number it may be."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{name}.")
        elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            yield prefix + name


def changed(values, path, value):
    name, _, rest = path.partition(".")
    return values | {name: changed(values[name], rest, value) if rest else value}


def refused(algorithm, path, value):
    """The message that refuses a config for one changed field; it must name the field."""
    with pytest.raises(RunError) as caught:
        algorithm_of({"algorithm": algorithm}).Config.from_dict(
            changed(CONFIGS[algorithm], path, value)
        )
    message = str(caught.value)
    assert path.rsplit(".", 1)[-1] in message
    return message


@pytest.mark.parametrize("algorithm", CONFIGS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_number_is_finite(algorithm, value):
    for path in numbers(CONFIGS[algorithm]):
        refused(algorithm, path, value)


@pytest.mark.parametrize("algorithm", CONFIGS)
def test_no_number_is_negative_but_those_that_may_be(algorithm):
    for path in numbers(CONFIGS[algorithm]):
        if not any(name in path for name in MAY_BE_NEGATIVE):
            refused(algorithm, path, -1)
            if isinstance(_value(CONFIGS[algorithm], path), float):
                refused(algorithm, path, -1e-6)


def _value(values, path):
    for name in path.split("."):
        values = values[name]
    return values


TRAINED = [name for name in CONFIGS if "optimizer" in CONFIGS[name]]


@pytest.mark.parametrize("algorithm", TRAINED)
@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("optimizer.learning_rate", -1e-6, "at least 0"),
        ("optimizer.b1", 1.0, "less than 1"),
        ("optimizer.b1", -0.1, "at least 0"),
        ("optimizer.b2", 1.0, "less than 1"),
        ("optimizer.eps", 0.0, "more than 0"),
        ("optimizer.warmup_steps", -1, "at least 0"),
        ("optimizer.max_grad_norm", -1.0, "at least 0"),
        ("sampling.temperature", math.inf, "a finite number"),
        ("clip_range", 0.0, "more than 0"),
        ("value_clip_range", 0.0, "more than 0"),
        ("discount", 1.01, "from 0 to 1"),
        ("lambda_", 1.01, "from 0 to 1"),
        ("baseline_decay", 1.01, "from 0 to 1"),
        ("kl.coefficient", -0.1, "at least 0"),
        ("kl.target", -0.1, "at least 0"),
        # What would hang, or take all memory, before the first step.
        ("num_steps", 10**12, "at most 10000000"),
        ("num_epochs", 1e9, "at most 100000"),
        ("num_iterations", 10**12, "at most 1000000"),
        ("epochs", 10**9, "at most 1000"),
        ("dynamic_sampling", 10**9, "at most 1000"),
        ("ensemble", 1_000_000, "at most 1000"),
        ("evaluation.base_samples", 10_000_000, "at most 65536"),
        ("evaluation.trained_samples", 10_000_000, "at most 65536"),
    ],
)
def test_a_number_out_of_its_range_is_refused_with_the_range(algorithm, path, value, expected):
    if path in numbers(CONFIGS[algorithm]):
        assert f"expected {expected}" in refused(algorithm, path, value)


@pytest.mark.parametrize("path", ["rounds", "samples"])
def test_rounds_without_end_are_refused(path):
    assert "expected at most 1000." in refused("online_preferences", path, 10**9)


def test_a_warm_up_longer_than_the_run_stops_before_the_first_step(
    tiny_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(offline, "fit_offline", lambda *_, **__: pytest.fail("training began"))
    config = tiny_config("sft", {"num_steps": 8, "optimizer.warmup_steps": 9})
    with pytest.raises(RunError, match="config.optimizer.warmup_steps = 9 .* the run, 8:"):
        sft.run(config, Workdir(tmp_path / "run", config))


def test_a_warm_up_longer_than_the_updates_of_all_iterations_is_refused(tiny_config):
    settings = {"num_iterations": 2, "epochs": 2, "minibatches": 2, "sampling.prompts": 8}
    tiny_config("ppo", settings | {"optimizer.warmup_steps": 8})
    with pytest.raises(RunError, match="config.optimizer.warmup_steps = 9 .* the run, 8:"):
        tiny_config("ppo", settings | {"optimizer.warmup_steps": 9})


@pytest.mark.parametrize("algorithm", TRAINED)
def test_the_defaults_are_settings_that_go_together(algorithm):
    config = algorithm_of({"algorithm": algorithm}).Config()
    assert dataclasses.replace(config) == config
