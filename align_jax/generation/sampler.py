"""Sampling continuations: prefill, then one compiled decoding loop with a key-value cache.

The cache has two parts: the prompt's keys and values, held once however many samples a prompt
gets, and each sample's own. Prompts are padded on the right to a length bucket; a sample's
positions go on from its prompt's true length, so padding never shows.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from align_jax.distributed.partitioning import constrain
from align_jax.generation.logits import filter_logits, sample
from align_jax.models.attention import attention
from align_jax.models.transformer import Transformer

Array = jax.Array

SMALLEST_BUCKET = 16
# Samples of a prompt, and tokens of a sample, beyond which an argument is a slip of the hand. What
# fits in memory is less.
MAX_SAMPLES, MAX_NEW_TOKENS = 2**16, 2**24


class Generation(NamedTuple):
    """Samples, prompt by prompt: row `i * samples_per_prompt + j` is sample j of prompt i.

    Attributes:
      tokens: `[N, max_new_tokens]` int32; 0 after a row has stopped.
      mask: `[N, max_new_tokens]` float32, 1 on generated tokens, the stop token included.
      log_probs: `[N, max_new_tokens]` float32, nats, of each token under the distribution it was
        drawn from (temperature and filters applied); under the untempered one for greedy decoding.
    """

    tokens: Array
    mask: Array
    log_probs: Array


class _Cache(NamedTuple):
    """Keys and values: `prompt_*` `[L,P,Tp,K,d]`, `sample_*` `[L,P,S,Tn,K,d]`."""

    prompt_keys: Array
    prompt_values: Array
    sample_keys: Array
    sample_values: Array


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    key: Array,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    samples_per_prompt: int = 1,
) -> Generation:
    """Samples continuations of prompts of any lengths.

    Args:
      model: the policy.
      prompts: lists of token ids, each with at least one.
      key: a PRNG key, or an array of one key per prompt. A sample depends on its prompt's key and
        its number only, not on what else is in the call.
      max_new_tokens: tokens per sample at most.
      temperature: divides the logits; 0 is greedy decoding.
      top_k, top_p: see `logits.filter_logits`.
      stop_tokens: a sample ends with the first of these it draws.
      samples_per_prompt: the prompt is computed once for all of them.

    Raises:
      ValueError: an empty prompt, an option out of its range, another number of keys than of
        prompts, or more tokens than the model has positions.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)  # `jax.random.PRNGKey`'s plain integers
    check_options(temperature, top_k, top_p, samples_per_prompt, max_new_tokens)
    _check_prompts(model, lengths, key, max_new_tokens)
    padded = np.zeros((len(prompts), prompt_bucket(int(lengths.max()))), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    if key.shape == ():
        key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(prompts)))
    cache, hidden = _prefill(model, padded, lengths, samples_per_prompt, max_new_tokens)
    out, _ = _decode(
        model,
        cache,
        hidden,
        lengths,
        key,
        jnp.asarray(tuple(stop_tokens), jnp.int32),
        float(temperature) or 1.0,  # floats, so that 1 and 1.0 share a compilation
        None if top_p is None else float(top_p),
        greedy=temperature == 0,
        top_k=top_k,
    )
    return out


def prompt_bucket(length: int) -> int:
    """Prompts are padded to 16, 24, 32, 48, 64, 96, ...: few shapes, at most a third of padding."""
    bucket = SMALLEST_BUCKET
    while bucket < length:
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
    return bucket


def _check_prompts(model, lengths, key, max_new_tokens):
    if len(lengths) == 0:
        raise ValueError("generate: there is no prompt.")
    if lengths.min() == 0:
        raise ValueError(
            f"generate: prompt {lengths.argmin()} is empty; every prompt needs at least one token."
        )
    if key.shape not in ((), lengths.shape):
        raise ValueError(
            f"generate: {len(lengths)} prompt(s) need one key, or one each; got {key.shape} keys."
        )
    longest = int(lengths.max()) + max_new_tokens
    if longest > model.config.context_length:
        raise ValueError(
            f"generate: a prompt of {lengths.max()} tokens and {max_new_tokens} new ones exceed "
            f"the model's context of {model.config.context_length} tokens; shorten one of them."
        )


def check_options(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    samples_per_prompt: int,
    max_new_tokens: int,
) -> None:
    """Raises `ValueError` for an option of `generate` that no model makes right."""
    if not 0 <= temperature < math.inf:
        bound = "at least 0" if temperature < 0 else "finite"
        raise ValueError(f"generate: temperature must be {bound}, got {temperature}.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1 (or None), got {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be above 0 and at most 1, got {top_p}.")
    for name, value, most in (
        ("samples_per_prompt", samples_per_prompt, MAX_SAMPLES),
        ("max_new_tokens", max_new_tokens, MAX_NEW_TOKENS),
    ):
        if not 1 <= value <= most:
            bound = "at least 1" if value < 1 else f"at most {most}"
            raise ValueError(f"generate: {name} must be {bound}, got {value}.")


@functools.partial(jax.jit, static_argnums=(3, 4))
def _prefill(model, tokens, lengths, samples, max_new_tokens):
    """Runs the prompts: their cache, and the hidden state `[P,D]` of each one's last token."""
    c = model.config
    rows, length = tokens.shape
    shape = (c.num_layers, rows, length, c.num_kv_heads, c.head_dim)
    dtype = jnp.dtype(c.compute_dtype)
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)

    def attend(layer, queries, keys, values, cache):
        heads = attention(
            queries,
            keys,
            values,
            segment_ids=segment_ids,
            sliding_window=c.sliding_window,
            positions=positions,
        )
        return heads, (cache[0].at[layer].set(keys), cache[1].at[layer].set(values))

    zeros = jnp.zeros(shape, dtype)
    hidden, (keys, values) = model.run_layers(tokens, positions, attend, (zeros, zeros))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    own = jnp.zeros(
        (2, c.num_layers, rows, samples, max_new_tokens, c.num_kv_heads, c.head_dim), dtype
    )
    return _Cache(keys, values, own[0], own[1]), last


@functools.partial(jax.jit, static_argnames=("greedy", "top_k"), donate_argnames=("cache",))
def _decode(model, cache, hidden, lengths, keys, stop_tokens, temperature, top_p, *, greedy, top_k):
    """Draws until every row has stopped; `hidden` is `[P,D]`, one a prompt.

    Returns the used-up cache too: a donated buffer is only reused for an output.
    """
    rows, samples, limit = cache.sample_keys.shape[1:4]
    n = rows * samples
    keys = jax.vmap(lambda k: jax.vmap(jax.random.fold_in, (None, 0))(k, jnp.arange(samples)))(keys)
    keys = keys.reshape(n)
    prompt_lengths = jnp.repeat(lengths, samples)

    def draw(hidden, step):
        logits = model.logits(hidden)
        if greedy:
            tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            log_p = jax.nn.log_softmax(logits, axis=-1)
            return tokens, jnp.take_along_axis(log_p, tokens[:, None], axis=-1)[:, 0]
        logits = filter_logits(logits / temperature, top_k=top_k, top_p=top_p)
        return sample(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, step))

    def record(out, step, drawn, stopped):
        tokens, log_probs = drawn
        live = ~stopped
        out = Generation(
            out.tokens.at[:, step].set(jnp.where(live, tokens, 0)),
            out.mask.at[:, step].set(live.astype(jnp.float32)),
            out.log_probs.at[:, step].set(jnp.where(live, log_probs, 0.0)),
        )
        return out, stopped | (tokens[:, None] == stop_tokens).any(-1)

    def go_on(state):
        step, stopped, *_ = state
        return (step < limit) & ~stopped.all()

    def advance(state):
        step, stopped, tokens, cache, out = state
        hidden, cache = _decode_layers(model, tokens, step - 1, prompt_lengths, cache, lengths)
        drawn = draw(hidden, step)
        out, stopped = record(out, step, drawn, stopped)
        return step + 1, stopped, drawn[0], cache, out

    empty = jnp.zeros((n, limit))
    out = Generation(empty.astype(jnp.int32), empty, empty)
    drawn = draw(jnp.repeat(hidden, samples, axis=0), 0)
    out, stopped = record(out, 0, drawn, jnp.zeros(n, bool))
    *_, cache, out = jax.lax.while_loop(go_on, advance, (1, stopped, drawn[0], cache, out))
    # Whole on every device, so that each of several hosts can read all of it.
    return Generation(*(constrain(x, None, None) for x in out)), cache


def _decode_layers(model, tokens, step, prompt_lengths, cache, lengths):
    """One token a row through all layers: hidden states `[N,D]` and the cache with it at `step`."""
    c = model.config
    rows, samples = cache.sample_keys.shape[1:3]
    prompt_length = cache.prompt_keys.shape[2]
    limit = cache.sample_keys.shape[3]
    position = prompt_lengths + step
    prompt_index = jnp.arange(prompt_length)
    sees_prompt = prompt_index[None] < lengths[:, None]  # [P,Tp]
    sees_own = jnp.arange(limit) <= step  # [Tn]
    if c.sliding_window is not None:
        sees_prompt &= (lengths[:, None] + step) - prompt_index[None] < c.sliding_window
        sees_own &= step - jnp.arange(limit) < c.sliding_window

    def attend(layer, queries, keys, values, cache):
        heads, k = c.num_heads, c.num_kv_heads
        put = lambda stored, new: jax.lax.dynamic_update_slice(  # noqa: E731
            stored, new.reshape(1, rows, samples, 1, k, c.head_dim), (layer, 0, 0, step, 0, 0)
        )
        cache = cache._replace(
            sample_keys=put(cache.sample_keys, keys), sample_values=put(cache.sample_values, values)
        )
        folded = queries.reshape(rows, samples, k, heads // k, c.head_dim)
        on_prompt = jnp.einsum(
            "pskgd,ptkd->pskgt",
            folded,
            cache.prompt_keys[layer],
            preferred_element_type=jnp.float32,
        )
        on_own = jnp.einsum(
            "pskgd,pstkd->pskgt",
            folded,
            cache.sample_keys[layer],
            preferred_element_type=jnp.float32,
        )
        scores = jnp.concatenate(
            [
                jnp.where(sees_prompt[:, None, None, None], on_prompt, -1e30),
                jnp.where(sees_own, on_own, -1e30),
            ],
            axis=-1,
        )
        weights = jax.nn.softmax(scores * c.head_dim**-0.5, axis=-1).astype(queries.dtype)
        merged = jnp.einsum(
            "pskgt,ptkd->pskgd", weights[..., :prompt_length], cache.prompt_values[layer]
        ) + jnp.einsum(
            "pskgt,pstkd->pskgd", weights[..., prompt_length:], cache.sample_values[layer]
        )
        return merged.reshape(rows * samples, 1, heads, c.head_dim), cache

    hidden, cache = model.run_layers(tokens[:, None], position[:, None], attend, cache)
    return hidden[:, 0], cache
