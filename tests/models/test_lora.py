"""Low-rank adapters against dense algebra done by hand: W + (alpha / r) A B."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.models.dimensions import parameter_dimensions
from align_jax.models.frozen import combine, partition
from align_jax.models.heads import ScalarModel
from align_jax.models.interchange import load_model, load_tokenizer, save_model
from align_jax.models.lora import add_adapters, merge_adapters, without_adapters
from align_jax.models.transformer import Transformer

FAMILIES = ("tiny", "tiny:gpt2")
RANK, ALPHA = 3, 7.5
TOKENS = np.random.default_rng(0).integers(8, 264, (3, 19), np.int32)


def adapted(base, *, targets=None, seed=1):
    """The base with adapters whose B is not zero any more."""
    model = add_adapters(base, rank=RANK, alpha=ALPHA, key=jax.random.key(0), targets=targets)
    rng = np.random.default_rng(seed)

    def draw(leaf):
        # As large as a kernel; larger ones saturate the attention, and float32 loses digits.
        return jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype)

    model.adapters = jax.tree.map(draw, model.adapters)
    return model


def kernel(model, name):
    attention, mlp = model.blocks.attention, model.blocks.mlp
    return getattr(attention if hasattr(attention, name) else mlp, name)


def as_matrices(name, stacked):
    """A kernel or its gradient as `[layers, inputs, outputs]` float64."""
    x = np.asarray(stacked, np.float64)
    if name == "down":
        return x.swapaxes(1, 2)  # stored output first
    inputs = 2 if name == "output" else 1
    return x.reshape(len(x), int(np.prod(x.shape[1 : 1 + inputs])), -1)


def factors(model, name):
    a, b = (np.asarray(getattr(model.adapters, f"{name}_{side}")[...], np.float64) for side in "ab")
    return a.reshape(len(a), -1, RANK), b.reshape(len(b), RANK, -1)


def dense(base, model):
    """A plain transformer with the kernels that the adapters amount to, by numpy."""
    out = jax.tree.map(lambda x: x, base)
    for name in model.adapters.targets:
        a, b = factors(model, name)
        merged = as_matrices(name, kernel(base, name)[...]) + ALPHA / RANK * (a @ b)
        if name == "down":
            merged = merged.swapaxes(1, 2)
        parameter = kernel(out, name)
        parameter.set_value(jnp.asarray(merged.reshape(parameter.shape), jnp.float32))
    return out


@jax.jit
def logits(model, tokens):
    return model.logits(model(tokens))


@pytest.mark.parametrize("name", FAMILIES)
def test_it_starts_as_its_base_exactly(name):
    base = load_model(name)
    model = add_adapters(base, rank=RANK, alpha=ALPHA, key=jax.random.key(0))
    np.testing.assert_array_equal(logits(model, TOKENS), logits(base, TOKENS))
    for target in model.adapters.targets:
        a, b = factors(model, target)
        assert a.any() and not b.any()


def test_a_is_normal_with_the_variance_of_the_authors_code_whatever_the_other_targets():
    base = load_model("tiny")
    base.config = dataclasses.replace(base.config, hidden_size=300, mlp_size=700)
    wide = add_adapters(base, rank=64, alpha=1, key=jax.random.key(0), targets=["up", "down"])
    for name, fan_in in (("up", 300), ("down", 700)):
        a = np.asarray(getattr(wide.adapters, f"{name}_a")[...])
        assert a.shape == (2, fan_in, 64)
        assert a.std() == pytest.approx((3 * fan_in) ** -0.5, rel=0.02)
        assert abs(a.mean()) < 4 * a.std() / np.sqrt(a.size)
    alone = add_adapters(base, rank=64, alpha=1, key=jax.random.key(0), targets=["down"])
    np.testing.assert_array_equal(alone.adapters.down_a[...], wide.adapters.down_a[...])
    other = add_adapters(base, rank=64, alpha=1, key=jax.random.key(1), targets=["down"])
    assert not np.array_equal(other.adapters.down_a[...], alone.adapters.down_a[...])


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_dense_sum_before_and_after_merging(name):
    base = load_model(name)
    model = adapted(base)
    expected = logits(dense(base, model), TOKENS)
    assert np.abs(expected - logits(base, TOKENS)).max() > 0.5
    np.testing.assert_allclose(logits(model, TOKENS), expected, atol=2e-5)
    merged = merge_adapters(model)
    assert jax.tree.structure(merged) == jax.tree.structure(base)  # plain, every parameter trained
    np.testing.assert_allclose(logits(merged, TOKENS), expected, atol=2e-5)


@pytest.mark.parametrize(("name", "remat"), [("tiny", "linear"), ("tiny:gpt2", "none")])
def test_gradients_follow_from_those_of_the_merged_kernels_by_the_chain_rule(name, remat):
    base = load_model(name, remat=remat)
    model = adapted(base)
    weights = np.random.default_rng(2).normal(size=(3, 19, 32)).astype(np.float32)

    def loss(model):
        return (weights * model(TOKENS)).sum()

    by_kernel = jax.jit(jax.grad(loss))(dense(base, model))
    trained, frozen = partition(model)
    found = jax.jit(jax.grad(lambda part: loss(combine(part, frozen))))(trained)
    assert len(jax.tree.leaves(found)) == 2 * len(model.adapters.targets)
    for target in model.adapters.targets:
        g = as_matrices(target, kernel(by_kernel, target)[...])
        a, b = factors(model, target)
        expected = ALPHA / RANK * (g @ b.swapaxes(1, 2)), ALPHA / RANK * (a.swapaxes(1, 2) @ g)
        for gradient, wanted in zip(factors(found, target), expected, strict=True):
            difference = np.abs(gradient - wanted).max()
            assert difference < 1e-5 * np.abs(wanted).max(), target


def test_the_step_never_forms_a_kernels_gradient():
    model = adapted(load_model("tiny", remat="linear"), targets=["query", "up", "down"])

    def products(part, rest):
        """Shapes of all matrix products of a compiled gradient."""

        def loss(part):
            return jnp.square(combine(part, rest)(TOKENS)).sum()

        jax.config.update("jax_disable_most_optimizations", False)
        try:
            text = jax.jit(jax.grad(loss)).lower(part).compile().as_text()
        finally:
            jax.config.update("jax_disable_most_optimizations", True)
        lines = [line.split(" = ")[1] for line in text.splitlines() if " dot(" in line]
        return {line.split("{")[0] for line in lines}

    # [mlp, embed] or transposed; 19 x 3 tokens, 264 words: nothing else has these sizes.
    shapes = {"f32[32,64]", "f32[64,32]"}
    assert shapes & products(*partition(merge_adapters(model)))
    found = products(*partition(model))
    assert found and not shapes & found


def test_the_reference_view_has_the_bases_numbers_and_arrays():
    base = load_model("tiny")
    model = adapted(base)
    reference = without_adapters(model)
    np.testing.assert_array_equal(logits(reference, TOKENS), logits(base, TOKENS))
    leaves = zip(jax.tree.leaves(reference), jax.tree.leaves(base), strict=True)
    assert all(a is b for a, b in leaves)
    assert not jax.tree.leaves(partition(reference)[0])
    assert model.adapters is not None and base.adapters is None


def test_merging_keeps_dtypes_shares_the_rest_and_leaves_the_adapted_model_alone():
    base = load_model("tiny", dtype="bfloat16")
    model = adapted(base, targets=["up", "value"])
    before = logits(model, TOKENS)
    merged = merge_adapters(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}
    same = {
        name
        for name in ("query", "value", "up", "down")
        if kernel(merged, name)[...] is kernel(base, name)[...]
    }
    assert same == {"query", "down"} and merged.embedding[...] is base.embedding[...]
    np.testing.assert_array_equal(logits(model, TOKENS), before)
    assert merge_adapters(base).blocks.mlp.up[...] is base.blocks.mlp.up[...]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_model_is_the_merged_one(name, tmp_path):
    model = adapted(load_model(name))
    save_model(model, load_tokenizer(name), tmp_path / "out")
    loaded, merged = load_model(tmp_path / "out"), merge_adapters(model)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(merged), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_scalar_model_trains_its_adapters_and_its_head():
    trunk = adapted(load_model("tiny"), targets=["query"])
    model = ScalarModel(trunk, key=jax.random.key(0))
    scalars = jax.jit(lambda m: m(TOKENS))(model)
    dense_trunk = ScalarModel(merge_adapters(trunk), key=jax.random.key(0))
    np.testing.assert_allclose(scalars, dense_trunk(TOKENS), atol=2e-5)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(partition(model)[0]))
    assert shapes == [(), (2, 3, 4, 8), (2, 32, 3), (32,)]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_factor_has_as_many_names_as_dimensions(name):
    model = adapted(load_model(name))
    named = parameter_dimensions(model)
    names = jax.tree.leaves(named, is_leaf=lambda x: isinstance(x, tuple))
    assert named.adapters.value_a.get_value() == ("layers", "embed", "rank")
    assert named.adapters.value_b.get_value() == ("layers", "rank", "kv_heads", "head_dim")
    assert named.adapters.down_a.get_value() == ("layers", "mlp", "rank")
    for leaf, dimensions in zip(jax.tree.leaves(model), names, strict=True):
        assert leaf.ndim == len(dimensions)


def test_shapes_alone_are_enough():
    config = load_model("tiny").config

    def make(key):
        base = Transformer(config, key=key)
        return add_adapters(base, rank=RANK, alpha=ALPHA, key=key)

    shapes = jax.eval_shape(make, jax.random.key(0))
    assert jax.tree.structure(shapes) == jax.tree.structure(adapted(load_model("tiny")))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("tiny", {"rank": 0}, "rank is 0; expected a whole number of at least 1"),
        ("tiny", {"rank": 2.0}, "rank is 2.0"),
        ("tiny", {"alpha": 0}, "alpha is 0; expected a number above 0"),
        ("tiny", {"alpha": float("nan")}, "alpha is nan"),
        ("tiny", {"targets": ()}, "targets is empty; this model has query, key"),
        ("tiny", {"targets": ["query", "quary"]}, "targets names 'quary'; this model has query"),
        ("tiny:gpt2", {"targets": ["gate"]}, "targets names 'gate'; .*output, up, down"),
    ],
)
def test_what_makes_no_sense_is_refused_by_the_arguments_name(name, arguments, message):
    arguments = {"rank": 2, "alpha": 4.0} | arguments
    with pytest.raises(ValueError, match=message):
        add_adapters(load_model(name), key=jax.random.key(0), **arguments)


def test_adapters_are_not_stacked():
    with pytest.raises(ValueError, match="has adapters already"):
        add_adapters(adapted(load_model("tiny")), rank=1, alpha=1.0, key=jax.random.key(0))
