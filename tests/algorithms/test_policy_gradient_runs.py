"""Policy-gradient experiments from the config on: what is refused, reported, saved."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from align_jax.algorithms import policy_gradient, sft
from align_jax.algorithms.policy_gradient import comparison
from align_jax.errors import DataError, RewardError, RunError
from align_jax.generation import rollout as rollouts
from align_jax.rewards.base import checked_scores
from align_jax.rewards.configured import make_reward
from align_jax.rewards.rules import vader_sentiment
from align_jax.training import pretrained
from align_jax.training.checkpoint import Checkpointer
from align_jax.training.metrics import read_metrics
from align_jax.training.workdir import Workdir
from align_jax.trees import flatten
from tests.algorithms.policy_runs import digits, log_probs_by_hand, samples_of


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
        ({"loss": "dpo", "sampling.samples": 2}, "config.loss=dpo has none; set config.critic=n"),
        (
            {"loss": "dpo", "sampling.samples": 2, "critic": "none", "kl.target": 6.0},
            "config.kl.target = 6.0 needs",
        ),
        (
            {"loss": "reinforce", "advantage": "moving_baseline", "critic": "none", "epochs": 2},
            "config.loss=reinforce does not correct",
        ),
        (
            {"advantage": "moving_baseline", "critic": "none", "sampling.prompts": 1},
            "needs two completions in the first iteration",
        ),
        ({"checkpoint_every": 0}, "config.checkpoint_every is 0"),
        ({"data.accumulation": 0}, "config.data.accumulation is 0"),
        ({"optimizer.schedule": "steep"}, "steep"),
        ({"data.max_length": 100_000}, "more than the model's context of"),
        ({"ptx.source": "/nowhere.jsonl"}, "nowhere.jsonl"),
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
    monkeypatch.setattr(rollouts, "generate", pytest.fail)
    with pytest.raises((RunError, RewardError, DataError), match=message):
        config = tiny_config("ppo", overrides)
        policy_gradient.run(config, Workdir(tmp_path / "run", config))


def test_a_reward_relative_to_its_batch_is_no_measure_of_held_out_samples(tiny_config, tmp_path):
    parts = {"length": {"weight": 1.0, "reward": {"kind": "length"}}}
    reward = {"kind": "mixture", "standardise": True, "components": parts}
    config = dataclasses.replace(tiny_config("ppo", {}), reward=reward)
    with pytest.raises(RunError, match="config.reward is standardised over the completions"):
        policy_gradient.run(config, Workdir(tmp_path / "run", config))


def test_adapters_on_another_start_than_the_reference(tiny_config, tmp_path):
    """What was trained is read again on what it was trained on."""
    tuned = Workdir(tmp_path / "sft", config := tiny_config("sft", {"num_steps": 4}))
    sft.run(config, tuned)
    overrides = {"num_iterations": 1, "epochs": 1, "lora.rank": 2, "init": str(tuned.path)}
    config = tiny_config("ppo", overrides | {"optimizer.learning_rate": 0.0})
    workdir = Workdir(tmp_path / "run", config)
    summary = policy_gradient.run(config, workdir)
    mesh = pretrained.open_mesh(config)
    result, start = (
        flatten(pretrained.load_pretrained(config, path, mesh))
        for path in (workdir.path, tuned.path)
    )
    for name in start:
        np.testing.assert_allclose(result[name], start[name], atol=1e-6, err_msg=name)
    assert summary["trained"]["kl"] != 0.0


def test_a_whole_run_reports_and_is_not_run_again(tiny_config, tmp_path, monkeypatch):
    config = tiny_config("ppo", {"num_iterations": 1, "epochs": 1})
    workdir = Workdir(tmp_path / "run", config)
    summary = policy_gradient.run(config, workdir)
    assert {"base", "best_of_4", "trained", "train"} <= summary.keys()
    assert summary["trained"]["kl"] != 0.0
    assert (tmp_path / "run/report/index.html").is_file()
    monkeypatch.setattr(rollouts, "generate", pytest.fail)
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
            [sample["scores"]["reward"] for sample in samples], vader_sentiment(texts), atol=1e-6
        )
        lengths = checked_scores(make_reward("length"), [{}] * len(texts), texts)
        trained_on = [sample["training_score"] for sample in samples]
        np.testing.assert_allclose(trained_on, lengths, atol=1e-6)
        assert summary["training_reward"][name] == pytest.approx(lengths.mean())


def test_a_training_reward_relative_to_its_batch_is_left_out(tiny_config, tmp_path):
    """Standardised in two calls, both means would be 0 whatever training has done."""
    settings = {"num_iterations": 1, "epochs": 1, "evaluation.reward": "vader"}
    parts = {"length": {"weight": 1.0, "reward": {"kind": "length"}}}
    reward = {"kind": "mixture", "standardise": True, "components": parts}
    config = dataclasses.replace(tiny_config("ppo", settings), reward=reward)
    summary = policy_gradient.run(config, Workdir(tmp_path / "run", config))
    assert "training_reward" not in summary and "reward_mean" in summary["trained"]
    for name in ("base", "trained"):
        text = (tmp_path / f"run/samples/sample_{name}.jsonl").read_text()
        assert "training_score" not in text


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


PROMPTS = [{"prompt": f"Count {n} from {n + 1}:"} for n in range(12)]


def test_from_python_a_callable_is_the_reward_and_nothing_is_left_behind(
    tiny_config, base, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = jax.device_get(flatten(base))
    settings = {"num_iterations": 2, "epochs": 1, "sampling.prompts": 4, "evaluation.prompts": 2}
    config = tiny_config("ppo", settings)
    result = policy_gradient.train(
        base, tokenizer, PROMPTS[:8], config, reward=digits, held_out=PROMPTS[8:]
    )
    assert list(tmp_path.iterdir()) == [] and result.workdir is None
    assert [row["step"] for row in result.metrics] == [1, 2]
    assert result.summary["train"] == result.metrics[-1]
    assert result.summary["trained"]["kl"] != 0.0
    trained = flatten(result.model)
    for name, value in flatten(base).items():  # the reference, and whoever else has the model
        np.testing.assert_array_equal(value, before[name])
    assert any(np.abs(trained[name] - before[name]).max() > 1e-3 for name in before)


def test_a_workdir_changes_no_number_and_goes_on(tiny_config, base, tokenizer, tmp_path):
    config = tiny_config("ppo", {"num_iterations": 1, "epochs": 1, "sampling.prompts": 4})
    results = [
        policy_gradient.train(base, tokenizer, PROMPTS, config, reward=digits, workdir=workdir)
        for workdir in (None, tmp_path / "run", tmp_path / "run")
    ]
    for other in results[1:]:
        for key, value in results[0].metrics[0].items():
            if key != "wall_time" and not key.startswith("seconds/"):
                assert other.metrics[0][key] == value, key
        for one, two in zip(*(jax.tree.leaves(r.model) for r in (results[0], other))):
            np.testing.assert_array_equal(one, two)


def test_a_run_killed_in_any_phase_ends_with_the_same_numbers(tiny_config, tmp_path, monkeypatch):
    """Kills before either of the two phases of sampling."""
    config = tiny_config("ppo", {"num_iterations": 1, "epochs": 1})
    whole = policy_gradient.run(config, Workdir(tmp_path / "whole", config))
    workdir = Workdir(tmp_path / "parts", config)
    draw, killed_in = comparison.draw_samples, []

    class Killed(BaseException):
        pass

    def killing(*arguments, description, **named):
        if description in killed_in:
            raise Killed
        return draw(*arguments, description=description, **named)

    monkeypatch.setattr(comparison, "draw_samples", killing)
    for phase in ("sampling base", "sampling trained"):
        killed_in[:] = [phase]
        with pytest.raises(Killed):
            policy_gradient.run(config, workdir)
    killed_in.clear()
    parts = policy_gradient.run(config, workdir)
    for name in ("base", "best_of_4", "trained"):
        assert parts[name] == whole[name]


def test_records_that_are_no_prompts_are_refused(tiny_config, base, tokenizer):
    config = tiny_config("ppo", {"sampling.prompts": 4})
    with pytest.raises(DataError, match=r"records\[1\]"):
        policy_gradient.train(base, tokenizer, [*PROMPTS[:1], {"text": "a"}], config)


def test_samples_have_the_schema_of_every_stage(tiny_config, base, tokenizer, tmp_path):
    """At another temperature than 1, too, `log_prob` is that of the untempered policy."""
    settings = {"num_iterations": 1, "epochs": 1, "sampling.prompts": 4}
    config = tiny_config("ppo", settings | {"sampling.temperature": 0.6})
    policy_gradient.train(base, tokenizer, PROMPTS, config, reward=digits, workdir=tmp_path / "run")
    [samples] = samples_of(tmp_path / "run")
    for sample in samples:
        record = PROMPTS[sample["prompt_id"]]
        assert sample["prompt"] == record["prompt"]
        assert sample["scores"] == {"reward": pytest.approx(digits([record], [sample["text"]])[0])}
        by_hand = log_probs_by_hand(base, sample, tokenizer)
        assert sample["log_prob"] == pytest.approx(by_hand, abs=1e-4)
        assert sample["log_prob"] == sample["ref_log_prob"]
        assert abs(sum(sample["log_probs"]) - by_hand) > 1e-3
