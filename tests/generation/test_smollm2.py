"""The sampler on the real model: its log-probabilities are those that training computes."""

import jax
import numpy as np

from align_jax.data.batching import build_batch
from align_jax.data.tokenise import Example
from align_jax.generation import generate
from align_jax.training.scoring import target_log_probs

PROMPTS = [
    [504, 2365, 6354, 16438, 27003, 690, 260, 23790, 2767, 30],  # The quick brown fox ...
    [504, 2365, 6354],
]
SAMPLES, NEW, TEMPERATURE = 6, 12, 0.8


def test_log_probs_equal_the_trainers_and_average_to_the_entropy(smollm2):
    out = generate(
        smollm2,
        PROMPTS,
        key=jax.random.key(0),
        max_new_tokens=NEW,
        temperature=TEMPERATURE,
        samples_per_prompt=SAMPLES,
    )
    responses = np.asarray(out.tokens).reshape(len(PROMPTS), SAMPLES, NEW)
    ones = (np.ones(NEW, np.float32),) * SAMPLES
    examples = [
        Example(i, np.array(prompt, np.int32), tuple(group), ones, {})
        for i, (prompt, group) in enumerate(zip(PROMPTS, responses))
    ]
    # All samples of a prompt in one row, as in training: the prompt's hidden states serve them all.
    batch = build_batch(examples, rows=2, length_buckets=[96], target_buckets=[SAMPLES * NEW])
    log_probs, entropy = jax.jit(target_log_probs, static_argnames="temperature")(
        smollm2, batch, temperature=TEMPERATURE
    )
    np.testing.assert_allclose(
        np.asarray(log_probs).reshape(-1, NEW), np.asarray(out.log_probs), atol=2e-4
    )
    # -log p of what is drawn is on average the entropy: the differences have mean 0 at every step.
    surprise = (-np.asarray(log_probs) - np.asarray(entropy)).ravel()
    assert np.abs(surprise.mean()) < 4 * surprise.std() / np.sqrt(surprise.size)
    assert np.mean(entropy) > 1
