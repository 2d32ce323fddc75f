"""Policy-gradient losses: float64 loops, the gradients they must have, and whole enumerations."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_jax.losses import policy_gradient, ranking

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
        scores, LOG_PROBS, OLD_LOG_PROBS, MASK, kl_coefficient=0.2
    )
    for row in range(4):
        last = max(t for t in range(5) if MASK[row, t])
        for t in range(5):
            expected = -0.2 * (float(LOG_PROBS[row, t]) - float(OLD_LOG_PROBS[row, t]))
            expected = MASK[row, t] * expected + (scores[row] if t == last else 0)
            np.testing.assert_allclose(actual[row, t], expected, rtol=1e-5, atol=1e-6)
    # Summed, it is the KL-regularised reward of the completion.
    np.testing.assert_allclose(
        actual.sum(-1), scores - 0.2 * ((LOG_PROBS - OLD_LOG_PROBS) * MASK).sum(-1), rtol=1e-4
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
        assert np.all(np.isfinite(gradient(advantages, rewards)))
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
