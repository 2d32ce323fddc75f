"""What a policy gradient optimises: advantages of an iteration, and the loss of a micro-batch.

The methods and the fields of the config are told in `policy_gradient.py`, which runs them.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jax.sharding import Mesh
from ml_collections import ConfigDict

from align_jax.errors import ModelError, RunError
from align_jax.losses import policy_gradient as pg
from align_jax.losses.preference import dpo_loss
from align_jax.models.frozen import combine, partition
from align_jax.models.heads import ScalarHead, ScalarModel, without_unembedding
from align_jax.models.locate import locate
from align_jax.models.transformer import Transformer
from align_jax.rewards.base import Reward
from align_jax.rewards.model import load_reward_model, loaded_members, member_directories
from align_jax.training import pretrained
from align_jax.training.scoring import (
    by_response,
    log_probs_from_states,
    predicting_states,
    target_log_probs,
)
from align_jax.training.step import Batch, LossFunction, LossSums

Array = jax.Array


class Agent(NamedTuple):
    """What is trained: the policy and, for PPO, its critic (on its own trunk, or a head on it)."""

    model: Transformer
    critic: ScalarModel | ScalarHead | None


def new_agent(config: ConfigDict, model: Transformer, mesh: Mesh, reward: Reward) -> Agent:
    """The policy, which starts as `model`, and its critic, before the first update.

    What is trained is in buffers of its own, for the train step consumes them; what is frozen is
    shared, by a critic that starts as a model `reward` has read, with that.

    Raises:
      RunError: the reward model of `critic_init` cannot be read or has another vocabulary.
    """
    policy = _own(model)
    if config.critic == "none":
        return Agent(policy, None)
    if config.critic == "shared":
        return Agent(policy, ScalarHead(policy.config.hidden_size, key=None))
    if not config.critic_init:
        return Agent(policy, ScalarModel(without_unembedding(_own(model)), key=None))
    directory = critic_directory(config)
    loaded = loaded_members(reward).get(directory.resolve())
    try:
        start, scale = loaded or load_reward_model(directory, mesh=mesh)
    except ModelError as error:
        raise RunError(f"config.critic_init = {config.critic_init}: {error}") from error
    critic = jax.tree.map(lambda x: x, start)
    critic.transformer.config = dataclasses.replace(
        start.config, compute_dtype=config.compute_dtype, remat=config.remat
    )
    if critic.config.vocab_size != policy.config.vocab_size:
        raise RunError(
            f"config.critic_init = {config.critic_init} has {critic.config.vocab_size} tokens, "
            f"the policy {policy.config.vocab_size}: a critic reads the policy's own tokens."
        )
    # It starts as the reward itself, hence with the reward's scale.
    head = critic.head
    head.head_kernel[...] = scale.gain * head.head_kernel[...]
    head.head_bias[...] = scale.gain * head.head_bias[...] + scale.bias
    critic.transformer = pretrained.with_adapters(config, critic.transformer, mesh)
    if loaded:
        critic.transformer = _own(critic.transformer)
    return Agent(policy, critic)


def critic_directory(config: ConfigDict) -> Path:
    """Where the reward model of `critic_init` lies: there, or in what its run has written.

    Raises:
      RunError: an ensemble, a run without a finished reward model, or no model at all.
    """
    try:
        folders = member_directories(config.critic_init)
        if len(folders) > 1:
            raise RunError(
                f"config.critic_init = {config.critic_init} is an ensemble of {len(folders)} "
                f"reward models, and a critic starts from one: name it, such as {folders[0]}."
            )
        locate(folders[0], weights=True)
    except ModelError as error:
        raise RunError(f"config.critic_init: {error}") from error
    return folders[0]


def _own(model: Transformer) -> Transformer:
    """The model with copies of the parameters that are trained."""
    trained, frozen = partition(model)
    return combine(jax.tree.map(jnp.copy, trained), frozen)


def _values(critic: ScalarModel | ScalarHead, batch: Batch, states: Array | None = None) -> Array:
    """The critic's estimate `[R,S]` before each target, in units of reward.

    A head needs the policy's `states`; a critic with its own trunk has its own.
    """
    if isinstance(critic, ScalarModel):
        return critic.head(predicting_states(critic.transformer, batch))
    return critic(states)


def score_completions(
    agent: Agent, batch: Batch, *, shape: tuple[int, int], temperature: float
) -> dict[str, Array]:
    """`log_probs`, `entropies` and, with a critic, `values` of a rollout batch: `[N,T]` each."""
    states = predicting_states(agent.model, batch)
    log_probs, entropies = log_probs_from_states(
        agent.model, states, batch, temperature=temperature
    )
    out = {"log_probs": log_probs, "entropies": entropies}
    if agent.critic is not None:
        out["values"] = _values(agent.critic, batch, states)
    return {name: by_response(x, batch, shape) for name, x in out.items()}


def critic_values(critic: ScalarModel, batch: Batch, *, shape: tuple[int, int]) -> Array:
    """Values `[N,T]` of a critic with its own trunk."""
    return by_response(_values(critic, batch), batch, shape)


def advantages_of(
    config: ConfigDict,
    scores: Array,
    log_probs: Array,
    ref_log_probs: Array,
    mask: Array,
    values: Array | None,
    kl_coefficient: Array,
    baseline: Array,
) -> dict[str, Array]:
    """Advantages, and PPO's returns, of all completions of an iteration.

    Args:
      scores: `[N]` float, completions of one prompt next to each other.
      log_probs, ref_log_probs, mask, values: `[N,T]`.
      kl_coefficient: of the KL in the reward; not used where it is a term of the loss.
      baseline: the moving baseline; NaN before the first iteration.

    Returns:
      `advantages` `[N,T]`, `rewards` `[N]` (scores minus the KL penalty) and, for GAE, `returns`.
    """
    penalised = config.kl.placement == "reward" and config.loss != "dpo"
    coefficient = kl_coefficient if penalised else 0.0
    kl = jnp.where(mask > 0, log_probs - ref_log_probs, 0.0).sum(-1)
    rewards = scores - coefficient * kl
    if config.advantage == "gae" and config.loss != "dpo":
        per_token = pg.kl_shaped_rewards(
            scores, log_probs, ref_log_probs, mask, kl_coefficient=coefficient
        )
        if config.whiten_rewards:
            per_token = pg.whiten(per_token, mask, shift_mean=False)
        advantages, returns = pg.gae(
            per_token, values, mask, discount=config.discount, lambda_=config.lambda_
        )
        if config.whiten_advantages:
            advantages = pg.whiten(advantages, mask)
        return {"advantages": advantages, "returns": returns, "rewards": rewards}
    groups = rewards.reshape(-1, config.sampling.samples)
    if config.loss == "dpo":
        per_completion = jnp.zeros_like(rewards)
    elif config.advantage == "rloo":
        per_completion = pg.rloo_advantages(groups).ravel()
    elif config.advantage == "grpo":
        per_completion = pg.grpo_advantages(groups, scale=config.scale_rewards).ravel()
    else:
        # The first iteration has no past: the mean of the other completions stands in for it.
        first = pg.rloo_advantages(rewards)
        per_completion = jnp.where(jnp.isnan(baseline), first, rewards - baseline)
    advantages = jnp.where(mask > 0, per_completion[:, None], 0.0)
    return {"advantages": advantages, "rewards": rewards}


def token_weights(config: ConfigDict, mask: Array) -> Array:
    """`[N,T]` weights with which the token losses of a minibatch add up to its loss."""
    method, max_length = config.aggregation, config.sampling.max_new_tokens
    if method == "sum":
        method, max_length = "dr_grpo", 1

    def total(losses):
        return pg.aggregate_token_losses(losses, mask, method=method, max_length=max_length).mean()

    return jax.grad(total)(jnp.zeros(mask.shape, jnp.float32))


def with_missing_eos(config: ConfigDict, scores: np.ndarray, ended: np.ndarray) -> np.ndarray:
    """Scores `[N]` once completions without a stop token (`ended` false) got what they deserve."""
    if config.missing_eos == "replace":
        return np.where(ended, scores, np.float32(config.missing_eos_score))
    if config.missing_eos == "subtract":
        return scores - np.float32(abs(config.missing_eos_score)) * ~ended
    return scores


def pair_weights(scores: np.ndarray, samples: int) -> np.ndarray:
    """`[N]`: 1 at the best and -1 at the worst completion of each prompt, 0 where all tie."""
    groups = scores.reshape(-1, samples)
    out = np.zeros_like(groups, np.float32)
    rows = np.flatnonzero(groups.max(1) > groups.min(1))
    out[rows, groups[rows].argmax(1)] = 1.0
    out[rows, groups[rows].argmin(1)] = -1.0
    return out.ravel()


def make_loss(config: ConfigDict) -> LossFunction:
    """The loss of a micro-batch of completions, already divided by what the whole minibatch holds.

    Beside the rows of `training/rollouts.rollout_batch` a batch has, `[N,T]`: `mask`,
    `old_log_probs`, `ref_log_probs`, `advantages`, `weights` (of the policy's loss),
    `mean_weights` (1 over the tokens of the minibatch) and, with a critic, `old_values` and
    `returns`; `[N]`: `pairs`, `pair_weights`, `on_policy` and `kl_coefficient`.

    `on_policy` is 1 in the first update of an iteration, where the old policy is the very one that
    is trained: its log-probabilities are then taken from the same forward pass, and every ratio is
    exactly 1, whatever that pass computes. What could be wrong with it shows in `val/old_gap`, the
    mean distance of its log-probabilities to the batch's `old_log_probs`.

    With PPO-ptx there are the arrays of a batch of text as `ptx_*` too, and `ptx_weights`.
    """
    high = config.clip_range_high or None
    temperature = config.sampling.temperature
    share = 1.0 / config.data.accumulation

    def policy_losses(log_probs, old, batch):
        advantages = batch["advantages"]
        clip = {"clip_range": config.clip_range, "clip_range_high": high}
        if config.loss == "ppo":
            return pg.ppo_clip_loss(
                log_probs, old, advantages, dual_clip=config.dual_clip or None, **clip
            )
        if config.loss == "gspo":
            return pg.gspo_loss(log_probs, old, advantages, batch["mask"], **clip)
        if config.loss == "cispo":
            clip["clip_range_high"] = high or config.clip_range
            return pg.cispo_loss(log_probs, old, advantages, **clip)
        return pg.reinforce_loss(log_probs, advantages)

    def dpo_losses(log_probs, batch):
        # One-hot over a prompt's completions: sums pick the chosen and the rejected one.
        pairs = batch["pairs"].reshape(-1, config.sampling.samples)
        pick = lambda x, sign: (  # noqa: E731
            jnp.where(pairs == sign, x.sum(-1).reshape(pairs.shape), 0.0).sum(-1)
        )
        losses = dpo_loss(
            pick(log_probs, 1.0),
            pick(log_probs, -1.0),
            pick(batch["ref_log_probs"], 1.0),
            pick(batch["ref_log_probs"], -1.0),
            beta=config.kl.coefficient,
        )
        return jnp.where((pairs != 0).any(-1), losses, 0.0)

    def loss_sums(agent: Agent, batch: Batch) -> LossSums:
        mask = batch["mask"]
        states = predicting_states(agent.model, batch)
        new, entropies = (
            by_response(x, batch, mask.shape)
            for x in log_probs_from_states(agent.model, states, batch, temperature=temperature)
        )
        on_policy = batch["on_policy"][:, None] > 0
        old = jnp.where(on_policy, stop_gradient(new), batch["old_log_probs"])
        mean = lambda x: (batch["mean_weights"] * x).sum()  # noqa: E731
        if config.loss == "dpo":
            # A pair's weight stands in the row of its chosen completion.
            of_rows = jnp.repeat(dpo_losses(new, batch), config.sampling.samples)
            loss = (batch["pair_weights"] * of_rows).sum()
        else:
            loss = (batch["weights"] * policy_losses(new, old, batch)).sum()
        difference = stop_gradient(new) - old
        ratio = jnp.exp(difference)
        clipped = ratio
        if config.loss == "gspo":
            clipped = pg.gspo_ratio(stop_gradient(new), old, mask)[:, None]
        upper = 1 + (high or config.clip_range)
        metrics = {
            "loss/policy_avg": loss,
            "policy/approxkl_avg": mean(pg.kl_estimate(old, stop_gradient(new), estimator="k2")),
            "policy/clipfrac_avg": mean((clipped < 1 - config.clip_range) | (clipped > upper)),
            "policy/entropy_avg": mean(entropies),
            "val/ratio": mean(ratio),
            "val/old_gap": mean(jnp.abs(stop_gradient(new) - batch["old_log_probs"])),
        }
        if config.kl.placement == "loss" and config.loss != "dpo":
            kl = pg.kl_estimate(new, batch["ref_log_probs"], estimator=config.kl.estimator)
            penalty = (batch["weights"] * kl).sum()
            metrics["loss/kl_avg"] = penalty
            loss += batch["kl_coefficient"][0] * penalty
        if config.entropy_coefficient:
            loss -= config.entropy_coefficient * (batch["weights"] * entropies).sum()
        if agent.critic is not None:
            values = by_response(_values(agent.critic, batch, states), batch, mask.shape)
            value_losses = pg.clipped_value_loss(
                values, batch["old_values"], batch["returns"], clip_range=config.value_clip_range
            )
            metrics["loss/value_avg"] = mean(value_losses)
            loss += config.value_coefficient * mean(value_losses)
        if config.ptx.source:
            text = {k.removeprefix("ptx_"): x for k, x in batch.items() if k.startswith("ptx_")}
            log_probs, _ = target_log_probs(agent.model, text)
            losses = pg.ptx_loss(log_probs, text["target_mask"], gamma=config.ptx.gamma)
            metrics["loss/ptx_avg"] = (text["weights"] * losses).sum()
            loss += metrics["loss/ptx_avg"]
        # The weights have the whole minibatch in them; `share` makes the parts add up to 1.
        return LossSums(loss, jnp.float32(share), metrics)

    return loss_sums
