"""KL estimates, shaped rewards and advantages: float64 loops, limits, and whole enumerations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_jax.losses import policy_gradient, ranking

rng = np.random.default_rng(0)
LOG_PROBS, REF_LOG_PROBS = -rng.gamma(2.0, size=(2, 4, 5)).astype(np.float32)
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 1], [0, 0, 0, 0, 1]])


def test_kl_estimators_closed_form():
    d = np.array([-3.0, -1e-3, 0.0, 1e-5, 0.5, 2.0], np.float32)
    zeros = np.zeros_like(d)
    wide = d.astype(np.float64)
    for estimator, expected in [
        ("k1", wide),
        ("k2", wide**2 / 2),
        ("k3", np.expm1(-wide) + wide),
    ]:
        actual = policy_gradient.kl_estimate(d, zeros, estimator=estimator)
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-14, err_msg=estimator)
    with pytest.raises(ValueError, match="`estimator`.*'k4'"):
        policy_gradient.kl_estimate(d, zeros, estimator="k4")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=8))
def test_k3_is_never_negative(differences):
    d = jnp.array(differences + [x * 1e-6 for x in differences])
    assert np.all(policy_gradient.kl_estimate(d, jnp.zeros(16), estimator="k3") >= 0)


def test_kl_estimates_under_enumeration():
    logits, ref_logits = rng.normal(size=(2, 7)).astype(np.float32)

    def log_softmax(x):
        return jax.nn.log_softmax(jnp.asarray(x))

    p, ref = log_softmax(logits), log_softmax(ref_logits)
    kl = float((np.exp(np.float64(p)) * (np.float64(p) - np.float64(ref))).sum())
    exact_gradient = jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * (log_softmax(x) - ref)))(logits)
    reverse_gradient = jax.grad(lambda x: jnp.sum(jnp.exp(ref) * (ref - log_softmax(x))))(logits)

    def expectation(estimator):
        return jnp.sum(jnp.exp(p) * policy_gradient.kl_estimate(p, ref, estimator=estimator))

    def expected_gradient(estimator):
        def f(x):
            estimate = policy_gradient.kl_estimate(log_softmax(x), ref, estimator=estimator)
            return jnp.sum(jnp.exp(p) * estimate)

        return jax.grad(f)(logits)

    np.testing.assert_allclose(expectation("k1"), kl, rtol=1e-5)
    np.testing.assert_allclose(expectation("k3"), kl, rtol=1e-5)
    assert abs(expectation("k2") - kl) > 1e-3
    # As losses they differ: k1's gradient is 0 on average, k2's is the KL's, k3's the forward KL's.
    np.testing.assert_allclose(expected_gradient("k1"), 0, atol=1e-6)
    np.testing.assert_allclose(expected_gradient("k2"), exact_gradient, atol=1e-6)
    np.testing.assert_allclose(expected_gradient("k3"), reverse_gradient, atol=1e-6)


def test_kl_shaped_rewards_loop():
    scores = rng.normal(size=4).astype(np.float32)
    actual = policy_gradient.kl_shaped_rewards(
        scores, LOG_PROBS, REF_LOG_PROBS, MASK, kl_coefficient=0.2
    )
    for row in range(4):
        last = max(t for t in range(5) if MASK[row, t])
        for t in range(5):
            expected = -0.2 * (float(LOG_PROBS[row, t]) - float(REF_LOG_PROBS[row, t]))
            expected = MASK[row, t] * expected + (scores[row] if t == last else 0)
            np.testing.assert_allclose(actual[row, t], expected, rtol=1e-5, atol=1e-6)
    # Summed, it is the KL-regularised reward of the completion.
    np.testing.assert_allclose(
        actual.sum(-1), scores - 0.2 * ((LOG_PROBS - REF_LOG_PROBS) * MASK).sum(-1), rtol=1e-4
    )


def gae_loop(rewards, values, mask, discount, lambda_):
    counted = [t for t in range(len(mask)) if mask[t]]
    advantages = [0.0] * len(mask)
    next_advantage = next_value = 0.0
    for t in reversed(counted):
        delta = rewards[t] + discount * next_value - values[t]
        next_advantage = delta + discount * lambda_ * next_advantage
        advantages[t], next_value = next_advantage, values[t]
    return advantages


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=5, max_size=5), min_size=4, max_size=4),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_gae_loop(mask, discount, lambda_):
    rewards, values = rng.normal(size=(2, 4, 5)).astype(np.float32)
    mask = np.array(mask)
    # Under jit the hyperparameters are traced, as when they follow a schedule.
    gae = jax.jit(policy_gradient.gae)
    advantages, returns = gae(rewards, values, mask, discount=discount, lambda_=lambda_)
    expected = [
        gae_loop(*row, discount, lambda_)
        for row in zip(rewards.tolist(), values.tolist(), mask.tolist())
    ]
    np.testing.assert_allclose(advantages, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(returns, (expected + values) * mask, rtol=1e-4, atol=1e-5)


def test_gae_ends():
    rewards, values = rng.normal(size=(2, 4, 5)).astype(np.float32)
    ones = np.ones((4, 5), int)
    # lambda = 1: the discounted return minus the value, and the return itself.
    advantages, returns = policy_gradient.gae(rewards, values, ones, discount=0.9, lambda_=1.0)
    powers = 0.9 ** np.arange(5)
    for t in range(5):
        discounted = (rewards[:, t:] * powers[: 5 - t]).sum(-1)
        np.testing.assert_allclose(returns[:, t], discounted, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            advantages[:, t], discounted - values[:, t], rtol=1e-4, atol=1e-5
        )
    # lambda = 0: one step of temporal difference.
    advantages, _ = policy_gradient.gae(rewards, values, ones, discount=0.9, lambda_=0.0)
    next_values = np.append(values[:, 1:], np.zeros((4, 1)), axis=1)
    np.testing.assert_allclose(
        advantages, rewards + 0.9 * next_values - values, rtol=1e-4, atol=1e-5
    )


def test_gae_skips_masked_tokens_in_the_middle():
    rewards, values = rng.normal(size=(2, 1, 5)).astype(np.float32)
    mask = np.array([[1, 0, 1, 0, 1]])
    advantages, _ = policy_gradient.gae(rewards, values, mask, discount=0.9, lambda_=0.8)
    kept = mask[0] == 1
    dense, _ = policy_gradient.gae(
        rewards[:, kept], values[:, kept], np.ones((1, 3)), discount=0.9, lambda_=0.8
    )
    np.testing.assert_allclose(advantages[:, kept], dense, rtol=1e-6)


@pytest.mark.parametrize("k", [2, 5])
def test_group_advantages_loops(k):
    rewards = rng.normal(size=(3, k)).astype(np.float32)
    rloo = policy_gradient.rloo_advantages(rewards)
    grpo = policy_gradient.grpo_advantages(rewards)
    for row in range(3):
        group = [float(x) for x in rewards[row]]
        std = np.std(group, ddof=1)
        for i in range(k):
            others = group[:i] + group[i + 1 :]
            np.testing.assert_allclose(rloo[row, i], group[i] - np.mean(others), rtol=1e-4)
            expected = (group[i] - np.mean(group)) / (std + 1e-4)
            np.testing.assert_allclose(grpo[row, i], expected, rtol=1e-4, atol=1e-6)
    # Unscaled, GRPO is RLOO with the sample itself in its baseline.
    unscaled = policy_gradient.grpo_advantages(rewards, scale=False)
    np.testing.assert_allclose(unscaled, rloo * (k - 1) / k, rtol=1e-4, atol=1e-6)


def test_equal_rewards_teach_nothing():
    rewards = jnp.full((2, 3), 0.1)
    for advantages in (policy_gradient.rloo_advantages, policy_gradient.grpo_advantages):
        np.testing.assert_allclose(advantages(rewards), 0, atol=1e-3)
        assert np.all(np.isfinite(jax.grad(lambda x, f=advantages: f(x).sum())(rewards)))
        with pytest.raises(ValueError, match="2 samples"):
            advantages(rewards[:, :1])


def test_rloo_gradient_is_unbiased_under_enumeration():
    # Over all K-tuples of samples from a softmax: the mean gradient is that of the mean reward.
    logits, rewards = rng.normal(size=(2, 3))
    k = 2
    with jax.enable_x64(True):
        exact = jax.grad(lambda x: -jnp.sum(jax.nn.softmax(x) * rewards))(jnp.asarray(logits))
        samples = np.array(list(itertools.product(range(3), repeat=k)))
        p = np.exp(logits) / np.exp(logits).sum()
        probability = p[samples].prod(-1)
        advantages = policy_gradient.rloo_advantages(jnp.asarray(rewards[samples]))

        def expected_loss(x):
            log_probs = jax.nn.log_softmax(x)[samples]
            losses = policy_gradient.reinforce_loss(log_probs, advantages)
            return jnp.sum(probability * losses.mean(-1))

        estimate = jax.grad(expected_loss)(jnp.asarray(logits))
        np.testing.assert_allclose(estimate, exact, atol=1e-12)


def test_spo_rewards_loop_and_fixed_point():
    preferences = np.array([[0.5, 0.6, 0.3], [0.4, 0.5, 0.9], [0.7, 0.1, 0.5]], np.float32)
    rewards = policy_gradient.spo_rewards(preferences)
    for i in range(3):
        expected = np.mean([preferences[i, j] for j in range(3) if j != i])
        np.testing.assert_allclose(rewards[i], expected, rtol=1e-6)
    # Samples drawn in the proportions of the minimax winner all earn 1/2: nothing is left to learn.
    a, b, c = 0.1, 0.3, 0.2
    cycle = 0.5 + np.array([[0, a, -c], [-a, 0, b], [c, -b, 0]])
    winner = np.asarray(ranking.minimax_winner(jnp.asarray(cycle)))
    samples = np.repeat(np.arange(3), np.rint(600 * winner).astype(int))
    rewards = policy_gradient.spo_rewards(cycle[np.ix_(samples, samples)])
    np.testing.assert_allclose(rewards, 0.5, atol=1e-5)
    with pytest.raises(ValueError, match="`preferences`"):
        policy_gradient.spo_rewards(preferences[:2])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 1), min_size=20, max_size=20), st.booleans())
def test_whiten_loop(mask, shift_mean):
    x = rng.normal(size=(4, 5), loc=3.0, scale=2.0).astype(np.float32)
    mask = np.reshape(mask, (4, 5)).astype(bool)
    actual = np.asarray(policy_gradient.whiten(x, mask, shift_mean=shift_mean))
    counted = x[mask].astype(np.float64)
    assert not np.any(actual[~mask])
    if len(counted):
        expected = (counted - counted.mean()) / np.sqrt(counted.var() + 1e-8)
        expected += 0 if shift_mean else counted.mean()
        np.testing.assert_allclose(actual[mask], expected, rtol=1e-3, atol=1e-3)
    if len(counted) > 1:
        np.testing.assert_allclose(actual[mask].std(), 1, rtol=1e-3)


def test_adaptive_kl_controller():
    def step(kl):
        return policy_gradient.adaptive_kl_update(0.1, kl, target=6.0, horizon=1000, batch_size=50)

    np.testing.assert_allclose(step(6.0), 0.1, rtol=1e-6)
    np.testing.assert_allclose(step(6.6), 0.1 * (1 + 0.1 * 0.05), rtol=1e-6)
    np.testing.assert_allclose(step(600.0), 0.1 * (1 + 0.2 * 0.05), rtol=1e-6)
    np.testing.assert_allclose(step(0.0), 0.1 * (1 - 0.2 * 0.05), rtol=1e-6)
    # In a world where the KL is inversely proportional to the coefficient, the target is reached.
    coefficient = jnp.array(0.5)
    for _ in range(300):
        coefficient = policy_gradient.adaptive_kl_update(
            coefficient, 0.6 / coefficient, target=6.0, horizon=10, batch_size=1
        )
    np.testing.assert_allclose(0.6 / coefficient, 6.0, rtol=1e-3)
