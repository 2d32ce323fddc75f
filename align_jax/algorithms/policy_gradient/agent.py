"""What a policy gradient trains, the policy and its critic, and the reference it is held to."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from align_jax.algorithms.policy_gradient.config import Config
from align_jax.errors import ModelError, RunError
from align_jax.models.frozen import own_trained
from align_jax.models.heads import ScalarHead, ScalarModel, without_unembedding
from align_jax.models.locate import locate
from align_jax.models.lora import without_adapters
from align_jax.models.transformer import Transformer
from align_jax.rewards.base import Reward
from align_jax.rewards.model import load_reward_model, loaded_members, member_directories
from align_jax.training import pretrained
from align_jax.training.scoring import by_response, log_probs_from_states, predicting_states
from align_jax.training.state import TrainState, state_shardings
from align_jax.training.step import Batch

Array = jax.Array


class Agent(NamedTuple):
    """What is trained.

    Attributes:
      model: the policy.
      critic: a model with its own trunk, a head on the policy's, or None.
    """

    model: Transformer
    critic: ScalarModel | ScalarHead | None


def reference_of(model: Transformer, mesh: Mesh) -> Transformer:
    """The model that the KL is taken to: `model` on the mesh, its adapters off, sharing arrays."""
    reference = without_adapters(model)
    shardings = state_shardings(TrainState(jnp.int32(0), reference, ()), mesh)
    return jax.device_put(reference, shardings.model)


def starting_policy(config: Config, model: Transformer, mesh: Mesh) -> Transformer:
    """The model that the policy starts as: `model`, or what `config.init` names, with its adapters.

    Raises:
      RunError: `config.init` is a model of another shape.
    """
    if not config.init:
        return model
    start = pretrained.load_pretrained(config, config.init, mesh)
    start = pretrained.with_adapters(config, start, mesh)
    if start.config != model.config:
        raise RunError(
            f"config.init = {config.init} is a model of another shape than config.model = "
            f"{config.model}."
        )
    return start


def new_agent(config: Config, model: Transformer, mesh: Mesh, reward: Reward) -> Agent:
    """The policy, which starts as `model`, and its critic, before the first update.

    What is trained is in buffers of its own, for the train step consumes them. What is frozen is
    shared: by the policy with `model`, by a critic with the model that `reward` has read.

    Raises:
      RunError: the reward model of `critic_init` cannot be read or has another vocabulary.
    """
    policy = own_trained(model)
    if config.critic == "none":
        return Agent(policy, None)
    if config.critic == "shared":
        return Agent(policy, ScalarHead(policy.config.hidden_size, key=None))
    if not config.critic_init:
        return Agent(policy, ScalarModel(without_unembedding(own_trained(model)), key=None))
    return Agent(policy, _critic_of_reward_model(config, policy, mesh, reward))


def _critic_of_reward_model(
    config: Config, policy: Transformer, mesh: Mesh, reward: Reward
) -> ScalarModel:
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
        critic.transformer = own_trained(critic.transformer)
    return critic


def critic_directory(config: Config) -> Path:
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


class Scored(NamedTuple):
    """What one pass says of the completions of a batch, `[N,T]` each, 0 past their ends.

    Attributes:
      log_probs: nats, at the sampling temperature.
      untempered: nats, at temperature 1.
      values: the critic's, in units of reward; None without a critic on the policy's trunk.
    """

    log_probs: Array
    untempered: Array
    values: Array | None


def score_completions(
    agent: Agent, batch: Batch, *, shape: tuple[int, int], temperature: float
) -> Scored:
    """Log-probabilities of a rollout batch under a policy, and the values of its critic.

    Args:
      shape: `(N, T)`.
      temperature: the one that was sampled at.
    """
    states = predicting_states(agent.model, batch)

    def log_probs(temperature: float) -> Array:
        values, _ = log_probs_from_states(agent.model, states, batch, temperature=temperature)
        return by_response(values, batch, shape)

    tempered = log_probs(temperature)
    untempered = tempered if temperature == 1.0 else log_probs(1.0)
    values = None if agent.critic is None else values_of(agent.critic, batch, states, shape=shape)
    return Scored(tempered, untempered, values)


def values_of(
    critic: ScalarModel | ScalarHead,
    batch: Batch,
    states: Array | None = None,
    *,
    shape: tuple[int, int],
) -> Array:
    """The critic's estimate `[N,T]` before each token, in units of reward.

    A head needs the policy's `states`; a critic with its own trunk has its own.
    """
    if isinstance(critic, ScalarModel):
        values = critic.head(predicting_states(critic.transformer, batch))
    else:
        assert states is not None
        values = critic(states)
    return by_response(values, batch, shape)
