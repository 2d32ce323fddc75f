"""Policy-gradient experiments from the config on: what is refused, reported, saved."""

import json

import numpy as np
import pytest

from align_jax.algorithms import policy_gradient
from align_jax.rewards.base import RewardError, checked_scores
from align_jax.rewards.configured import make_reward
from align_jax.rewards.rules import vader_sentiment
from align_jax.training import online
from align_jax.training.checkpoint import Checkpointer
from align_jax.training.errors import RunError
from align_jax.training.metrics import read_metrics
from align_jax.training.workdir import Workdir


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"loss": "pppo"}, "config.loss is 'pppo'; expected one of ppo"),
        ({"kl.placement": "both"}, "config.kl.placement is 'both'"),
        ({"sampling.prompts": 9, "minibatches": 2}, "config.sampling.prompts = 9 is no multiple"),
        ({"sampling.temperature": 0.0}, "config.sampling.temperature is 0"),
        ({"critic": "none"}, "needs a critic"),
        (
            {"advantage": "rloo", "critic": "none"},
            "config.sampling.samples is 1; expected at least",
        ),
        ({"advantage": "moving_baseline"}, "set config.critic=none"),
        (
            {"evaluation.base_samples": 3},
            "config.evaluation.base_samples is 3; expected at least 16",
        ),
        ({"data.max_length": 8}, "config.data.max_length = 8 leaves no room for a prompt"),
        ({"init": "/nowhere"}, "config.init: there is no model at /nowhere"),
        ({"critic_init": "/nowhere"}, "config.critic_init: there is no model at /nowhere"),
        ({"reward.kind": "joy"}, "config.reward.*joy"),
        ({"evaluation.reward": "joy"}, "config.evaluation.reward.*joy"),
        ({"sampling.prompts": 1000}, "config.sampling.prompts = 1000 is more than there are"),
    ],
)
def test_a_wrong_config_is_refused_before_anything_is_sampled(
    tiny_config, tmp_path, monkeypatch, overrides, message
):
    monkeypatch.setattr(online, "generate", pytest.fail)
    config = tiny_config("ppo", overrides)
    with pytest.raises((RunError, RewardError), match=message):
        policy_gradient.run(config, Workdir(tmp_path / "run", config))


def test_a_whole_run_reports_and_is_not_run_again(tiny_config, tmp_path, monkeypatch):
    config = tiny_config("ppo", {"num_iterations": 1, "epochs": 1})
    workdir = Workdir(tmp_path / "run", config)
    summary = policy_gradient.run(config, workdir)
    assert {"base", "best_of_4", "trained", "train"} <= summary.keys()
    assert summary["trained"]["kl"] != 0.0
    assert (tmp_path / "run/report/index.html").is_file()
    monkeypatch.setattr(online, "generate", pytest.fail)
    again = policy_gradient.run(config, workdir)
    assert again["trained"] == summary["trained"]
    assert policy_gradient.evaluate(config, workdir)["trained"] == summary["trained"]


def test_held_out_samples_may_be_judged_by_another_reward(tiny_config, tmp_path):
    settings = {"num_iterations": 1, "epochs": 1, "evaluation.reward": "vader"}
    config = tiny_config("ppo", settings)
    workdir = Workdir(tmp_path / "run", config)
    summary = policy_gradient.run(config, workdir)
    for name in ("base", "trained"):
        lines = (tmp_path / f"run/samples/sample_{name}.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines]
        texts = [sample["text"] for sample in samples]
        np.testing.assert_allclose(
            [sample["score"] for sample in samples], vader_sentiment(texts), atol=1e-6
        )
        lengths = checked_scores(make_reward("length"), [{}] * len(texts), texts)
        trained_on = [sample["training_score"] for sample in samples]
        np.testing.assert_allclose(trained_on, lengths, atol=1e-6)
        assert summary["training_reward"][name] == pytest.approx(lengths.mean())


def test_adapters_alone_are_trained_and_the_base_is_the_reference(tiny_config, tmp_path):
    config = tiny_config("ppo", {"num_iterations": 2, "epochs": 1, "lora.rank": 4})
    workdir = Workdir(tmp_path / "run", config)
    policy_gradient.run(config, workdir)
    rows = read_metrics(tmp_path / "run")
    assert rows[0]["objective/kl"] == 0.0 and rows[1]["objective/kl"] != 0.0
    checkpointer = Checkpointer(tmp_path / "run/checkpoints")
    saved = checkpointer._manager.item_metadata(checkpointer.latest_step())
    checkpointer.close()
    assert all("adapters" in name for name in saved["model"])
