"""The sampler's filters against brute force, and its draws against the distribution they claim."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from align_jax.generation.logits import _inverse_transform, filter_logits, sample


def softmax64(logits):
    x = np.asarray(logits, np.float64)
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def brute_force(row, top_k, top_p):
    """Which tokens of one row (without ties) stay, token by token from the most probable on."""
    order = sorted(range(len(row)), key=lambda token: -row[token])
    if top_k is not None:
        order = order[:top_k]
    if top_p is not None:
        p, total, kept = softmax64(row[order]), 0.0, 0
        while total < top_p and kept < len(order):
            total += p[kept]
            kept += 1
        order = order[:kept]
    return set(order)


@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [(1, None), (5, None), (40, None), (100, None), (None, 0.05), (None, 0.6), (None, 0.95)]
    + [(5, 0.6), (30, 0.9), (100, 0.3), (None, 1e-6), (5, 1.0)],
)
def test_filters_keep_what_brute_force_keeps(top_k, top_p):
    logits = 2 * np.random.default_rng(0).normal(size=(20, 40)).astype(np.float32)
    filtered = np.asarray(filter_logits(logits, top_k=top_k, top_p=top_p))
    for row, after in zip(logits, filtered):
        kept = brute_force(row, top_k, top_p)
        assert {token for token in range(40) if after[token] > -np.inf} == kept
        np.testing.assert_array_equal(after[list(kept)], row[list(kept)])


def test_no_filter_and_top_p_of_1_keep_all():
    logits = np.random.default_rng(0).normal(size=(20, 40)).astype(np.float32)
    np.testing.assert_array_equal(filter_logits(logits, top_k=None, top_p=None), logits)
    np.testing.assert_array_equal(filter_logits(logits, top_k=None, top_p=1.0), logits)


def test_ties_with_the_last_kept_stay():
    logits = np.array([[1.0, 3.0, 2.0, 2.0, 0.0]], np.float32)
    for filters in ({"top_k": 2, "top_p": None}, {"top_k": None, "top_p": 0.7}):
        kept = np.asarray(filter_logits(logits, **filters)) > -np.inf
        np.testing.assert_array_equal(kept, [[False, True, True, True, False]])


def test_top_p_counts_after_top_k():
    # .5 .2 .2 .1: of the two most probable the first has 5/7, enough for 0.6 and not for 0.8.
    logits = np.log(np.array([[0.5, 0.2001, 0.1999, 0.1]], np.float32))
    for top_p, expected in ((0.6, 1), (0.8, 2)):
        kept = np.asarray(filter_logits(logits, top_k=2, top_p=top_p)) > -np.inf
        assert kept.sum() == expected


def chi_square_p_value(tokens, probabilities):
    """Of the draws, with rare tokens joined so that each class expects at least 10."""
    order = np.argsort(probabilities)
    expected = len(tokens) * probabilities[order]
    observed = np.bincount(tokens, minlength=len(order))[order]
    classes = np.floor(np.cumsum(expected) / 10).astype(int)
    classes = np.minimum(classes, classes[-1] - 1)  # the last may be short
    merged = [np.bincount(classes, x) for x in (observed, expected)]
    used = merged[1] > 0
    return stats.chisquare(merged[0][used], merged[1][used]).pvalue


@pytest.mark.parametrize("vocabulary", [3, 37, 256, 300, 700])
def test_frequencies_follow_the_softmax(vocabulary):
    rng = np.random.default_rng(vocabulary)
    logits = (1.5 * rng.normal(size=vocabulary)).astype(np.float32)
    logits[vocabulary // 3 : vocabulary // 2] = -np.inf
    draws = 20_000
    tokens, log_probs = jax.jit(lambda row, k: sample(jnp.tile(row, (draws, 1)), k))(
        logits, keys(draws)
    )
    tokens, p = np.asarray(tokens), softmax64(logits)
    assert tokens.dtype == np.int32 and tokens.min() >= 0 and tokens.max() < vocabulary
    assert np.isfinite(logits[tokens]).all()
    np.testing.assert_allclose(log_probs, np.log(p[tokens]), atol=3e-6)
    assert 0.001 < chi_square_p_value(tokens, p)
    # The test has the power to tell a temperature of 1 from one of 1.15.
    assert chi_square_p_value(tokens, softmax64(logits / 1.15)) < 0.001


def test_blocks_within_and_across_are_drawn_independently():
    """Two uniforms a row: within the second block, what is drawn must not follow the block."""
    p = np.full(512, 1e-12)
    p[[0, 255, 256, 300, 511]] = [0.3, 0.2, 0.1, 0.3, 0.1]
    logits = jnp.tile(jnp.log(jnp.asarray(p, jnp.float32)), (20_000, 1))
    tokens, _ = jax.jit(sample)(logits, keys(20_000, seed=1))
    assert 0.001 < chi_square_p_value(np.asarray(tokens), p / p.sum())


def test_minus_infinity_is_never_drawn():
    """One possible token a row, anywhere, in vocabularies that do and do not fill their blocks."""
    for vocabulary in (5, 256, 1000):
        rng = np.random.default_rng(0)
        allowed = rng.integers(0, vocabulary, 500)
        allowed[:2] = 0, vocabulary - 1
        logits = np.full((500, vocabulary), -np.inf, np.float32)
        logits[np.arange(500), allowed] = rng.normal(size=500)
        tokens, log_probs = jax.jit(sample)(logits, keys(500))
        np.testing.assert_array_equal(tokens, allowed)
        np.testing.assert_array_equal(log_probs, 0.0)


@pytest.mark.parametrize("entries", [3, 256, 501, 600])
def test_inverse_transform_never_takes_weight_zero(entries):
    """At the very boundaries, where a parallel sum's rounding shows (501 blocks: Llama 3)."""
    rng = np.random.default_rng(0)
    weights = rng.random((64, entries)) * (rng.random((64, entries)) < 0.1)
    weights[:, entries // 2] += 1e-3
    weights = weights.astype(np.float32)
    transform = jax.jit(_inverse_transform)
    cumulative = np.asarray(jnp.cumsum(weights, axis=-1))
    largest = np.float32(1 - 2.0**-23)  # that jax.random.uniform gives
    uniforms = [np.zeros(64, np.float32), np.full(64, largest)]
    for i in range(0, entries, max(1, entries // 128)):
        boundary = (cumulative[:, i] / cumulative[:, -1]).astype(np.float32)
        uniforms += [boundary, np.nextafter(boundary, np.float32(0))]
    for uniform in uniforms:
        drawn = np.asarray(transform(weights, np.clip(uniform, 0, largest)))
        assert (weights[np.arange(64), drawn] > 0).all()
    ends = [np.asarray(transform(weights, uniform)) for uniform in uniforms[:2]]
    np.testing.assert_array_equal(ends[0], (weights > 0).argmax(1))
    np.testing.assert_array_equal(ends[1], entries - 1 - (weights > 0)[:, ::-1].argmax(1))


def test_very_small_probabilities():
    """A mass of 1e-9 a token in every block, or a gap of 2e4 nats: finite, exact, and not drawn."""
    tiny = np.full((1000, 600), np.log(1e-9), np.float32)
    tiny[:, 431] = 0.0
    gap = np.full((1000, 600), -1e4, np.float32)
    gap[:, 431] = 1e4
    for logits in (tiny, gap):
        tokens, log_probs = jax.jit(sample)(logits, keys(1000))
        expected = np.log(softmax64(logits)[np.arange(1000), tokens])
        np.testing.assert_allclose(log_probs, expected, atol=1e-6)
        assert (np.asarray(tokens) == 431).mean() > 0.995
    # Alone among themselves they are drawn as their ratios say, however small exp(logit) is.
    logits = np.log(np.array([1e-9, 3e-9])).astype(np.float32) - 60
    tokens, log_probs = jax.jit(sample)(np.tile(logits, (4000, 1)), keys(4000))
    assert np.mean(tokens) == pytest.approx(0.75, abs=0.03)
    np.testing.assert_allclose(log_probs, np.log([0.25, 0.75])[tokens], atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours():
    logits = np.random.default_rng(0).normal(size=(12, 300)).astype(np.float32)
    row_keys, draw = keys(12), jax.jit(sample)
    tokens, log_probs = map(np.asarray, draw(logits, row_keys))
    order = np.random.default_rng(1).permutation(12)
    permuted = draw(logits[order], row_keys[order])
    np.testing.assert_array_equal(permuted[0], tokens[order])
    np.testing.assert_array_equal(permuted[1], log_probs[order])
    others = logits.copy()
    others[1:] = np.where(np.arange(300) < 7, 50.0, -np.inf)
    alone = draw(others, row_keys.at[1:].set(row_keys[0]))
    assert (alone[0][0], alone[1][0]) == (tokens[0], log_probs[0])
    for i in range(12):
        assert draw(logits[i : i + 1], row_keys[i : i + 1])[0][0] == tokens[i]
    assert len(set(np.asarray(draw(np.tile(logits[:1], (12, 1)), row_keys)[0]))) > 6
