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
scores         {name: float}: the reward is "reward", what a combined one is made of has the names
               of its parts, and shares of won comparisons are "wins"; empty if nothing scored it
base_log_prob  float, nats, only where it was asked for: of the completion under the model that
               training started from, at the temperature it was drawn at

A later stage trains on these tokens. Text that is tokenised again may become other tokens, whose
log-probabilities nobody has sampled.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align_jax.data.sources import read_file
from align_jax.data.tokenise import Example
from align_jax.errors import DataError, RunError
from align_jax.files import write_file

Sample = dict[str, Any]

# What begins a source of samples, and the kinds of records that can be made of them.
PREFIX = "samples:"
KINDS = ("preference", "sft")

# The score that is meant where none is named.
REWARD = "reward"

# What training reads of a line, and its type in JSON.
_READ = {"prompt_id": int, "prompt_tokens": list, "tokens": list, "mask": list, "scores": dict}


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Writes samples as JSON lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(json.dumps(sample) + "\n" for sample in samples).encode("utf-8"))


def read_samples(path: str | os.PathLike) -> list[Sample]:
    """What `write_samples` wrote.

    Raises:
      DataError: no such file, or a line that is no sample; names file and line.
    """
    samples = []
    for where, line in read_file(os.path.expanduser(os.fspath(path))):
        for name, kind in _READ.items():
            found = line.get(name) if isinstance(line, dict) else None
            if not isinstance(found, kind):
                raise DataError(
                    f"{where}: no sample: its field '{name}' is {found!r}; expected "
                    f"{'an object' if kind is dict else 'a list' if kind is list else 'a number'}. "
                    "Samples are what the algorithm 'sample' writes."
                )
        if len(line["mask"]) != len(line["tokens"]):
            raise DataError(
                f"{where}: no sample: {len(line['tokens'])} tokens and a mask of "
                f"{len(line['mask'])}."
            )
        samples.append(line)
    if not samples:
        raise DataError(f"{path}: the file is empty; expected at least one sample")
    return samples


def score_of(sample: Sample, score: str = "") -> float:
    """A score of a sample by its name; without one "reward", or the only score there is.

    Raises:
      RunError: no such score, or several and none is named.
    """
    scores = sample["scores"]
    name = score or (REWARD if len(scores) != 1 else next(iter(scores)))
    if name in scores:
        return scores[name]
    if not scores:
        raise RunError("the samples have no scores: sample with a reward or a comparer.")
    have = ", ".join(map(repr, scores))
    if score:
        raise RunError(f"config.data.score is {score!r}; the samples have the scores {have}.")
    raise RunError(f"the samples have the scores {have}: name one of them in config.data.score.")


def by_prompt(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The samples of each prompt, in the order in which prompts and samples first come."""
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample["prompt_id"], []).append(sample)
    return list(groups.values())


def pairs_from_samples(
    samples: Sequence[Sample], *, score: str = ""
) -> tuple[list[Example], np.ndarray]:
    """The best against the worst sample of each prompt; a prompt whose samples tie is left out.

    Args:
      score: which of their scores orders them; see `score_of`.

    Returns:
      examples, chosen before rejected, whose ids are the prompts'; and the sampled model's
      log-probabilities of both at temperature 1, `[examples, 2]` float32, nats. They are the
      reference's for a training that starts from the model that was sampled.

    Raises:
      RunError: the samples of every prompt tie; see also `score_of`.
    """
    examples, log_probs = [], []
    for group in by_prompt(samples):
        ordered = sorted(group, key=lambda sample: score_of(sample, score))
        worst, best = ordered[0], ordered[-1]
        if score_of(best, score) == score_of(worst, score):
            continue
        examples.append(example_of([best, worst]))
        log_probs.append([best["log_prob"], worst["log_prob"]])
    if not examples:
        raise RunError(
            "the samples of every prompt have the same score, so there is no pair to learn from: "
            "raise config.sampling.samples or config.sampling.max_new_tokens."
        )
    return examples, np.array(log_probs, np.float32)


def demonstrations_from_samples(
    samples: Sequence[Sample], *, best_of: int | None = None, score: str = ""
) -> list[Example]:
    """The best sample of each prompt, as a demonstration; the first of several best ones.

    Args:
      best_of: of how many of a prompt's samples, the first ones; None for all of them.
      score: which of their scores says what is best; see `score_of`.
    """
    return [
        example_of([max(group[:best_of], key=lambda sample: score_of(sample, score))])
        for group in by_prompt(samples)
    ]


def example_of(samples: Sequence[Sample]) -> Example:
    """Samples of one prompt as the responses of one example, token for token as they were drawn."""
    first = samples[0]
    return Example.of_samples(
        first["prompt_id"],
        first["prompt_tokens"],
        [sample["tokens"] for sample in samples],
        masks=[sample["mask"] for sample in samples],
    )


def examples_of_samples(
    source: str, *, kind: str, score: str, limit: int, max_length: int, overlong: str
) -> list[Example]:
    """Examples of a source `samples:PATH`.

    Args:
      kind: "preference", the best against the worst of each prompt, or "sft", the best.
      score: see `score_of`.
      limit: how many prompts to read; 0 reads all.
      max_length: of prompt and longest response, in tokens; a longer example is left out if
        `overlong` is "drop" and otherwise refused, since tokens that were drawn are never cut.

    Raises:
      DataError: a file that cannot be read, a kind that samples do not give, an example too long.
      RunError: see `pairs_from_samples`.
    """
    if kind not in KINDS:
        raise DataError(
            f"{source}: samples give records of the kinds {' and '.join(KINDS)}, not {kind!r}."
        )
    samples = read_samples(source.removeprefix(PREFIX))
    groups = by_prompt(samples)[: limit or None]
    samples = [sample for group in groups for sample in group]
    if kind == "sft":
        examples = demonstrations_from_samples(samples, score=score)
    else:
        examples, _ = pairs_from_samples(samples, score=score)
    kept = []
    for example in examples:
        length = len(example.prompt) + max(map(len, example.responses))
        if length <= max_length:
            kept.append(example)
        elif overlong != "drop":
            raise DataError(
                f"{source}: prompt {example.id} with its samples is {length} tokens, and "
                f"data.max_length is {max_length}: raise it, or set data.overlong to 'drop' (what "
                "was sampled is never cut)."
            )
    if not kept:
        raise DataError(f"{source}: no example is left below data.max_length = {max_length}.")
    return kept
