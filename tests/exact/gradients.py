"""Expected gradients of Monte-Carlo estimators, all groups of samples enumerated, in float64.

One prompt, a tabular policy (a logit per prefix and symbol). Every estimator is the library's loss;
its expectation is the gradient of sum over groups of P(group) loss(group), P(group) a constant.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from align_jax.exact import table
from align_jax.exact.language import Language, random_reward
from align_jax.exact.table import relative, rescaled
from align_jax.losses import policy_gradient as pg

LANGUAGE = Language(max_length=3)
BETA = 0.5


class Enumerated:
    """Values, policy and gradients at a random tabular policy and reference; use under x64."""

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        shape = len(LANGUAGE.prefixes), LANGUAGE.num_symbols + 1
        self.logits = jnp.asarray(rng.normal(size=shape))
        self.reference = self.log_probs(jnp.asarray(rng.normal(size=shape)))
        self.reward = jnp.asarray(random_reward(LANGUAGE, seed)[0])
        self.mask = jnp.asarray(LANGUAGE.choices[2], float)

    @staticmethod
    def log_probs(logits):
        """`[N,T]`, 0 past the end."""
        return table.token_log_probs(LANGUAGE, logits)

    def exact(self) -> jax.Array:
        """The gradient of -(E r - beta KL), by differentiating the sum over all responses."""

        def objective(logits):
            reward = table.expected_reward(LANGUAGE, logits, self.reward)
            return -(reward - BETA * table.expected_kl(LANGUAGE, logits, self.reference.sum(-1)))

        return jax.grad(objective)(self.logits)

    def kl_gradient(self) -> jax.Array:
        """The gradient of KL(pi || ref)."""
        reference = self.reference.sum(-1)
        return jax.grad(lambda x: table.expected_kl(LANGUAGE, x, reference))(self.logits)

    def expected(
        self, loss: Callable[[jax.Array], jax.Array], *, logits=None, sampler=None
    ) -> jax.Array:
        """E over one sample of the gradient of the summed `loss(log_probs [N,T]) [N,T]`.

        `logits` is where the gradient is taken, `sampler` who draws; this policy by default.
        """
        weight = jnp.exp(self.log_probs(self.logits if sampler is None else sampler).sum(-1))

        def total(logits):
            return (weight * (loss(self.log_probs(logits)) * self.mask).sum(-1)).sum()

        return jax.grad(total)(self.logits if logits is None else logits)

    def expected_of_groups(self, advantages, size: int, *, mean: str | None = None) -> jax.Array:
        """E over groups of `size` of the group's mean REINFORCE gradient with KL-shaped scores.

        Over a response's symbols it is the sum, or `aggregate_token_losses` of the method `mean`.
        """
        total = self.log_probs(self.logits).sum(-1)
        rewards = self.reward - BETA * (total - self.reference.sum(-1))
        groups = np.array(list(itertools.product(range(len(total)), repeat=size)))
        weight = jnp.exp(total[groups].sum(-1))
        given = advantages(rewards[groups])

        def loss(logits):
            log_probs = self.log_probs(logits)
            if mean is None:
                losses = pg.reinforce_loss(log_probs.sum(-1)[groups], given)
            else:
                tokens = pg.reinforce_loss(log_probs[groups], given[..., None])
                losses = pg.aggregate_token_losses(tokens, self.mask[groups], method=mean)
            return (weight[:, None] * losses).sum() / size

        return jax.grad(loss)(self.logits)

    def shaped(self):
        """KL-shaped rewards `[N,T]` and the exact value before each symbol."""
        log_probs = self.log_probs(self.logits)
        rewards = pg.kl_shaped_rewards(
            self.reward, log_probs, self.reference, self.mask, kl_coefficient=BETA
        )
        to_go = jnp.cumsum(rewards[:, ::-1], -1)[:, ::-1]
        prefix = LANGUAGE.choices[0]
        weight = jnp.exp(log_probs.sum(-1))[:, None] * self.mask
        size = len(LANGUAGE.prefixes)
        mass = jax.ops.segment_sum(weight.ravel(), prefix.ravel(), size)
        value = jax.ops.segment_sum((weight * to_go).ravel(), prefix.ravel(), size) / mass
        return rewards, value[prefix] * self.mask


def biases() -> dict[str, float]:
    """Relative bias of each estimator's expected gradient; the estimand stands in the name."""
    with jax.enable_x64(True):
        return _biases(Enumerated())


def _biases(e: Enumerated) -> dict[str, float]:
    exact, out = e.exact(), {}
    rewards, values = e.shaped()
    old = e.log_probs(e.logits)

    def with_advantages(values, lambda_, **options):
        advantages, _ = pg.gae(rewards, values, e.mask, lambda_=lambda_)
        return lambda log_probs: pg.ppo_clip_loss(log_probs, old, advantages, **options)

    zeros = jnp.zeros_like(rewards)
    to_go, _ = pg.gae(rewards, zeros, e.mask, lambda_=1.0)
    out["REINFORCE, reward to go"] = relative(
        e.expected(lambda x: pg.reinforce_loss(x, to_go)), exact
    )
    for k in (2, 3):
        out[f"RLOO, K = {k}"] = relative(e.expected_of_groups(pg.rloo_advantages, k), exact)
        unscaled = e.expected_of_groups(lambda r: pg.grpo_advantages(r, scale=False), k)
        out[f"GRPO without std, K = {k}, against (K - 1) / K of it"] = relative(
            unscaled * k / (k - 1), exact
        )
        out[f"GRPO without std, K = {k}"] = relative(unscaled, exact)
        out[f"GRPO with std, K = {k}, after the best rescaling"] = rescaled(
            e.expected_of_groups(pg.grpo_advantages, k), exact
        )
    for name, mean in (("each response's", "grpo"), ("the group's", "dapo")):
        out[f"RLOO, K = 2, mean over {name} symbols, after the best rescaling"] = rescaled(
            e.expected_of_groups(pg.rloo_advantages, 2, mean=mean), exact
        )
    out |= _off_policy(e, to_go)
    out["PPO's first step, exact critic, lambda = 0.95"] = relative(
        e.expected(with_advantages(values, 0.95)), exact
    )
    out["PPO's first step, exact critic, lambda = 0"] = relative(
        e.expected(with_advantages(values, 0.0)), exact
    )
    critic = jnp.asarray(np.random.default_rng(1).normal(size=len(LANGUAGE.prefixes)))
    wrong = values + 0.5 * critic[LANGUAGE.choices[0]] * e.mask
    for lambda_ in (1.0, 0.95, 0.0):
        out[f"PPO's first step, critic off by 0.5, lambda = {lambda_:g}"] = relative(
            e.expected(with_advantages(wrong, lambda_)), exact
        )
    out |= _second_step(e, with_advantages(values, 1.0))
    out["k1 in the loss, against the KL's gradient"] = relative(
        e.expected(lambda x: pg.kl_estimate(x, e.reference, estimator="k1")), e.kl_gradient()
    )
    for estimator in ("k2", "k3"):
        token = e.expected(lambda x, k=estimator: pg.kl_estimate(x, e.reference, estimator=k))
        out[f"{estimator} in the loss by symbol, against the KL's gradient"] = relative(
            token, e.kl_gradient()
        )

    def k2_of_sequences(x):
        whole = pg.kl_estimate(x.sum(-1), e.reference.sum(-1), estimator="k2")
        return jnp.zeros_like(x).at[:, 0].set(whole)

    out["k2 in the loss by response, against the KL's gradient"] = relative(
        e.expected(k2_of_sequences), e.kl_gradient()
    )
    return out | _entropy(e)


def _entropy(e: Enumerated) -> dict[str, float]:
    """The bonus on sampled prefixes, against the entropy of responses."""

    def negative_entropy(logits):
        total = e.log_probs(logits).sum(-1)
        return (jnp.exp(total) * total).sum()

    prefix, weight = LANGUAGE.choices[0], jnp.exp(e.log_probs(e.logits).sum(-1))
    bonus = jax.grad(
        lambda x: (weight @ pg.entropy_bonus(x[prefix], e.mask, coefficient=1.0)).sum()
    )(e.logits)
    name = "entropy bonus by symbol, against the responses' entropy"
    return {name: relative(bonus, jax.grad(negative_entropy)(e.logits))}


def _off_policy(e: Enumerated, to_go: jax.Array) -> dict[str, float]:
    """REINFORCE on samples of a policy nearby, with the weights that are to correct for it."""
    shift = np.random.default_rng(2).normal(size=e.logits.shape)
    sampler = e.logits + 0.5 * shift
    tokens, drawn = e.log_probs(e.logits), e.log_probs(sampler)

    def whole(cap):
        return pg.truncated_importance_weights(tokens.sum(-1), drawn.sum(-1), cap=cap)[:, None]

    corrections = {
        "uncorrected": 1.0,
        "weighted by response": whole(jnp.inf),
        "weighted by response, capped at 2": whole(2.0),
        "weighted by symbol": pg.truncated_importance_weights(tokens, drawn, cap=jnp.inf),
    }
    return {
        f"REINFORCE on another's samples, {name}": relative(
            e.expected(lambda x, w=w: w * pg.reinforce_loss(x, to_go), sampler=sampler), e.exact()
        )
        for name, w in corrections.items()
    }


def _second_step(e: Enumerated, loss) -> dict[str, float]:
    """The bias of PPO's second step on one sample of data: samples and advantages are old."""
    moved = Enumerated()
    moved.logits = e.logits - 1.0 * e.expected(loss)
    bias = relative(e.expected(loss, logits=moved.logits), moved.exact())
    return {"PPO's second step on the same data (step length 1)": bias}
