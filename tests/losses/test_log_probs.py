"""Log-probabilities against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.losses.log_probs import (
    chunked_token_log_probs,
    negative_log_likelihood,
    sequence_log_probs,
    token_log_probs,
)


def log_softmax64(logits):
    """`log softmax` over the last axis in float64."""
    x = np.asarray(logits, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def chosen64(log_p, tokens):
    return np.take_along_axis(log_p, np.asarray(tokens)[..., None], axis=-1)[..., 0]


def random_logits(*shape, scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    logits = (scale * rng.normal(size=shape)).astype(np.float32)
    return logits, rng.integers(0, shape[-1], shape[:-1]).astype(np.int32)


# token_log_probs


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("shape", [(11, 50), (3, 7, 50), (2, 3, 5, 50)])
def test_token_log_probs_equal_numpy(shape, temperature):
    logits, tokens = random_logits(*shape)
    actual = token_log_probs(logits, tokens, temperature=temperature)
    expected = chosen64(log_softmax64(logits.astype(np.float64) / temperature), tokens)
    assert actual.dtype == jnp.float32 and actual.shape == shape[:-1]
    np.testing.assert_allclose(actual, expected, atol=3e-6)


def test_token_log_probs_gradient_is_onehot_minus_softmax():
    logits, tokens = random_logits(3, 7, 20)
    weights = np.random.default_rng(1).normal(size=(3, 7))

    @jax.jit
    @jax.grad
    def gradient(x):
        return (weights * token_log_probs(x, tokens, temperature=0.7)).sum()

    p = np.exp(log_softmax64(logits.astype(np.float64) / 0.7))
    expected = weights[..., None] * (np.eye(20)[tokens] - p) / 0.7
    np.testing.assert_allclose(gradient(logits), expected, atol=3e-6)


def test_token_log_probs_take_bfloat16_and_give_float32():
    logits, tokens = random_logits(4, 30)
    logits = jnp.asarray(logits, jnp.bfloat16)
    actual = token_log_probs(logits, tokens)
    assert actual.dtype == jnp.float32
    expected = chosen64(log_softmax64(logits.astype(jnp.float32)), tokens)
    np.testing.assert_allclose(actual, expected, atol=3e-6)


def test_token_log_probs_of_extreme_logits_are_finite():
    logits = np.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4]], np.float32)
    tokens = np.array([1, 0, 2])
    np.testing.assert_allclose(
        token_log_probs(logits, tokens), [-2e4, -np.log(3), -np.log(3)], rtol=1e-6
    )
    gradient = jax.grad(lambda x: token_log_probs(x, tokens).sum())(logits)
    expected = np.eye(3)[tokens] - [[1, 0, 0], [1 / 3] * 3, [1 / 3] * 3]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    # A token that the sampler's filters sent to -inf counts for nothing in the others' normaliser.
    filtered = np.array([0.0, 1.0, -np.inf], np.float32)
    assert token_log_probs(filtered, jnp.array(1)) == pytest.approx(-np.log1p(np.exp(-1.0)))


def test_token_log_probs_under_jit_and_vmap():
    logits, tokens = random_logits(3, 7, 20)
    expected = token_log_probs(logits, tokens, temperature=0.7)
    compiled = jax.jit(token_log_probs, static_argnames="temperature")
    np.testing.assert_allclose(compiled(logits, tokens, temperature=0.7), expected, atol=1e-6)
    mapped = jax.vmap(lambda x, t: token_log_probs(x, t, temperature=0.7))
    np.testing.assert_allclose(mapped(logits, tokens), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x, i: token_log_probs(i, i[..., 0]), "logits"),
        (lambda x, i: token_log_probs(x, x[..., 0]), "tokens"),
        (lambda x, i: sequence_log_probs(i, i), "token_log_probs"),
        (lambda x, i: negative_log_likelihood(i, i), "token_log_probs"),
        (lambda x, i: chunked_token_log_probs(i[None], x, i[:, :3], chunk_size=2), "hidden"),
        (lambda x, i: chunked_token_log_probs(x[None], i, i[:, :3], chunk_size=2), "unembedding"),
        (lambda x, i: chunked_token_log_probs(x[None], x, x[:, :3], chunk_size=2), "tokens"),
    ],
)
def test_wrong_types_are_errors_that_name_the_argument(call, name):
    with pytest.raises(TypeError, match=f"^{name} must be"):
        call(np.zeros((3, 4), np.float32), np.zeros((3, 4), np.int32))


# sequence_log_probs, negative_log_likelihood

VALUES = np.array([[-1.5, -2.0, -0.25, -4.0], [-3.0, -1.0, -2.0, -0.5], [-1.0] * 4], np.float32)
MASK = np.array([[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]], np.float32)


@pytest.mark.parametrize("mask_dtype", [np.float32, np.int32, bool])
def test_sequence_log_probs_sum_or_average_what_counts(mask_dtype):
    mask = MASK.astype(mask_dtype)
    np.testing.assert_allclose(sequence_log_probs(VALUES, mask), [-5.75, -1.0, 0.0], rtol=1e-6)
    average = sequence_log_probs(VALUES, mask, average=True)
    np.testing.assert_allclose(average, [-5.75 / 3, -1.0, 0.0], rtol=1e-6)
    nll = negative_log_likelihood(VALUES, mask)
    np.testing.assert_array_equal(nll, np.where(MASK > 0, -VALUES, 0.0))


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, -1e38])
@pytest.mark.parametrize(
    "function",
    [
        sequence_log_probs,
        lambda x, m: sequence_log_probs(x, m, average=True),
        negative_log_likelihood,
    ],
    ids=["sum", "average", "nll"],
)
def test_what_stands_behind_the_mask_has_no_influence(function, junk):
    dirty = np.where(MASK > 0, VALUES, np.float32(junk))
    np.testing.assert_array_equal(function(dirty, MASK), function(VALUES, MASK))
    gradient = jax.grad(lambda x: function(x, MASK).sum())
    np.testing.assert_array_equal(gradient(dirty), gradient(VALUES))
    np.testing.assert_array_equal(np.asarray(gradient(dirty))[MASK == 0], 0.0)
    assert (np.asarray(gradient(dirty))[MASK > 0] != 0).all()
    if function is negative_log_likelihood:
        np.testing.assert_array_equal(np.asarray(function(dirty, MASK))[MASK == 0], 0.0)


@pytest.mark.parametrize("function", [sequence_log_probs, negative_log_likelihood])
def test_sums_of_bfloat16_are_float32_and_transforms_change_nothing(function):
    # 1 + 256 * 2^-7 would stay 1 if it were summed in bfloat16.
    halves = jnp.concatenate([jnp.ones(1), jnp.full(256, 2.0**-7)])[None].astype(jnp.bfloat16)
    assert function(halves, jnp.ones((1, 257))).dtype == jnp.float32
    assert abs(function(halves, jnp.ones((1, 257))).sum()) == 3.0
    expected = function(VALUES, MASK)
    np.testing.assert_array_equal(jax.jit(function)(VALUES, MASK), expected)
    np.testing.assert_array_equal(jax.vmap(function)(VALUES, MASK), expected)


# chunked_token_log_probs

B, T, V, D = 2, 11, 37, 5


def chunked_inputs(seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(B, T, D)).astype(np.float32),
        rng.normal(size=(V, D)).astype(np.float32),
        rng.integers(0, V, (B, T)).astype(np.int32),
        rng.normal(size=(2, B, T)).astype(np.float32),  # cotangents of log-probability and entropy
    )


def unchunked64(hidden, unembedding, tokens, temperature, cap):
    logits = np.asarray(hidden, np.float64) @ np.asarray(unembedding, np.float64).T
    if cap is not None:
        logits = cap * np.tanh(logits / cap)
    log_p = log_softmax64(logits / temperature)
    return chosen64(log_p, tokens), -(np.exp(log_p) * log_p).sum(-1)


def central_differences(f, x, step=1e-5):
    """Gradient of a scalar function of a float64 array."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        moved = [x.copy(), x.copy()]
        moved[0][index] += step
        moved[1][index] -= step
        gradient[index] = (f(moved[0]) - f(moved[1])) / (2 * step)
    return gradient


@pytest.mark.parametrize("entropy_weight", [0.0, 1.0], ids=["log_probs", "with_entropy"])
@pytest.mark.parametrize(
    ("chunk_size", "temperature", "cap"),
    [(4, 1.0, None), (11, 0.7, 5.0), (1, 0.7, None), (100, 1.3, 2.0)],
)
def test_chunked_equals_float64(chunk_size, temperature, cap, entropy_weight):
    hidden, unembedding, tokens, (g, h) = chunked_inputs()

    def loss(hidden, unembedding):
        log_probs, entropy = chunked_token_log_probs(
            hidden,
            unembedding,
            tokens,
            chunk_size=chunk_size,
            temperature=temperature,
            logit_softcap=cap,
        )
        total = (g * log_probs).sum()
        if entropy_weight:  # without it the entropy's cotangent is a symbolic zero
            total += (h * entropy).sum()
        return total, (log_probs, entropy)

    def loss64(hidden, unembedding):
        log_probs, entropy = unchunked64(hidden, unembedding, tokens, temperature, cap)
        return (g * log_probs).sum() + entropy_weight * (h * entropy).sum()

    gradients, (log_probs, entropy) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(
        hidden, unembedding
    )
    expected = unchunked64(hidden, unembedding, tokens, temperature, cap)
    for actual, reference in zip((log_probs, entropy), expected):
        assert actual.dtype == jnp.float32 and actual.shape == (B, T)
        np.testing.assert_allclose(actual, reference, atol=1e-5)
    hidden64, unembedding64 = hidden.astype(np.float64), unembedding.astype(np.float64)
    expected = (
        central_differences(lambda x: loss64(x, unembedding64), hidden64),
        central_differences(lambda x: loss64(hidden64, x), unembedding64),
    )
    for actual, reference in zip(gradients, expected):
        np.testing.assert_allclose(actual, reference, atol=2e-5)


def test_gradient_through_the_entropy_alone():
    hidden, unembedding, tokens, (_, h) = chunked_inputs()

    @jax.jit
    @jax.grad
    def gradient(x):
        return (h * chunked_token_log_probs(x, unembedding, tokens, chunk_size=4)[1]).sum()

    expected = central_differences(
        lambda x: (h * unchunked64(x, unembedding, tokens, 1.0, None)[1]).sum(),
        hidden.astype(np.float64),
    )
    np.testing.assert_allclose(gradient(hidden), expected, atol=1e-5)


def test_one_gradient_alone_and_under_vmap():
    """Each with the other input constant, as for a frozen head; and a stack of batches."""
    hidden, unembedding, tokens, (g, _) = chunked_inputs()

    def loss(hidden, unembedding, tokens):
        return (g * chunked_token_log_probs(hidden, unembedding, tokens, chunk_size=4)[0]).sum()

    both = jax.jit(jax.grad(loss, (0, 1)))
    for argument, expected in enumerate(both(hidden, unembedding, tokens)):
        alone = jax.jit(jax.grad(loss, argument))(hidden, unembedding, tokens)
        np.testing.assert_allclose(alone, expected, atol=1e-6)
    hidden, tokens = np.stack([hidden, 2 * hidden]), np.stack([tokens, tokens[:, ::-1]])
    mapped = jax.jit(jax.vmap(both, (0, None, 0)))(hidden, unembedding, tokens)
    for i in range(2):
        expected = both(hidden[i], unembedding, tokens[i])
        for actual, reference in zip(mapped, expected):
            np.testing.assert_allclose(actual[i], reference, atol=1e-5)


def test_bfloat16_hidden_with_float32_master_weights():
    hidden, unembedding, tokens, (g, h) = chunked_inputs()
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    rounded = (
        np.asarray(hidden, np.float64),
        np.asarray(jnp.asarray(unembedding, jnp.bfloat16), np.float64),
    )

    def loss(hidden, unembedding):
        out = chunked_token_log_probs(hidden, unembedding, tokens, chunk_size=4)
        return (g * out[0] + h * out[1]).sum(), out

    gradients, out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(hidden, unembedding)
    # Accumulated in float32: as exact as float32 is, given the rounded inputs.
    for actual, reference in zip(out, unchunked64(*rounded, tokens, 1.0, None)):
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, reference, atol=1e-5)
    assert [x.dtype for x in gradients] == [jnp.bfloat16, jnp.float32]

    def loss64(hidden, unembedding):
        out = unchunked64(hidden, unembedding, tokens, 1.0, None)
        return (g * out[0] + h * out[1]).sum()

    expected = (
        central_differences(lambda x: loss64(x, rounded[1]), rounded[0]),
        central_differences(lambda x: loss64(rounded[0], x), rounded[1]),
    )
    for actual, reference in zip(gradients, expected):
        difference = np.linalg.norm(np.asarray(actual, np.float64) - reference)
        assert difference < 2.0**-8 * np.linalg.norm(reference)


def test_chunked_with_extreme_logits():
    """Logits around +-1e4, whose entropy is that of their differences."""
    hidden = np.array([[[1e4, 0.0], [-1e4, 1.0], [1e4, 1.0]]], np.float32)
    unembedding = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [-1.0, 0.0]], np.float32)
    tokens = np.array([[0, 3, 3]])

    def loss(hidden, unembedding):
        out = chunked_token_log_probs(hidden, unembedding, tokens, chunk_size=2)
        return out[0].sum() + out[1].sum(), out

    gradients, out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(hidden, unembedding)
    for actual, reference in zip(out, unchunked64(hidden, unembedding, tokens, 1.0, None)):
        np.testing.assert_allclose(actual, reference, rtol=1e-6, atol=1e-3)
    # log 3 and the entropy of softmax(0, 1, 2), not what is left of 1e4 - 1e4.
    np.testing.assert_allclose(out[1], [[1.0986123, 0.0, 0.8323934]], atol=1e-3)
    assert all(np.isfinite(x).all() for x in gradients)
    shifted = np.array([[[5000.0, 1.0]]], np.float32)
    entropy = chunked_token_log_probs(shifted, unembedding, tokens[:, :1], chunk_size=1)[1]
    np.testing.assert_allclose(entropy, 0.8323934, atol=5e-4)
    assert (np.asarray(out[1]) >= 0).all()
