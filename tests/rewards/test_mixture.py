import numpy as np
import pytest

from align_jax.errors import RewardError
from align_jax.rewards.base import check_records, scores_and_components
from align_jax.rewards.mixture import Mixture, SafetyGated
from align_jax.rewards.rules import Answer

RNG = np.random.default_rng(0)
A, B = RNG.normal(2.0, 5.0, 7), RNG.normal(-1.0, 0.3, 7)
TEXTS = [f"completion {i}" for i in range(7)]
RECORDS = [{"prompt": f"prompt {i}", "where": f"f:{i}"} for i in range(7)]


def table(values):
    """A reward that looks its completions up."""
    by_text = dict(zip(TEXTS, values))
    return lambda records, completions: [by_text[text] for text in completions]


def test_a_mixture_is_the_weighted_sum_and_shows_its_parts():
    mixture = Mixture({"helpful": (0.7, table(A)), "harmless": (-2, table(B))})
    np.testing.assert_allclose(mixture(RECORDS, TEXTS), 0.7 * A - 2 * B, rtol=1e-6)
    scores, parts = scores_and_components(mixture, RECORDS, TEXTS)
    assert scores.dtype == np.float32 and list(parts) == ["helpful", "harmless"]
    np.testing.assert_array_equal(parts["helpful"], A.astype(np.float32))
    np.testing.assert_array_equal(parts["harmless"], B.astype(np.float32))
    np.testing.assert_array_equal(scores, mixture(RECORDS, TEXTS))
    # Without standardisation a completion's score is its own.
    assert mixture(RECORDS[3:4], TEXTS[3:4])[0] == scores[3]


def test_standardised_components_have_mean_0_and_deviation_1_before_they_are_weighed():
    mixture = Mixture({"a": (1.0, table(A)), "b": (0.5, table(B))}, standardise=True)
    expected = (A - A.mean()) / A.std() + 0.5 * (B - B.mean()) / B.std()
    np.testing.assert_allclose(mixture(RECORDS, TEXTS), expected, atol=2e-5)
    assert mixture(RECORDS[:1], TEXTS[:1]).tolist() == [0.0]
    equal = Mixture({"a": (1.0, table(np.ones(7)))}, standardise=True)
    assert equal(RECORDS, TEXTS).tolist() == [0.0] * 7


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("threshold", [0.15, 0.5])
def test_llama_2s_gate_against_its_equation(threshold):
    safety, helpfulness = np.linspace(-3.0, 1.5, 7), RNG.normal(1, 2, 7)
    is_safety = np.array([True, False, False, True, False, False, False])
    r_s, r_h = sigmoid(safety), sigmoid(helpfulness)
    r_c = np.where(is_safety | (r_s < threshold), r_s, r_h)
    assert {True, False} == set((r_s < threshold)[~is_safety])  # both branches are taken
    logit = np.log(r_c / (1 - r_c))
    expected = (logit - logit.mean()) / logit.std()

    gated = SafetyGated(table(safety), table(helpfulness), threshold=threshold)
    records = [
        {**record, "safety": True} if marked else record
        for record, marked in zip(RECORDS, is_safety)
    ]
    scores, parts = scores_and_components(gated, records, TEXTS)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    np.testing.assert_allclose(parts["safety"], safety, rtol=1e-6)
    np.testing.assert_allclose(parts["helpfulness"], helpfulness, rtol=1e-6)


def test_scores_far_out_do_not_saturate():
    # The sigmoid of both is 1 in floating point, and their logit would be infinite.
    gated = SafetyGated(table(np.full(7, 50.0)), table([60, 80, 60, 80, 60, 80, 70]))
    assert gated(RECORDS, TEXTS)[1] > gated(RECORDS, TEXTS)[6] > gated(RECORDS, TEXTS)[0]
    assert np.isfinite(gated(RECORDS, TEXTS)).all()


def test_a_component_that_fails_is_named():
    mixture = Mixture({"good": (1.0, table(A)), "bad": (1.0, lambda r, c: [float("nan")] * len(c))})
    with pytest.raises(
        RewardError, match="component 'bad': the reward .* returned nan.*'prompt 0'"
    ):
        mixture(RECORDS, TEXTS)
    with pytest.raises(RewardError, match="component 'bad': "):
        scores_and_components(mixture, RECORDS, TEXTS)


def test_components_may_refuse_records():
    mixture = Mixture({"a": (1.0, table(A)), "right": (1.0, Answer())})
    with pytest.raises(RewardError, match="f:0: the reward 'answer' needs a number"):
        check_records(mixture, RECORDS)
    nested = SafetyGated(table(A), mixture)
    with pytest.raises(RewardError, match="f:0"):
        check_records(nested, RECORDS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixture({}), "^components: there are none"),
        (lambda: Mixture({"a": ("1", table(A))}), "^components.a.weight: '1' is no finite number"),
        (lambda: Mixture({"a": (float("nan"), table(A))}), "^components.a.weight: nan"),
        (lambda: Mixture({"a": (1.0, table(A))}, standardise=1), "^standardise: 1 is neither"),
        (lambda: SafetyGated(table(A), table(B), threshold=0.0), "^threshold: 0.0 is no prob"),
        (lambda: SafetyGated(table(A), table(B), threshold=1.0), "^threshold: 1.0"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
