"""Samples of a policy that are kept: drawn, scored, compared, and measured under another model."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from align_jax.data.batching import num_tokens
from align_jax.data.dataset import Data
from align_jax.data.samples import REWARD, Sample, by_prompt, example_of
from align_jax.data.tokenise import Example
from align_jax.generation.rollout import Sampling, roll_out
from align_jax.generation.samples import sample_lines
from align_jax.models.transformer import Transformer
from align_jax.progress import progress
from align_jax.rewards.base import (
    Comparer,
    Records,
    Reward,
    checked_probabilities,
    scores_and_components,
)
from align_jax.training.reference import compute_log_probs

# The score that `with_wins` adds.
WINS = "wins"

# Prompts, with all their samples, whose log-probabilities are computed together.
SCORED_TOGETHER = 4


def draw_samples(
    model: Transformer,
    mesh: Mesh,
    tokenizer: Any,
    records: Records,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    count: int,
    sampling: Sampling,
    key: jax.Array,
    description: str,
    reward: Reward | None = None,
    first_prompt: int = 0,
) -> list[Sample]:
    """`count` samples of every prompt, prompt by prompt, scored if there is a reward.

    Args:
      records, prompts: the prompts, as the reward wants them and as token ids.
      sampling: see `Sampling`; `batch_prompts` prompts and `batch_samples` of a prompt's samples
        are drawn together.
      key: a sample depends on it, on its prompt's number and on its own number only.
      first_prompt: the number of the first of these prompts.
    """
    size, together = sampling.batch_prompts or len(prompts), sampling.batch_samples or count
    samples: list[Sample] = []
    with progress(description=description, total=len(prompts) * count, unit="sample") as bar:
        for first in range(0, len(prompts), size):
            chosen = range(first, min(first + size, len(prompts)))
            numbers = np.array(chosen) + first_prompt
            for round_ in range(0, count, together):
                round_key = jax.random.fold_in(key, round_)
                rollout = roll_out(
                    model,
                    mesh,
                    tokenizer,
                    [np.asarray(prompts[i], np.int32) for i in chosen],
                    sampling,
                    keys=jax.vmap(jax.random.fold_in, (None, 0))(round_key, numbers),
                    samples=min(together, count - round_),
                )
                samples += sample_lines(
                    rollout,
                    [records[i] for i in chosen],
                    prompt_ids=numbers,
                    log_prob=np.array([row.sum() for row in rollout.log_probs]),
                    scores={},
                    first_sample=round_,
                )
                bar.update(len(rollout.texts))
    samples = [sample for group in by_prompt(samples) for sample in group]
    if sampling.temperature != 1.0:
        # The sampler's sums are those of the distribution at the sampling temperature.
        own = log_probs_under(model, mesh, samples, Data(), temperature=1.0)
        samples = [s | {"log_prob": float(value)} for s, value in zip(samples, own)]
    if reward is None:
        return samples
    return with_scores(samples, reward, [record for record in records for _ in range(count)])


def with_scores(samples: Sequence[Sample], reward: Reward, records: Records) -> list[Sample]:
    """Adds a reward to the samples' scores, with its components if it is a combined one.

    Args:
      records: the prompt of each sample, as the reward wants it.

    Raises: as `rewards.base.checked_scores`.
    """
    rewards, components = scores_and_components(reward, records, [s["text"] for s in samples])
    scores = components | {REWARD: rewards}
    return [
        sample | {"scores": sample["scores"] | {name: float(x[n]) for name, x in scores.items()}}
        for n, sample in enumerate(samples)
    ]


def with_wins(samples: Sequence[Sample], comparer: Comparer, records: Records) -> list[Sample]:
    """Adds to each sample's scores its share of won comparisons with the prompt's other samples.

    Args:
      records: the prompt of each sample, as the comparer wants it.

    Raises: as `rewards.base.checked_probabilities`.
    """
    asked = {sample["prompt_id"]: record for sample, record in zip(samples, records)}
    groups = by_prompt(samples)
    texts = [[sample["text"] for sample in group] for group in groups]
    won = comparisons_won(comparer, [asked[group[0]["prompt_id"]] for group in groups], texts)
    return [
        # Against itself every sample has 0.5, which is no comparison.
        one | {"scores": one["scores"] | {WINS: float((wins - 0.5) / max(len(group) - 1, 1))}}
        for group, own in zip(groups, won)
        for one, wins in zip(group, own)
    ]


def comparisons_won(
    comparer: Comparer, records: Records, texts: Sequence[Sequence[str]]
) -> list[np.ndarray]:
    """Comparisons that each of a prompt's completions wins, `[K]` for each prompt.

    All pairs of a prompt are compared, itself included: every completion wins half of the
    comparison with itself, and half of one with an equal text. Nobody is asked about these, and
    about each pair of texts once.

    Args:
      records: the prompts, as the comparer wants them.
      texts: the K completions of each.

    Raises: as `rewards.base.checked_probabilities`.
    """
    different = [list(dict.fromkeys(own)) for own in texts]
    asked = [
        (record, *pair)
        for record, own in zip(records, different)
        for pair in itertools.combinations(own, 2)
    ]
    answers = iter(checked_probabilities(comparer, *zip(*asked)) if asked else ())
    won = []
    for own, all_texts in zip(different, texts):
        better = np.full((len(own), len(own)), 0.5)
        for i, j in itertools.combinations(range(len(own)), 2):
            better[i, j] = next(answers)
            better[j, i] = 1 - better[i, j]
        places = [own.index(text) for text in all_texts]
        won.append(better[:, places].sum(1)[places])
    return won


def log_probs_under(
    model: Transformer,
    mesh: Mesh,
    samples: Sequence[Sample],
    data: Data,
    *,
    temperature: float,
) -> np.ndarray:
    """Log-probability `[N]` float32 of each sample under a model, nats.

    The samples of a prompt are the responses of one example, so that the prompt is computed once.

    Args:
      samples: prompt by prompt, as many of each.
      data: its buckets round the lengths up.
      temperature: of the model's distribution.
    """
    examples: list[Example] = [example_of(group) for group in by_prompt(samples)]
    # Samples may be longer than any training bucket, so a bucket that holds the longest is added.
    longest = -(-max(map(num_tokens, examples)) // 8) * 8
    data = dataclasses.replace(
        data,
        batch_size=SCORED_TOGETHER,
        accumulation=1,
        rows=0,
        length_buckets=(*data.length_buckets, longest),
        target_buckets=(*data.target_buckets, longest),
    )
    return compute_log_probs(model, mesh, examples, data, temperature=temperature).ravel()


def with_log_probs_under(
    model: Transformer,
    mesh: Mesh,
    samples: Sequence[Sample],
    data: Data,
    *,
    temperature: float,
) -> list[Sample]:
    """Adds each sample's `base_log_prob` under the base model: the other half of the KL.

    Args: as for `log_probs_under`; `temperature` is that of the sampling.
    """
    log_probs = log_probs_under(model, mesh, samples, data, temperature=temperature)
    return [s | {"base_log_prob": float(value)} for s, value in zip(samples, log_probs)]
