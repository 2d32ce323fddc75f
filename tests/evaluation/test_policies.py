"""Samples of a policy and their log-probabilities under another model."""

import jax
import pytest

from align_jax.data import dataset
from align_jax.distributed.mesh import make_mesh
from align_jax.evaluation.policies import draw_samples, with_log_probs_under
from align_jax.generation.rollout import default_sampling_config
from align_jax.models.interchange import load_model, load_tokenizer
from align_jax.rewards.rules import RULES, of_completions

TEXTS = ("ab", "the longest of them", "c", "two words", "!")


@pytest.mark.parametrize("batching", [{}, {"accumulation": 8}, {"rows": 2, "length_buckets": (8,)}])
def test_under_itself_a_samples_log_probability_is_the_samplers(batching):
    """However the training is batched, and whatever the lengths it is held to."""
    model, tokenizer, mesh = load_model("tiny"), load_tokenizer("tiny"), make_mesh()
    sampling = default_sampling_config()
    sampling.update(max_new_tokens=6, temperature=0.6)
    samples = draw_samples(
        model,
        mesh,
        tokenizer,
        [{"prompt": text, "where": text} for text in TEXTS],
        [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS],
        count=3,
        sampling=sampling,
        reward=of_completions(RULES["length"]),
        key=jax.random.key(0),
        description="sampling",
    )
    data = dataset.default_data_config(batch_size=16, **batching)
    found = with_log_probs_under(model, mesh, samples, 3, data, temperature=0.6)
    assert [s["base_log_prob"] for s in found] == pytest.approx(
        [s["log_prob"] for s in samples], abs=1e-4
    )
    assert len({round(s["log_prob"], 3) for s in samples}) > 10  # they do differ
