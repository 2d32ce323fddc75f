"""Online DPO: direct preference optimisation on pairs that the policy has just drawn.

Of the completions of a prompt the best scored is preferred to the worst (Guo et al. 2024, OAIF,
arXiv:2402.04792, algorithm 1, with a reward in place of a language model's choice). The loss is
DPO's,

    -log sigmoid(beta (log pi/pi_ref(best) - log pi/pi_ref(worst)))

with `config.kl.coefficient` as beta: the KL to the reference is in the loss, and neither advantages
nor a critic are needed. It runs in the iterations of `policy_gradient`, with `config.loss=dpo`:
sampling, scoring, reference and updates are the same.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient

from align_jax.errors import RunError
from align_jax.losses.preference import dpo_loss

Array = jax.Array
# `config.Config` and `objective.Completions` of `policy_gradient`, whose modules import this one.
Config = Any
Completions = Any


class Pairs(NamedTuple):
    """The pairs among completions; those of one prompt stand next to each other.

    Attributes:
      sign: `[N]`, 1 at the best and -1 at the worst completion of a prompt, 0 where all tie.
      weight: `[N]`, at the best completion the pair's share of its minibatch's mean, 0 elsewhere.
    """

    sign: np.ndarray | Array
    weight: np.ndarray | Array

    def in_minibatch(self, rows: np.ndarray) -> "Pairs":
        """The pairs with the weights they have in the minibatch of these completions."""
        best = self.sign > 0
        return self._replace(weight=(best / max(best[rows].sum(), 1)).astype(np.float32))


def best_against_worst(scores: np.ndarray, samples: int) -> Pairs:
    """The pairs of an iteration with scores `[N]`, `samples` completions a prompt, in one batch."""
    groups = scores.reshape(-1, samples)
    sign = np.zeros_like(groups, np.float32)
    rows = np.flatnonzero(groups.max(1) > groups.min(1))
    sign[rows, groups[rows].argmax(1)] = 1.0
    sign[rows, groups[rows].argmin(1)] = -1.0
    pairs = Pairs(sign.ravel(), np.zeros(sign.size, np.float32))
    return pairs.in_minibatch(np.arange(sign.size))


@dataclasses.dataclass(frozen=True, eq=False)
class OnlineDpo:
    """The loss of pairs, with what a trainer must know of it: see `methods.TokenLoss`."""

    reads: tuple[str, ...] = ()
    grouped = True
    takes_advantages = False
    takes_kl = False

    def check(self, config: Config) -> None:
        """Raises `RunError` for a config that this loss cannot do with."""
        kl = config.kl
        if kl.coefficient <= 0:
            raise RunError(
                f"config.kl.coefficient = {kl.coefficient} is the beta of config.loss=dpo, whose "
                "gradient it multiplies: expected more than 0."
            )
        if kl.target > 0:
            raise RunError(
                f"config.kl.target = {kl.target} needs another config.loss than dpo, whose beta is "
                "fixed: set config.kl.target=0."
            )

    def ratio(self, new: Array, old: Array, mask: Array) -> Array:
        """Ratios `[N,T]` of the policy to the one that sampled; they are logged, not clipped."""
        return jnp.exp(stop_gradient(new) - old)

    def pairs(self, scores: np.ndarray, samples: int) -> Pairs:
        """Which completions are compared."""
        return best_against_worst(scores, samples)

    def __call__(self, config: Config, new: Array, old: Array, completions: Completions) -> Array:
        """What a micro-batch adds to the loss of its minibatch: a scalar."""
        samples = config.sampling.samples
        signs = completions.pairs.sign.reshape(-1, samples)

        def of_one(log_probs, sign):
            sums = log_probs.sum(-1).reshape(signs.shape)
            return jnp.where(signs == sign, sums, 0.0).sum(-1)

        losses = dpo_loss(
            of_one(new, 1.0),
            of_one(new, -1.0),
            of_one(completions.ref_log_probs, 1.0),
            of_one(completions.ref_log_probs, -1.0),
            beta=config.kl.coefficient,
        )
        losses = jnp.where((signs != 0).any(-1), losses, 0.0)
        # A pair's weight stands in the row of its best completion.
        return (completions.pairs.weight * jnp.repeat(losses, samples)).sum()
