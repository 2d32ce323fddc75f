"""Samples as records: one JSON line a completion, the schema that every stage and report shares.

prompt_id      int, the number of its record in its source
sample         int, which of the prompt's completions
prompt         text or messages, as the record has it
prompt_tokens  [int]
text           the completion without special tokens
tokens         [int], the stop token included
mask           [int], 1 on the tokens that the policy drew, 0 on those it was given
log_probs      [float], nats, of each token as it was drawn (temperature and filters applied)
log_prob       float, nats, of the whole completion at temperature 1, unfiltered
ended          bool, false where the token budget cut the completion short
scores         {name: float}, rewards by name; empty if nothing has scored it
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align_jax.errors import RunError
from align_jax.files import write_file
from align_jax.generation.rollout import Rollout

Sample = dict[str, Any]


def sample_lines(
    rollout: Rollout,
    prompts: Sequence[Mapping[str, Any]],
    *,
    prompt_ids: Sequence[int],
    log_prob: np.ndarray,
    scores: Mapping[str, np.ndarray],
) -> list[Sample]:
    """The completions of a rollout in the schema above, prompt by prompt.

    Args:
      prompts: the record of each of the rollout's P prompts.
      prompt_ids: their numbers.
      log_prob: `[N]` nats, of each completion at temperature 1.
      scores: `[N]` by name.
    """
    lines = []
    for n, text in enumerate(rollout.texts):
        index, kept = n // rollout.samples, rollout.mask[n] > 0
        lines.append(
            {
                "prompt_id": int(prompt_ids[index]),
                "sample": n % rollout.samples,
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


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Writes samples as JSON lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(json.dumps(sample) + "\n" for sample in samples).encode("utf-8"))


def read_samples(path: Path) -> list[Sample]:
    """What `write_samples` wrote; `RunError` naming the file and line of what it did not write."""
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            samples.append(json.loads(line))
        except ValueError as error:
            raise RunError(f"{path}:{number}: no sample: {error}.") from error
    return samples
