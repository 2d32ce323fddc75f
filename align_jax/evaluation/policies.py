"""What a policy does on held-out prompts: samples of it and of the model it is compared with."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from align_jax.data.batching import num_tokens
from align_jax.data.dataset import Data
from align_jax.data.tokenise import Example
from align_jax.evaluation import statistics
from align_jax.evaluation.report import write_report
from align_jax.generation.rollout import Sampling, roll_out
from align_jax.models.transformer import Transformer
from align_jax.progress import progress
from align_jax.rewards.base import Records, Reward, checked_scores
from align_jax.training.metrics import read_metrics
from align_jax.training.reference import compute_log_probs

# Corpora are compared at this many samples a prompt: distinct-2 falls as a corpus grows.
DISTINCT_SAMPLES = 4

# A continuation: {prompt, prompt_tokens, text, tokens, log_prob, score}; log_prob in nats.
Sample = dict[str, Any]


def draw_samples(
    model: Transformer,
    mesh: Mesh,
    tokenizer: Any,
    records: Records,
    prompts: Sequence[Sequence[int]],
    *,
    count: int,
    sampling: Sampling,
    reward: Reward,
    key: jax.Array,
    description: str,
) -> list[Sample]:
    """`count` scored samples of every prompt, prompt by prompt.

    Args:
      records, prompts: the prompts, as the reward wants them and as token ids.
      sampling: see `generation.rollout`; `batch_samples` of a prompt are drawn
        together.
    """
    size, together = sampling.batch_prompts or len(prompts), sampling.batch_samples or count
    groups: list[list[Sample]] = [[] for _ in prompts]
    with progress(description=description, total=len(prompts) * count, unit="sample") as bar:
        for first in range(0, len(prompts), size):
            chosen = range(first, min(first + size, len(prompts)))
            for round_ in range(0, count, together):
                round_key = jax.random.fold_in(key, round_)
                rollout = roll_out(
                    model,
                    mesh,
                    tokenizer,
                    [np.asarray(prompts[i], np.int32) for i in chosen],
                    sampling,
                    keys=jax.vmap(jax.random.fold_in, (None, 0))(round_key, np.array(chosen)),
                    samples=min(together, count - round_),
                )
                for row, text in enumerate(rollout.texts):
                    index = chosen[row // rollout.samples]
                    groups[index].append(
                        {
                            "prompt": records[index]["prompt"],
                            "prompt_tokens": [int(token) for token in prompts[index]],
                            "text": text,
                            "tokens": rollout.tokens[row][rollout.mask[row] > 0].tolist(),
                            "log_prob": float(rollout.log_probs[row].sum()),
                        }
                    )
                bar.update(len(rollout.texts))
    samples = [sample for group in groups for sample in group]
    repeated = [record for record in records for _ in range(count)]
    scores = checked_scores(reward, repeated, [sample["text"] for sample in samples])
    return [sample | {"score": float(score)} for sample, score in zip(samples, scores)]


def with_log_probs_under(
    model: Transformer,
    mesh: Mesh,
    samples: Sequence[Sample],
    per_prompt: int,
    data: Data,
    *,
    temperature: float,
) -> list[Sample]:
    """Adds each sample's log-probability under the base model: the other half of the KL.

    The samples of a prompt are the responses of one example, so that it is computed once for them.
    """
    examples = []
    for start in range(0, len(samples), per_prompt):
        group = samples[start : start + per_prompt]
        responses = [sample["tokens"] for sample in group]
        prompt = group[0]["prompt_tokens"]
        examples.append(Example.of_samples(start // per_prompt, prompt, responses))
    # Whatever was sampled fits: buckets bound what is trained on.
    longest = max(map(num_tokens, examples))
    settings = {"batch_size": 4, "accumulation": 1, "rows": 0}
    for name in ("length_buckets", "target_buckets"):
        settings[name] = (*getattr(data, name), -(-longest // 8) * 8)
    data = dataclasses.replace(data, **settings)
    log_probs = compute_log_probs(model, mesh, examples, data, temperature=temperature).ravel()
    return [s | {"base_log_prob": float(value)} for s, value in zip(samples, log_probs)]


def summarise(base: Sequence[Sample], trained: Sequence[Sample], evaluation: Any) -> dict[str, Any]:
    """The report's `base`, `best_of_4`, `trained` and what the trained model leans on."""
    pool = _grid(base, "score", evaluation.base_samples)
    scores = _grid(trained, "score", evaluation.trained_samples)
    best = statistics.best_of_n_choices(pool, 4)
    base_texts = _grid(base, "text", evaluation.base_samples)
    best_texts = np.take_along_axis(base_texts, best, axis=1)
    trained_texts = _grid(trained, "text", evaluation.trained_samples)
    gains = [sample["log_prob"] - sample["base_log_prob"] for sample in trained]

    def row(values: np.ndarray, wins: float, kl: float, texts: np.ndarray) -> dict[str, float]:
        mean, half_width = statistics.mean_ci95(values)
        corpus = texts[:, :DISTINCT_SAMPLES].ravel().tolist()
        return {
            "reward_mean": mean,
            "reward_ci95": half_width,
            "win_rate": wins,
            "kl": kl,
            "distinct_2": statistics.distinct_n(corpus, 2),
        }

    four = statistics.best_of_n(pool, 4)[:, None]
    return {
        "base": row(pool, 0.5, 0.0, base_texts),
        "best_of_4": row(
            four,
            statistics.best_of_n_win_rate(pool, 4)[0],
            statistics.best_of_n_kl_bound(4),
            best_texts,
        ),
        "trained": row(
            scores, statistics.win_rate(scores, pool)[0], float(np.mean(gains)), trained_texts
        ),
        "exploitation": statistics.exploitation(
            base_texts.ravel().tolist(), trained_texts.ravel().tolist()
        ),
    }


def write_comparison(
    directory: Path,
    title: str,
    summary: dict[str, Any],
    base: Sequence[Sample],
    trained: Sequence[Sample],
    evaluation: Any,
) -> None:
    """Writes the report of a run whose samples these are; see `report.write_report`."""
    write_report(
        directory / "report",
        title=title,
        summary=summary,
        curves=read_metrics(directory),
        rewards={
            "base": _grid(base, "score", evaluation.base_samples),
            "trained": _grid(trained, "score", evaluation.trained_samples),
        },
        samples=_side_by_side(base, trained, evaluation),
    )


def _grid(samples: Sequence[Sample], field: str, per_prompt: int) -> np.ndarray:
    """`[prompts, per_prompt]` of one field."""
    values = np.array([sample[field] for sample in samples])
    return values.reshape(-1, per_prompt)


def _side_by_side(
    base: Sequence[Sample], trained: Sequence[Sample], evaluation: Any
) -> list[dict[str, Any]]:
    """The first samples of the first 12 prompts: not chosen for looks."""
    pairs = zip(base[:: evaluation.base_samples], trained[:: evaluation.trained_samples])
    return [
        {
            "prompt": _text(a["prompt"]),
            "base": a["text"],
            "base_score": a["score"],
            "trained": b["text"],
            "trained_score": b["score"],
        }
        for a, b in list(pairs)[:12]
    ]


def _text(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
