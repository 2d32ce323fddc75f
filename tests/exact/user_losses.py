"""Losses as a user of `align-jax verify` would have them in a module, right and wrong."""

import functools

import jax.numpy as jnp

from align_jax.losses import policy_gradient as pg
from align_jax.losses import preference, ranking

BETA = 0.1

# Pairs.

dpo = functools.partial(preference.dpo_loss, beta=BETA)
dpo_of_beta_half = functools.partial(preference.dpo_loss, beta=0.5)
ipo = functools.partial(preference.ipo_loss, beta=BETA)


def dpo_flipped(chosen, rejected, ref_chosen, ref_rejected):
    return dpo(rejected, chosen, ref_rejected, ref_chosen)


def dpo_without_reference(chosen, rejected, ref_chosen, ref_rejected):
    return preference.cpo_loss(chosen, rejected, beta=BETA)


def dpo_by_hand(chosen, rejected, ref_chosen, ref_rejected):
    """log(sigmoid(x)) where log_sigmoid(x) is needed."""
    h = chosen - ref_chosen - rejected + ref_rejected
    return -jnp.log(1 / (1 + jnp.exp(-BETA * h)))


def dpo_broadcast(chosen, rejected, ref_chosen, ref_rejected):
    return dpo(chosen, rejected, ref_chosen, ref_rejected)[:, None] + jnp.zeros_like(chosen)


def dpo_mean(chosen, rejected, ref_chosen, ref_rejected):
    return dpo(chosen, rejected, ref_chosen, ref_rejected).mean()


def dpo_count(chosen, rejected, ref_chosen, ref_rejected):
    return (chosen - ref_chosen < rejected - ref_rejected).astype(int)


def dpo_with_an_if(chosen, rejected, ref_chosen, ref_rejected):
    return dpo(chosen, rejected, ref_chosen, ref_rejected) if chosen[0] < 1e9 else chosen


def dpo_of_three(chosen, rejected, ref_chosen):
    return dpo(chosen, rejected, ref_chosen, ref_chosen)


def constant(chosen, rejected, ref_chosen, ref_rejected):
    return jnp.zeros_like(chosen)


def nan(chosen, rejected, ref_chosen, ref_rejected):
    return jnp.log(-jnp.abs(chosen) - 1)


# Samples.


def _reinforce(log_probs, advantages, mask):
    return (pg.reinforce_loss(log_probs, advantages[..., None]) * mask).sum(-1).mean()


def _shaped(old, ref, rewards, mask):
    """The KL in the reward."""
    return rewards - BETA * ((old - ref) * mask).sum(-1)


def rloo(log_probs, old, ref, rewards, mask):
    return _reinforce(log_probs, pg.rloo_advantages(_shaped(old, ref, rewards, mask)), mask)


def rloo_upside_down(*arrays):
    return -rloo(*arrays)


def rloo_without_mask(log_probs, old, ref, rewards, mask):
    return rloo(log_probs, old, ref, rewards, jnp.ones_like(mask))


def grpo(log_probs, old, ref, rewards, mask, *, scale=True):
    """With the KL in the reward."""
    advantages = pg.grpo_advantages(_shaped(old, ref, rewards, mask), scale=scale)
    return _reinforce(log_probs, advantages, mask)


grpo_without_std = functools.partial(grpo, scale=False)


def kl_in_loss(log_probs, old, ref, rewards, mask, *, estimator, scale=False):
    penalty = (pg.kl_estimate(log_probs, ref, estimator=estimator) * mask).sum(-1).mean()
    advantages = pg.grpo_advantages(rewards, scale=scale)
    return _reinforce(log_probs, advantages, mask) + BETA * penalty


k1_in_loss = functools.partial(kl_in_loss, estimator="k1")
grpo_of_the_paper = functools.partial(kl_in_loss, estimator="k3", scale=True)


def k2_of_responses_in_loss(log_probs, old, ref, rewards, mask):
    """Its gradient is the KL's, but GRPO's mean makes the KL dearer by K / (K - 1)."""
    ratio = ((log_probs - ref) * mask).sum(-1)
    advantages = pg.grpo_advantages(rewards, scale=False)
    return _reinforce(log_probs, advantages, mask) + BETA * (ratio**2 / 2).mean()


# Rewards.

bradley_terry = ranking.bradley_terry_loss
with_margin = functools.partial(ranking.bradley_terry_loss, margin=1.0)


def half_scale(chosen, rejected):
    return ranking.bradley_terry_loss(2 * chosen, 2 * rejected)
