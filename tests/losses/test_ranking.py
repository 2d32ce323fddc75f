"""Reward-model losses against float64 loops, enumeration, and each other."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from align_jax.losses import ranking

rng = np.random.default_rng(0)

RANKED = [name for name, loss in ranking.LOSSES.items() if loss.ranked]


def test_what_each_loss_says_of_itself():
    assert list(ranking.LOSSES) == ["pairwise", "best_of_k", "all_pairs", "plackett_luce"]
    assert RANKED == ["best_of_k", "all_pairs", "plackett_luce"]
    options = {name: [o.name for o in loss.options] for name, loss in ranking.LOSSES.items()}
    assert options.pop("pairwise") == ["label_smoothing", "center_coefficient"]
    assert not any(options.values())
    assert [loss.name for loss in ranking.LOSSES.values() if loss.only_best] == ["best_of_k"]


def test_a_pair_is_its_two_responses_its_margin_and_the_options():
    rewards, margin = rng.normal(size=(5, 2)).astype(np.float32), np.ones(5, np.float32)
    options = {"label_smoothing": 0.2, "center_coefficient": 0.1}
    values = {"rewards": rewards, "margin": margin}
    np.testing.assert_array_equal(
        ranking.LOSSES["pairwise"](values, **options),
        ranking.bradley_terry_loss(rewards[:, 0], rewards[:, 1], margin=1.0, **options),
    )
    with pytest.raises(TypeError, match="margin"):
        ranking.LOSSES["all_pairs"](values | {"ranks": rewards}, margin=1.0)


@pytest.mark.parametrize("name", RANKED)
def test_a_response_that_is_not_there_weighs_nothing(name):
    rewards = rng.normal(size=(1, 5)).astype(np.float32)
    ranks = np.array([[2, 0, np.nan, 1, np.nan]], np.float32)
    present = ~np.isnan(ranks[0])

    def loss(rewards, ranks):
        return ranking.LOSSES[name]({"rewards": rewards, "ranks": ranks})[0]

    value, gradient = jax.value_and_grad(loss)(rewards, ranks)
    alone, expected = jax.value_and_grad(loss)(rewards[:, present], ranks[:, present])
    np.testing.assert_allclose(value, alone, rtol=1e-6)
    np.testing.assert_allclose(gradient[:, present], expected, rtol=1e-5)
    np.testing.assert_array_equal(gradient[:, ~present], 0)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def test_bradley_terry_closed_form():
    loss = ranking.bradley_terry_loss(jnp.array([2.0, 0.0]), jnp.array([2.0, math.log(3)]))
    np.testing.assert_allclose(loss, [math.log(2), math.log(4)], rtol=1e-6)


def test_bradley_terry_loop():
    chosen, rejected, margin = rng.normal(size=(3, 7)).astype(np.float32)
    actual = ranking.bradley_terry_loss(
        chosen, rejected, margin=margin, label_smoothing=0.1, center_coefficient=0.3
    )
    expected = []
    for c, r, m in zip(chosen.tolist(), rejected.tolist(), margin.tolist()):
        nll = -0.9 * log_sigmoid(c - r - m) - 0.1 * log_sigmoid(m + r - c)
        expected.append(nll + 0.3 * (c + r) ** 2)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_bradley_terry_minimum_is_the_log_odds_of_the_label():
    # With smoothing e the expected loss is a cross-entropy, so it is least at sigmoid(z) = 1 - e.
    gaps = jnp.linspace(-6, 6, 2401)
    loss = ranking.bradley_terry_loss(gaps, jnp.zeros_like(gaps), label_smoothing=0.2)
    np.testing.assert_allclose(gaps[jnp.argmin(loss)], math.log(0.8 / 0.2), atol=0.005)


def test_best_of_k_is_a_softmax_over_responses():
    rewards = rng.normal(size=(6, 4)).astype(np.float32)
    best = np.array([0, 1, 2, 3, 1, 1])
    odds = np.exp(rewards.astype(np.float64))
    expected = [-math.log(odds[i, b] / odds[i].sum()) for i, b in enumerate(best)]
    np.testing.assert_allclose(ranking.best_of_k_loss(rewards, best), expected, rtol=1e-5)


def test_best_of_k_ignores_a_shift_of_all_rewards():
    rewards, best = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), jnp.array([0, 3, 1])
    f = jax.value_and_grad(lambda r: ranking.best_of_k_loss(r, best).sum())
    (value, gradient), (shifted, shifted_gradient) = f(rewards), f(rewards + 5.0)
    np.testing.assert_allclose(value, shifted, rtol=1e-6)
    np.testing.assert_allclose(gradient, shifted_gradient, atol=1e-6)
    np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-6)
    one_hot = jax.nn.one_hot(best, 4)
    np.testing.assert_allclose(gradient, jax.nn.softmax(rewards) - one_hot, atol=1e-6)


def test_best_of_k_index_errors():
    rewards = jnp.zeros((2, 3))
    assert np.isnan(ranking.best_of_k_loss(rewards, jnp.array([0, 3]))[1])
    with pytest.raises(TypeError, match="`best`"):
        ranking.best_of_k_loss(rewards, jnp.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="`best`"):
        ranking.best_of_k_loss(rewards, jnp.array(0))


def all_pairs_loop(rewards, ranks):
    pairs = [(i, j) for i, j in itertools.permutations(range(len(ranks)), 2) if ranks[i] < ranks[j]]
    return sum(-log_sigmoid(rewards[i] - rewards[j]) for i, j in pairs) / max(len(pairs), 1)


def plackett_luce_loop(rewards, ranks):
    total = 0.0
    for i in range(len(ranks)):
        left = [rewards[j] for j in range(len(ranks)) if ranks[j] >= ranks[i]]
        total += math.log(sum(map(math.exp, left))) - rewards[i]
    return total


@settings(max_examples=20, deadline=None)
@given(st.data(), st.sampled_from([2, 3, 5]))
def test_ranking_losses_are_their_loops(data, k):
    ranks = data.draw(st.lists(st.integers(0, k - 1), min_size=k, max_size=k))
    rewards = data.draw(st.lists(st.floats(-20, 20, width=32), min_size=k, max_size=k))
    for loss, loop in [
        (ranking.all_pairs_loss, all_pairs_loop),
        (ranking.plackett_luce_loss, plackett_luce_loop),
    ]:
        actual = jax.jit(loss)(jnp.array([rewards]), jnp.array([ranks]))
        assert actual.shape == (1,)
        np.testing.assert_allclose(actual[0], loop(rewards, ranks), rtol=2e-5, atol=2e-5)


def test_two_responses_are_bradley_terry():
    rewards = jnp.asarray(rng.normal(size=(8, 2)), jnp.float32)
    ranks = jnp.array([[0, 1], [1, 0]] * 4)
    chosen = jnp.where(ranks[:, 0] == 0, rewards[:, 0], rewards[:, 1])
    expected = ranking.bradley_terry_loss(chosen, rewards.sum(-1) - chosen)
    best = jnp.argmin(ranks, -1)
    for loss in (
        ranking.all_pairs_loss(rewards, ranks),
        ranking.plackett_luce_loss(rewards, ranks),
        ranking.best_of_k_loss(rewards, best),
    ):
        np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_plackett_luce_probabilities_of_all_orders_sum_to_one():
    rewards = jnp.asarray(rng.normal(size=4), jnp.float32)
    orders = jnp.array(list(itertools.permutations(range(4))))
    probabilities = jnp.exp(
        -ranking.plackett_luce_loss(jnp.broadcast_to(rewards, orders.shape), orders)
    )
    np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-5)
    # Marginally the best response is drawn from the softmax, which is best_of_k_loss.
    first = jnp.array([probabilities[orders[:, i] == 0].sum() for i in range(4)])
    marginal = jnp.exp(-ranking.best_of_k_loss(jnp.tile(rewards, (4, 1)), jnp.arange(4)))
    np.testing.assert_allclose(first, marginal, rtol=1e-5)


def test_ties_say_nothing_to_all_pairs():
    rewards = jnp.array([[3.0, -1.0, 2.0]])
    assert ranking.all_pairs_loss(rewards, jnp.zeros((1, 3), int))[0] == 0
    gradient = jax.grad(lambda r: ranking.all_pairs_loss(r, jnp.zeros((1, 3), int)).sum())(rewards)
    assert not np.any(gradient)
    # One pair tied: the mean is over the two that are left.
    expected = -(log_sigmoid(3 - 2) + log_sigmoid(-1 - 2)) / 2
    np.testing.assert_allclose(
        ranking.all_pairs_loss(rewards, jnp.array([[0, 0, 1]]))[0], expected, rtol=1e-6
    )


def test_tied_plackett_luce_does_not_depend_on_listing_order():
    rewards, ranks = jnp.array([[1.0, -2.0, 0.5, 3.0]]), jnp.array([[1, 0, 1, 2]])
    swap = jnp.array([2, 1, 0, 3])
    loss = ranking.plackett_luce_loss(rewards, ranks)
    np.testing.assert_allclose(
        loss, ranking.plackett_luce_loss(rewards[:, swap], ranks[:, swap]), rtol=1e-6
    )


def test_process_reward_loop_and_soft_labels():
    rewards = rng.normal(size=(2, 5)).astype(np.float32)
    labels = np.array([[1, 0, 0.25, 1, 0], [0, 0, 1, 0.5, 1]], np.float32)
    mask = np.array([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1]])
    actual = ranking.process_reward_loss(rewards, labels, mask)
    for index in np.ndindex(2, 5):
        r, y = float(rewards[index]), float(labels[index])
        p = 1 / (1 + math.exp(-r))
        expected = mask[index] * -(y * math.log(p) + (1 - y) * math.log(1 - p))
        np.testing.assert_allclose(actual[index], expected, rtol=1e-5, atol=1e-7)
    # A hard label makes a step a comparison with the constant 0.
    np.testing.assert_allclose(
        ranking.process_reward_loss(jnp.array([1.3]), jnp.array([1.0]), jnp.array([1])),
        ranking.bradley_terry_loss(jnp.array([1.3]), jnp.array([0.0])),
        rtol=1e-6,
    )


def random_preferences(k, generator):
    a = generator.uniform(-0.5, 0.5, size=(k, k))
    return 0.5 + (a - a.T) / 2


def linear_program_winner(preferences):
    """max t such that p @ (preferences - 1/2) >= t in every column."""
    k = len(preferences)
    result = linprog(
        np.append(np.zeros(k), -1),
        A_ub=np.c_[-(preferences - 0.5).T, np.ones(k)],
        b_ub=np.zeros(k),
        A_eq=[np.append(np.ones(k), 0)],
        b_eq=[1],
        bounds=[(0, None)] * k + [(None, None)],
    )
    return result.x[:k]


@pytest.mark.parametrize("k", [2, 3, 7])
def test_minimax_winner_is_the_linear_programs(k):
    generator = np.random.default_rng(k)
    preferences = np.stack([random_preferences(k, generator) for _ in range(10)])
    winners = np.asarray(ranking.minimax_winner(jnp.asarray(preferences, jnp.float32)))
    for p, matrix in zip(winners, preferences):
        np.testing.assert_allclose(p, linear_program_winner(matrix), atol=2e-5)
        np.testing.assert_allclose(p.sum(), 1, rtol=1e-6)
        assert np.min(p @ (matrix - 0.5)) > -1e-6


def test_minimax_winner_of_known_games():
    half = 0.5
    paper_scissors_stone = jnp.array([[half, 1, 0], [0, half, 1], [1, 0, half]])
    np.testing.assert_allclose(ranking.minimax_winner(paper_scissors_stone), 1 / 3, atol=1e-6)
    # Margins a (0 over 1), b (1 over 2), c (2 over 0): the winner is (b, c, a) / (a + b + c).
    a, b, c = 0.1, 0.4, 0.2
    cycle = half + jnp.array([[0, a, -c], [-a, 0, b], [c, -b, 0]])
    expected = np.array([b, c, a]) / (a + b + c)
    np.testing.assert_allclose(ranking.minimax_winner(cycle), expected, atol=1e-5)
    condorcet = jnp.array([[half, 0.51, 0.6], [0.49, half, 0.9], [0.4, 0.1, half]])
    np.testing.assert_allclose(ranking.minimax_winner(condorcet), [1, 0, 0], atol=1e-4)
    np.testing.assert_allclose(ranking.minimax_winner(jnp.full((4, 4), half)), 0.25, atol=1e-6)
    np.testing.assert_allclose(ranking.minimax_winner(jnp.full((1, 1), half)), [1.0])


def test_shapes_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="`chosen_rewards`.*`rejected_rewards`"):
        ranking.bradley_terry_loss(jnp.zeros(3), jnp.zeros((3, 1)))
    for loss in (ranking.all_pairs_loss, ranking.plackett_luce_loss):
        with pytest.raises(ValueError, match="`ranks`"):
            loss(jnp.zeros((2, 3)), jnp.zeros(3, int))
    with pytest.raises(ValueError, match="`mask`"):
        ranking.process_reward_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.ones((2, 1)))
    with pytest.raises(ValueError, match="`preferences`"):
        ranking.minimax_winner(jnp.zeros((2, 3)))
    for smoothing in (-0.1, 0.5):
        with pytest.raises(ValueError, match="`label_smoothing`"):
            ranking.bradley_terry_loss(jnp.zeros(1), jnp.zeros(1), label_smoothing=smoothing)
