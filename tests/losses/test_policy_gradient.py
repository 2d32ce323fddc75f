"""Policy-gradient losses and their aggregation: float64 loops, and the gradients they must have."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.losses import policy_gradient

rng = np.random.default_rng(0)
LOG_PROBS, OLD_LOG_PROBS = -rng.gamma(2.0, size=(2, 4, 5)).astype(np.float32)
ADVANTAGES = rng.normal(size=(4, 5)).astype(np.float32)
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 1], [0, 0, 0, 0, 1]])


def gradient(f, x=LOG_PROBS):
    return np.asarray(jax.grad(lambda x: f(x).sum())(jnp.asarray(x)))


def test_reinforce_gradient_is_minus_the_advantage():
    np.testing.assert_allclose(
        policy_gradient.reinforce_loss(LOG_PROBS, ADVANTAGES), -ADVANTAGES * LOG_PROBS, rtol=1e-6
    )
    grad = gradient(lambda x: policy_gradient.reinforce_loss(x, ADVANTAGES))
    np.testing.assert_allclose(grad, -ADVANTAGES, rtol=1e-6)
    # One advantage per sequence is the same advantage for each of its tokens.
    np.testing.assert_allclose(
        policy_gradient.reinforce_loss(LOG_PROBS, ADVANTAGES[:, :1]),
        policy_gradient.reinforce_loss(LOG_PROBS, np.repeat(ADVANTAGES[:, :1], 5, axis=1)),
    )


@pytest.mark.parametrize(
    "hyper",
    [{}, {"clip_range_high": 0.5}, {"dual_clip": 3.0}, {"clip_range": 0.1, "dual_clip": 1.5}],
)
def test_ppo_loop(hyper):
    actual = policy_gradient.ppo_clip_loss(LOG_PROBS, OLD_LOG_PROBS, ADVANTAGES, **hyper)
    low = hyper.get("clip_range", 0.2)
    high = hyper.get("clip_range_high", low)
    for index in np.ndindex(4, 5):
        ratio = math.exp(float(LOG_PROBS[index]) - float(OLD_LOG_PROBS[index]))
        a = float(ADVANTAGES[index])
        objective = min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
        if a < 0 and "dual_clip" in hyper:
            objective = max(objective, hyper["dual_clip"] * a)
        np.testing.assert_allclose(actual[index], -objective, rtol=1e-5, err_msg=str(index))


def test_ppo_at_ratio_one_is_reinforce():
    for hyper in ({}, {"dual_clip": 3.0}):
        ppo = gradient(
            lambda x, h=hyper: policy_gradient.ppo_clip_loss(x, LOG_PROBS, ADVANTAGES, **h)
        )
        np.testing.assert_allclose(ppo, -ADVANTAGES, rtol=1e-6)
    cispo = gradient(lambda x: policy_gradient.cispo_loss(x, LOG_PROBS, ADVANTAGES))
    np.testing.assert_allclose(cispo, -ADVANTAGES, rtol=1e-6)


def test_ppo_stops_only_steps_that_went_too_far():
    # Rows: ratio too low, inside, too high. Columns: advantage -1, +1.
    log_ratio = jnp.log(jnp.array([[0.5, 0.5], [1.1, 1.1], [2.0, 2.0]]))
    advantages = jnp.array([[-1.0, 1.0]] * 3)

    def f(x, **hyper):
        return policy_gradient.ppo_clip_loss(x, jnp.zeros((3, 2)), advantages, **hyper)

    grad = gradient(f, log_ratio)
    np.testing.assert_allclose(grad, [[0, -0.5], [1.1, -1.1], [2.0, 0]], rtol=1e-6)
    grad = gradient(lambda x: f(x, clip_range_high=1.5, dual_clip=1.05), log_ratio)
    np.testing.assert_allclose(grad, [[0, -0.5], [0, -1.1], [0, -2.0]], rtol=1e-6)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    old, advantages = jnp.zeros((1, 3)), jnp.array([[2.0, -1.0, 3.0]])
    log_probs = jnp.log(jnp.array([[0.1, 1.0, 20.0]]))
    grad = gradient(lambda x: policy_gradient.cispo_loss(x, old, advantages), log_probs)
    np.testing.assert_allclose(grad, [[-0.2, 1.0, -15.0]], rtol=1e-5)
    narrow = gradient(
        lambda x: policy_gradient.cispo_loss(
            x, old, advantages, clip_range=0.5, clip_range_high=1.0
        ),
        log_probs,
    )
    np.testing.assert_allclose(narrow, [[-1.0, 1.0, -6.0]], rtol=1e-5)


def test_gspo_ratio_is_the_geometric_mean_of_token_ratios():
    actual = policy_gradient.gspo_ratio(LOG_PROBS, OLD_LOG_PROBS, MASK)
    for row in range(4):
        ratios = [
            math.exp(float(a) - float(b))
            for a, b, m in zip(LOG_PROBS[row], OLD_LOG_PROBS[row], MASK[row])
            if m
        ]
        np.testing.assert_allclose(actual[row], math.prod(ratios) ** (1 / len(ratios)), rtol=1e-5)
    none = policy_gradient.gspo_ratio(LOG_PROBS, OLD_LOG_PROBS, np.zeros_like(MASK))
    np.testing.assert_array_equal(none, 1)


def test_gspo_per_token_has_the_sequence_losss_value_and_gradient():
    # Close enough to the old policy that some sequences are clipped and some are not.
    log_probs = OLD_LOG_PROBS + 0.1 * rng.normal(size=(4, 5)).astype(np.float32)
    advantages = ADVANTAGES[:, :1]

    def per_token(x):
        losses = policy_gradient.gspo_loss(
            x, OLD_LOG_PROBS, advantages, MASK, clip_range=0.02, clip_range_high=0.04
        )
        return policy_gradient.aggregate_token_losses(losses, MASK, method="grpo")

    def per_sequence(x):
        ratio = jnp.exp(((x - OLD_LOG_PROBS) * MASK).sum(-1) / MASK.sum(-1))
        a = advantages[:, 0]
        return -jnp.minimum(ratio * a, jnp.clip(ratio, 0.98, 1.04) * a)

    np.testing.assert_allclose(per_token(log_probs), per_sequence(log_probs), rtol=1e-5)
    expected = gradient(per_sequence, log_probs)
    np.testing.assert_allclose(gradient(per_token, log_probs), expected, rtol=1e-4, atol=1e-7)
    moving = np.any(expected != 0, axis=-1)
    assert np.any(moving) and not np.all(moving)


def test_truncated_importance_weights():
    old, sampler = jnp.log(jnp.array([0.2, 0.5, 0.9])), jnp.log(jnp.array([0.4, 0.5, 0.1]))
    weights = policy_gradient.truncated_importance_weights(old, sampler, cap=2.0)
    np.testing.assert_allclose(weights, [0.5, 1.0, 2.0], rtol=1e-6)


def test_importance_weights_correct_the_samplers_expectation():
    # Below the cap, the sampler's expectation of weight x f is the trainer's expectation of f.
    trainer, sampler = rng.dirichlet(np.ones(6), size=2).astype(np.float32)
    f = rng.normal(size=6)
    weights = policy_gradient.truncated_importance_weights(
        np.log(trainer), np.log(sampler), cap=1e6
    )
    np.testing.assert_allclose((sampler * weights * f).sum(), (trainer * f).sum(), rtol=1e-5)


def test_clipped_value_loop():
    values, old_values, returns = rng.normal(size=(3, 4, 5)).astype(np.float32)
    actual = policy_gradient.clipped_value_loss(values, old_values, returns, clip_range=0.3)
    for index in np.ndindex(4, 5):
        v, old, target = (float(x[index]) for x in (values, old_values, returns))
        clipped = min(max(v, old - 0.3), old + 0.3)
        expected = 0.5 * max((v - target) ** 2, (clipped - target) ** 2)
        np.testing.assert_allclose(actual[index], expected, rtol=1e-5, atol=1e-7)


def test_ptx_is_gamma_times_the_negative_log_likelihood():
    actual = policy_gradient.ptx_loss(LOG_PROBS, MASK, gamma=3.0)
    np.testing.assert_allclose(actual, -3.0 * LOG_PROBS * MASK, rtol=1e-6)
    default = policy_gradient.ptx_loss(LOG_PROBS, MASK)
    np.testing.assert_allclose(default, 27.8 / 3.0 * actual, rtol=1e-5)


def test_entropy_bonus_loop_and_closed_forms():
    logits = rng.normal(size=(2, 3, 6)).astype(np.float32)
    mask = np.array([[1, 1, 0], [0, 1, 1]])
    actual = policy_gradient.entropy_bonus(logits, mask, coefficient=0.5)
    for index in np.ndindex(2, 3):
        p = np.exp(logits[index].astype(np.float64))
        p /= p.sum()
        np.testing.assert_allclose(
            actual[index], 0.5 * mask[index] * sum(p * np.log(p)), rtol=1e-5, atol=1e-7
        )
    one = jnp.ones(1)
    uniform = policy_gradient.entropy_bonus(jnp.zeros((1, 6)), one, coefficient=1.0)
    np.testing.assert_allclose(uniform, -math.log(6), rtol=1e-6)
    # A forbidden token neither counts nor makes nan, in value and gradient.
    forbidden = jnp.array([[0.0, 0.0, -jnp.inf, -jnp.inf]])

    def f(x):
        return policy_gradient.entropy_bonus(x, one, coefficient=1.0)

    np.testing.assert_allclose(f(forbidden), -math.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient(f, forbidden), 0, atol=1e-6)


def test_aggregation_loops():
    losses = rng.normal(size=(2, 4, 5)).astype(np.float32)
    mask = np.stack([MASK, MASK[::-1] * [1, 0, 1, 1, 1]])
    grpo = policy_gradient.aggregate_token_losses(losses, mask, method="grpo")
    dr_grpo = policy_gradient.aggregate_token_losses(losses, mask, method="dr_grpo", max_length=7)
    dapo = policy_gradient.aggregate_token_losses(losses, mask, method="dapo")
    flat = policy_gradient.aggregate_token_losses(
        losses.reshape(8, 5), mask.reshape(8, 5), method="dapo"
    )
    for b in range(2):
        total, count = 0.0, 0
        for g in range(4):
            tokens = [float(x) for x, m in zip(losses[b, g], mask[b, g]) if m]
            total, count = total + sum(tokens), count + len(tokens)
            mean = sum(tokens) / max(len(tokens), 1)
            np.testing.assert_allclose(grpo[b, g], mean, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(dr_grpo[b, g], sum(tokens) / 7, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(dapo[b].mean(), total / count, rtol=1e-4)
    np.testing.assert_allclose(flat.mean(), losses[mask == 1].mean(), rtol=1e-4)


def test_aggregations_agree_on_sequences_of_equal_length():
    losses, mask = rng.normal(size=(4, 5)).astype(np.float32), np.ones((4, 5))
    expected = losses.mean(-1)
    for hyper in ({"method": "grpo"}, {"method": "dapo"}, {"method": "dr_grpo", "max_length": 5}):
        actual = policy_gradient.aggregate_token_losses(losses, mask, **hyper)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_arguments_that_do_not_fit_raise():
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="`advantages`"):
        policy_gradient.reinforce_loss(x, jnp.zeros(3))
    with pytest.raises(ValueError, match="`old_log_probs`"):
        policy_gradient.ppo_clip_loss(x, x[:, :1], x)
    with pytest.raises(ValueError, match="`mask`"):
        policy_gradient.gae(x, x, jnp.ones(3))
    with pytest.raises(ValueError, match="`scores`"):
        policy_gradient.kl_shaped_rewards(x, x, x, x, kl_coefficient=0.1)
    with pytest.raises(ValueError, match="`method`.*'mean'"):
        policy_gradient.aggregate_token_losses(x, jnp.ones((2, 3)), method="mean")
    with pytest.raises(ValueError, match="`max_length`"):
        policy_gradient.aggregate_token_losses(x, jnp.ones((2, 3)), method="dr_grpo")
    with pytest.raises(ValueError, match="G, T"):
        policy_gradient.aggregate_token_losses(x[0], jnp.ones(3), method="dapo")
