"""Preference losses that need no reference model, and LD-DPO's reweighted log-probabilities.

They belong to `align_jax.losses.preference`, which exports them.
"""

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jax.typing import ArrayLike

from align_jax.losses._inputs import as_float, as_mask, is_number, require, same_shape_floats

__all__ = ["cpo_loss", "ld_dpo_log_probs", "orpo_loss", "simpo_loss", "slic_loss"]


def slic_loss(
    chosen_logps: ArrayLike, rejected_logps: ArrayLike, *, delta: ArrayLike = 1.0
) -> jax.Array:
    """Hinge that asks the chosen response to be `delta` nats likelier than the rejected one.

    loss = max(0, delta - chosen_logps + rejected_logps)

    Args:
      chosen_logps, rejected_logps: [B] nats, summed over response tokens.

    Returns: [B] nats.
    Raises: TypeError for integer log-probabilities; ValueError for unequal shapes.

    Zhao et al. 2023 (SLiC-HF), eq. 1. Its regulariser, -lambda log pi(y_ref), is an ordinary
    fine-tuning loss on the SFT data, for the caller to add.
    """
    chosen, rejected = same_shape_floats(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    return jax.nn.relu(delta - chosen + rejected)


def cpo_loss(
    chosen_logps: ArrayLike, rejected_logps: ArrayLike, *, beta: ArrayLike = 0.1
) -> jax.Array:
    """DPO with a uniform reference: the contrastive term of CPO.

    loss = -log sigmoid(beta (chosen_logps - rejected_logps))

    Args:
      chosen_logps, rejected_logps: [B] nats, summed over response tokens.

    Returns: [B] nats.
    Raises: TypeError for integer log-probabilities; ValueError for unequal shapes.

    Xu et al. 2024 (CPO). Its second term, the negative log-likelihood of the chosen
    responses, is an ordinary fine-tuning loss, for the caller to add.
    """
    chosen, rejected = same_shape_floats(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    return -log_sigmoid(beta * (chosen - rejected))


def simpo_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    *,
    beta: ArrayLike = 2.0,
    gamma: ArrayLike = 1.0,
) -> jax.Array:
    """Reference-free comparison of log-probabilities per token, to be won by `gamma`.

    loss = -log sigmoid(beta chosen_logps - beta rejected_logps - gamma)

    Args:
      chosen_logps, rejected_logps: [B] nats per token, AVERAGED over response tokens
        (`sequence_log_probs(..., average=True)`): the average is the method. On sums this is CPO
        with a margin.
      gamma: target margin, on the scale of beta times nats (TRL's `gamma_beta_ratio` is
        gamma / beta).

    Returns: [B] nats.
    Raises: TypeError for integer log-probabilities; ValueError for unequal shapes.

    Meng et al. 2024 (SimPO), eq. 6.
    """
    chosen, rejected = same_shape_floats(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    return -log_sigmoid(beta * (chosen - rejected) - gamma)


def orpo_loss(chosen_avg_logps: ArrayLike, rejected_avg_logps: ArrayLike) -> jax.Array:
    """Log-odds of the chosen against the rejected response: ORPO's odds-ratio term.

    log odds(p) = log p - log(1 - p)
    loss = -log sigmoid(log odds(chosen) - log odds(rejected))

    Args:
      chosen_avg_logps, rejected_avg_logps: [B] nats per token, averaged over response tokens.

    Returns: [B] nats.
    Raises: TypeError for integer log-probabilities; ValueError for unequal shapes.

    Hong et al. 2024 (ORPO), eq. 7. The whole loss adds the chosen responses' negative
    log-likelihood and weighs this term by lambda (eq. 6), for the caller to do.
    """
    chosen, rejected = same_shape_floats(
        chosen_avg_logps=chosen_avg_logps, rejected_avg_logps=rejected_avg_logps
    )

    def log_odds(log_p):
        # A probability that rounds to 1 has infinite odds; 1e-7 is float32's distance from 1.
        log_p = jnp.minimum(log_p, -1e-7)
        return log_p - jax.nn.log1mexp(-log_p)

    return -log_sigmoid(log_odds(chosen) - log_odds(rejected))


def ld_dpo_log_probs(
    chosen_token_log_probs: ArrayLike,
    rejected_token_log_probs: ArrayLike,
    chosen_mask: ArrayLike,
    rejected_mask: ArrayLike,
    *,
    alpha: ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities for DPO in which tokens past the shorter response's length weigh `alpha`.

    With l the number of tokens in the shorter response of the pair,
    log p = sum_{t < l} log pi(y_t) + alpha sum_{t >= l} log pi(y_t)

    Args:
      chosen_token_log_probs, rejected_token_log_probs: [..., T] and [..., T'] nats.
      chosen_mask, rejected_mask: 1 for response tokens, of the same shapes.
      alpha: in [0, 1]; 1 is DPO.

    Returns: ([...], [...]) nats. Call it for the policy and for the reference, then `dpo_loss`.
    Raises: TypeError for integer log-probabilities; ValueError for shapes or `alpha`.

    Liu et al. 2024 (LD-DPO).
    """
    chosen = as_float("chosen_token_log_probs", chosen_token_log_probs)
    rejected = as_float("rejected_token_log_probs", rejected_token_log_probs)
    chosen_mask = as_mask(chosen_mask, chosen.shape)
    rejected_mask = as_mask(rejected_mask, rejected.shape)
    if is_number(alpha):
        require(0 <= alpha <= 1, f"`alpha` must be in [0, 1], but is {alpha}")
    public_length = jnp.minimum(chosen_mask.sum(-1), rejected_mask.sum(-1))[..., None]

    def desensitized_sum(log_probs, mask):
        weights = jnp.where(jnp.cumsum(mask, -1) <= public_length, 1.0, alpha)
        return (weights * jnp.where(mask, log_probs, 0.0)).sum(-1)

    return desensitized_sum(chosen, chosen_mask), desensitized_sum(rejected, rejected_mask)
