"""From logits to a sampled token: temperature, top-k, top-p, and the draw itself."""

import jax
import jax.numpy as jnp

Array = jax.Array

_BLOCK = 256


def filter_logits(logits: Array, *, top_k: int | None, top_p: Array | float | None) -> Array:
    """Sends to -inf what the sampler may not draw.

    Args:
      logits: `[N,V]` float32, already divided by the temperature.
      top_k: keep the k largest (Fan et al. 2018, arXiv:1805.04833); ties with the k-th stay too.
      top_p: then keep the smallest set of most probable tokens whose probability reaches p
        (Holtzman et al. 2020, arXiv:1904.09751), above 0; ties with the last of them stay too.

    Returns:
      `[N,V]` float32.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = (before < top_p).sum(-1, keepdims=True)
        smallest = jnp.take_along_axis(ordered, kept - 1, axis=-1)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits


def sample(logits: Array, keys: Array) -> tuple[Array, Array]:
    """Draws one token a row from `softmax(logits)`.

    Inverse transform in two stages (a block of 256 tokens, then a token in it): two uniforms a row
    instead of the one per vocabulary entry of the Gumbel trick, which on a CPU costs more than a
    layer. Two separate uniforms also resolve probabilities far below float32's 2^-24.

    Args:
      logits: `[N,V]` float32; -inf is never drawn.
      keys: `[N]` PRNG keys, one a row, so that a row's draw does not depend on its neighbours.

    Returns:
      tokens `[N]` int32 and their log-probabilities `[N]` float32, nats.
    """
    n, vocabulary = logits.shape
    log_p = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.pad(jnp.exp(log_p), ((0, 0), (0, -vocabulary % _BLOCK)))
    blocks = p.reshape(n, -1, _BLOCK)
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _inverse_transform(blocks.sum(-1), uniforms[:, 0])
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    tokens = block * _BLOCK + _inverse_transform(within, uniforms[:, 1])
    return tokens, jnp.take_along_axis(log_p, tokens[:, None], axis=-1)[:, 0]


def _inverse_transform(weights: Array, uniform: Array) -> Array:
    """`[N,M], [N] -> [N]` int32: index i with probability weights[i] / sum, never of weight 0."""
    # A parallel sum rounds its prefixes differently, so that one may rise at an entry of weight 0:
    # such entries take no part, and the total is a prefix that does.
    cumulative = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
    drawn = uniform[:, None] * cumulative.max(-1, keepdims=True)
    return jnp.argmax(cumulative > drawn, axis=-1).astype(jnp.int32)
