"""The transformer against brute force: who sees whom, positions, blocks, groups, remat, heads."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.models import attention as attention_module
from align_jax.models.attention import attention, visible
from align_jax.models.heads import ScalarHead, ScalarModel, without_unembedding
from align_jax.models.interchange import load_model
from align_jax.models.transformer import Transformer, segment_positions

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
TOLERANCE = 1e-5


def sharpened(name):
    """A tiny model whose attention is far from uniform."""
    model = load_model(name)
    return jax.tree.map(lambda x: x * 8 if x.ndim > 2 else x, model)


@pytest.fixture(scope="module", params=["tiny", "tiny:gpt2"])
def run(request):
    model = sharpened(request.param)
    return jax.jit(lambda tokens, **kwargs: model(tokens, **kwargs))


def tokens_of(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 264, n) for n in lengths]


def test_mask_rule_against_brute_force():
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(0, 3, (4, 12)), axis=1)
    branches = rng.integers(0, 3, (4, 12))
    index = np.arange(12)
    got = visible(index, index, segments, segments, branches, branches)
    for b, i, j in np.ndindex(4, 12, 12):
        seen = j <= i and segments[b, i] == segments[b, j]
        seen = seen and branches[b, j] in (0, branches[b, i])
        assert got[b, i, j] == seen


def test_responses_that_share_a_prompt_equal_separate_rows(run):
    prompt, first, second = tokens_of(9, 5, 7)
    rows = [np.concatenate([prompt, response]) for response in (first, second)]
    separate = [run(row[None])[0] for row in rows]
    shared = run(
        np.concatenate([prompt, first, second])[None],
        positions=np.concatenate([np.arange(14), np.arange(9, 16)])[None],
        segment_ids=np.ones((1, 21), int),
        branch_ids=np.repeat([0, 1, 2], (9, 5, 7))[None],
    )[0]
    np.testing.assert_allclose(shared[:14], separate[0], atol=TOLERANCE)
    np.testing.assert_allclose(shared[14:], separate[1][9:], atol=TOLERANCE)
    causal = run(np.concatenate([prompt, first, second])[None])[0]
    assert np.abs(causal[14:] - separate[1][9:]).max() > 0.01  # the mask is what makes it so


def test_packing_changes_nothing(run):
    parts = tokens_of(4, 1, 11)
    segments = np.repeat([1, 2, 3], (4, 1, 11))[None]
    packed = run(np.concatenate(parts)[None], segment_ids=segments)[0]
    alone = np.concatenate([run(part[None])[0] for part in parts])
    np.testing.assert_allclose(packed, alone, atol=TOLERANCE)


@pytest.mark.parametrize("before", [0, 6])
def test_padding_changes_nothing(run, before):
    (tokens,) = tokens_of(10)
    alone = run(tokens[None])[0]
    for filler in (0, 2, 200):
        row = np.full((1, 16), filler)
        row[0, before : before + 10] = tokens
        segments = np.zeros((1, 16), int)
        segments[0, before : before + 10] = 1
        padded = run(row, segment_ids=segments)[0]
        assert np.isfinite(padded).all()
        np.testing.assert_allclose(padded[before : before + 10], alone, atol=TOLERANCE)


def test_other_rows_change_nothing(run):
    a, b, c = (part[None] for part in tokens_of(8, 8, 8))
    batch = run(np.concatenate([a, b, c]))
    np.testing.assert_allclose(batch[1], run(b)[0], atol=TOLERANCE)


def test_the_future_changes_nothing(run):
    (tokens,) = tokens_of(12)
    changed = np.concatenate([tokens[:7], (tokens[7:] + 1) % 264])
    np.testing.assert_allclose(run(tokens[None])[0, :7], run(changed[None])[0, :7], atol=TOLERANCE)


def test_position_rule():
    segments = jnp.array([[0, 0, 1, 1, 1, 2, 2, 3], [1, 1, 2, 1, 1, 1, 0, 0]])
    expected = [[0, 1, 0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 1, 2, 0, 1]]
    np.testing.assert_array_equal(segment_positions((2, 8), segments), expected)
    np.testing.assert_array_equal(segment_positions((1, 3), None), [[0, 1, 2]])


def dense_attention(queries, keys, values, mask):
    """Plain softmax attention, keys and values repeated for each head of a group; float64."""
    queries, keys, values = (np.asarray(x, np.float64) for x in (queries, keys, values))
    group = queries.shape[2] // keys.shape[2]
    keys, values = (np.repeat(x, group, axis=2) for x in (keys, values))
    scores = np.einsum("bthd,bshd->bhts", queries, keys) / np.sqrt(queries.shape[-1])
    scores = np.where(mask[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), values)


@pytest.mark.parametrize("length", [5, 128, 300])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_blocked_grouped_attention_equals_dense(length, kv_heads):
    keys = jax.random.split(jax.random.key(length), 3)
    q = 2 * jax.random.normal(keys[0], (2, length, 6, 4))
    k, v = (jax.random.normal(key, (2, length, kv_heads, 4)) for key in keys[1:])
    index = np.arange(length)
    causal = np.broadcast_to(index[:, None] >= index, (2, length, length))
    np.testing.assert_allclose(attention(q, k, v), dense_attention(q, k, v, causal), atol=1e-5)

    segments = np.stack([1 + index * 4 // length, 1 + index * 3 // length])
    branches = np.stack([index % 3, np.zeros(length, int)])
    positions = np.asarray(segment_positions((2, length), jnp.asarray(segments)))
    distance = positions[:, :, None] - positions[:, None]
    mask = causal & (segments[:, :, None] == segments[:, None]) & (distance < 20)
    mask &= (branches[:, None] == 0) | (branches[:, None] == branches[:, :, None])
    got = attention(
        q,
        k,
        v,
        segment_ids=segments,
        branch_ids=branches,
        sliding_window=20,
        positions=positions,
    )
    np.testing.assert_allclose(got, dense_attention(q, k, v, mask), atol=1e-5)


def test_the_block_size_changes_nothing(monkeypatch):
    model = sharpened("tiny")
    tokens = np.stack(tokens_of(130, 130))
    expected = model(tokens)
    monkeypatch.setattr(attention_module, "QUERY_BLOCK", 1_000)
    np.testing.assert_allclose(model(tokens), expected, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["tiny", "tiny:gpt2"])
def test_remat_changes_no_value_and_no_gradient(name):
    tokens = np.stack(tokens_of(12, 12))

    def loss(model):
        return jnp.square(model.logits(model(tokens))).mean()

    value, gradient = {}, {}
    for remat in ("none", "linear", "full"):
        value[remat], grad = jax.jit(jax.value_and_grad(loss))(load_model(name, remat=remat))
        gradient[remat] = jax.tree.leaves(grad)
        assert value[remat] == pytest.approx(float(value["none"]), rel=1e-6)
        for ours, plain in zip(gradient[remat], gradient["none"], strict=True):
            np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-8)
    assert all(np.abs(leaf).max() > 0 for leaf in gradient["none"])


def test_remat_keeps_less():
    """The point of it: residuals of a gradient in bytes, by policy."""
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)

    def residuals(remat):
        config = dataclasses.replace(load_model("tiny").config, num_layers=8, remat=remat)
        model = jax.eval_shape(lambda: Transformer(config, key=jax.random.key(0)))
        _, back = jax.eval_shape(lambda m, t: jax.vjp(lambda m: m(t).sum(), m), model, tokens)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(back))

    assert residuals("full") < residuals("linear") < residuals("none")


def test_bfloat16_compute_stays_near_float32():
    exact = load_model("tiny")
    rough = load_model("tiny", compute_dtype="bfloat16")
    tokens = np.stack(tokens_of(20))
    hidden = rough(tokens)
    assert hidden.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(rough)} == {jnp.dtype("float32")}
    logits = rough.logits(hidden)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact.logits(exact(tokens)), atol=0.03)


def test_reward_head_starts_at_the_papers_scale():
    head = ScalarHead(20_000, key=jax.random.key(0))
    kernel = np.asarray(head.head_kernel[...])
    assert kernel.std() == pytest.approx(20_001**-0.5, rel=0.03)
    assert abs(kernel.mean()) < 4 * 20_001**-0.5 / np.sqrt(20_000)
    assert head.head_bias[...] == 0.0
    hidden = np.random.default_rng(0).normal(size=(2, 3, 20_000)).astype(np.float32)
    np.testing.assert_allclose(head(hidden), hidden @ kernel, atol=1e-4)


def test_value_head_starts_at_zero():
    model = ScalarModel(load_model("tiny"), key=None)
    values = model(np.stack(tokens_of(6, 6)))
    assert values.shape == (2, 6) and values.dtype == jnp.float32
    assert not np.asarray(values).any()


def test_an_untied_projection_to_the_vocabulary_is_left_out():
    transformer = load_model(GOLDENS / "llama_untied")
    tokens = np.random.default_rng(0).integers(0, 90, (2, 11)).astype(np.int32)
    bare = without_unembedding(transformer)
    assert bare.unembedding is None and transformer.unembedding is not None
    np.testing.assert_array_equal(bare(tokens), transformer(tokens))
    assert without_unembedding(bare) is bare
    assert len(jax.tree.leaves(bare)) == len(jax.tree.leaves(transformer)) - 1
