"""Every experiment: its config at every scale makes sense, and `tiny` runs to its end."""

import json

import pytest
from ml_collections import ConfigDict

from align_jax import main
from align_jax.algorithms import ALGORITHMS, algorithm_of, settings_of
from align_jax.config import SCALES, load_config
from align_jax.data.sources import load_records
from tests.conftest import EXPERIMENTS

NAMES = sorted(file.stem for file in EXPERIMENTS.glob("*.py"))
# Those that no other test runs whole.
RUN_HERE = ("grpo_gsm8k", "hh_rlhf", "reinforce", "rloo", "stiennon2020_summarize")


def runs_of(config):
    """The settings of a run and of the runs it is made of."""
    yield config
    if config.algorithm == "stages":
        for stage in config.stages.values():
            yield from runs_of(stage)
    elif config.algorithm == "online_preferences":
        yield from (config.reward_model, config.policy)


def types_of(config):
    """`get_type` of every field, nested."""
    return {
        name: types_of(value) if isinstance(value, ConfigDict) else config.get_type(name)
        for name, value in config.items()
    }


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_lost_between_the_config_and_its_settings(name, scale):
    config = load_config(f"{EXPERIMENTS / name}.py:scale={scale}")
    again = settings_of(config).to_config_dict()
    assert again.to_dict() == config.to_dict()
    assert types_of(again) == types_of(config)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", NAMES)
def test_a_config_says_what_can_be_run(name, scale):
    config = settings_of(load_config(f"{EXPERIMENTS / name}.py:scale={scale}"))
    for run in runs_of(config):
        fields = set(run.to_dict())
        assert run.algorithm in ALGORITHMS and ("seed" in fields or run.algorithm == "stages")
        if "model" in fields and not run.model.startswith("stage:"):
            assert (run.model == "tiny") == (scale == "tiny")
            assert {"data", "mesh"} <= fields and (
                "optimizer" in fields or run.algorithm == "sample"
            )
            # Iterations say how long a policy trains: what it would not read is not there to set.
            by_steps = {"num_steps", "num_epochs", "log_every"} & fields
            assert len(by_steps) == (0 if run.algorithm in ("policy_gradient", "sample") else 3)
        if run.algorithm == "policy_gradient" and run.data.source.startswith("builtin:"):
            assert run.sampling.prompts <= len(load_records(run.data.source, kind="prompt"))
    for stage in config.stages.values() if config.algorithm == "stages" else [config]:
        for source, kind, _ in algorithm_of(stage).sources(stage):
            if source.startswith("builtin:"):
                assert load_records(source, kind=kind)


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_states_the_command(name):
    text = (EXPERIMENTS / f"{name}.py").read_text()
    assert f"launch/local.sh experiments/{name}.py" in text
    assert all(f"scale={scale}" in text for scale in ("tiny", "paper"))


@pytest.mark.parametrize("name", RUN_HERE)
def test_tiny_runs_to_its_end(name, tmp_path):
    workdir = tmp_path / "run"
    command = ["train", f"--config={EXPERIMENTS / name}.py:scale=tiny", f"--workdir={workdir}"]
    assert main.main(command) == 0
    assert (workdir / "finished.json").is_file()
    policy = workdir / "ppo" if (workdir / "ppo").is_dir() else workdir
    rows = [json.loads(line) for line in (policy / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["objective/kl"] == 0.0
    parts = [name for name in rows[0] if name.startswith("objective/scores/")]
    wanted = {"objective/scores/helpful", "objective/scores/harmless"}
    assert set(parts) == (wanted if name == "hh_rlhf" else set())
    if name == "hh_rlhf":
        # The round begins with what the stages before it made: their policy, and their pairs.
        online = workdir / "online/round_0"
        first = json.loads((online / "policy/metrics.jsonl").read_text().splitlines()[0])
        assert first["objective/kl"] != 0.0
        # Of other prompts than the stage before.
        asked = [
            [json.loads(line)["prompt_id"] for line in file.read_text().splitlines()]
            for file in (
                workdir / "ppo/samples/iteration_000000.jsonl",
                online / "policy/samples/iteration_000000.jsonl",
            )
        ]
        assert asked[0] != asked[1]
        learnt = (online / "all_comparisons.jsonl").read_text().splitlines()
        made = (online / "samples/comparisons.jsonl").read_text().splitlines()
        assert len(learnt) > len(made)
