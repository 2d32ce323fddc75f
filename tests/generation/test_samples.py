"""Rollouts as lines: what was drawn is what is kept."""

import numpy as np

from align_jax.generation.rollout import Rollout
from align_jax.generation.samples import read_samples, sample_lines, write_samples


def rollout():
    """Two prompts, two samples of each; the second sample of the first was cut by the budget."""
    tokens = np.array([[5, 1, 0], [6, 7, 8], [1, 0, 0], [9, 1, 0]], np.int32)
    mask = (tokens > 0).astype(np.float32)
    return Rollout(
        [np.array([2, 3], np.int32), np.array([4], np.int32)],
        tokens,
        mask,
        np.where(mask > 0, -np.float32(0.1) * tokens, 0.0).astype(np.float32),
        np.array([True, False, True, True]),
        ["five", "six", "", "nine"],
    )


def lines(**changes):
    settings = {
        "prompt_ids": [7, 11],
        "log_prob": np.array([-1.0, -2.0, -3.0, -4.0]),
        "scores": {"reward": np.array([0.5, np.float32(0.1), 0, 1])},
    }
    prompts = [{"prompt": "two three"}, {"prompt": [{"role": "user", "content": "four"}]}]
    return sample_lines(rollout(), prompts, **settings | changes)


def test_every_field_of_the_schema_is_there():
    first, second, third, _ = lines()
    assert second == {
        "prompt_id": 7,
        "sample": 1,
        "prompt": "two three",
        "prompt_tokens": [2, 3],
        "text": "six",
        "tokens": [6, 7, 8],
        "mask": [1, 1, 1],
        "log_probs": [float(-np.float32(0.1) * n) for n in (6, 7, 8)],
        "log_prob": -2.0,
        "ended": False,
        "scores": {"reward": float(np.float32(0.1))},
    }
    assert first["tokens"] == [5, 1] and first["mask"] == [1, 1] and first["ended"]
    assert (
        third["prompt_id"] == 11 and third["sample"] == 0 and third["prompt"][0]["role"] == "user"
    )


def test_samples_drawn_later_have_later_numbers():
    assert [line["sample"] for line in lines(first_sample=4)] == [4, 5, 4, 5]


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "samples" / "samples.jsonl"
    write_samples(path, lines())
    assert read_samples(path) == lines()
