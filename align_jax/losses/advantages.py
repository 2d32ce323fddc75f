"""From rewards to advantages: KL estimates, shaping, baselines, normalisation.

They belong to `align_jax.losses.policy_gradient`, which exports them. Everything here is plain
arithmetic that gradients flow through; the policy-gradient losses are what stops them.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from align_jax.losses._inputs import (
    MAX_EXPONENT,
    Number,
    as_float,
    as_mask,
    bounded_exp,
    require,
    same_shape_floats,
)

__all__ = [
    "adaptive_kl_update",
    "gae",
    "grpo_advantages",
    "kl_estimate",
    "kl_shaped_rewards",
    "rloo_advantages",
    "spo_rewards",
    "whiten",
]


def kl_estimate(
    log_probs: ArrayLike, ref_log_probs: ArrayLike, *, estimator: str = "k1"
) -> jax.Array:
    """Single-sample estimate of KL(policy || reference) at samples of the policy.

    With d = log_probs - ref_log_probs:
      "k1"  d                 unbiased, any sign
      "k2"  d^2 / 2           biased, positive; its gradient is an unbiased gradient of the KL
      "k3"  exp(-d) - 1 + d   unbiased, positive; its gradient estimates the forward KL's

    Args:
      log_probs, ref_log_probs: [...] nats, per token or per sequence. No gradient reaches the
        reference.

    Returns: [...] nats. In k3 the exponential continues as its tangent past 40 nats.
    Raises: TypeError for integers; ValueError for unequal shapes or an unknown estimator.

    Schulman 2020 ("Approximating KL divergence"); k3: Shao et al. 2024 (GRPO), eq. 4.
    """
    log_probs, ref_log_probs = same_shape_floats(log_probs=log_probs, ref_log_probs=ref_log_probs)
    d = log_probs - jax.lax.stop_gradient(ref_log_probs)
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d**2 / 2
    if estimator == "k3":
        # Three forms: by series near 0, where rounding would make the difference negative.
        small = jnp.abs(d) < 1e-2
        d_small = jnp.where(small, d, 0.0)
        series = d_small**2 / 2 * (1 - d_small / 3 * (1 - d_small / 4 * (1 - d_small / 5)))
        d_safe = jnp.where(d > -MAX_EXPONENT, d, 0.0)
        exact = jnp.where(d > -MAX_EXPONENT, jnp.expm1(-d_safe), bounded_exp(-d) - 1) + d
        return jnp.where(small, series, exact)
    raise ValueError(f"`estimator` must be 'k1', 'k2' or 'k3', but is {estimator!r}")


def kl_shaped_rewards(
    scores: ArrayLike,
    log_probs: ArrayLike,
    ref_log_probs: ArrayLike,
    mask: ArrayLike,
    *,
    kl_coefficient: Number,
) -> jax.Array:
    """Per-token rewards: the KL penalty on every completion token, the score on the last one.

    rewards[t] = -kl_coefficient (log_probs[t] - ref_log_probs[t]) + [t is last] score

    Args:
      scores: [...] floats, one per completion.
      log_probs, ref_log_probs: [..., T] nats.
      mask: [..., T], 1 for completion tokens.

    Returns: [..., T], 0 where `mask` is 0. A completion without tokens loses its score.
    Raises: TypeError for integers; ValueError for shapes that do not fit.

    Ziegler et al. 2019, eq. 2; Ouyang et al. 2022, eq. 2, spread over tokens as in their code.
    """
    scores = as_float("scores", scores)
    log_probs, ref_log_probs = same_shape_floats(log_probs=log_probs, ref_log_probs=ref_log_probs)
    mask = as_mask(mask, log_probs.shape)
    require(
        scores.shape == log_probs.shape[:-1],
        f"`scores` has shape {scores.shape}, but `log_probs` {log_probs.shape} needs one a row",
    )
    penalty = kl_coefficient * jnp.where(mask, log_probs - ref_log_probs, 0.0)
    # The last counted token is the one after which none is left.
    tokens_left = jnp.flip(jnp.cumsum(jnp.flip(mask, -1), -1), -1)
    is_last = mask & (tokens_left == 1)
    return jnp.where(is_last, scores[..., None], 0.0) - penalty


def gae(
    rewards: ArrayLike,
    values: ArrayLike,
    mask: ArrayLike,
    *,
    discount: Number = 1.0,
    lambda_: Number = 0.95,
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimates and the returns that a value head is trained on.

    delta[t] = rewards[t] + discount values[t+1] - values[t]
    advantages[t] = delta[t] + discount lambda_ advantages[t+1],  returns = advantages + values

    Args:
      rewards, values: [..., T] floats. values[t] is the estimate before token t.
      mask: [..., T], 1 for completion tokens. Masked positions are skipped, wherever they are: t+1
        is the next counted token, and after the last one value and advantage are 0.

    Returns: (advantages, returns), [..., T] each, 0 where `mask` is 0.
    Raises: TypeError for integers; ValueError for unequal shapes.

    Schulman et al. 2015 (GAE), eq. 16.
    """
    rewards, values = same_shape_floats(rewards=rewards, values=values)
    mask = as_mask(mask, rewards.shape)
    rewards, values = jnp.where(mask, rewards, 0.0), jnp.where(mask, values, 0.0)

    def step(carry, x):
        next_advantage, next_value = carry
        reward, value, counts = x
        delta = reward + discount * next_value - value
        advantage = delta + discount * lambda_ * next_advantage
        carry = (
            jnp.where(counts, advantage, next_advantage),
            jnp.where(counts, value, next_value),
        )
        return carry, jnp.where(counts, advantage, 0.0)

    zeros = jnp.zeros_like(rewards[..., 0])
    time_first = [jnp.moveaxis(x, -1, 0) for x in (rewards, values, mask)]
    _, advantages = jax.lax.scan(step, (zeros, zeros), time_first, reverse=True)
    advantages = jnp.moveaxis(advantages, 0, -1)
    return advantages, advantages + values


def rloo_advantages(rewards: ArrayLike) -> jax.Array:
    """Each sample's reward minus the mean reward of the other samples for its prompt.

    advantages[i] = rewards[i] - 1 / (K - 1) sum_{j != i} rewards[j]

    Args:
      rewards: [..., K] floats, K >= 2 samples per prompt.

    Returns: [..., K].
    Raises: TypeError for integer rewards; ValueError for K < 2.

    Kool et al. 2019; Ahmadian et al. 2024 (RLOO).
    """
    rewards = as_float("rewards", rewards)
    k = rewards.shape[-1]
    require(k >= 2, "`rewards` needs at least 2 samples per prompt to leave one out")
    return (rewards - rewards.mean(-1, keepdims=True)) * (k / (k - 1))


def grpo_advantages(rewards: ArrayLike, *, scale: bool = True) -> jax.Array:
    """Rewards relative to the other samples for the prompt, in standard deviations.

    advantages = (rewards - mean) / (std + 1e-4), and only rewards - mean without `scale`

    Args:
      rewards: [..., K] floats, K >= 2 samples per prompt.
      scale: False for Dr. GRPO, which keeps prompts of uniform difficulty from dominating.

    Returns: [..., K]; 0 where all rewards are equal.
    Raises: TypeError for integer rewards; ValueError for K < 2.

    Shao et al. 2024 (GRPO), sec. 4.1.2; Liu et al. 2025 (Dr. GRPO), sec. 3. The paper names neither
    the divisor of the variance nor an epsilon: K - 1 and 1e-4 are what TRL, verl and others use.
    """
    rewards = as_float("rewards", rewards)
    k = rewards.shape[-1]
    require(k >= 2, "`rewards` needs at least 2 samples per prompt to compare")
    centered = rewards - rewards.mean(-1, keepdims=True)
    if not scale:
        return centered
    variance = (centered**2).sum(-1, keepdims=True) / (k - 1)
    # The square root has no derivative at 0, where equal rewards would put it.
    std = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)
    return centered / (std + 1e-4)


def spo_rewards(preferences: ArrayLike) -> jax.Array:
    """Self-play rewards: the share of the other samples for the prompt that each one beats.

    rewards[i] = 1 / (K - 1) sum_{j != i} preferences[i, j]

    Args:
      preferences: [..., K, K] floats, the probability that sample i is preferred to sample j; the
        diagonal is ignored.

    Returns: [..., K] in [0, 1].
    Raises: TypeError for integers; ValueError for a matrix that is not square or K < 2.

    Swamy et al. 2024 (SPO), algorithm 1. What it converges to is `ranking.minimax_winner`.
    """
    preferences = as_float("preferences", preferences)
    k = preferences.shape[-1]
    require(
        preferences.ndim >= 2 and preferences.shape[-2] == k and k >= 2,
        f"`preferences` must be [..., K, K] with K >= 2, but has shape {preferences.shape}",
    )
    return jnp.where(jnp.eye(k, dtype=bool), 0.0, preferences).sum(-1) / (k - 1)


def whiten(x: ArrayLike, mask: ArrayLike, *, shift_mean: bool = True) -> jax.Array:
    """Scales the counted entries of a whole batch to unit variance, and to zero mean.

    (x - mean) / sqrt(var + 1e-8), plus the mean if not `shift_mean`; over all axes

    Args:
      x: [...] floats.
      mask: 1 where an entry counts, of the same shape.

    Returns: like x, 0 where `mask` is 0.
    Raises: TypeError for integers; ValueError for unequal shapes.

    Ziegler et al. 2019 (their code), with the population variance as there; TRL divides by n - 1.
    """
    x = as_float("x", x)
    mask = as_mask(mask, x.shape)
    count = jnp.maximum(mask.sum(), 1)
    mean = jnp.where(mask, x, 0.0).sum() / count
    centered = jnp.where(mask, x - mean, 0.0)
    whitened = centered * jax.lax.rsqrt((centered**2).sum() / count + 1e-8)
    return whitened if shift_mean else jnp.where(mask, whitened + mean, 0.0)


def adaptive_kl_update(
    coefficient: ArrayLike,
    kl: ArrayLike,
    *,
    target: ArrayLike,
    horizon: ArrayLike,
    batch_size: ArrayLike,
) -> jax.Array:
    """One step of the controller that holds the KL to the reference near a target.

    coefficient (1 + clip(kl / target - 1, -0.2, 0.2) batch_size / horizon)

    Args:
      coefficient, kl: the current coefficient and the batch's mean KL per sequence, in nats.
      target: nats.
      horizon, batch_size: in sequences; horizon / batch_size is the controller's time constant.

    Returns: the next coefficient.
    Raises: TypeError for an integer coefficient or KL.

    Ziegler et al. 2019, sec. 2.2, whose K_beta is batch_size / horizon.
    """
    coefficient, kl = as_float("coefficient", coefficient), as_float("kl", kl)
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    return coefficient * (1 + error * batch_size / horizon)
