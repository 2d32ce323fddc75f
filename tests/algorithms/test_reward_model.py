"""Reward models: every loss against brute force, scores where they belong, settings refused."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.algorithms.comparisons import as_rankings, attach, warn_of_ties
from align_jax.algorithms.reward_model import Config, loss_sums
from align_jax.data import batching
from align_jax.data.dataset import Data
from align_jax.data.tokenise import Example
from align_jax.errors import RunError
from align_jax.losses.ranking import LOSSES
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
    data = Data(batch_size=len(examples), rows=rows)
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
        scores = response_scores(model, batch_of(prepare(Config(), examples), rows=rows))
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


def prepare(config, examples):
    """Examples as a run trains on them."""
    return as_rankings(examples, config.ranking_loss, margins=config.margin_of_strength)


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
    config = Config(loss="all_pairs")
    prepared = prepare(config, examples)
    sums = loss_sums(config, model, batch_of(prepared, rows=2))
    assert float(sums.weight) == 4
    np.testing.assert_allclose(sums.loss, np.sum(losses), rtol=1e-5)
    np.testing.assert_allclose(sums.metrics["rewards/accuracies"], np.sum(accuracies), rtol=1e-6)
    np.testing.assert_allclose(sums.metrics["rewards/margins"], np.sum(margins), atol=1e-5)
    # Without ties a record of K is weighted by 1 / (K choose 2): the mean over its pairs.
    gradient = jax.grad(lambda m: loss_sums(config, m, batch_of(prepared)).loss)(model)
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
    config = Config(loss=loss)
    batch = batch_of(prepare(config, examples))
    value, gradient = jax.value_and_grad(lambda m: loss_sums(config, m, batch).loss)(model)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_what_a_pair_costs_with_margin_smoothing_and_centre(model):
    rng = np.random.default_rng(4)
    margins = (0.0, 0.5, 2.0)
    examples = [example(rng, (4, 6), id=i, margin=m) for i, m in enumerate(margins)]
    config = Config(label_smoothing=0.1, center_coefficient=0.01)
    sums = loss_sums(config, model, batch_of(prepare(config, examples)))
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
        return [e.extras["margin"] for e in prepare(Config(margins=table), examples)]

    assert margins("llama2_large", [3.0, 2.0, 1.0, 0.0]) == [3, 2, 1, 0]
    assert margins("llama2_small", [3.0, 2.0, 1.0, 0.0]) == pytest.approx([1, 2 / 3, 1 / 3, 0])
    edited = Config().to_config_dict()
    with edited.ignore_type():
        edited.margins = {"much": 1.5, "2": 0.25}
    config = Config.from_dict(edited)
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
    config = Config(loss="all_pairs")
    records = [example(rng, (3,) * k, id=k, ranks=list(range(k))) for k in (2, 3, 4, 2, 4, 4)]
    prepared = prepare(config, records)
    step = jax.jit(functools.partial(loss_sums, config))
    for start in (0, 2, 4):
        step(model, batch_of(prepared[start : start + 2]))
    assert step._cache_size() == 1


def test_comparisons_that_say_nothing_are_counted_and_the_first_is_named(caplog):
    rng = np.random.default_rng(0)
    made = [example(rng, (3, 4, 5), id=i, ranks=[0, 1, 2]) for i in range(6)]
    made[1] = dataclasses.replace(made[1], extras=made[1].extras | {"ranks": [1, 1, 1]})
    made[3] = dataclasses.replace(made[3], responses=made[3].responses[:1] * 3)
    # One response of another rank that differs is enough; equal ones of one rank are no matter.
    made[4] = dataclasses.replace(
        made[4],
        responses=(*made[4].responses[:1] * 2, made[4].responses[2]),
        extras=made[4].extras | {"ranks": [0, 0, 1]},
    )
    warn_of_ties(as_rankings(made, LOSSES["all_pairs"]))
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith("2 of 6 comparisons") and said.endswith("the first is file:1")
    caplog.clear()
    warn_of_ties(made[4:])
    assert not caplog.records


def test_ranks_that_say_nothing_are_refused():
    with pytest.raises(RunError, match="all 1 records rank all of their completions alike"):
        prepare(Config(loss="all_pairs"), [example(np.random.default_rng(0), (2, 2), ranks=[1, 1])])
    examples = [example(np.random.default_rng(0), (2, 2, 2), ranks=[0, 0, 1])]
    with pytest.raises(RunError, match="file:0: 2 completions have rank 0"):
        prepare(Config(loss="best_of_k"), examples)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "pair"}, "config.loss is 'pair'; expected one of pairwise, best_of_k"),
        (
            {"loss": "all_pairs", "label_smoothing": 0.1},
            "config.label_smoothing is 0.1, but label_smoothing is for config.loss = 'pairwise' "
            "only: leave it at 0.0",
        ),
        ({"loss": "best_of_k", "center_coefficient": 0.1}, "is for .*'pairwise' only"),
        ({"loss": "plackett_luce", "margins": "llama2_small"}, "margins is for .*'pairwise' only"),
        ({"loss": "all_pairs", "margins": {"1": 1.0}}, "margins is for .*'pairwise' only"),
        ({"label_smoothing": 0.5}, "config.label_smoothing is 0.5; expected at least 0 and below"),
        ({"label_smoothing": math.nan}, "config.label_smoothing is nan; expected a finite number"),
        ({"center_coefficient": -1.0}, "config.center_coefficient is -1.0; expected .* at least 0"),
        ({"margins": {"strong": "2"}}, r"config.margins\['strong'\] is '2'; expected a finite"),
        ({"margins": {"strong": math.inf}}, r"config.margins\['strong'\] is inf; expected"),
        ({"margins": 2.0}, "config.margins is 2.0; expected a string or a mapping"),
        ({"margin": "llama2_small"}, "no field 'margin'. Did you mean 'margins'"),
        ({"ensemble": 0}, "config.ensemble is 0; expected at least 1"),
        ({"held_out": -1}, "config.held_out is -1; expected at least 0"),
        ({"normalization": {"kind": "std"}}, "normalization.kind is 'std'; expected one of none"),
        ({"normalization": {"kind": "mean"}}, "needs config.normalization.source"),
        ({"normalization": {"limit": 3}}, "limit is 3, but config.normalization.kind is 'none'"),
        (
            {"normalization": {"kind": "mean", "source": "texts.jsonl", "max_new_tokens": 3}},
            "max_new_tokens is 3, but config.normalization.policy is ''",
        ),
    ],
)
def test_settings_that_say_nothing_or_nonsense_are_refused(settings, message):
    with pytest.raises(RunError, match=message):
        Config.from_dict(settings)
