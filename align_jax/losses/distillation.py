"""Losses that pull a student's next-token distribution to a teacher's, which gets no gradient."""

import math

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.typing import ArrayLike

from align_jax.losses._inputs import as_float, require, same_shape_floats

__all__ = ["generalized_jsd_loss", "top_k_kl_loss"]


def _bounded(log_probs: jax.Array) -> jax.Array:
    # The log-probability of an impossible token is -inf, and 0 * (-inf) would be nan.
    return jnp.maximum(log_probs, -1e30)


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def top_k_kl_loss(
    student_logits: ArrayLike, teacher_top_log_probs: ArrayLike, teacher_top_ids: ArrayLike
) -> jax.Array:
    """KL from teacher to student when only the teacher's k likeliest tokens were kept.

    loss = sum_{v in top k} p_v (log p_v - log q_v) + p_tail (log p_tail - log q_tail)

    where p is the teacher, q the student, and the tail is all other tokens as one class. It is 0
    exactly where the student has the teacher's top-k probabilities, and never above the full KL.

    Args:
      student_logits: [..., V] floats.
      teacher_top_log_probs: [..., k] nats, normalised over the whole vocabulary (what their
        probabilities lack of 1 is the tail).
      teacher_top_ids: [..., k] integers, all different.

    Returns: [...] nats.
    Raises: TypeError for integer logits or non-integer ids; ValueError for shapes that do not fit.

    Hinton et al. 2015, at temperature 1; the tail class keeps the loss a KL divergence, so
    that missing mass is neither ignored nor given to the top k.
    """
    logits = as_float("student_logits", student_logits)
    top_log_probs = stop_gradient(as_float("teacher_top_log_probs", teacher_top_log_probs))
    ids = jnp.asarray(teacher_top_ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"`teacher_top_ids` must hold integers, but its dtype is {ids.dtype}")
    require(
        ids.shape == top_log_probs.shape and ids.shape[:-1] == logits.shape[:-1],
        f"`teacher_top_ids` {ids.shape} and `teacher_top_log_probs` {top_log_probs.shape} must "
        f"have one shape, and that of `student_logits` {logits.shape} but for the last axis",
    )
    log_normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    log_p, log_q = top_log_probs, jnp.take_along_axis(logits, ids, axis=-1) - log_normalizer
    if ids.shape[-1] < logits.shape[-1]:
        # Stored log-probabilities are rounded and can sum to a little over 1.
        tail_prob = jnp.maximum(1.0 - jnp.exp(log_p).sum(-1, keepdims=True), 0.0)
        # Summing the other logits, and not 1 - (top k), keeps a tail far below float32's epsilon.
        smallest = jnp.finfo(logits.dtype).min
        others = jnp.put_along_axis(logits, ids, smallest, axis=-1, inplace=False)
        student_tail = jax.nn.logsumexp(others, axis=-1, keepdims=True) - log_normalizer
        log_p = jnp.concatenate([log_p, jnp.log(tail_prob)], -1)
        log_q = jnp.concatenate([log_q, student_tail], -1)
    return _kl(_bounded(log_p), _bounded(log_q))


def generalized_jsd_loss(
    student_logits: ArrayLike, teacher_logits: ArrayLike, *, beta: float
) -> jax.Array:
    """Jensen-Shannon divergence between teacher and student, skewed by `beta`.

    m = beta p + (1 - beta) q,  loss = beta KL(p || m) + (1 - beta) KL(q || m)

    where p is the teacher and q the student. beta = 0 gives KL(p || q) and beta = 1 gives
    KL(q || p): the limits of loss / beta and loss / (1 - beta), since the loss itself vanishes.

    Args:
      student_logits, teacher_logits: [..., V] floats.
      beta: a Python number in [0, 1].

    Returns: [...] nats.
    Raises: TypeError for integer logits; ValueError for unequal shapes or `beta`.

    Agarwal et al. 2023 (GKD), eq. 1; the limits are those it states, and TRL's endpoints.
    """
    student, teacher = same_shape_floats(
        student_logits=student_logits, teacher_logits=teacher_logits
    )
    require(0 <= beta <= 1, f"`beta` must be in [0, 1], but is {beta}")

    log_q = _bounded(jax.nn.log_softmax(student, axis=-1))
    log_p = stop_gradient(_bounded(jax.nn.log_softmax(teacher, axis=-1)))
    if beta == 0:
        return _kl(log_p, log_q)
    if beta == 1:
        return _kl(log_q, log_p)
    log_m = jnp.logaddexp(math.log(beta) + log_p, math.log1p(-beta) + log_q)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
