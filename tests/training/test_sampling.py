"""Samples of a policy, their scores, and their log-probabilities under another model."""

import jax
import numpy as np
import pytest

from align_jax.data.dataset import Data
from align_jax.distributed.mesh import make_mesh
from align_jax.generation.rollout import Sampling
from align_jax.models.interchange import load_model, load_tokenizer
from align_jax.rewards.mixture import Mixture
from align_jax.rewards.rules import RULES, of_completions
from align_jax.training.sampling import (
    comparisons_won,
    draw_samples,
    with_log_probs_under,
    with_scores,
    with_wins,
)

TEXTS = ("ab", "the longest of them", "c", "two words", "!")
RECORDS = [{"prompt": text, "where": text} for text in TEXTS]
LENGTH = of_completions(RULES["length"])


def draw(sampling, *, count=3, **settings):
    model, tokenizer, mesh = load_model("tiny"), load_tokenizer("tiny"), make_mesh()
    return draw_samples(
        model,
        mesh,
        tokenizer,
        RECORDS,
        [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS],
        count=count,
        sampling=sampling,
        key=jax.random.key(0),
        description="sampling",
        **settings,
    )


@pytest.mark.parametrize("batching", [{}, {"accumulation": 8}, {"rows": 2, "length_buckets": (8,)}])
def test_under_itself_a_samples_log_probability_is_the_samplers(batching):
    """However the training is batched, and whatever the lengths it is held to."""
    samples = draw(Sampling(max_new_tokens=6, temperature=0.6), reward=LENGTH)
    model, mesh, data = load_model("tiny"), make_mesh(), Data(batch_size=16, **batching)
    for temperature, own in (
        (0.6, [sum(s["log_probs"]) for s in samples]),
        # Whatever it was drawn at, `log_prob` is at temperature 1.
        (1.0, [s["log_prob"] for s in samples]),
    ):
        found = with_log_probs_under(model, mesh, samples, data, temperature=temperature)
        assert [s["base_log_prob"] for s in found] == pytest.approx(own, abs=1e-4)
        assert len({round(value, 3) for value in own}) > 10  # they do differ


def test_at_temperature_1_the_log_probability_is_the_samplers_sum():
    for sample in draw(Sampling(max_new_tokens=6)):
        assert sample["log_prob"] == float(np.sum(np.float32(sample["log_probs"])))


def test_samples_do_not_depend_on_what_they_are_drawn_with():
    together = draw(Sampling(max_new_tokens=6))
    apart = draw(Sampling(max_new_tokens=6, batch_prompts=2))
    assert [s["tokens"] for s in together] == [s["tokens"] for s in apart]
    assert [s["prompt_id"] for s in together] == [p for p in range(5) for _ in range(3)]
    assert [s["sample"] for s in together] == 5 * [0, 1, 2]
    rounds = draw(Sampling(max_new_tokens=6, batch_samples=1))
    assert [(s["prompt_id"], s["sample"]) for s in rounds] == [
        (s["prompt_id"], s["sample"]) for s in together
    ]


def test_scores_are_the_reward_and_what_it_is_made_of():
    samples = draw(Sampling(max_new_tokens=4), count=1)
    assert samples[0]["scores"] == {}
    reward = Mixture({"long": (2.0, LENGTH), "longer": (1.0, LENGTH)})
    for sample in with_scores(samples, reward, RECORDS):
        length = len(sample["text"])
        assert sample["scores"] == {"long": length, "longer": length, "reward": 3 * length}


def longer(records, first, second):
    return [float(len(a) > len(b)) if len(a) != len(b) else 0.5 for a, b in zip(first, second)]


def test_comparisons_won_ask_about_each_pair_of_texts_once():
    asked = []

    def comparer(records, first, second):
        asked.extend(zip(first, second))
        return longer(records, first, second)

    [first, second] = comparisons_won(comparer, RECORDS[:2], [["a", "bbb", "a", "cc"], ["x", "x"]])
    np.testing.assert_array_equal(first, [1.0, 3.5, 1.0, 2.5])
    np.testing.assert_array_equal(second, [1.0, 1.0])
    assert asked == [("a", "bbb"), ("a", "cc"), ("bbb", "cc")]


def test_wins_are_shares_of_the_comparisons_with_the_other_samples():
    made = [
        {"prompt_id": n, "text": text, "scores": {"reward": 1.0}}
        for n, texts in enumerate([("a", "bbb", "cc"), ("x", "x", "x")])
        for text in texts
    ]
    found = with_wins(made, longer, [RECORDS[s["prompt_id"]] for s in made])
    assert [s["scores"]["wins"] for s in found] == [0.0, 1.0, 0.5, 0.5, 0.5, 0.5]
    assert all(s["scores"]["reward"] == 1.0 for s in found)
