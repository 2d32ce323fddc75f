"""The sampler's work and memory: what it draws, computes, keeps and compiles."""

import functools
import warnings

import jax
import numpy as np
import pytest

from align_jax.generation import generate, sampler
from tests.generation.prompts import keys_of, model_of, prompts_of
from tests.jaxprs import equations


@pytest.fixture
def count_draws(monkeypatch):
    """How often the compiled loop draws."""
    calls = []
    sample = sampler.sample

    def counting(logits, keys):
        jax.debug.callback(lambda: calls.append(logits.shape))
        return sample(logits, keys)

    monkeypatch.setattr(sampler, "sample", counting)
    return calls


def test_the_loop_stops_when_all_rows_have(count_draws):
    model, prompts, keys = model_of("tiny"), prompts_of(3, 4), keys_of(2)
    new = 61  # a shape of this test alone: only what is traced here counts its draws
    draw = functools.partial(generate, model, prompts, key=keys, max_new_tokens=new)
    free = np.asarray(draw(stop_tokens=[-1, -1]).tokens)
    jax.effects_barrier()
    assert len(count_draws) == new
    count_draws.clear()
    stop_tokens = [int(free[0, 3]), int(free[1, 6])]
    last = max(int(np.flatnonzero(np.isin(row, stop_tokens))[0]) for row in free)
    out = draw(stop_tokens=stop_tokens)
    jax.effects_barrier()
    assert 0 < last <= 6 and len(count_draws) == last + 1
    np.testing.assert_array_equal(np.asarray(out.mask).any(0), np.arange(new) <= last)
    np.testing.assert_array_equal(out.tokens, free * np.asarray(out.mask, np.int32))


def prefill_shapes(samples):
    model = model_of("tiny")
    tokens, lengths = np.ones((3, 24), np.int32), np.array([5, 24, 7], np.int32)
    jaxpr = jax.make_jaxpr(sampler._prefill, static_argnums=(3, 4))(
        model, tokens, lengths, samples, 7
    )
    products = [
        tuple(v.aval.shape for v in (*e.invars, *e.outvars))
        for e in equations(jaxpr.jaxpr)
        if e.primitive.name == "dot_general"
    ]
    cache, hidden = jax.eval_shape(
        lambda m, t, n: sampler._prefill(m, t, n, samples, 7), model, tokens, lengths
    )
    return products, cache, hidden


def test_the_prompt_is_computed_and_kept_once_for_all_its_samples():
    products, cache, hidden = prefill_shapes(samples=5)
    assert len(products) > 5 and products == prefill_shapes(samples=1)[0]
    model, n = model_of("tiny"), np.ones(3, np.int32)
    c = model.config
    per_token = (c.num_kv_heads, c.head_dim)
    assert hidden.shape == (3, c.hidden_size)
    assert cache.prompt_keys.shape == cache.prompt_values.shape == (2, 3, 24, *per_token)
    assert cache.sample_keys.shape == cache.sample_values.shape == (2, 3, 5, 7, *per_token)
    # Nor does decoding lay the prompt's keys out once per sample.
    decode = functools.partial(sampler._decode, greedy=False, top_k=None)
    jaxpr = jax.make_jaxpr(decode)(
        model, cache, hidden, n, keys_of(3), np.zeros(0, np.int32), 1.0, None
    )
    shapes = {v.aval.shape for e in equations(jaxpr.jaxpr) for v in e.outvars}
    assert (3, 5, 7, *per_token) in shapes and (3, 24, *per_token) in shapes
    repeated = 3 * 5 * 24 * c.num_kv_heads * c.head_dim
    assert repeated not in {int(np.prod(shape)) for shape in shapes}


def test_lengths_and_settings_within_a_bucket_compile_nothing_new():
    model = model_of("tiny")

    def draw(*lengths, seed, temperature, top_p):
        generate(
            model,
            prompts_of(*lengths, seed=seed),
            key=jax.random.key(seed),
            max_new_tokens=5,
            temperature=temperature,
            top_p=top_p,
            stop_tokens=[seed],
        )
        return sampler._prefill._cache_size(), sampler._decode._cache_size()

    first = draw(3, 9, seed=0, temperature=0.7, top_p=0.8)
    assert draw(12, 16, seed=1, temperature=1.3, top_p=0.9) == first
    assert draw(1, 2, seed=2, temperature=1, top_p=0.95) == first
    assert draw(1, 17, seed=2, temperature=1.0, top_p=0.95) == (first[0] + 1, first[1] + 1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_cache_is_donated(temperature):
    model, lengths = model_of("tiny"), np.array([5, 16], np.int32)
    cache, hidden = sampler._prefill(model, np.ones((2, 16), np.int32), lengths, 3, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "Some donated buffers were not usable", when compiling
        sampler._decode(
            model,
            cache,
            hidden,
            lengths,
            keys_of(2),
            np.zeros(0, np.int32),
            temperature or 1.0,
            None,
            greedy=temperature == 0,
            top_k=None,
        )
    assert all(x.is_deleted() for x in cache)
    assert not any(x.is_deleted() for x in jax.tree.leaves((model, hidden)))
