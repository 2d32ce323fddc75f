"""What an iteration's updates are made of: coefficients, weights, text, and the text's score."""

import jax
import numpy as np
import pytest

from align_jax.algorithms.policy_gradient import Config, iteration
from align_jax.algorithms.policy_gradient.agent import Scored
from align_jax.algorithms.policy_gradient.objective import Estimate
from align_jax.data.dataset import Data
from align_jax.generation import rollout as rollouts
from align_jax.generation.rollout import Sampling
from align_jax.models.heads import ScalarModel
from align_jax.models.tokenizers import load_tokenizer
from align_jax.rewards.configured import make_reward
from align_jax.rewards.model import RewardScale, save_reward_model
from align_jax.training.metrics import read_metrics
from tests.algorithms.policy_runs import METHODS, other_model, samples_of
from tests.generation.rollouts import made_rollout


def test_the_coefficient_of_a_kl_in_the_loss_moves_and_is_the_one_applied(new_trainer):
    settings = METHODS["grpo"] | {"num_iterations": 4, "kl.target": 0.05, "kl.horizon": 50}
    trainer, directory = new_trainer(settings | {"optimizer.learning_rate": 0.02})
    trainer.fit()
    rows = read_metrics(directory)
    coefficients = [row["objective/kl_coefficient"] for row in rows]
    assert coefficients[0] == pytest.approx(0.05) and len(set(coefficients)) == 4
    for row, after in zip(rows, coefficients[1:]):
        error = np.clip(row["objective/kl"] / 0.05 - 1, -0.2, 0.2)
        count = 16  # completions of an iteration
        expected = row["objective/kl_coefficient"] * (1 + error * count / 50)
        assert after == pytest.approx(expected, rel=1e-5)
    for row in rows[1:]:
        penalty = row["loss"] - row["loss/policy_avg"]
        assert row["loss/kl_avg"] > 1e-3
        assert penalty == pytest.approx(
            row["objective/kl_coefficient"] * row["loss/kl_avg"], rel=1e-3, abs=1e-7
        )


@pytest.mark.parametrize("method", ["ppo", "grpo", "online dpo"])
def test_the_rlhf_reward_is_the_objective_wherever_the_kl_is_taken(new_trainer, base, method):
    settings = METHODS[method] | {"num_iterations": 1, "kl.coefficient": 0.3}
    trainer, directory = new_trainer(settings, model=other_model(base))
    metrics = trainer.fit()[1][-1]
    (samples,) = samples_of(directory)
    kl = np.mean([s["log_prob"] - s["ref_log_prob"] for s in samples])
    assert abs(kl) > 0.01
    assert metrics["objective/kl"] == pytest.approx(kl, rel=1e-4)
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.3 * kl, rel=1e-4)
    expected = np.mean([s["scores"]["reward"] for s in samples]) - 0.3 * kl
    assert metrics["objective/rlhf_reward"] == pytest.approx(expected, rel=1e-4)


def test_token_losses_are_weighed_by_the_capped_ratio_of_trainer_to_sampler(
    new_trainer, monkeypatch
):
    """A sampler whose log-probabilities are off by up to a nat, as another engine's could be."""
    original, batches = rollouts.roll_out, []

    def off(*arguments, **named):
        rollout = original(*arguments, **named)
        noise = np.random.default_rng(0).uniform(-1, 1, rollout.mask.shape).astype(np.float32)
        return rollout._replace(log_probs=rollout.log_probs + noise * rollout.mask)

    made = iteration.minibatch

    def recording(config, experience, layout, groups, **more):
        batch = made(config, experience, layout, groups, **more)
        rows = experience.collected.rollout.rows(groups)
        batches.append((batch.completions, experience.collected.rollout.log_probs[rows]))
        return batch

    monkeypatch.setattr(rollouts, "roll_out", off)
    monkeypatch.setattr(iteration, "minibatch", recording)
    metrics = {}
    for cap in (0.0, 1.5):
        settings = METHODS["rloo"] | {"num_iterations": 1, "importance_cap": cap}
        metrics[cap] = new_trainer(settings, name=str(cap))[0].fit()[1][-1]
    (plain, drawn), (capped, _) = batches
    ratio = np.exp(plain.old_log_probs - drawn, dtype=np.float64)
    importance = np.minimum(ratio, 1.5)
    mask = plain.mask > 0
    assert (ratio[mask] > 1.5).any() and (ratio[mask] < 0.8).any()
    np.testing.assert_allclose(capped.importance, importance, rtol=1e-5)
    np.testing.assert_array_equal(capped.weights, plain.weights)
    assert plain.importance is None
    assert metrics[1.5]["val/sampler_gap"] > 0.5
    for cap, weights in ((0.0, plain.weights), (1.5, plain.weights * importance)):
        loss = -(weights * plain.advantages * plain.old_log_probs).sum()
        assert metrics[cap]["loss/policy_avg"] == pytest.approx(loss, rel=1e-3, abs=1e-4)
    assert metrics[0.0]["loss/policy_avg"] != pytest.approx(metrics[1.5]["loss/policy_avg"])


def test_text_in_micro_batches_is_the_whole_text(new_trainer):
    out = []
    for accumulation in (1, 2):
        settings = {
            "data.accumulation": accumulation,
            "ptx.source": "builtin:tiny_sft",
            "ptx.batch_size": 4,
            "ptx.gamma": 2.0,
            "num_iterations": 1,
        }
        settings |= METHODS["reinforce"]
        out.append(new_trainer(settings, name=str(accumulation))[0].fit()[1][-1])
    for name in ("loss", "loss/ptx_avg", "loss/policy_avg", "grad_norm"):
        assert out[0][name] == pytest.approx(out[1][name], rel=1e-4), name
    assert out[0]["loss/ptx_avg"] > 1


def test_every_update_reads_the_next_text(new_trainer, monkeypatch):
    settings = {"ptx.source": "builtin:tiny_sft", "ptx.batch_size": 4, "epochs": 2}
    trainer, _ = new_trainer(METHODS["ppo"] | settings | {"num_iterations": 2})
    read, original = [], trainer._text_batch

    def recording(memory):
        read.append(memory["next_text"])
        return original(memory)

    monkeypatch.setattr(trainer, "_text_batch", recording)
    trainer.fit()
    assert read == [4 * update for update in range(8)]


def other_tokenizer():
    """Bytes as the tiny one has, under other ids, and some pairs of them as one token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    merges = [("t", "h"), ("1", "2"), ("\u0120", "2"), ("e", "r"), ("c", "o"), ("o", "u")]
    tokens = [*letters, *("".join(merge) for merge in merges), "<end>"]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")


def test_a_reward_model_reads_the_text_with_its_own_tokenizer(
    new_trainer, base, tokenizer, tmp_path
):
    model, own = ScalarModel(base, key=jax.random.key(3)), other_tokenizer()
    assert len(own) <= base.config.vocab_size
    save_reward_model(model, own, tmp_path / "rm", scale=RewardScale(gain=1.5, bias=0.25))
    assert load_tokenizer(tmp_path / "rm").eos_token_id == own.eos_token_id
    reward = make_reward({"kind": "model", "path": str(tmp_path / "rm")}, tokenizer=tokenizer)
    trainer, directory = new_trainer({"num_iterations": 1}, reward=reward)
    trainer.fit()
    (samples,) = samples_of(directory)
    assert not all(sample["ended"] for sample in samples)
    by_hand = {}
    for name, using in (("own", own), ("policy's", tokenizer)):
        ids = lambda text: using(text, add_special_tokens=False).input_ids  # noqa: B023, E731
        # Prompt and completion are tokenised apart, and EOS closes the text though most of these
        # completions were cut by the token budget.
        texts = [[*ids(s["prompt"]), *ids(s["text"]), using.eos_token_id] for s in samples]
        tokens = np.zeros((len(texts), max(map(len, texts))), np.int32)
        for row, text in zip(tokens, texts):
            row[: len(text)] = text
        scalars = np.asarray(jax.jit(lambda tokens: model(tokens))(tokens))
        by_hand[name] = [1.5 * row[len(text) - 1] + 0.25 for row, text in zip(scalars, texts)]
    np.testing.assert_allclose([s["scores"]["reward"] for s in samples], by_hand["own"], atol=2e-5)
    assert np.abs(np.subtract(by_hand["own"], by_hand["policy's"])).min() > 1e-3


def made_experience(lengths, samples):
    """Completions of these lengths whose scores and advantages are their numbers."""
    rollout = made_rollout(lengths, samples=samples)
    numbers = np.arange(len(lengths), dtype=np.float32)
    scored = Scored(rollout.log_probs, rollout.log_probs, None)
    return iteration.Experience(
        iteration.Collected([], rollout, numbers, {}, numbers > np.inf),
        iteration.Evaluated(scored, scored, None),
        numbers,
        Estimate(numbers, numbers[:, None] * rollout.mask, None),
        None,
        None,
        0.05,
    )


@pytest.mark.parametrize("aggregation", ["dapo", "grpo", "dr_grpo", "sum"])
def test_the_weights_of_a_minibatch_are_of_its_own_completions(aggregation):
    """Four prompts, two of them an update: what the other two drew changes nothing."""
    experience = made_experience([1, 6, 3, 2, 5, 4, 1, 1], samples=2)
    config = Config(
        advantage="rloo",
        critic="none",
        aggregation=aggregation,
        sampling=Sampling(prompts=4, samples=2, max_new_tokens=6),
        minibatches=2,
        epochs=1,
        data=Data(length_buckets=(16, 32)),
    )
    rollout = experience.collected.rollout
    layout = rollouts.layout_of(rollout, config.data, longest_prompt=9)
    for groups in ([0, 3], [2, 1]):
        made = iteration.minibatch(config, experience, layout, groups, on_policy=True).completions
        mask = rollout.mask[rollout.rows(groups)]
        tokens = mask.sum(1, keepdims=True)
        divisor = {"dapo": mask.sum(), "grpo": 4 * tokens, "dr_grpo": 4 * 6, "sum": 4}[aggregation]
        np.testing.assert_allclose(made.weights, mask / divisor, rtol=1e-6)
        np.testing.assert_allclose(made.mean_weights, mask / mask.sum(), rtol=1e-6)


def test_the_moving_baseline_keeps_its_past_by_its_decay(new_trainer):
    trainer, _ = new_trainer(METHODS["reinforce"] | {"baseline_decay": 0.9})
    experience = made_experience([1, 2], samples=1)  # the mean reward is 0.5
    for before, expected in ((None, 0.5), (2.0, 0.9 * 2.0 + 0.1 * 0.5)):
        memory = trainer.remember({"baseline": before, "kl_coefficient": 0.05}, experience)
        assert memory["baseline"] == pytest.approx(expected)


def test_every_iteration_and_every_attempt_samples_by_keys_of_its_own(new_trainer, monkeypatch):
    """The same policy and the same prompts twice: only the iteration's number differs."""
    settings = METHODS["rloo"] | {"dynamic_sampling": 2}
    trainer, _ = new_trainer(settings, reward=lambda _, texts: np.zeros(len(texts)))
    seen, original = [], rollouts.roll_out

    def recording(*arguments, keys, **named):
        seen.append(np.asarray(jax.random.key_data(keys)).tolist())
        return original(*arguments, keys=keys, **named)

    monkeypatch.setattr(rollouts, "roll_out", recording)
    drawn = [trainer.collect(trainer.model, {"next_prompt": 0}, i)[0] for i in (0, 1, 0)]
    first, second, again = (one.rollout.tokens.tolist() for one in drawn)
    assert first == again != second
    assert seen[:3] == seen[6:]  # attempts of iteration 0, and once more
    keys = [tuple(key) for attempt in seen[:6] for key in attempt]
    assert len(keys) == 6 * 8 == len(set(keys))


def test_micro_batches_hold_the_groups_in_order_with_their_values():
    experience = made_experience([1, 6, 3, 2, 5, 4, 1, 1], samples=2)
    data = Data(length_buckets=(16, 32))
    layout = rollouts.layout_of(experience.collected.rollout, data, longest_prompt=9)
    sampling = Sampling(prompts=4, samples=2, max_new_tokens=6)

    def made(accumulation):
        config = Config(
            advantage="rloo",
            critic="none",
            sampling=sampling,
            data=Data(accumulation=accumulation, length_buckets=(16, 32)),
        )
        return iteration.minibatch(config, experience, layout, [3, 0, 2, 1], on_policy=True)

    whole, halves = made(1), made(2)
    assert whole.completions.advantages[:, 0].tolist() == [6, 7, 0, 1, 4, 5, 2, 3]
    for name in ("tokens", "targets"):
        joined = halves.rows[name].reshape(whole.rows[name].shape)
        np.testing.assert_array_equal(joined, whole.rows[name], err_msg=name)
    for name in ("mask", "advantages", "weights"):
        one, two = (getattr(batch.completions, name) for batch in (whole, halves))
        np.testing.assert_array_equal(two.reshape(one.shape), one, err_msg=name)
    # Responses are numbered anew in every micro-batch.
    assert halves.rows["target_response"].max() == 3 and whole.rows["target_response"].max() == 7
