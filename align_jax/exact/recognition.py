"""Which known law a policy is: what a loss converged to where that is not the optimum."""

import numpy as np
from scipy.optimize import brentq

from align_jax.exact.fixed_points import win_rates
from align_jax.exact.language import Array, World, expectation, kl, normalized

# A policy is a law whose distance is at most this share of the reference's from the optimum.
NEAR = 1e-4
# The probability of a policy's only response.
SURE = 0.999


def is_near(world: World, distance: float) -> bool:
    """Whether a distance in nats is small beside that of the reference from the optimum."""
    return distance < NEAR * world.distance(world.reference)


def recognise(world: World, policy: Array) -> str | None:
    """A known law, in words, that is near the policy `[P,N]`; None if there is none.

    Known are the tilts base x exp(c score), for the reference or a uniform base, and the reward or
    the win rate as the score; and all probability on the best or the worst response.
    """
    p = np.exp(policy)
    for pick, sign in ((world.reward.argmax(-1), ""), (world.reward.argmin(-1), "-")):
        if (np.take_along_axis(p, pick[:, None], -1) > SURE).all():
            flipped = " (the sign of r is flipped)" if sign else ""
            return f"the optimum of E[{sign}r] without a KL, one response per prompt{flipped}"
    best, law = np.inf, None
    for base_name, base in (("ref", world.reference), ("", np.zeros_like(world.reward))):
        for score_name, score in (("r", world.reward), ("win rate", win_rates(world))):
            strength = _tilt(base, score, policy)
            residual = kl(policy, normalized(base + strength * score)).max()
            # Where rewards are small, win rates are linear in them: the simpler law is named.
            if residual < best / 100:
                best, law = residual, _named(base_name, score_name, strength, score.std())
    return law if is_near(world, best) else None


def _tilt(base: Array, score: Array, policy: Array) -> float:
    """The strength c at which base x exp(c score) is nearest to the policy: equal mean scores."""

    def surplus(strength: float) -> float:
        tilted = normalized(base + strength * score)
        return float((expectation(tilted, score) - expectation(policy, score)).sum())

    end = 1e4 / np.ptp(score)
    if surplus(-end) > 0 or surplus(end) < 0:
        return 0.0
    return brentq(surplus, -end, end, xtol=1e-12)


def _named(base: str, score: str, strength: float, spread: float) -> str:
    if abs(strength) * spread < NEAR:
        return "the reference itself" if base else "the uniform distribution"
    price, sign = 1 / abs(strength), "-" if strength < 0 else ""
    flipped = " (the sign of r is flipped)" if sign else ""
    if base and score == "r":
        return f"the optimum of E[{sign}r] - {price:.3g} KL{flipped}"
    law = f"{base} exp({sign}{score} / {price:.3g}) / Z".strip()
    return law + ("" if base else ", which no reference moves") + flipped
