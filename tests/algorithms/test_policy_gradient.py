"""Whole policy-gradient runs on the tiny model: what they start from, log, keep and reach."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.algorithms.policy_gradient import iteration
from align_jax.algorithms.policy_gradient.agent import new_agent
from align_jax.errors import RewardError
from align_jax.generation import rollout as rollouts
from align_jax.generation import sampler
from align_jax.models.transformer import Transformer
from align_jax.training.checkpoint import Checkpointer
from align_jax.training.metrics import read_metrics
from align_jax.training.signals import Interrupted
from align_jax.trees import flatten
from tests.algorithms.policy_runs import METHODS, digits, log_probs_by_hand, other_model, samples_of


@pytest.mark.parametrize(
    ("method", "temperature"), [("ppo", 1.0), *((method, 0.6) for method in METHODS)]
)
def test_a_run_starts_at_its_reference_with_ratio_1(new_trainer, method, temperature):
    settings = {"num_iterations": 1, "epochs": 1, "minibatches": 1}
    trainer, directory = new_trainer(
        METHODS[method] | settings | {"sampling.temperature": temperature}
    )
    metrics = trainer.fit()[1][-1]
    assert metrics["objective/kl"] == 0.0  # to the bit
    assert metrics["policy/approxkl_avg"] == 0.0 and metrics["policy/clipfrac_avg"] == 0.0
    assert metrics["val/ratio"] == pytest.approx(1.0, abs=1e-6)  # a mean of exact ones
    # What ratio and approxkl cannot show, for the first update's old policy is its own pass.
    assert metrics["val/sampler_gap"] < 2e-5 and metrics["val/old_gap"] < 2e-5
    assert metrics["objective/rlhf_reward"] == metrics["objective/scores"]
    if method == "online dpo":
        assert metrics["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert all(np.isfinite(list(metrics.values())))
    assert [row["step"] for row in read_metrics(directory)] == [1]


def test_fractional_scores_survive(new_trainer):
    trainer, directory = new_trainer(
        {"num_iterations": 1}, reward=lambda _, texts: np.full(len(texts), 0.73)
    )
    metrics = trainer.fit()[1][-1]
    assert metrics["objective/scores"] == pytest.approx(0.73, abs=1e-6)
    assert all(
        sample["scores"]["reward"] == pytest.approx(0.73) for sample in samples_of(directory)[0]
    )


def test_the_logged_kl_is_that_of_the_saved_samples(new_trainer, base, tokenizer):
    policy = other_model(base)
    own = jax.tree.map(jnp.copy, policy)
    trainer, directory = new_trainer({"num_iterations": 1}, model=policy)
    metrics = trainer.fit()[1][-1]
    (samples,) = samples_of(directory)
    kl = [
        log_probs_by_hand(own, s, tokenizer) - log_probs_by_hand(base, s, tokenizer)
        for s in samples
    ]
    assert metrics["objective/kl"] == pytest.approx(np.mean(kl), abs=1e-4)
    assert abs(np.mean(kl)) > 0.01
    coefficient = trainer.config.kl.coefficient
    assert metrics["objective/rlhf_reward"] == pytest.approx(
        np.mean([s["scores"]["reward"] for s in samples]) - coefficient * np.mean(kl), abs=1e-4
    )


def test_a_completion_is_valued_the_same_alone_and_among_others(new_trainer, base):
    """Micro-batches of one prompt and of eight; the critic's head is random, not zero."""
    out = []
    for minibatches in (1, 8):
        trainer, _ = new_trainer({"minibatches": minibatches}, model=other_model(base))
        agent = new_agent(trainer.config, trainer.model, trainer.mesh, trainer.task.reward)
        agent.critic.head.head_kernel[...] = jax.random.normal(jax.random.key(0), (32,))
        memory = {"next_prompt": 0}
        rollout = trainer.collect(agent.model, memory, 0)[0].rollout
        layout = rollouts.layout_of(
            rollout, trainer.config.data, longest_prompt=trainer.longest_prompt
        )
        out.append(trainer.evaluate_completions(agent, rollout, layout))
    assert np.abs(out[0].values).max() > 0.1
    for one, other in zip(*map(jax.tree.leaves, out), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_the_reference_is_frozen_and_has_no_optimizer_state(new_trainer, base):
    before = jax.device_get(flatten(base))
    trainer, directory = new_trainer({"optimizer.learning_rate": 0.1})
    trainer.fit()
    after = jax.device_get(flatten(trainer.reference))
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
    checkpointer = Checkpointer(directory / "checkpoints")
    saved = checkpointer._manager.item_metadata(checkpointer.latest_step())
    trained = checkpointer.restore_model(base)
    checkpointer.close()
    # Adam's two moments, of policy and critic alone, and counters.
    names = [n for n in saved["optimizer"] if "count" not in n]
    assert len(names) == 2 * (len(saved["model"]) + len(saved["critic"]))
    moved = flatten(trained)
    assert any(np.abs(np.asarray(moved[name]) - before[name]).max() > 1e-3 for name in before)


def parameters(directory, base):
    checkpointer = Checkpointer(directory / "checkpoints")
    leaves = jax.device_get(flatten(checkpointer.restore_model(base)))
    checkpointer.close()
    return leaves


def assert_same_runs(one, other, base):
    """Parameters and samples of the runs in two directories, to the bit."""
    a, b = (parameters(directory, base) for directory in (one, other))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert samples_of(one) == samples_of(other)


@pytest.mark.parametrize("method", ["ppo", "reinforce"])
def test_an_interrupted_run_goes_on_exactly(new_trainer, base, method):
    """SIGTERM in the middle of iteration 1: moments, baseline, KL coefficient, prompts go on."""
    settings = METHODS[method] | {"num_iterations": 4, "kl.target": 0.01, "kl.horizon": 20}
    whole, there = new_trainer(settings, name="whole")
    whole.fit()

    def killing(records, texts, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return digits(records, texts)

    first, here = new_trainer(settings, name="parts", reward=killing)
    with pytest.raises(Interrupted):
        first.fit()
    assert len(samples_of(here)) == 2
    second, _ = new_trainer(settings, name="parts")
    second.fit()
    assert_same_runs(there, here, base)
    rows = [
        [{k: v for k, v in row.items() if k != "wall_time" and "seconds" not in k} for row in run]
        for run in (read_metrics(there), read_metrics(here))
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    coefficients = [row["objective/kl_coefficient"] for row in rows[0]]
    assert len(set(coefficients)) == 4


def test_a_killed_run_repeats_what_was_not_saved(new_trainer, base):
    """Killed in iteration 3 with iteration 2 unsaved; prompts that were replaced and text go on."""
    settings = METHODS["grpo"] | {
        "num_iterations": 4,
        "checkpoint_every": 2,
        "dynamic_sampling": 1,
        "ptx.source": "builtin:tiny_sft",
        "ptx.batch_size": 4,
    }
    asked = []

    def counting(records, texts):
        asked.append(len(texts))
        return digits(records, texts)

    whole, there = new_trainer(settings, name="whole", reward=counting)
    whole.fit()

    class Killed(BaseException):
        pass

    def killing(records, texts):
        if len(samples_of(here)) == 3:
            raise Killed
        return digits(records, texts)

    first, here = new_trainer(settings, name="parts", reward=killing)
    with pytest.raises(Killed):
        first.fit()
    second, _ = new_trainer(settings, name="parts")
    second.fit()
    assert_same_runs(there, here, base)
    assert len(asked) > 4  # so prompts were replaced


def test_accumulated_micro_batches_are_the_whole_minibatch(new_trainer, base):
    out = []
    for accumulation in (1, 4):
        settings = {"data.accumulation": accumulation, "kl.placement": "loss", "critic": "shared"}
        trainer, directory = new_trainer(settings, name=str(accumulation))
        metrics = trainer.fit()[1][-1]
        out.append((metrics, parameters(directory, base)))
    for name in out[0][1]:
        np.testing.assert_allclose(out[0][1][name], out[1][1][name], atol=5e-4, err_msg=name)
    for name in ("loss", "loss/value_avg", "policy/entropy_avg", "grad_norm", "loss/kl_avg"):
        assert out[0][0][name] == pytest.approx(out[1][0][name], rel=1e-3, abs=1e-5), name


def test_every_pass_over_the_completions_has_its_own_order(new_trainer, monkeypatch):
    trainer, _ = new_trainer({"epochs": 3, "minibatches": 2})
    orders = []
    original = iteration.minibatch

    def recording(config, experience, layout, groups, **more):
        orders.append(list(groups))
        return original(config, experience, layout, groups, **more)

    monkeypatch.setattr(iteration, "minibatch", recording)
    trainer.fit()
    passes = [orders[i] + orders[i + 1] for i in range(0, len(orders), 2)]
    assert len(passes) == 6 and len({tuple(order) for order in passes}) == 6
    assert all(sorted(order) == list(range(8)) for order in passes)


def test_a_missing_stop_token_replaces_or_lowers_the_score(new_trainer):
    for rule, expected in (("replace", -1.0), ("subtract", 0.25 - 1.0)):
        trainer, directory = new_trainer(
            {"missing_eos": rule, "num_iterations": 1},
            reward=lambda _, texts: np.full(len(texts), 0.25),
            name=rule,
        )
        metrics = trainer.fit()[1][-1]
        ended = np.array([sample["ended"] for sample in samples_of(directory)[0]])
        assert not ended.all()
        wanted = np.where(ended, 0.25, expected).mean()
        assert metrics["objective/scores"] == pytest.approx(wanted)
        assert metrics["objective/raw_scores"] == pytest.approx(0.25)


def test_groups_without_a_difference_are_replaced(new_trainer):
    calls = []

    def reward(records, texts):
        """The first prompts asked for score the same, the next ones do not."""
        calls.append(sorted({record["prompt"] for record in records}))
        return np.zeros(len(texts)) if len(calls) == 1 else np.arange(len(texts)) % 2

    settings = METHODS["grpo"] | {"dynamic_sampling": 3, "num_iterations": 1}
    trainer, directory = new_trainer(settings, reward=reward)
    trainer.fit()
    assert len(calls) == 2 and not set(calls[0]) & set(calls[1])
    assert sorted({s["prompt"] for s in samples_of(directory)[0]}) == calls[1]


def test_updates_end_once_the_policy_has_moved_enough(new_trainer):
    settings = {"epochs": 4, "optimizer.learning_rate": 0.05, "num_iterations": 1}
    free, _ = new_trainer(settings, name="free")
    held, _ = new_trainer(settings | {"max_approx_kl": 1e-4}, name="held")
    assert free.fit()[1][-1]["val/updates"] == 4
    assert held.fit()[1][-1]["val/updates"] == 2


def test_the_first_iteration_compiles_all_there_is(new_trainer):
    trainer, _ = new_trainer(
        {
            "num_iterations": 3,
            "epochs": 2,
            "minibatches": 2,
            "data.length_buckets": (64,),
            "data.target_buckets": (16,),
        }
    )
    sizes = lambda: [f._cache_size() for f in (sampler._prefill, sampler._decode)]  # noqa: E731
    before = sizes()
    trainer.fit()
    # Prompts come in two buckets of the sampler.
    assert all(after - start <= 2 for after, start in zip(sizes(), before))
    own = (trainer.step, trainer.score, trainer.values, trainer.estimate)
    assert [function._cache_size() for function in own] == [1] * 4


# What takes the mean score from .03 to .2 and more, at 2 to 4 nats.
LEARNING = {
    "sampling.prompts": 64,
    "minibatches": 2,
    "epochs": 2,
    "num_iterations": 14,
    "checkpoint_every": 100,
    "kl.coefficient": 0.02,
    "optimizer.learning_rate": 1e-2,
    "data.length_buckets": (32,),
    "data.target_buckets": (8,),
}


@pytest.mark.parametrize("seed", range(8))
def test_ppo_improves_on_every_seed(new_trainer, seed):
    trainer, directory = new_trainer(LEARNING | {"seed": seed})
    trainer.fit()
    scores = [row["objective/scores"] for row in read_metrics(directory)]
    # 64 scores of about .03 have a standard error of .01.
    assert np.mean(scores[-3:]) > np.mean(scores[:2]) + 0.08, scores


def test_a_huge_kl_coefficient_keeps_the_policy_at_its_reference(new_trainer):
    trainer, directory = new_trainer(LEARNING | {"kl.coefficient": 100.0})
    trainer.fit()
    scores = [row["objective/scores"] for row in read_metrics(directory)]
    assert abs(np.mean(scores[-3:]) - np.mean(scores[:2])) < 0.03, scores
    # k3: the KL without the noise of its sign. What is left are Adam's steps at a rate of 1e-2.
    d = np.array([s["log_prob"] - s["ref_log_prob"] for s in samples_of(directory)[-1]])
    assert np.mean(np.expm1(-d) + d) < 0.3


def test_a_reward_that_fails_names_prompt_and_completion(new_trainer):
    trainer, _ = new_trainer(reward=lambda _, texts: np.full(len(texts), np.nan))
    with pytest.raises(RewardError, match="(?s)nan.*Count .*completion"):
        trainer.fit()


def test_the_critic_may_start_as_the_reward_model(new_trainer, base, tokenizer, tmp_path):
    from align_jax.models.heads import ScalarModel
    from align_jax.rewards.model import RewardScale, save_reward_model

    model = ScalarModel(base, key=jax.random.key(1))
    save_reward_model(model, tokenizer, tmp_path / "rm", scale=RewardScale(gain=2.0, bias=0.5))
    trainer, _ = new_trainer({"critic_init": str(tmp_path / "rm")})
    agent = new_agent(trainer.config, trainer.model, trainer.mesh, trainer.task.reward)
    tokens = jnp.arange(10, 20)[None]
    np.testing.assert_allclose(
        agent.critic(tokens), 2.0 * model(tokens) + 0.5, rtol=1e-4, atol=1e-5
    )


def test_a_separate_critic_starts_at_0_on_the_policys_trunk(new_trainer, base):
    trainer, _ = new_trainer()
    agent = new_agent(trainer.config, trainer.model, trainer.mesh, trainer.task.reward)
    tokens = jnp.arange(10, 20)[None]
    assert isinstance(agent.model, Transformer) and not np.any(agent.critic(tokens))
    np.testing.assert_array_equal(agent.critic.transformer(tokens), base(tokens))
