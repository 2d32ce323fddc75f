"""Losses that fit a reward model to comparisons, and the game that comparisons define.

Rewards are on the scale where a difference of 1 is one nat of log-odds. Rank 0 is best.

After each loss that a reward model can be trained with stands its `RankingLoss`, which says what it
reads and which options are its own. `LOSSES` holds all of them by name.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jax.typing import ArrayLike

from align_jax.losses._inputs import (
    Number,
    as_float,
    as_mask,
    is_number,
    require,
    same_shape_floats,
)
from align_jax.losses._options import Option

__all__ = [
    "LOSSES",
    "RankingLoss",
    "all_pairs_loss",
    "best_of_k_loss",
    "bradley_terry_loss",
    "minimax_winner",
    "plackett_luce_loss",
    "process_reward_loss",
]

# The reward of a response that is not there. Its exp is 0, and unlike minus infinity it gives
# differences, and gradients, that are not nan.
_LOWEST = -1e30


@dataclasses.dataclass(frozen=True, eq=False)
class RankingLoss:
    """A loss with everything that a trainer of reward models must know of it.

        loss = LOSSES["pairwise"]
        loss({"rewards": rewards, "margin": margin}, label_smoothing=0.1)  # [B] nats

    An example is a ranking of up to K responses, or a pair with the chosen response first. The
    names that `reads` may hold:

        rewards  [B,K] floats, in the order of the responses
        ranks    [B,K] floats, 0 is best; nan where an example has fewer than K responses
        margin   [B] floats, by how much the chosen response of a pair should win

    Whoever reads `ranks` is `ranked` and learns from rankings, the others learn from pairs.
    """

    name: str
    # Takes the values of `reads` in their order, then the options as keywords.
    function: Callable[..., jax.Array]
    reads: tuple[str, ...]
    options: tuple[Option, ...] = ()
    # Whether it asks of a ranking only which response is best: exactly one must have rank 0.
    only_best: bool = False

    @property
    def ranked(self) -> bool:
        """Whether an example is a ranking, and not a pair."""
        return "ranks" in self.reads

    def __call__(self, values: Mapping[str, jax.Array], **options: Number) -> jax.Array:
        """The loss [B] in nats, from the arrays that `reads` names and the loss's own options."""
        return self.function(*(values[name] for name in self.reads), **options)


def _filled(rewards: jax.Array, ranks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Responses that are not there come last, and weigh nothing beside those that are."""
    present = ~jnp.isnan(ranks)
    return jnp.where(present, rewards, _LOWEST), jnp.where(present, ranks, jnp.inf)


def bradley_terry_loss(
    chosen_rewards: ArrayLike,
    rejected_rewards: ArrayLike,
    *,
    margin: ArrayLike = 0.0,
    label_smoothing: Number = 0.0,
    center_coefficient: Number = 0.0,
) -> jax.Array:
    """Negative log-likelihood that the chosen response wins under Bradley-Terry.

    z = chosen - rejected - margin
    loss = -(1 - label_smoothing) log sigmoid(z) - label_smoothing log sigmoid(-z)
           + center_coefficient (chosen + rejected)^2

    Args:
      chosen_rewards, rejected_rewards: [...] floats.
      margin: how much better the chosen response was judged to be; a number or [...].
      label_smoothing: probability in [0, 0.5) that a comparison is flipped.
      center_coefficient: weight of the term that holds rewards near 0, which the comparisons alone
        leave free.

    Returns: [...] nats.
    Raises: TypeError for integer rewards; ValueError for unequal shapes or label_smoothing.

    Ouyang et al. 2022 (InstructGPT), eq. 1; margin: Touvron et al. 2023 (Llama 2), eq. 2; centring:
    Eisenstein et al. 2023, eq. 2; smoothing: Mitchell 2023 (cDPO).
    """
    chosen, rejected = same_shape_floats(
        chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards
    )
    if is_number(label_smoothing):
        require(0 <= label_smoothing < 0.5, "`label_smoothing` must be in [0, 0.5)")
    z = chosen - rejected - margin
    loss = -(1 - label_smoothing) * log_sigmoid(z) - label_smoothing * log_sigmoid(-z)
    return loss + center_coefficient * (chosen + rejected) ** 2


def _first_beats_second(rewards: jax.Array, margin: jax.Array, **options: Number) -> jax.Array:
    return bradley_terry_loss(rewards[:, 0], rewards[:, 1], margin=margin, **options)


PAIRWISE = RankingLoss(
    "pairwise",
    _first_beats_second,
    ("rewards", "margin"),
    options=(
        Option("label_smoothing", least=0.0, below=0.5),
        Option("center_coefficient", least=0.0),
    ),
)


def best_of_k_loss(rewards: ArrayLike, best: ArrayLike) -> jax.Array:
    """Cross-entropy of the response a person picked out of K.

    loss = -rewards[best] + log sum_k exp(rewards[k])

    Args:
      rewards: [..., K] floats.
      best: [...] integers in [0, K). An index outside gives nan.

    Returns: [...] nats.
    Raises: TypeError for integer rewards or non-integer `best`; ValueError if shapes do not fit.

    Ziegler et al. 2019, eq. 1. The equation is printed without its minus sign; a loss needs it.
    """
    rewards = as_float("rewards", rewards)
    best = jnp.asarray(best)
    if not jnp.issubdtype(best.dtype, jnp.integer):
        raise TypeError(f"`best` must hold integer indices, but its dtype is {best.dtype}")
    require(
        best.shape == rewards.shape[:-1],
        f"`best` has shape {best.shape}, but `rewards` {rewards.shape} needs {rewards.shape[:-1]}",
    )
    picked = jnp.take_along_axis(rewards, best[..., None], axis=-1, mode="fill")[..., 0]
    return jax.nn.logsumexp(rewards, axis=-1) - picked


def _first_rank_is_best(rewards: jax.Array, ranks: jax.Array) -> jax.Array:
    rewards, ranks = _filled(rewards, ranks)
    return best_of_k_loss(rewards, jnp.argmin(ranks, axis=1))


BEST_OF_K = RankingLoss("best_of_k", _first_rank_is_best, ("rewards", "ranks"), only_best=True)


def _ranked(rewards: ArrayLike, ranks: ArrayLike) -> tuple[jax.Array, jax.Array]:
    rewards, ranks = as_float("rewards", rewards), jnp.asarray(ranks)
    require(
        rewards.shape == ranks.shape,
        f"`rewards` {rewards.shape} and `ranks` {ranks.shape} must have one shape",
    )
    return rewards, ranks


def all_pairs_loss(rewards: ArrayLike, ranks: ArrayLike) -> jax.Array:
    """Mean Bradley-Terry loss over the pairs that a ranking of K responses contains.

    loss = mean over i, j with ranks[i] < ranks[j] of -log sigmoid(rewards[i] - rewards[j])

    Args:
      rewards: [..., K] floats.
      ranks: [..., K] numbers, 0 is best; only their order matters.

    Returns: [...] nats; 0 where everything is tied. Without ties the mean is over K choose 2 pairs.
    Raises: TypeError for integer rewards; ValueError for unequal shapes.

    Ouyang et al. 2022 (InstructGPT), eq. 1. Tied pairs say nothing, so they leave the numerator and
    the denominator: a prompt with ties then weighs as much as one without.
    """
    rewards, ranks = _ranked(rewards, ranks)
    better = ranks[..., :, None] < ranks[..., None, :]
    losses = -log_sigmoid(rewards[..., :, None] - rewards[..., None, :])
    return jnp.where(better, losses, 0.0).sum((-2, -1)) / jnp.maximum(better.sum((-2, -1)), 1)


# A nan is neither below nor above a rank, so responses that are not there form no pair.
ALL_PAIRS = RankingLoss("all_pairs", all_pairs_loss, ("rewards", "ranks"))


def plackett_luce_loss(rewards: ArrayLike, ranks: ArrayLike) -> jax.Array:
    """Negative log-likelihood of a whole order of K responses under Plackett-Luce.

    loss = sum_i [ log sum_{j : ranks[j] >= ranks[i]} exp(rewards[j]) - rewards[i] ]

    Args:
      rewards: [..., K] floats.
      ranks: [..., K] numbers, 0 is best; only their order matters.

    Returns: [...] nats.
    Raises: TypeError for integer rewards; ValueError for unequal shapes.

    Plackett 1975; Zhu et al. 2023 (K-wise maximum likelihood). Plackett-Luce gives ties no
    probability; they are handled as in Breslow 1974 (tied responses share a denominator), which
    does not depend on the order in which tied responses happen to be listed.
    """
    rewards, ranks = _ranked(rewards, ranks)
    remaining = ranks[..., None, :] >= ranks[..., :, None]
    candidates = jnp.broadcast_to(rewards[..., None, :], remaining.shape)
    return (jax.nn.logsumexp(candidates, axis=-1, where=remaining) - rewards).sum(-1)


def _plackett_luce(rewards: jax.Array, ranks: jax.Array) -> jax.Array:
    return plackett_luce_loss(*_filled(rewards, ranks))


PLACKETT_LUCE = RankingLoss("plackett_luce", _plackett_luce, ("rewards", "ranks"))


LOSSES: dict[str, RankingLoss] = {
    loss.name: loss for loss in (PAIRWISE, BEST_OF_K, ALL_PAIRS, PLACKETT_LUCE)
}


def process_reward_loss(rewards: ArrayLike, labels: ArrayLike, mask: ArrayLike) -> jax.Array:
    """Cross-entropy of step-wise rewards with whether each step is right.

    loss[t] = -labels[t] log sigmoid(rewards[t]) - (1 - labels[t]) log sigmoid(-rewards[t])

    Args:
      rewards: [..., T] floats, the log-odds that the step ending at t is right.
      labels: [..., T] floats in [0, 1]: hard labels, or the share of completions that succeed.
      mask: [..., T], 1 where a step ends.

    Returns: [..., T] nats, 0 where `mask` is 0.
    Raises: TypeError for integer rewards or labels; ValueError for unequal shapes.

    Lightman et al. 2023 (sec. 2.6); soft labels: Wang et al. 2023 (Math-Shepherd).
    """
    rewards, labels = same_shape_floats(rewards=rewards, labels=labels)
    mask = as_mask(mask, rewards.shape)
    rewards, labels = jnp.where(mask, rewards, 0.0), jnp.where(mask, labels, 0.0)
    loss = -labels * log_sigmoid(rewards) - (1 - labels) * log_sigmoid(-rewards)
    return jnp.where(mask, loss, 0.0)


def minimax_winner(preferences: ArrayLike) -> jax.Array:
    """The mixture of K responses that no response beats on average: what SPO converges to.

    p solves max_p min_j sum_i p_i (preferences[i, j] - 1/2), of which the value is 0. Unlike a
    Bradley-Terry winner it exists for cyclic preferences.

    Args:
      preferences: [..., K, K] floats, the probability that i is preferred to j. The diagonal is
        ignored, and where preferences[i, j] + preferences[j, i] is not 1 the two are averaged.

    Returns: [..., K] probabilities. Where several mixtures are optimal, the analytic centre of
      their set (so indifference gives the uniform mixture). No gradient flows through it.
    Raises: TypeError for integers; ValueError for a matrix that is not square.

    Swamy et al. 2024 (SPO), sec. 2; Kreweras 1965.
    """
    preferences = jax.lax.stop_gradient(as_float("preferences", preferences))
    k = preferences.shape[-1]
    require(
        preferences.ndim >= 2 and preferences.shape[-2] == k,
        f"`preferences` must be [..., K, K], but has shape {preferences.shape}",
    )
    payoff = (preferences - jnp.swapaxes(preferences, -1, -2)) / 2
    batch, dtype = payoff.shape[:-2], payoff.dtype
    total_row = jnp.broadcast_to(jnp.append(jnp.ones(k, dtype), 0.0), (*batch, 1, k + 1))

    def payoffs_against(p):
        # Not a matrix product: on a TPU that would round to bfloat16.
        return (payoff * p[..., None, :]).sum(-1)

    # A primal-dual interior-point method. With slack = s - payoff @ p >= 0, the point where
    # p_i slack_i = mu for all i tends to an equilibrium as mu -> 0; skew-symmetry makes s = K mu.
    def newton_step(_, state):
        p, s, mu = state
        slack = s[..., None] - payoffs_against(p)
        # Unknowns (dp, ds): the linearised p_i slack_i = mu, and sum(dp) = 0.
        rows = jnp.eye(k, dtype=dtype) * slack[..., None] - p[..., None] * payoff
        matrix = jnp.concatenate([jnp.concatenate([rows, p[..., None]], -1), total_row], -2)
        target = jnp.concatenate([mu[..., None] - p * slack, 1 - p.sum(-1, keepdims=True)], -1)
        step = jnp.linalg.solve(matrix, target[..., None])[..., 0]
        dp, ds = step[..., :k], step[..., k]
        dslack = ds[..., None] - payoffs_against(dp)
        shrink = jnp.concatenate([-dp / p, -dslack / slack], -1).max(-1)
        size = 0.95 / jnp.maximum(shrink, 0.95)
        return p + size[..., None] * dp, s + size * ds, jnp.maximum(0.3 * mu, 1e-9)

    uniform = jnp.full((*batch, k), 1 / k, dtype)
    state = (uniform, jnp.ones(batch, dtype), jnp.full(batch, 1 / k, dtype))
    p, _, _ = jax.lax.fori_loop(0, 60, newton_step, state)
    p = jnp.maximum(p, 0.0)
    return p / p.sum(-1, keepdims=True)
