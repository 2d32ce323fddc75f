"""Rollouts that no model has drawn."""

import numpy as np

from align_jax.generation.rollout import Rollout


def made_rollout(lengths, samples, limit=6):
    """A rollout of random tokens whose completions have these lengths."""
    rng = np.random.default_rng(0)
    mask = (np.arange(limit) < np.array(lengths)[:, None]).astype(np.float32)
    tokens = np.where(mask > 0, rng.integers(8, 264, mask.shape), 0).astype(np.int32)
    log_probs = (-rng.random(mask.shape) * mask).astype(np.float32)
    prompts = [
        rng.integers(8, 264, size, np.int32) for size in rng.integers(1, 7, len(lengths) // samples)
    ]
    texts = [f"text {i}" for i in range(len(lengths))]
    return Rollout(prompts, tokens, mask, log_probs, np.ones(len(lengths), bool), texts)
