import itertools
import math

import numpy as np
import pytest
from scipy import stats

from align_jax.evaluation import statistics


@pytest.fixture
def rewards():
    """Three prompts of seven samples with many ties, as VADER's zeros make."""
    return np.random.default_rng(0).integers(-2, 3, (3, 7)) / 2.0


def test_mean_ci95_is_students_interval_of_the_prompt_means():
    values = np.random.default_rng(1).normal(size=(9, 4)) + np.arange(9)[:, None]
    mean, half_width = statistics.mean_ci95(values)
    low, high = stats.ttest_1samp(values.mean(axis=1), 0).confidence_interval(0.95)
    assert (mean - half_width, mean + half_width) == pytest.approx((low, high), rel=1e-12)


def test_mean_ci95_covers_the_truth_although_samples_of_a_prompt_are_alike():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        values = rng.normal(size=(10, 1)) + 0.3 * rng.normal(size=(10, 8))
        mean, half_width = statistics.mean_ci95(values)
        covered += abs(mean) < half_width
    assert 0.92 < covered / 400 < 0.98


def test_one_prompt_has_a_mean_and_no_interval():
    mean, half_width = statistics.mean_ci95([[1.0, 2.0]])
    assert mean == 1.5 and math.isnan(half_width)


def test_win_rate_counts_every_pair_and_half_of_the_ties(rewards):
    candidate = np.random.default_rng(3).integers(-1, 4, (3, 4)) / 2.0
    by_prompt = [
        np.mean([1.0 if c > b else 0.5 if c == b else 0.0 for c in own for b in pool])
        for own, pool in zip(candidate, rewards, strict=True)
    ]
    rate, error = statistics.win_rate(candidate, rewards)
    assert rate == pytest.approx(np.mean(by_prompt), rel=1e-12)
    assert error == pytest.approx(stats.sem(by_prompt), rel=1e-12)


def test_win_rate_of_a_pool_against_itself_is_one_half(rewards):
    assert statistics.win_rate(rewards, rewards)[0] == pytest.approx(0.5, abs=1e-15)


@pytest.mark.parametrize("n", range(1, 8))
def test_best_of_n_averages_every_subset(rewards, n):
    brute = [np.mean([max(s) for s in itertools.combinations(pool, n)]) for pool in rewards]
    np.testing.assert_allclose(statistics.best_of_n(rewards, n), brute, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("n", range(1, 7))
def test_best_of_n_win_rate_averages_every_draw_of_n_and_an_opponent(rewards, n):
    brute = []
    for pool in rewards:
        wins = []
        for opponent in range(len(pool)):
            for subset in itertools.combinations(np.delete(pool, opponent), n):
                best = max(subset)
                wins.append(float(best > pool[opponent]) + 0.5 * (best == pool[opponent]))
        brute.append(np.mean(wins))
    rate, error = statistics.best_of_n_win_rate(rewards, n)
    assert rate == pytest.approx(np.mean(brute), rel=1e-12)
    assert error == pytest.approx(stats.sem(brute), rel=1e-9, abs=1e-15)


def test_best_of_n_wins_n_times_in_n_plus_1_without_ties():
    pool = np.random.default_rng(4).normal(size=(2, 20))
    assert statistics.best_of_n_win_rate(pool, 4)[0] == pytest.approx(0.8, rel=1e-12)


def test_best_of_n_from_a_large_pool_needs_no_large_floats():
    pool = np.random.default_rng(5).uniform(size=(1, 3000))
    assert statistics.best_of_n(pool, 1500)[0] == pytest.approx(pool.max(), abs=1e-2)


def test_best_of_n_choices_are_the_best_of_disjoint_groups(rewards):
    choices = statistics.best_of_n_choices(rewards, 3)
    expected = [
        [max(range(3 * g, 3 * g + 3), key=row.__getitem__) for g in (0, 1)] for row in rewards
    ]
    np.testing.assert_array_equal(choices, expected)


def test_best_of_n_kl_bound_is_the_kl_of_best_of_n_over_a_continuum():
    # The density of the best of n uniform samples is n u^(n-1); its KL to the uniform, by
    # quadrature.
    u = (np.arange(2_000_000) + 0.5) / 2_000_000
    for n in (1, 2, 4, 16):
        density = n * u ** (n - 1)
        kl = np.mean(density * np.log(density))
        assert statistics.best_of_n_kl_bound(n) == pytest.approx(kl, abs=1e-6)


def test_distinct_n():
    texts = ["a b a b", "A  b\nc", "d", ""]
    assert statistics.distinct_n(texts, 1) == 4 / 8
    assert statistics.distinct_n(texts, 2) == 3 / 5  # ab ba ab | ab bc
    assert math.isnan(statistics.distinct_n(["a", ""], 2))


def test_exploitation_names_the_words_that_rose():
    base = ["the plot is slow, but fine."] * 90 + ["A wonderful film!"] * 10
    trained = ["The film is wonderful! Truly wonderful."] * 80 + ["the plot is slow"] * 20
    found = statistics.exploitation(base, trained, top_words=2)
    assert found["words"] == [
        {"word": "truly", "base": 0.0, "trained": 0.8},
        {"word": "film", "base": 0.1, "trained": 0.8},
    ]
    assert found["any_top_word"] == [0.1, 0.8]
    assert found["exclamation"] == [0.1, 0.8]
    assert found["mean_words"] == [pytest.approx(5.7), pytest.approx(5.6)]
    assert (
        "leans on truly, film: 80% of its samples contain at least one, against 10%"
        in found["line"]
    )
    assert "mark: 80% (base 10%)" in found["line"] and "5.6 words (base 5.7)" in found["line"]


def test_exploitation_claims_nothing_when_both_come_from_one_source():
    rng = np.random.default_rng(6)
    vocabulary = np.array([f"w{i}" for i in range(1500)])
    frequencies = 1 / np.arange(1, 1501)
    draw = rng.choice(vocabulary, (800, 18), p=frequencies / frequencies.sum())
    texts = [" ".join(words) for words in draw]
    found = statistics.exploitation(texts[:640], texts[640:])
    assert found["words"] == [] and found["line"].startswith("No word became more frequent")


def test_wrong_inputs_are_named(rewards):
    with pytest.raises(ValueError, match=r"rewards\[1, 2\] is nan"):
        bad = rewards.copy()
        bad[1, 2] = np.nan
        statistics.best_of_n(bad, 2)
    with pytest.raises(ValueError, match=r"must be \[prompts, samples\], not \[7\]"):
        statistics.mean_ci95(rewards[0])
    with pytest.raises(ValueError, match="candidate has 2 prompts and base has 3"):
        statistics.win_rate(rewards[:2], rewards)
    with pytest.raises(ValueError, match="n must be 1 to 7 for 7 samples a prompt, not 8"):
        statistics.best_of_n(rewards, 8)
    with pytest.raises(ValueError, match="n must be 1 to 6"):
        statistics.best_of_n_win_rate(rewards, 7)
    with pytest.raises(ValueError, match="neither list"):
        statistics.exploitation([], ["a"])
