"""Policy-gradient losses per token, and how token losses become one number.

Log-probabilities are [..., T] floats in nats, of the tokens that were sampled. A loss is to be
minimised. Old log-probabilities, advantages and importance weights are constants: no gradient flows
into them. Advantages may be [..., 1], one per sequence. All raise TypeError for integer inputs and
ValueError for shapes that do not fit. Advantages and rewards are computed in `advantages.py`, whose
functions are public here too.
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.typing import ArrayLike

from align_jax.losses._inputs import (
    Number,
    as_float,
    as_mask,
    bounded_exp,
    masked_mean,
    require,
    same_shape_floats,
)
from align_jax.losses.advantages import (
    adaptive_kl_update,
    gae,
    grpo_advantages,
    kl_estimate,
    kl_shaped_rewards,
    rloo_advantages,
    spo_rewards,
    whiten,
)

__all__ = [
    "adaptive_kl_update",
    "aggregate_token_losses",
    "cispo_loss",
    "clipped_value_loss",
    "entropy_bonus",
    "gae",
    "grpo_advantages",
    "gspo_loss",
    "gspo_ratio",
    "kl_estimate",
    "kl_shaped_rewards",
    "ppo_clip_loss",
    "ptx_loss",
    "reinforce_loss",
    "rloo_advantages",
    "spo_rewards",
    "truncated_importance_weights",
    "whiten",
]


def _advantages(advantages: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    advantages = as_float("advantages", advantages)
    fits = advantages.shape in (shape, (*shape[:-1], 1))
    require(
        fits,
        f"`advantages` has shape {advantages.shape}, but `log_probs` {shape} needs the same shape "
        "or one advantage per sequence, [..., 1]",
    )
    return stop_gradient(advantages)


def _clipped_surrogate(
    ratio: jax.Array,
    advantages: jax.Array,
    clip_range: Number,
    clip_range_high: Number | None,
) -> jax.Array:
    high = clip_range if clip_range_high is None else clip_range_high
    clipped = jnp.clip(ratio, 1 - clip_range, 1 + high)
    return -jnp.minimum(ratio * advantages, clipped * advantages)


def reinforce_loss(log_probs: ArrayLike, advantages: ArrayLike) -> jax.Array:
    """The loss whose gradient is the policy gradient.

    loss[t] = -advantages[t] log_probs[t]

    Returns: [..., T].

    Williams 1992.
    """
    log_probs = as_float("log_probs", log_probs)
    return -_advantages(advantages, log_probs.shape) * log_probs


def ppo_clip_loss(
    log_probs: ArrayLike,
    old_log_probs: ArrayLike,
    advantages: ArrayLike,
    *,
    clip_range: Number = 0.2,
    clip_range_high: Number | None = None,
    dual_clip: Number | None = None,
) -> jax.Array:
    """Policy gradient that stops once the ratio to the sampling policy has moved far enough.

    ratio = exp(log_probs - old_log_probs)
    loss = -min(ratio A, clip(ratio, 1 - clip_range, 1 + clip_range_high) A)
    and with dual_clip, where A < 0: loss = min(loss, -dual_clip A)

    `clip_range_high` defaults to `clip_range`; larger is DAPO's clip-higher. `dual_clip` > 1 bounds
    the loss of tokens that became far likelier although A < 0. Past 40 nats the ratio continues as
    the exponential's tangent.

    Returns: [..., T].

    Schulman et al. 2017 (PPO), eq. 7; clip-higher: Yu et al. 2025 (DAPO), eq. 8; dual clip: Ye et
    al. 2020.
    """
    log_probs, old_log_probs = same_shape_floats(log_probs=log_probs, old_log_probs=old_log_probs)
    advantages = _advantages(advantages, log_probs.shape)
    ratio = bounded_exp(log_probs - stop_gradient(old_log_probs))
    loss = _clipped_surrogate(ratio, advantages, clip_range, clip_range_high)
    if dual_clip is None:
        return loss
    return jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)


def gspo_ratio(log_probs: ArrayLike, old_log_probs: ArrayLike, mask: ArrayLike) -> jax.Array:
    """Importance ratio of whole sequences, normalised by length.

    ratio = exp(mean over mask of (log_probs - old_log_probs))

    `mask` is [..., T], 1 for completion tokens.

    Returns: [...]; 1 for a completion without tokens.

    Zheng et al. 2025 (GSPO), eq. 7.
    """
    log_probs, old_log_probs = same_shape_floats(log_probs=log_probs, old_log_probs=old_log_probs)
    mask = as_mask(mask, log_probs.shape)
    return bounded_exp(masked_mean(log_probs - stop_gradient(old_log_probs), mask))


def gspo_loss(
    log_probs: ArrayLike,
    old_log_probs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    clip_range: Number = 3e-4,
    clip_range_high: Number | None = 4e-4,
) -> jax.Array:
    """Clipped surrogate in which a sequence's tokens share one ratio and are clipped together.

    s[t] = stop_gradient(gspo_ratio / pi(y_t)) pi(y_t)
    loss[t] = -min(s[t] A[t], clip(s[t], 1 - clip_range, 1 + clip_range_high) A[t])

    This is GSPO-token. With one advantage per sequence its mean over the sequence's tokens
    (`aggregate_token_losses(..., method="grpo")`) has GSPO's value and gradient.
    `mask` is [..., T], 1 for completion tokens.

    Returns: [..., T], 0 where `mask` is 0.

    Zheng et al. 2025 (GSPO), eqs. 5, 13 and 14.
    """
    log_probs, old_log_probs = same_shape_floats(log_probs=log_probs, old_log_probs=old_log_probs)
    mask = as_mask(mask, log_probs.shape)
    advantages = _advantages(advantages, log_probs.shape)
    log_probs = jnp.where(mask, log_probs, 0.0)
    advantages = jnp.where(mask, advantages, 0.0)
    ratio = stop_gradient(gspo_ratio(log_probs, old_log_probs, mask))[..., None]
    token_ratio = ratio * jnp.exp(log_probs - stop_gradient(log_probs))
    return _clipped_surrogate(token_ratio, advantages, clip_range, clip_range_high)


def cispo_loss(
    log_probs: ArrayLike,
    old_log_probs: ArrayLike,
    advantages: ArrayLike,
    *,
    clip_range: Number = 1.0,
    clip_range_high: Number = 4.0,
) -> jax.Array:
    """Policy gradient with clipped importance weights, so that every token keeps its gradient.

    loss = -stop_gradient(clip(ratio, 1 - clip_range, 1 + clip_range_high)) A log_probs
    with ratio = exp(log_probs - old_log_probs)

    The default `clip_range` of 1 sets no lower bound, as in the paper. TRL's `epsilon_high` is the
    bound itself, 1 + clip_range_high.

    Returns: [..., T].

    MiniMax 2025 (MiniMax-M1), eqs. 4 and 5.
    """
    log_probs, old_log_probs = same_shape_floats(log_probs=log_probs, old_log_probs=old_log_probs)
    advantages = _advantages(advantages, log_probs.shape)
    ratio = stop_gradient(bounded_exp(log_probs - old_log_probs))
    return -jnp.clip(ratio, 1 - clip_range, 1 + clip_range_high) * advantages * log_probs


def truncated_importance_weights(
    log_probs: ArrayLike, sampler_log_probs: ArrayLike, *, cap: Number = 2.0
) -> jax.Array:
    """Weights that correct for a sampler whose probabilities differ from the trainer's.

    weights = min(exp(log_probs - sampler_log_probs), cap)

    Multiply token losses by it. `log_probs` are the trainer's for the parameters that sampled (the
    "old" ones); both are [..., T], or [...] sums for one weight per sequence.

    Returns: like `log_probs`, in [0, cap]; no gradient flows through it.

    Yao et al. 2025 ("Your efficient RL framework secretly brings you off-policy RL training");
    Ionides 2008.
    """
    log_probs, sampler_log_probs = same_shape_floats(
        log_probs=log_probs, sampler_log_probs=sampler_log_probs
    )
    return jnp.minimum(bounded_exp(stop_gradient(log_probs - sampler_log_probs)), cap)


def clipped_value_loss(
    values: ArrayLike, old_values: ArrayLike, returns: ArrayLike, *, clip_range: Number = 0.2
) -> jax.Array:
    """Squared error of the value head, whose steps are clipped as the policy's are.

    clipped = clip(values, old_values - clip_range, old_values + clip_range)
    loss = max((values - returns)^2, (clipped - returns)^2) / 2

    Args:
      values, old_values, returns: [..., T] floats in units of reward.

    Returns: [..., T], in reward^2.

    Dhariwal et al. 2017 (OpenAI Baselines, PPO2; not in the PPO paper), with its factor 1/2.
    """
    values, old_values, returns = same_shape_floats(
        values=values, old_values=old_values, returns=returns
    )
    old_values, returns = stop_gradient(old_values), stop_gradient(returns)
    clipped = jnp.clip(values, old_values - clip_range, old_values + clip_range)
    return jnp.maximum((values - returns) ** 2, (clipped - returns) ** 2) / 2


def ptx_loss(log_probs: ArrayLike, mask: ArrayLike, *, gamma: Number = 27.8) -> jax.Array:
    """PPO-ptx's pretraining term: likelihood of pretraining text, to be added to PPO's loss.

    loss[t] = -gamma log_probs[t]

    `log_probs` are [..., T], of pretraining tokens; `mask` is 1 where a token counts.

    Returns: [..., T] nats, 0 where `mask` is 0.

    Ouyang et al. 2022 (InstructGPT), eq. 2 (gamma from appendix C.4).
    """
    log_probs = as_float("log_probs", log_probs)
    return -gamma * jnp.where(as_mask(mask, log_probs.shape), log_probs, 0.0)


def entropy_bonus(logits: ArrayLike, mask: ArrayLike, *, coefficient: Number = 0.01) -> jax.Array:
    """Loss term that rewards entropy: minus the entropy of each next-token distribution.

    loss[t] = coefficient sum_v p_v log p_v,  p = softmax(logits[t])

    Args:
      logits: [..., T, V] floats; -inf forbids a token.
      mask: [..., T], 1 where a token counts.

    Returns: [..., T] nats, 0 where `mask` is 0.

    Schulman et al. 2017 (PPO), eq. 9, with c_2 = `coefficient`.
    """
    logits = as_float("logits", logits)
    mask = as_mask(mask, logits.shape[:-1])
    log_p = jax.nn.log_softmax(jnp.where(mask[..., None], logits, 0.0), axis=-1)
    # 0 * (-inf) would be nan, in the value and in the gradient.
    log_p = jnp.maximum(log_p, -1e30)
    return coefficient * jnp.where(mask, (jnp.exp(log_p) * log_p).sum(-1), 0.0)


def aggregate_token_losses(
    token_losses: ArrayLike,
    mask: ArrayLike,
    *,
    method: str,
    max_length: int | None = None,
) -> jax.Array:
    """Token losses to one loss per sequence, such that the mean over sequences is the objective.

      "grpo"     mean over the sequence's tokens: short sequences weigh more per token
      "dr_grpo"  sum over the sequence's tokens / max_length: no bias from length
      "dapo"     sum over the sequence's tokens x sequences / tokens of all: every token weighs the
                 same; "all" is over the last two axes

    Args:
      token_losses: [..., T] floats; for "dapo" [..., G, T]. The paper's normaliser is the group's
        ([B, G, T]); for that of the whole batch, as in TRL and verl, pass [B G, T].
      mask: 1 where a token counts, of the same shape.
      max_length: for "dr_grpo", the constant that divides: the generation budget.

    Returns: [...]; 0 for a sequence without tokens.
    Raises: ValueError also for an unknown method or a missing `max_length`.

    Shao et al. 2024 (GRPO), eq. 3; Liu et al. 2025 (Dr. GRPO), sec. 3; Yu et al. 2025 (DAPO),
    eq. 8.
    """
    token_losses = as_float("token_losses", token_losses)
    mask = as_mask(mask, token_losses.shape)
    if method == "grpo":
        return masked_mean(token_losses, mask)
    sums = jnp.where(mask, token_losses, 0.0).sum(-1)
    if method == "dr_grpo":
        if max_length is None:
            raise ValueError("`method='dr_grpo'` needs `max_length`")
        return sums / max_length
    if method == "dapo":
        require(mask.ndim >= 2, f"`method='dapo'` needs [..., G, T], but got {mask.shape}")
        tokens = jnp.maximum(mask.sum((-2, -1)), 1)[..., None]
        return sums * mask.shape[-2] / tokens
    raise ValueError(f"`method` must be 'grpo', 'dr_grpo' or 'dapo', but is {method!r}")
