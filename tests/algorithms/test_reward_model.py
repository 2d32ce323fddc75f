"""Reward models: every loss against brute force, scores where they belong, and whole runs."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.algorithms import reward_model
from align_jax.algorithms.comparisons import attach, prepare
from align_jax.algorithms.reward_model import make_loss
from align_jax.data import batching, dataset
from align_jax.data.tokenise import Example
from align_jax.errors import RunError
from align_jax.models.heads import ScalarModel, response_scores
from align_jax.models.interchange import load_model, load_tokenizer

EOS = load_tokenizer("tiny").eos_token_id


@pytest.fixture(scope="module")
def model():
    return ScalarModel(load_model("tiny"), key=jax.random.key(3))


def example(rng, lengths, *, prompt=5, id=0, **extras):
    responses = tuple(rng.integers(8, 264, length).astype(np.int32) for length in lengths)
    return Example(
        id=id,
        prompt=rng.integers(8, 264, prompt).astype(np.int32),
        responses=responses,
        response_masks=tuple(np.ones(length, np.float32) for length in lengths),
        extras={"where": f"file:{id}", **extras},
    )


@jax.jit
def hidden_states(transformer, tokens):
    return transformer(tokens)


def score_alone(model, prompt, response):
    """The scalar at the last token of one text, computed by itself."""
    text = np.concatenate([prompt, response])
    # What stands to the right of a text cannot change it: one length, one compilation.
    tokens = np.pad(text, (0, 40 - len(text)))[None]
    hidden = np.asarray(hidden_states(model.transformer, tokens), np.float64)[0, len(text) - 1]
    return float(hidden @ np.asarray(model.head.head_kernel[...]) + model.head.head_bias[...])


def batch_of(examples, *, rows=0):
    data = dataset.default_data_config(batch_size=len(examples), rows=rows)
    batch = batching.make_collate(data, attach)(examples)
    return jax.tree.map(jnp.asarray, batch)


# --- scores


def test_the_score_is_that_of_the_last_real_token_for_every_length_with_and_without_eos(model):
    rng = np.random.default_rng(0)
    examples = []
    for length, ends in itertools.product((1, 2, 3, 7, 20), (True, False)):
        one = example(rng, (length, 4), id=len(examples), prompt=1 + length % 3)
        if ends:
            closed = np.append(one.responses[0][:-1], EOS).astype(np.int32)
            one = dataclasses.replace(one, responses=(closed, one.responses[1]))
        examples.append(one)
    expected = [score_alone(model, e.prompt, r) for e in examples for r in e.responses]
    for rows in (0, 3):  # a row each, and packed
        scores = response_scores(model, batch_of(prepare(CONFIG(), examples), rows=rows))
        np.testing.assert_allclose(scores, expected, atol=2e-5)
    assert np.std(expected) > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(model, side):
    text = np.random.default_rng(1).integers(8, 264, 9).astype(np.int32)
    alone = model(text[None])[0, -1]
    padding = np.full(6, EOS, np.int32)
    tokens = np.concatenate([padding, text] if side == "left" else [text, padding])[None]
    real = np.concatenate([np.zeros(6), np.ones(9)][:: 1 if side == "left" else -1])
    scalars = model(tokens, segment_ids=real[None].astype(np.int32))
    np.testing.assert_allclose(scalars[0, -1 if side == "left" else 8], alone, atol=1e-5)


def test_the_head_starts_as_stiennon_says():
    kernels = [ScalarModel(load_model("tiny"), key=key).head for key in jax.random.split(KEY, 40)]
    values = np.concatenate([np.asarray(head.head_kernel[...]) for head in kernels])
    deviation = 1 / math.sqrt(32 + 1)
    assert abs(values.mean()) < 4 * deviation / math.sqrt(len(values))
    assert values.std() == pytest.approx(deviation, rel=4 / math.sqrt(2 * len(values)))
    assert all(float(head.head_bias[...]) == 0 for head in kernels)


KEY = jax.random.key(0)


# --- losses


def CONFIG(**overrides):
    config = reward_model.default_reward_model_config()
    config.update(overrides)
    return config


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def test_k_wise_records_in_one_batch_are_the_brute_force_loop_over_their_pairs(model):
    rng = np.random.default_rng(2)
    all_ranks = [(2, 0, 1, 3), (1, 0), (0, 1, 1), (3, 1, 2, 0, 4), (0, 0)]
    examples = [
        example(rng, rng.integers(1, 9, len(ranks)), id=i, ranks=list(ranks))
        for i, ranks in enumerate(all_ranks)
    ]
    losses, accuracies, margins = [], [], []
    for one, ranks in zip(examples, all_ranks):
        scores = [score_alone(model, one.prompt, response) for response in one.responses]
        pairs = [(i, j) for i, j in itertools.permutations(range(len(ranks)), 2)]
        ordered = [scores[i] - scores[j] for i, j in pairs if ranks[i] < ranks[j]]
        if ordered:  # the last record is one tie, and has no say
            losses.append(np.mean([-log_sigmoid(d) for d in ordered]))
            accuracies.append(np.mean([d > 0 for d in ordered]))
            margins.append(np.mean(ordered))
    config = CONFIG(loss="all_pairs")
    prepared = prepare(config, examples)
    sums = make_loss(config)(model, batch_of(prepared, rows=2))
    assert float(sums.weight) == 4
    np.testing.assert_allclose(sums.loss, np.sum(losses), rtol=1e-5)
    np.testing.assert_allclose(sums.metrics["rewards/accuracies"], np.sum(accuracies), rtol=1e-6)
    np.testing.assert_allclose(sums.metrics["rewards/margins"], np.sum(margins), atol=1e-5)
    # Without ties a record of K is weighted by 1 / (K choose 2): the mean over its pairs.
    gradient = jax.grad(lambda m: make_loss(config)(m, batch_of(prepared)).loss)(model)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert float(jnp.abs(gradient.head.head_kernel[...]).max()) > 1e-3


@pytest.mark.parametrize("loss", ["plackett_luce", "best_of_k"])
def test_losses_over_k_responses_with_different_k_in_one_batch(model, loss):
    rng = np.random.default_rng(3)
    all_ranks = [(2, 0, 1), (1, 0), (3, 2, 1, 0)]
    examples = [
        example(rng, rng.integers(1, 9, len(ranks)), id=i, ranks=list(ranks))
        for i, ranks in enumerate(all_ranks)
    ]
    expected = 0.0
    for one, ranks in zip(examples, all_ranks):
        scores = np.array([score_alone(model, one.prompt, r) for r in one.responses])
        by_rank = scores[np.argsort(ranks)]
        last = len(ranks) - 1 if loss == "plackett_luce" else 1
        expected += sum(np.log(np.exp(by_rank[i:]).sum()) - by_rank[i] for i in range(last))
    config = CONFIG(loss=loss)
    batch = batch_of(prepare(config, examples))
    value, gradient = jax.value_and_grad(lambda m: make_loss(config)(m, batch).loss)(model)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_what_a_pair_costs_with_margin_smoothing_and_centre(model):
    rng = np.random.default_rng(4)
    margins = (0.0, 0.5, 2.0)
    examples = [example(rng, (4, 6), id=i, margin=m) for i, m in enumerate(margins)]
    config = CONFIG(label_smoothing=0.1, center_coefficient=0.01)
    sums = make_loss(config)(model, batch_of(prepare(config, examples)))
    expected = 0.0
    for one, margin in zip(examples, margins):
        a, b = (score_alone(model, one.prompt, response) for response in one.responses)
        z = a - b - margin
        expected += -0.9 * log_sigmoid(z) - 0.1 * log_sigmoid(-z) + 0.01 * (a + b) ** 2
    np.testing.assert_allclose(sums.loss, expected, rtol=1e-5)


def test_margins_from_strengths_are_llama_2s_table():
    rng = np.random.default_rng(5)

    def margins(table, strengths):
        examples = [example(rng, (2, 2), strength=s) for s in strengths]
        return [e.extras["margin"] for e in prepare(CONFIG(margins=table), examples)]

    assert margins("llama2_large", [3.0, 2.0, 1.0, 0.0]) == [3, 2, 1, 0]
    assert margins("llama2_small", [3.0, 2.0, 1.0, 0.0]) == pytest.approx([1, 2 / 3, 1 / 3, 0])
    config = reward_model.default_reward_model_config()
    with config.ignore_type():
        config.margins = {"much": 1.5, "2": 0.25}
    named = [example(rng, (2, 2), strength=s) for s in ("much", 2.0)]
    assert [e.extras["margin"] for e in prepare(config, named)] == [1.5, 0.25]
    with pytest.raises(RunError, match="file:0: strength 'some' is not in config.margins"):
        prepare(config, [example(rng, (2, 2), strength="some")])
    with pytest.raises(RunError, match="file:0: no 'strength'"):
        prepare(config, [example(rng, (2, 2))])
    with pytest.raises(RunError, match="'llama3'; expected one of llama2_small"):
        margins("llama3", [3.0])


def test_batches_of_any_mixture_of_k_share_one_compilation(model):
    rng = np.random.default_rng(6)
    config = CONFIG(loss="all_pairs")
    records = [example(rng, (3,) * k, id=k, ranks=list(range(k))) for k in (2, 3, 4, 2, 4, 4)]
    prepared = prepare(config, records)
    step = jax.jit(make_loss(config))
    for start in (0, 2, 4):
        step(model, batch_of(prepared[start : start + 2]))
    assert step._cache_size() == 1


def test_ranks_that_say_nothing_are_refused():
    with pytest.raises(RunError, match="all 1 records rank all of their completions alike"):
        prepare(CONFIG(loss="all_pairs"), [example(np.random.default_rng(0), (2, 2), ranks=[1, 1])])
    examples = [example(np.random.default_rng(0), (2, 2, 2), ranks=[0, 0, 1])]
    with pytest.raises(RunError, match="file:0: 2 completions have rank 0"):
        prepare(CONFIG(loss="best_of_k"), examples)
