"""Log-probabilities of tokens and sequences, with and without the full logits in memory.

All log-probabilities are in nats and float32. `tokens` are the tokens whose probability is asked
for: `logits[..., t, :]` is the distribution over `tokens[..., t]`, so a caller with next-token
logits shifts them first.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def token_log_probs(logits: Array, tokens: Array, *, temperature: float = 1.0) -> Array:
    """Log-probability of each token: `log softmax(logits / temperature)[token]`.

    Args:
      logits: `[...,T,V]` float.
      tokens: `[...,T]` integer.
      temperature: divides the logits, as the sampler that drew the tokens did.

    Returns:
      `[...,T]` float32, nats.

    Raises:
      TypeError: logits are not floats, or tokens not integers.
    """
    _check_types(logits=logits, tokens=tokens)
    # Not as logit - logsumexp, which loses digits where logits are large (low temperatures).
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)
    return jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]


def sequence_log_probs(token_log_probs: Array, mask: Array, *, average: bool = False) -> Array:
    """Log-probability of each sequence: the sum (or mean) of its counted tokens'.

    Args:
      token_log_probs: `[...,T]` float, nats.
      mask: `[...,T]`, 1 where a token counts; what stands elsewhere (NaN included) has no
        influence.
      average: divide by the number of counted tokens; a sequence with none gives 0.

    Returns:
      `[...]` float32, nats (nats per token with `average`).
    """
    _check_types(token_log_probs=token_log_probs)
    counted = jnp.where(mask > 0, token_log_probs.astype(jnp.float32), 0.0)
    total = counted.sum(-1)
    return total / jnp.maximum((mask > 0).sum(-1), 1) if average else total


def negative_log_likelihood(token_log_probs: Array, mask: Array) -> Array:
    """Supervised fine-tuning's loss of each token: `-log pi(y_t | x, y_<t)` where the mask is 1.

    The mask is what keeps prompts out of the loss (Ouyang et al. 2022, arXiv:2203.02155, section
    3.5).

    Args:
      token_log_probs: `[...,T]` float, nats.
      mask: `[...,T]`, 1 where a token counts.

    Returns:
      `[...,T]` float32, nats; exactly 0 where the mask is 0.
    """
    _check_types(token_log_probs=token_log_probs)
    return jnp.where(mask > 0, -token_log_probs.astype(jnp.float32), 0.0)


def chunked_token_log_probs(
    hidden: Array,
    unembedding: Array,
    tokens: Array,
    *,
    chunk_size: int,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
) -> tuple[Array, Array]:
    """Log-probabilities and entropies from hidden states, never holding `[B,T,V]`.

    The logits are `hidden @ unembedding.T` (then `cap * tanh(. / cap)` with a soft cap, then
    divided by the temperature). `chunk_size` positions of every row are projected at a time, in
    the forward pass and, recomputed, in the backward pass, so the peak is `[B,chunk_size,V]`.

    Args:
      hidden: `[B,T,D]` float; matrix products run in its dtype and accumulate in float32.
      unembedding: `[V,D]` float.
      tokens: `[B,T]` integer; the token each hidden state is to predict.
      chunk_size: positions of a row per chunk at most.
      temperature: divides the logits; a Python number, as are the two around it (none is traced).
      logit_softcap: Gemma 2's soft cap (arXiv:2408.00118, section 2); None for none.

    Returns:
      `log_probs` and `entropy`, both `[B,T]` float32, nats. Both are differentiable in `hidden` and
      `unembedding`; a gradient through the entropy costs nothing when it is not taken.

    Raises:
      TypeError: hidden or unembedding are not floats, or tokens not integers.
    """
    _check_types(hidden=hidden, unembedding=unembedding, tokens=tokens)
    length = tokens.shape[1]
    # Chunks of equal size, so that the last one is not mostly padding.
    chunks = -(-length // chunk_size)
    chunk_size = -(-length // chunks)
    padding = chunks * chunk_size - length
    log_probs, entropy = _chunked(
        _pad(hidden, padding),
        unembedding,
        _pad(tokens, padding),
        chunk_size,
        temperature,
        logit_softcap,
    )
    return log_probs[:, :length], entropy[:, :length]


def _pad(x: Array, padding: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)) if padding else x


def _chunks(x: Array, chunk_size: int) -> Array:
    """`[B,T,...] -> [T/chunk, B, chunk, ...]`."""
    split = x.reshape(x.shape[0], x.shape[1] // chunk_size, chunk_size, *x.shape[2:])
    return jnp.moveaxis(split, 1, 0)


def _unchunks(x: Array) -> Array:
    joined = jnp.moveaxis(x, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])


def _project(h: Array, w: Array, temperature: float, cap: float | None) -> Array:
    logits = jnp.einsum("bcd,vd->bcv", h, w, preferred_element_type=jnp.float32)
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    return logits / temperature


def _chunked_primal(hidden, unembedding, tokens, chunk_size, temperature, cap):
    return _chunked_forward(hidden, unembedding, tokens, chunk_size, temperature, cap)[0]


_chunked = jax.custom_vjp(_chunked_primal, nondiff_argnums=(3, 4, 5))


def _chunked_forward(hidden, unembedding, tokens, chunk_size, temperature, cap):
    # The cast stands inside the custom gradient so that the master weights get a float32 gradient.
    w = unembedding.astype(hidden.dtype)

    def chunk(_, inputs):
        h, targets = inputs
        scaled = _project(h, w, temperature, cap)
        normalizer = jax.nn.logsumexp(scaled, axis=-1)
        chosen = jnp.take_along_axis(scaled, targets[..., None], axis=-1)[..., 0]
        # Not as normalizer - mean: those two cancel where logits are large.
        log_p = scaled - normalizer[..., None]
        entropy = -(jnp.exp(log_p) * log_p).sum(-1)
        return None, (chosen - normalizer, entropy, normalizer)

    inputs = (_chunks(hidden, chunk_size), _chunks(tokens, chunk_size))
    _, (log_probs, entropy, normalizer) = jax.lax.scan(chunk, None, inputs)
    residuals = (hidden, unembedding, tokens, normalizer)
    return (_unchunks(log_probs), _unchunks(entropy)), residuals


def _chunked_backward(chunk_size, temperature, cap, residuals, cotangents):
    hidden, unembedding, tokens, normalizer = residuals
    w = unembedding.astype(hidden.dtype)
    d_log_probs, d_entropy = cotangents
    use_entropy = not isinstance(d_entropy, jax.custom_derivatives.SymbolicZero)
    if isinstance(d_log_probs, jax.custom_derivatives.SymbolicZero):
        d_log_probs = jnp.zeros(tokens.shape, jnp.float32)

    def chunk(d_unembedding, inputs):
        h, targets, normalizer, g = inputs[:4]
        scaled = _project(h, w, temperature, cap)
        log_p = scaled - normalizer[..., None]
        p = jnp.exp(log_p)
        hit = jnp.arange(scaled.shape[-1]) == targets[..., None]
        # d log p(target) = onehot - p; d entropy = -p (log p + entropy).
        d_scaled = g[..., None] * (hit - p)
        if use_entropy:
            entropy = -(p * log_p).sum(-1, keepdims=True)
            d_scaled -= inputs[4][..., None] * p * (log_p + entropy)
        d_logits = d_scaled / temperature
        if cap is not None:
            d_logits *= 1.0 - jnp.square(scaled * temperature / cap)
        d_logits = d_logits.astype(h.dtype)
        d_h = jnp.einsum("bcv,vd->bcd", d_logits, w, preferred_element_type=jnp.float32)
        d_w = jnp.einsum("bcv,bcd->vd", d_logits, h, preferred_element_type=jnp.float32)
        return d_unembedding + d_w, d_h.astype(h.dtype)

    inputs = [_chunks(hidden, chunk_size), _chunks(tokens, chunk_size), normalizer]
    inputs.append(_chunks(d_log_probs, chunk_size))
    if use_entropy:
        inputs.append(_chunks(d_entropy, chunk_size))
    zeros = jnp.zeros(unembedding.shape, jnp.float32)
    d_unembedding, d_hidden = jax.lax.scan(chunk, zeros, tuple(inputs))
    return _unchunks(d_hidden), d_unembedding.astype(unembedding.dtype), None


def _forward_rule(hidden, unembedding, tokens, chunk_size, temperature, cap):
    # With symbolic zeros the rule receives (value, perturbed) pairs.
    values = (hidden.value, unembedding.value, tokens.value)
    return _chunked_forward(*values, chunk_size, temperature, cap)


_chunked.defvjp(_forward_rule, _chunked_backward, symbolic_zeros=True)


def _check_types(*, tokens: Array | None = None, **floats: Array) -> None:
    for name, x in floats.items():
        if not jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point, got {jnp.asarray(x).dtype}.")
    if tokens is not None and not jnp.issubdtype(jnp.asarray(tokens).dtype, jnp.integer):
        raise TypeError(f"tokens must be integers, got {jnp.asarray(tokens).dtype}.")
