"""Rewards made of rewards: a weighted sum, and Llama 2's safety gate.

Both have `components(records, completions) -> {name: [N] float32}`, the scores that went in, and
`combine(components, records)`; `base.scores_and_components` gives both for one computation.
Where a batch is standardised, its statistics are those of the completions of one call, so a reward
is then relative to its batch, and 0 in a batch of one.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from align_jax.errors import RewardError
from align_jax.losses.policy_gradient import whiten
from align_jax.rewards.base import Records, Reward, check_records, checked_scores


class Combined:
    """What rewards made of rewards share.

    Attributes:
      rewards: the components by name.
      relative: whether scores depend on what else is scored in the call.
    """

    def __init__(self, rewards: Mapping[str, Reward], *, relative: bool):
        self.rewards = dict(rewards)
        self.relative = relative or any(getattr(r, "relative", False) for r in rewards.values())

    def check_records(self, records: Records) -> None:
        for reward in self.rewards.values():
            check_records(reward, records)

    def components(self, records: Records, completions: Sequence[str]) -> dict[str, np.ndarray]:
        """The score of each component, `[N]` float32, before any standardisation."""
        out = {}
        for name, reward in self.rewards.items():
            try:
                out[name] = checked_scores(reward, records, completions)
            except RewardError as error:
                raise RewardError(f"component {name!r}: {error}") from error
        return out

    def combine(self, components: Mapping[str, np.ndarray], records: Records) -> np.ndarray:
        raise NotImplementedError

    def __call__(self, records: Records, completions: Sequence[str]) -> np.ndarray:
        return self.combine(self.components(records, completions), records)


class Mixture(Combined):
    """A weighted sum, `sum_k w_k r_k(x, y)`; `[N]` float32.

    Args:
      components: {name: (weight, reward)}, at least one.
      standardise: each component is first brought to mean 0 and standard deviation 1 over the
        completions of the call, so that weights compare rewards of different scales.
    """

    name = "mixture"

    def __init__(
        self, components: Mapping[str, tuple[float, Reward]], *, standardise: bool = False
    ):
        if not components:
            raise ValueError("components: there are none; a mixture needs at least one.")
        for name, (weight, _) in components.items():
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not math.isfinite(weight):
                raise ValueError(f"components.{name}.weight: {weight!r} is no finite number.")
        if not isinstance(standardise, bool):
            raise ValueError(f"standardise: {standardise!r} is neither True nor False.")
        rewards = {name: reward for name, (_, reward) in components.items()}
        super().__init__(rewards, relative=standardise)
        self._weights = {name: float(weight) for name, (weight, _) in components.items()}
        self._standardise = standardise

    def combine(self, components: Mapping[str, np.ndarray], records: Records) -> np.ndarray:
        total = np.zeros(len(records), np.float64)
        for name, weight in self._weights.items():
            scores = _whitened(components[name]) if self._standardise else components[name]
            total += weight * scores.astype(np.float64)
        return total.astype(np.float32)


class SafetyGated(Combined):
    """Llama 2's reward: safety where it matters, helpfulness elsewhere; `[N]` float32.

        R_c = R_s   if is_safety(prompt) or R_s < threshold,   else R_h
        reward = whiten(logit(R_c))

    over the completions of the call. R_s and R_h are the sigmoids of the components' scores, which
    are linear (logits) as a reward model's are; so logit(R_c) is the score itself. A prompt is a
    safety prompt if its record's field `safety` is true.

    Args:
      safety, helpfulness: rewards whose scores are logits.
      threshold: of the safety probability, in (0, 1).

    Source: Touvron et al. 2023 (arXiv:2307.09288), section 3.2.3.
    """

    name = "safety_gated"

    def __init__(self, safety: Reward, helpfulness: Reward, *, threshold: float = 0.15):
        if not isinstance(threshold, float) or not 0 < threshold < 1:
            raise ValueError(f"threshold: {threshold!r} is no probability between 0 and 1.")
        super().__init__({"safety": safety, "helpfulness": helpfulness}, relative=True)
        self._least_logit = math.log(threshold / (1 - threshold))

    def combine(self, components: Mapping[str, np.ndarray], records: Records) -> np.ndarray:
        safety, helpfulness = components["safety"], components["helpfulness"]
        marked = np.array([record.get("safety", False) for record in records], bool)
        gated = marked | (safety < self._least_logit)
        return _whitened(np.where(gated, safety, helpfulness))


def _whitened(scores: np.ndarray) -> np.ndarray:
    return np.asarray(whiten(scores, np.ones(scores.shape)))
