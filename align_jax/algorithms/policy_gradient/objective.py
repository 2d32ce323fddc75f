"""What a policy gradient optimises: advantages of an iteration, and the loss of a micro-batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient

from align_jax.algorithms.online_preference import Pairs
from align_jax.algorithms.policy_gradient.agent import Agent, values_of
from align_jax.algorithms.policy_gradient.config import Config
from align_jax.algorithms.policy_gradient.methods import Signals
from align_jax.losses import policy_gradient as pg
from align_jax.training.scoring import (
    by_response,
    log_probs_from_states,
    predicting_states,
    target_log_probs,
)
from align_jax.training.step import Batch, LossFunction, LossSums

Array = jax.Array


class Estimate(NamedTuple):
    """What an iteration's completions turned out to be worth.

    Attributes:
      rewards: `[N]`, scores minus the KL penalty that is in the reward.
      advantages: `[N,T]`; None for a loss that takes none.
      returns: `[N,T]`, what a critic is trained on; None without one.
    """

    rewards: Array
    advantages: Array | None
    returns: Array | None


def estimate_advantages(
    config: Config,
    scores: Array,
    log_probs: Array,
    ref_log_probs: Array,
    mask: Array,
    values: Array | None,
    kl_coefficient: Array,
    baseline: Array,
) -> Estimate:
    """Advantages of all completions of an iteration.

    Args:
      scores: `[N]` float, completions of one prompt next to each other.
      log_probs, ref_log_probs, mask, values: `[N,T]`.
      kl_coefficient: of the KL in the reward; not used where it is a term of the loss.
      baseline: the moving baseline; NaN before the first iteration.
    """
    coefficient = kl_coefficient if config.kl_in_reward else 0.0
    kl = jnp.where(mask > 0, log_probs - ref_log_probs, 0.0).sum(-1)
    rewards = scores - coefficient * kl
    if config.estimator is None:
        return Estimate(rewards, None, None)
    signals = Signals(
        scores, rewards, log_probs, ref_log_probs, mask, values, coefficient, baseline
    )
    return Estimate(rewards, *config.estimator.function(config, signals))


def aggregation_weights(mask: Array, *, method: str, max_length: int) -> Array:
    """Weights `[N,T]` with which the token losses of a minibatch add up to its loss.

    They are the derivatives of the mean of `losses.policy_gradient.aggregate_token_losses`:

      "dapo"     1 / tokens of the minibatch
      "grpo"     1 / (N tokens of the completion)
      "dr_grpo"  1 / (N max_length)
      "sum"      1 / N

    Args:
      mask: `[N,T]`, 1 on the tokens of a completion; numpy's or JAX's, as is the result.
      max_length: tokens that a completion may have.
    """
    tokens = mask.sum(-1, keepdims=True)
    divisors = {
        "dapo": tokens.sum().clip(1),
        "grpo": len(mask) * tokens.clip(1),
        "dr_grpo": len(mask) * max_length,
        "sum": len(mask),
    }
    return mask / divisors[method]


def with_missing_eos(config: Config, scores: np.ndarray, ended: np.ndarray) -> np.ndarray:
    """Scores `[N]` once completions without a stop token (`ended` false) got what they deserve."""
    if config.missing_eos == "replace":
        return np.where(ended, scores, np.float32(config.missing_eos_score))
    if config.missing_eos == "subtract":
        return scores - np.float32(abs(config.missing_eos_score)) * ~ended
    return scores


class Completions(NamedTuple):
    """The N completions of a micro-batch; arrays are `[N,T]`.

    Attributes:
      mask: 1 on the tokens of a completion.
      old_log_probs, ref_log_probs: of the policy that sampled and of the reference, nats.
      weights: with which the token losses of the minibatch add up to its loss.
      mean_weights: likewise to the mean over its tokens.
      importance: what corrects the policy's loss, and no other term, for the sampler; None without
        `importance_cap`.
      advantages: None for a loss that takes none.
      old_values, returns: of the critic before the iteration, and what it is trained on; None
        without one.
      pairs: `[N]`; None for a loss that compares none.
    """

    mask: Array
    old_log_probs: Array
    ref_log_probs: Array
    weights: Array
    mean_weights: Array
    importance: Array | None = None
    advantages: Array | None = None
    old_values: Array | None = None
    returns: Array | None = None
    pairs: Pairs | None = None


class Text(NamedTuple):
    """A batch of PPO-ptx's text.

    Attributes:
      rows: in the layout of `data/batching.py`.
      weights: `[R,S]`, with which its token losses add up to their mean over the minibatch.
    """

    rows: Batch
    weights: Array


class MicroBatch(NamedTuple):
    """What one call of the loss gets; all of a minibatch, or one of its equal parts.

    Attributes:
      rows: prompts with their completions, in the layout of `data/batching.py`.
      completions: what is known of these completions.
      on_policy: `[N]`, 1 in the first update of an iteration, where the old policy is the very one
        that is trained, and 0 later.
      kl_coefficient: a scalar, of the KL in the loss.
      text: PPO-ptx's; None without it.
    """

    rows: Batch
    completions: Completions
    on_policy: Array
    kl_coefficient: Array
    text: Text | None = None


def make_objective(config: Config) -> LossFunction:
    """The loss of a `MicroBatch`, already divided by what the whole minibatch holds.

    Where a batch is `on_policy`, the old log-probabilities are taken from the same forward pass,
    and every ratio is exactly 1, whatever that pass computes. What could be wrong with it shows in
    `val/old_gap`, the mean distance of its log-probabilities to the batch's `old_log_probs`.
    """

    def loss_sums(agent: Agent, batch: MicroBatch) -> LossSums:
        completions, shape = batch.completions, batch.completions.mask.shape
        states = predicting_states(agent.model, batch.rows)
        new, entropies = (
            by_response(x, batch.rows, shape)
            for x in log_probs_from_states(
                agent.model, states, batch.rows, temperature=config.sampling.temperature
            )
        )
        old = jnp.where(batch.on_policy[:, None] > 0, stop_gradient(new), completions.old_log_probs)
        loss = config.policy_loss(config, new, old, completions)
        metrics = {"loss/policy_avg": loss}
        metrics |= _policy_metrics(config, stop_gradient(new), old, entropies, completions)
        if config.kl_in_loss:
            kl = pg.kl_estimate(new, completions.ref_log_probs, estimator=config.kl.estimator)
            metrics["loss/kl_avg"] = penalty = (completions.weights * kl).sum()
            loss += batch.kl_coefficient * penalty
        if config.entropy_coefficient:
            loss -= config.entropy_coefficient * (completions.weights * entropies).sum()
        if agent.critic is not None:
            values = values_of(agent.critic, batch.rows, states, shape=shape)
            metrics["loss/value_avg"] = value_loss = _value_loss(config, values, completions)
            loss += config.value_coefficient * value_loss
        if batch.text is not None:
            metrics["loss/ptx_avg"] = text_loss = _text_loss(config, agent, batch.text)
            loss += text_loss
        # The weights have the whole minibatch in them; these shares make the parts add up to 1.
        return LossSums(loss, jnp.float32(1.0 / config.data.accumulation), metrics)

    return loss_sums


def _policy_metrics(
    config: Config, new: Array, old: Array, entropies: Array, completions: Completions
) -> dict[str, Array]:
    """How far the policy has moved, and how sure it is: means over the tokens of a minibatch."""
    ratio = config.policy_loss.ratio(new, old, completions.mask)
    clipped = (ratio < 1 - config.clip_range) | (ratio > 1 + config.upper_clip_range)
    means = {
        "policy/approxkl_avg": pg.kl_estimate(old, new, estimator="k2"),
        "policy/clipfrac_avg": clipped,
        "policy/entropy_avg": entropies,
        "val/ratio": jnp.exp(new - old),
        "val/old_gap": jnp.abs(new - completions.old_log_probs),
    }
    return {name: (completions.mean_weights * x).sum() for name, x in means.items()}


def _value_loss(config: Config, values: Array, completions: Completions) -> Array:
    losses = pg.clipped_value_loss(
        values, completions.old_values, completions.returns, clip_range=config.value_clip_range
    )
    return (completions.mean_weights * losses).sum()


def _text_loss(config: Config, agent: Agent, text: Text) -> Array:
    log_probs, _ = target_log_probs(agent.model, text.rows)
    losses = pg.ptx_loss(log_probs, text.rows["target_mask"], gamma=config.ptx.gamma)
    return (text.weights * losses).sum()
