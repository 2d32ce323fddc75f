"""What a policy learns from: prompts, rewards and text, read and checked before any model is."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from align_jax.algorithms.policy_gradient.agent import critic_directory
from align_jax.algorithms.policy_gradient.config import Config
from align_jax.data import batching
from align_jax.data.dataset import Data, RawRecords, examples_of, prompts_of
from align_jax.data.loader import Loader
from align_jax.data.records import Record
from align_jax.data.tokenise import Example
from align_jax.errors import ModelError, RunError
from align_jax.evaluation.evaluators import load_held_out
from align_jax.generation.rollout import stop_tokens
from align_jax.models.locate import locate
from align_jax.rewards.base import Reward, check_records
from align_jax.rewards.configured import make_reward
from align_jax.rewards.model import reward_models
from align_jax.training import pretrained


class Prompts(NamedTuple):
    """Prompts as the reward and as the policy read them; an example's id is its record's place."""

    records: list[Record]
    examples: list[Example]


class Task(NamedTuple):
    """Everything that training reads beside its models.

    Attributes:
      prompts: what completions are sampled of.
      held_out: what the policy is sampled on before and after training.
      reward: what is trained on.
      judge: the reward of held-out samples.
      text: batches of PPO-ptx's text, one an update; None without it.
      measured: the held-out data of every evaluator.
    """

    prompts: Prompts
    held_out: Prompts
    reward: Reward
    judge: Reward
    text: Loader | None
    measured: list[Any]


def read_task(
    config: Config,
    tokenizer: Any,
    mesh: Mesh,
    records: RawRecords,
    held_out: RawRecords = (),
    *,
    reward: Reward | None = None,
) -> Task:
    """Reads what a run needs, and refuses what would stop it later.

    Args:
      tokenizer: the policy's.
      mesh: where reward models go.
      records: the prompts.
      held_out: those that the policy is compared with its reference on; may be empty.
      reward: instead of `config.reward`.

    Raises:
      RunError: sizes that do not fit; a model that `config` names and that is not there.
      RewardError: a reward that cannot be made, or does not go with the prompts.
      DataError: a record that cannot be used, or a text that no bucket holds.
    """
    stop_tokens(tokenizer, config.sampling)
    prompts = _prompts(config, tokenizer, records)
    check_count(config, prompts.examples)
    if reward is None:
        reward = make_reward(config.reward, tokenizer=tokenizer, mesh=mesh)
    judge = reward
    if described := config.evaluation.reward:
        key = "config.evaluation.reward"
        judge = make_reward(described, tokenizer=tokenizer, mesh=mesh, key=key)
    if held_out and getattr(judge, "relative", False):
        raise RunError(
            "config.reward is standardised over the completions scored together, so held-out "
            "samples before and after training cannot be compared by it: name another reward in "
            "config.evaluation.reward, or set config.evaluation.source='' for no such samples."
        )
    _check_models(config)
    compared = _prompts(config, tokenizer, held_out) if held_out else Prompts([], [])
    for one, asked in ((reward, prompts), (reward, compared), (judge, compared)):
        check_records(one, asked.records)
        for model in reward_models(one):
            model.require_room(asked.records, tokenizer, config.sampling.max_new_tokens)
    measured = load_held_out(config, tokenizer, kind="prompt")
    return Task(prompts, compared, reward, judge, _read_text(config, tokenizer), measured)


def _prompts(config: Config, tokenizer: Any, records: RawRecords) -> Prompts:
    budget = config.sampling.max_new_tokens
    return Prompts(*prompts_of(records, tokenizer, config.data, max_new_tokens=budget))


def check_count(config: Config, examples: Sequence[Example]) -> None:
    """Raises `RunError` if there are fewer prompts than one iteration takes."""
    if config.sampling.prompts > len(examples):
        raise RunError(
            f"config.sampling.prompts = {config.sampling.prompts} is more than there are prompts: "
            f"{len(examples)}."
        )


def _check_models(config: Config) -> None:
    """Raises `RunError` for a starting policy or critic that is not there."""
    if config.init and pretrained.run_at(config.init) is None:
        try:
            locate(config.init, weights=True)
        except ModelError as error:
            raise RunError(f"config.init: {error}") from error
    if config.critic_init:
        critic_directory(config)


def _read_text(config: Config, tokenizer: Any) -> Loader | None:
    if not config.ptx.source:
        return None
    data = text_data(config)
    examples = examples_of(config.ptx.source, tokenizer, data, kind="sft")
    # The seed is offset so that this order never equals that of the prompts.
    seed, collate = config.seed + 2**33, batching.make_collate(data)
    loader = Loader(examples, batch_size=data.batch_size, seed=seed, collate=collate)
    places = loader.places(0, config.num_updates * data.batch_size)
    batching.check_lengths(data, examples, places)
    return loader


def text_data(config: Config) -> Data:
    """How PPO-ptx's text is read and laid out: as prompts are, without their limit."""
    return dataclasses.replace(config.data, batch_size=config.ptx.batch_size, limit=0)
