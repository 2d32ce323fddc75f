"""The choices that make a method: token losses and advantage estimators, one object each.

An object says what its choice computes, which fields of the config it alone reads, and what else a
config that chooses it must say. `LOSSES` and `ADVANTAGES` have them under the names that
`config.loss` and `config.advantage` may have.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient

from align_jax.algorithms.online_preference import OnlineDpo, Pairs
from align_jax.errors import RunError
from align_jax.losses import policy_gradient as pg

Array = jax.Array
# `config.Config` and `objective.Completions` of `policy_gradient`, whose modules import this one.
Config = Any
Completions = Any


def _nothing_more(config: Config) -> None:
    """What a choice checks that goes with everything."""


def _token_ratio(new: Array, old: Array, mask: Array) -> Array:
    return jnp.exp(stop_gradient(new) - old)


def _completion_ratio(new: Array, old: Array, mask: Array) -> Array:
    return pg.gspo_ratio(stop_gradient(new), old, mask)[:, None]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenLoss:
    """A loss of every sampled token, made of log-probabilities and an advantage.

    Attributes:
      function: `(config, new, old, completions) -> [N,T]`; `new` and `old` are the
        log-probabilities `[N,T]` of the policy in training and of the one that sampled.
      reads: fields of the config that not all losses read.
      check: raises `RunError` for a config that this loss cannot do with.
      ratio: `(new, old, mask) -> [N,T]` or `[N,1]`, what `clip_range` bounds.
      grouped: whether it compares the completions of a prompt, and so needs two.
      takes_advantages: whether it has an advantage estimator, hence perhaps a critic.
      takes_kl: whether the KL to the reference is to be added, to the reward or to the loss.
    """

    function: Callable[[Config, Array, Array, Completions], Array]
    reads: tuple[str, ...] = ("importance_cap",)
    check: Callable[[Config], None] = _nothing_more
    ratio: Callable[[Array, Array, Array], Array] = _token_ratio
    grouped = False
    takes_advantages = True
    takes_kl = True

    def __call__(self, config: Config, new: Array, old: Array, completions: Completions) -> Array:
        """What a micro-batch adds to the loss of its minibatch: a scalar."""
        losses = self.function(config, new, old, completions)
        if completions.importance is not None:
            losses *= completions.importance
        return (completions.weights * losses).sum()

    def pairs(self, scores: np.ndarray, samples: int) -> Pairs | None:
        """Which completions are compared; token losses compare none."""
        return None


def _clipping(config: Config) -> dict[str, float]:
    return {"clip_range": config.clip_range, "clip_range_high": config.upper_clip_range}


def _ppo(config, new, old, completions):
    return pg.ppo_clip_loss(
        new, old, completions.advantages, dual_clip=config.dual_clip or None, **_clipping(config)
    )


def _reinforce(config, new, old, completions):
    return pg.reinforce_loss(new, completions.advantages)


def _gspo(config, new, old, completions):
    return pg.gspo_loss(new, old, completions.advantages, completions.mask, **_clipping(config))


def _cispo(config, new, old, completions):
    return pg.cispo_loss(new, old, completions.advantages, **_clipping(config))


def _check_on_policy(config: Config) -> None:
    if config.epochs * config.minibatches > 1:
        raise RunError(
            f"config.epochs = {config.epochs} and config.minibatches = {config.minibatches}: "
            "config.loss=reinforce does not correct for a policy that has moved on; set both to "
            "1, or config.loss=ppo."
        )


LOSSES: dict[str, TokenLoss | OnlineDpo] = {
    "ppo": TokenLoss(_ppo, ("importance_cap", "clip_range_high", "dual_clip")),
    "reinforce": TokenLoss(_reinforce, check=_check_on_policy),
    "gspo": TokenLoss(_gspo, ("importance_cap", "clip_range_high"), ratio=_completion_ratio),
    "cispo": TokenLoss(_cispo, ("importance_cap", "clip_range_high")),
    "dpo": OnlineDpo(),
}


class Signals(NamedTuple):
    """What advantages are made of, for the N completions of an iteration, prompt by prompt.

    Attributes:
      scores: `[N]`, rewards after the rule for missing EOS.
      rewards: `[N]`, `scores` minus the KL penalty of the whole completion.
      log_probs, ref_log_probs: `[N,T]`, of the policy that sampled and of the reference, nats.
      mask: `[N,T]`, 1 on the tokens of a completion.
      values: `[N,T]`, the critic's; None without one.
      kl_coefficient: of the penalty that is in `rewards`; 0 if none is.
      baseline: the moving baseline; NaN before the first iteration.
    """

    scores: Array
    rewards: Array
    log_probs: Array
    ref_log_probs: Array
    mask: Array
    values: Array | None
    kl_coefficient: Array | float
    baseline: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Advantage:
    """What a sampled token is compared with.

    Attributes:
      function: `(config, signals) -> (advantages [N,T], returns [N,T] or None)`.
      reads: fields of the config that not all estimators read.
      check: raises `RunError` for a config that this estimator cannot do with.
      grouped: whether it compares the completions of a prompt, and so needs two.
      needs_critic: whether it reads a critic's values, and makes the returns that train it.
    """

    function: Callable[[Config, Signals], tuple[Array, Array | None]]
    reads: tuple[str, ...] = ()
    check: Callable[[Config], None] = _nothing_more
    grouped: bool = False
    needs_critic: bool = False


def _gae(config: Config, signals: Signals) -> tuple[Array, Array]:
    rewards = pg.kl_shaped_rewards(
        signals.scores,
        signals.log_probs,
        signals.ref_log_probs,
        signals.mask,
        kl_coefficient=signals.kl_coefficient,
    )
    if config.whiten_rewards:
        rewards = pg.whiten(rewards, signals.mask, shift_mean=False)
    assert signals.values is not None  # `needs_critic`
    advantages, returns = pg.gae(
        rewards, signals.values, signals.mask, discount=config.discount, lambda_=config.lambda_
    )
    if config.whiten_advantages:
        advantages = pg.whiten(advantages, signals.mask)
    return advantages, returns


def _of_completions(function: Callable[[Config, Signals], Array]):
    """An estimator that gives all tokens of a completion the advantage `[N]` of `function`."""

    def on_every_token(config: Config, signals: Signals) -> tuple[Array, None]:
        return jnp.where(signals.mask > 0, function(config, signals)[:, None], 0.0), None

    return on_every_token


def _rloo(config: Config, signals: Signals) -> Array:
    return pg.rloo_advantages(signals.rewards.reshape(-1, config.sampling.samples)).ravel()


def _grpo(config: Config, signals: Signals) -> Array:
    groups = signals.rewards.reshape(-1, config.sampling.samples)
    return pg.grpo_advantages(groups, scale=config.scale_rewards).ravel()


def _moving_baseline(config: Config, signals: Signals) -> Array:
    # The first iteration has no past: the mean of the other completions stands in for it.
    first = pg.rloo_advantages(signals.rewards)
    later = signals.rewards - signals.baseline
    return jnp.where(jnp.isnan(signals.baseline), first, later)


def _check_two_completions(config: Config) -> None:
    if config.sampling.prompts * config.sampling.samples < 2:
        raise RunError(
            "config.advantage=moving_baseline needs two completions in the first iteration: raise "
            "config.sampling.prompts or config.sampling.samples."
        )


ADVANTAGES = {
    "gae": Advantage(
        _gae,
        ("discount", "lambda_", "whiten_rewards", "whiten_advantages"),
        needs_critic=True,
    ),
    "rloo": Advantage(_of_completions(_rloo), grouped=True),
    "grpo": Advantage(_of_completions(_grpo), ("scale_rewards",), grouped=True),
    "moving_baseline": Advantage(
        _of_completions(_moving_baseline), ("baseline_decay",), check=_check_two_completions
    ),
}
