"""Losses on preferences that compare the policy with a frozen reference (DPO and its relatives).

Unless said otherwise `*_logps` are log-probabilities of whole responses in nats, summed over
response tokens, [B] floats; every loss is [B], one per comparison. With the log-ratios

    h_w = chosen_logps - ref_chosen_logps
    h_l = rejected_logps - ref_rejected_logps
    h = h_w - h_l

`beta` is the strength of the KL penalty and beta h_w the implicit reward. The reference gets no
gradient. All raise TypeError for integer log-probabilities and ValueError for unequal shapes or a
hyperparameter outside its range. Losses of h_w and h_l apart live in `preference_pointwise.py`,
those without a reference in `preference_reference_free.py`; all are public here.
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.nn import log_sigmoid, sigmoid
from jax.typing import ArrayLike

from align_jax.losses._inputs import (
    as_mask,
    bounded_exp,
    is_number,
    log_ratios,
    masked_mean,
    require,
    same_shape_floats,
)
from align_jax.losses.preference_pointwise import (
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    bco_unpaired_loss,
    kto_loss,
    nca_loss,
    sppo_loss,
)
from align_jax.losses.preference_reference_free import (
    cpo_loss,
    ld_dpo_log_probs,
    orpo_loss,
    simpo_loss,
    slic_loss,
)

__all__ = [
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "bco_loss",
    "bco_unpaired_loss",
    "cpo_loss",
    "discopop_loss",
    "dpo_loss",
    "exo_loss",
    "f_dpo_loss",
    "ipo_loss",
    "kto_loss",
    "ld_dpo_log_probs",
    "length_normalized_dpo_loss",
    "nca_loss",
    "orpo_loss",
    "robust_dpo_loss",
    "rso_hinge_loss",
    "simpo_loss",
    "slic_loss",
    "sppo_loss",
    "wpo_loss",
    "wpo_weights",
]


def dpo_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 0.0,
    margin: ArrayLike = 0.0,
) -> jax.Array:
    """Bradley-Terry likelihood of the comparison under the policy's implicit reward.

    z = beta h - margin
    loss = -(1 - label_smoothing) log sigmoid(z) - label_smoothing log sigmoid(-z)

    `label_smoothing` in [0, 0.5) is the probability that a label is flipped (conservative DPO).
    `margin` (a number or [B], in nats) is the offset by which the chosen response should win: for
    ODPO alpha log(score_w - score_l), for length-regularised DPO alpha (|y_l| - |y_w|).

    Rafailov et al. 2023, eq. 7; smoothing: Mitchell 2023 (cDPO); offset: Amini et al. 2024 (ODPO);
    length: Park et al. 2024 (R-DPO).
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    if is_number(label_smoothing):
        require(0 <= label_smoothing < 0.5, "`label_smoothing` must be in [0, 0.5)")
    z = beta * (h_w - h_l) - margin
    return -(1 - label_smoothing) * log_sigmoid(z) - label_smoothing * log_sigmoid(-z)


def length_normalized_dpo_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    chosen_lengths: ArrayLike,
    rejected_lengths: ArrayLike,
    *,
    beta: ArrayLike = 5.0,
) -> jax.Array:
    """DPO on log-ratios per token, so that length by itself earns no reward.

    loss = -log sigmoid(beta (h_w / chosen_lengths - h_l / rejected_lengths))

    `*_lengths` are [B] token counts; a response without tokens has log-ratio 0. `beta` acts on nats
    per token, hence its larger default (the recipe's).

    Lambert et al. 2024 (Tulu 3); Meng et al. 2024 (SimPO), appendix ("DPO w/ LN").
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    h_w = h_w / jnp.maximum(jnp.asarray(chosen_lengths), 1)
    h_l = h_l / jnp.maximum(jnp.asarray(rejected_lengths), 1)
    return -log_sigmoid(beta * (h_w - h_l))


def f_dpo_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    divergence: str,
    alpha: float = 0.5,
    beta: ArrayLike = 0.1,
) -> jax.Array:
    """DPO for a policy held to its reference by another divergence than the reverse KL.

    loss = -log sigmoid(beta f'(e^h_w) - beta f'(e^h_l)), constants of f' dropped, with f'(u) =
      "reverse_kl"      log u (this is dpo_loss)
      "forward_kl"      -1 / u
      "jensen_shannon"  log(u / (1 + u))
      "alpha"           (1 - u^-alpha) / alpha, 0 < alpha <= 1: the reverse KL as alpha -> 0, the
                        forward KL at alpha = 1

    Exponentials continue as their tangent past 40 nats, so that everything stays finite.

    Wang et al. 2023 (f-DPO), table 1, whose alpha this is. TRL's newer code writes
    (u^(a-1) - 1) / (a - 1), where a = 1 - alpha.
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    if divergence == "reverse_kl":
        return -log_sigmoid(beta * (h_w - h_l))
    if divergence == "forward_kl":
        return -log_sigmoid(beta * (bounded_exp(-h_l) - bounded_exp(-h_w)))
    if divergence == "jensen_shannon":
        return -log_sigmoid(beta * (log_sigmoid(h_w) - log_sigmoid(h_l)))
    if divergence == "alpha":
        require(0 < alpha <= 1, f"`alpha` must be in (0, 1], but is {alpha}")
        score = bounded_exp(-alpha * h_l) - bounded_exp(-alpha * h_w)
        return -log_sigmoid(beta * score / alpha)
    raise ValueError(
        "`divergence` must be 'reverse_kl', 'forward_kl', 'jensen_shannon' or 'alpha', "
        f"but is {divergence!r}"
    )


def ipo_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
) -> jax.Array:
    """Squared distance of the log-ratio gap to the finite gap that preferences justify.

    loss = (h - 1 / (2 beta))^2, in nats^2

    Azar et al. 2023, eq. 17, whose tau is `beta`. On summed log-probabilities, as there; TRL
    divides them by the length, which is another objective.
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return (h_w - h_l - 1 / (2 * beta)) ** 2


def robust_dpo_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 0.0,
) -> jax.Array:
    """Unbiased estimate of the DPO loss on clean labels when labels are flipped at a known rate.

    loss = [(1 - label_smoothing) (-log sigmoid(beta h)) + label_smoothing log sigmoid(-beta h)]
           / (1 - 2 label_smoothing)

    `label_smoothing` in [0, 0.5) is the flip rate. A single loss can be negative; only its
    expectation over flips is a DPO loss.

    Chowdhury et al. 2024 (robust DPO).
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    if is_number(label_smoothing):
        require(0 <= label_smoothing < 0.5, "`label_smoothing` must be in [0, 0.5)")
    z = beta * (h_w - h_l)
    loss = -(1 - label_smoothing) * log_sigmoid(z) + label_smoothing * log_sigmoid(-z)
    return loss / (1 - 2 * label_smoothing)


def exo_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 1e-3,
) -> jax.Array:
    """Reverse KL from the policy's choice between the two responses to the smoothed label.

    q = sigmoid(beta h)
    loss = q (log q - log(1 - label_smoothing)) + (1 - q) (log(1 - q) - log label_smoothing)

    `label_smoothing` in (0, 0.5): a hard label is infinitely far in this direction of the KL, which
    is why 0 is an error (TRL replaces it by 1e-3 without a word).

    Ji et al. 2024 (EXO), eq. 16.
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    if is_number(label_smoothing):
        require(0 < label_smoothing < 0.5, "`label_smoothing` must be in (0, 0.5)")
    z = beta * (h_w - h_l)
    chosen_term = sigmoid(z) * (log_sigmoid(z) - jnp.log1p(-label_smoothing))
    return chosen_term + sigmoid(-z) * (log_sigmoid(-z) - jnp.log(label_smoothing))


def discopop_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    tau: ArrayLike = 0.05,
) -> jax.Array:
    """Log-ratio modulated loss: logistic for lost comparisons, exponential for won ones.

    z = beta h,  m = sigmoid(z / tau), tau > 0
    loss = (1 - m) (-log sigmoid(z)) + m exp(-z)

    Lu et al. 2024 (DiscoPOP), eq. 5. Not convex: around z = 0 it has the flat spot of its paper.
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    if is_number(tau):
        require(tau > 0, f"`tau` must be above 0, but is {tau}")
    z = beta * (h_w - h_l)
    # m exp(-z) in one exponent: m underflows where exp(-z) overflows.
    exponential = bounded_exp(log_sigmoid(z / tau) - z)
    return sigmoid(-z / tau) * -log_sigmoid(z) + exponential


def aot_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
) -> jax.Array:
    """Stochastic dominance of the policy's preference margins over the reference's.

    loss = -log sigmoid(beta (sort(chosen - rejected) - sort(ref_chosen - ref_rejected)))

    Sorted over the last axis, the whole batch: element i belongs to the i-th quantile, not to
    comparison i. Fill no batch with padding.

    Melnyk et al. 2024 (AOT), paired, with the logistic loss.
    """
    chosen, rejected, ref_chosen, ref_rejected = same_shape_floats(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    margins = jnp.sort(chosen - rejected, axis=-1)
    ref_margins = jnp.sort(stop_gradient(ref_chosen - ref_rejected), axis=-1)
    return -log_sigmoid(beta * (margins - ref_margins))


def aot_unpaired_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
) -> jax.Array:
    """Stochastic dominance of chosen over rejected log-ratios, which need not share prompts.

    loss = -log sigmoid(beta (sort(h_w) - sort(h_l)))

    Sorted over the last axis, the whole batch: element i belongs to the i-th quantile.

    Melnyk et al. 2024 (AOT), unpaired, with the logistic loss (once TRL's `aot_pair`).
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return -log_sigmoid(beta * (jnp.sort(h_w, axis=-1) - jnp.sort(h_l, axis=-1)))


def rso_hinge_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
) -> jax.Array:
    """Hinge on the implicit reward gap: SLiC with log-probabilities relative to the reference.

    loss = max(0, 1 - beta h)

    Liu et al. 2023 (RSO), the hinge-norm loss, whose gamma is `beta`.
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return jax.nn.relu(1 - beta * (h_w - h_l))


def wpo_weights(
    token_log_probs: ArrayLike, log_sum_squared_probs: ArrayLike, mask: ArrayLike
) -> jax.Array:
    """How likely the policy is to have written a response itself, per token.

    w = exp(mean over mask of (token_log_probs - log_sum_squared_probs))

    Args:
      token_log_probs: [..., T] log pi(y_t) in nats.
      log_sum_squared_probs: [..., T] log sum_v pi(v)^2, which a token drawn from the policy attains
        on average; it makes 1 the weight of the policy's own responses.
      mask: [..., T], 1 for response tokens.

    Returns: [...] weights, without gradient; 1 for an empty response.

    Zhou et al. 2024 (WPO), with sampled alignment.
    """
    token_log_probs, log_sum_squared_probs = same_shape_floats(
        token_log_probs=token_log_probs, log_sum_squared_probs=log_sum_squared_probs
    )
    mask = as_mask(mask, token_log_probs.shape)
    weights = bounded_exp(masked_mean(token_log_probs - log_sum_squared_probs, mask))
    return stop_gradient(weights)


def wpo_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    chosen_weights: ArrayLike,
    rejected_weights: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
) -> jax.Array:
    """DPO weighted by how close to on-policy the two responses are.

    loss = min(chosen_weights rejected_weights, 1) (-log sigmoid(beta h))

    The weights ([B], from `wpo_weights`) get no gradient. The bound of 1 comes from the authors'
    code, not their paper: it keeps one lucky pair from outweighing a batch.

    Zhou et al. 2024 (WPO).
    """
    chosen_weights, rejected_weights = same_shape_floats(
        chosen_weights=chosen_weights, rejected_weights=rejected_weights
    )
    weights = stop_gradient(chosen_weights * rejected_weights)
    loss = dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=beta)
    return jnp.minimum(weights, 1.0) * loss
