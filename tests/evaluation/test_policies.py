"""Numbers and texts of samples, however many there are of a prompt."""

import numpy as np
import pytest

from align_jax.evaluation.policies import (
    distinct_2,
    log_ratios,
    scores_by_prompt,
    side_by_side,
    texts_by_prompt,
)


def sample(prompt_id, text, **more):
    return {
        "prompt_id": prompt_id,
        "prompt": f"prompt {prompt_id}",
        "text": text,
        "scores": {},
    } | more


SAMPLES = [
    sample(3, "a b", scores={"reward": 1.0, "length": 3.0}),
    sample(3, "a c", scores={"reward": 0.5, "length": 3.0}),
    sample(1, "a b", scores={"reward": -1.0, "length": 3.0}),
    sample(1, "", scores={"reward": 0.0, "length": 0.0}),
]


def test_scores_and_texts_stand_by_prompt():
    np.testing.assert_array_equal(scores_by_prompt(SAMPLES), [[1.0, 0.5], [-1.0, 0.0]])
    np.testing.assert_array_equal(scores_by_prompt(SAMPLES, "length"), [[3, 3], [3, 0]])
    assert texts_by_prompt(SAMPLES).tolist() == [["a b", "a c"], ["a b", ""]]
    assert distinct_2(texts_by_prompt(SAMPLES)) == pytest.approx(2 / 3)


def test_the_kl_is_that_of_the_sampled_distribution():
    """The sampler's sums at its temperature, and not those at temperature 1."""
    drawn = [
        {"log_probs": [-1.0, -2.0], "log_prob": -9.0, "base_log_prob": -3.5},
        {"log_probs": [-0.5], "log_prob": -9.0, "base_log_prob": -0.25},
    ]
    assert log_ratios(drawn) == [0.5, -0.25]


def test_side_by_side_shows_the_first_sample_of_each_prompt():
    trained = [sample(3, "t"), sample(3, "u"), sample(1, "v"), sample(1, "w")]
    first, second = side_by_side(SAMPLES, trained)
    assert first == {
        "prompt": "prompt 3",
        "base": "a b",
        "base_score": 1.0,
        "trained": "t",
        "trained_score": None,
    }
    assert second["base_score"] == -1.0 and second["trained"] == "v"
