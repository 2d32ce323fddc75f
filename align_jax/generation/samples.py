"""Rollouts as samples: the lines of `data/samples.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from align_jax.data.samples import Sample, read_samples, write_samples
from align_jax.generation.rollout import Rollout

__all__ = ["Sample", "read_samples", "sample_lines", "write_samples"]


def sample_lines(
    rollout: Rollout,
    prompts: Sequence[Mapping[str, Any]],
    *,
    prompt_ids: Sequence[int],
    log_prob: np.ndarray,
    scores: Mapping[str, np.ndarray],
    first_sample: int = 0,
) -> list[Sample]:
    """The completions of a rollout as samples, prompt by prompt.

    Args:
      prompts: the record of each of the rollout's P prompts.
      prompt_ids: their numbers.
      log_prob: `[N]` nats, of each completion at temperature 1.
      scores: `[N]` by name.
      first_sample: how many samples of these prompts were drawn before.
    """
    lines = []
    for n, text in enumerate(rollout.texts):
        index, kept = n // rollout.samples, rollout.mask[n] > 0
        lines.append(
            {
                "prompt_id": int(prompt_ids[index]),
                "sample": first_sample + n % rollout.samples,
                "prompt": prompts[index]["prompt"],
                "prompt_tokens": rollout.prompts[index].tolist(),
                "text": text,
                "tokens": rollout.tokens[n][kept].tolist(),
                "mask": [1] * int(kept.sum()),
                "log_probs": rollout.log_probs[n][kept].tolist(),
                "log_prob": float(log_prob[n]),
                "ended": bool(rollout.ended[n]),
                "scores": {name: float(values[n]) for name, values in scores.items()},
            }
        )
    return lines
