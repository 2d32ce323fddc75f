"""Preference losses on each response's own log-ratio, so that the chosen one cannot sink too.

They belong to `align_jax.losses.preference`, which exports them and explains the notation.
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.nn import log_sigmoid, sigmoid
from jax.typing import ArrayLike

from align_jax.losses._inputs import as_float, is_number, log_ratios, require, same_shape_floats

__all__ = [
    "apo_down_loss",
    "apo_zero_loss",
    "bco_loss",
    "bco_unpaired_loss",
    "kto_loss",
    "nca_loss",
    "sppo_loss",
]


def nca_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
) -> jax.Array:
    """Noise contrast of each response with the reference, which keeps the chosen one likely.

    loss = -log sigmoid(beta h_w) - (log sigmoid(-beta h_w) + log sigmoid(-beta h_l)) / 2

    Chen et al. 2024 (NCA), with K = 2 and a hard preference.
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    noise = log_sigmoid(-beta * h_w) + log_sigmoid(-beta * h_l)
    return -log_sigmoid(beta * h_w) - 0.5 * noise


def bco_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    delta: ArrayLike = 0.0,
) -> jax.Array:
    """Binary classification of both responses by implicit reward above a running threshold.

    loss = -log sigmoid(beta h_w - delta) - log sigmoid(-(beta h_l - delta))

    `delta` is the running mean of the implicit rewards beta h of chosen and rejected responses; it
    starts at 0 and gets no gradient.

    Jung et al. 2024 (BCO).
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    delta = stop_gradient(delta)
    return -log_sigmoid(beta * h_w - delta) - log_sigmoid(delta - beta * h_l)


def bco_unpaired_loss(
    logps: ArrayLike,
    ref_logps: ArrayLike,
    desirable: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    delta: ArrayLike = 0.0,
) -> jax.Array:
    """`bco_loss` for single responses that people accepted or refused.

    loss = -log sigmoid(+-(beta (logps - ref_logps) - delta)), + where `desirable`

    `desirable` is [B], true or 1 for accepted responses.

    Jung et al. 2024 (BCO).
    """
    logps, ref_logps = same_shape_floats(logps=logps, ref_logps=ref_logps)
    z = beta * (logps - stop_gradient(ref_logps)) - stop_gradient(delta)
    return -log_sigmoid(jnp.where(jnp.asarray(desirable).astype(bool), z, -z))


def sppo_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    win_probability: ArrayLike = 1.0,
) -> jax.Array:
    """Squared distance of each log-ratio to the multiplicative-weights step of self-play.

    loss = (h_w - (P - 1/2) / beta)^2 + (h_l + (P - 1/2) / beta)^2, in nats^2

    `win_probability` P (a number or [B]) is the probability that the chosen response beats the
    previous policy's; the rejected one's is 1 - P. The default 1 is the hard version.

    Wu et al. 2024 (SPPO), eq. 4.7, whose eta is 1 / beta.
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    if is_number(win_probability):
        require(0 <= win_probability <= 1, "`win_probability` must be in [0, 1]")
    target = (stop_gradient(win_probability) - 0.5) / beta
    return (h_w - target) ** 2 + (h_l + target) ** 2


def apo_zero_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
) -> jax.Array:
    """Chosen up, rejected down: for chosen responses better than what the model writes itself.

    loss = 1 - sigmoid(beta h_w) + sigmoid(beta h_l), in [0, 2]

    D'Oosterlinck et al. 2024 (APO), eq. 7 plus 1, which keeps the loss positive.
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return sigmoid(-beta * h_w) + sigmoid(beta * h_l)


def apo_down_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
) -> jax.Array:
    """Both down, rejected more: for chosen responses worse than what the model writes itself.

    loss = sigmoid(beta h_w) + 1 - sigmoid(beta h), in [0, 2]

    D'Oosterlinck et al. 2024 (APO), eq. 8 plus 1, which keeps the loss positive.
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return sigmoid(beta * h_w) + sigmoid(-beta * (h_w - h_l))


def kto_loss(
    logps: ArrayLike,
    ref_logps: ArrayLike,
    desirable: ArrayLike,
    kl: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    desirable_weight: ArrayLike = 1.0,
    undesirable_weight: ArrayLike = 1.0,
) -> jax.Array:
    """Prospect-theoretic value of single responses that people found desirable or not.

    z = beta (logps - ref_logps - max(kl, 0))
    loss = desirable_weight sigmoid(-z) where `desirable`, else undesirable_weight sigmoid(z)

    Args:
      logps, ref_logps: [B] floats, nats.
      desirable: [B], true or 1 for desirable responses.
      kl: the reference point z_0, an estimate of KL(policy || reference) in nats: a number or [B].
        It gets no gradient, and estimates below 0 count as 0.

    Returns: [B], in [0, weight].

    Ethayarajh et al. 2024 (KTO), eq. 8 (7 in the first version), where lambda_y - v is the loss.
    """
    logps, ref_logps = same_shape_floats(logps=logps, ref_logps=ref_logps)
    reference_point = jnp.maximum(stop_gradient(as_float("kl", kl)), 0.0)
    z = beta * (logps - stop_gradient(ref_logps) - reference_point)
    return jnp.where(
        jnp.asarray(desirable).astype(bool),
        desirable_weight * sigmoid(-z),
        undesirable_weight * sigmoid(z),
    )
