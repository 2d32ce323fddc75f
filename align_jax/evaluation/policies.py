"""What a policy does on held-out prompts, beside the model it is compared with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align_jax.data.samples import Sample, by_prompt, score_of
from align_jax.evaluation import statistics
from align_jax.evaluation.report import write_report
from align_jax.training.metrics import read_metrics

# Corpora are compared at this many samples a prompt: distinct-2 falls as a corpus grows.
DISTINCT_SAMPLES = 4

# Prompts whose first samples a report shows side by side: the first ones, not chosen for looks.
SHOWN = 12


def summarise(base: Sequence[Sample], trained: Sequence[Sample]) -> dict[str, Any]:
    """The report's `base`, `best_of_4`, `trained` and what the trained model leans on."""
    pool = scores_by_prompt(base)
    scores = scores_by_prompt(trained)
    best = statistics.best_of_n_choices(pool, 4)
    base_texts, trained_texts = texts_by_prompt(base), texts_by_prompt(trained)
    best_texts = np.take_along_axis(base_texts, best, axis=1)

    def row(values: np.ndarray, wins: float, kl: float, texts: np.ndarray) -> dict[str, float]:
        mean, half_width = statistics.mean_ci95(values)
        return {
            "reward_mean": mean,
            "reward_ci95": half_width,
            "win_rate": wins,
            "kl": kl,
            "distinct_2": distinct_2(texts),
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
            scores,
            statistics.win_rate(scores, pool)[0],
            float(np.mean(log_ratios(trained))),
            trained_texts,
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
) -> None:
    """Writes the report of a run whose samples these are; see `report.write_report`."""
    write_report(
        directory / "report",
        title=title,
        summary=summary,
        curves=read_metrics(directory),
        rewards={"base": scores_by_prompt(base), "trained": scores_by_prompt(trained)},
        samples=side_by_side(base, trained),
    )


def scores_by_prompt(samples: Sequence[Sample], score: str = "") -> np.ndarray:
    """One score of samples, as many of each prompt: `[prompts, samples]`; see `score_of`."""
    return np.array([[score_of(s, score) for s in group] for group in by_prompt(samples)])


def texts_by_prompt(samples: Sequence[Sample]) -> np.ndarray:
    """The texts of samples, as many of each prompt: `[prompts, samples]`."""
    return np.array([[sample["text"] for sample in group] for group in by_prompt(samples)])


def distinct_2(texts: np.ndarray) -> float:
    """Distinct-2 of the first `DISTINCT_SAMPLES` texts of each prompt; `[prompts, samples]`."""
    return statistics.distinct_n(texts[:, :DISTINCT_SAMPLES].ravel().tolist(), 2)


def log_ratios(samples: Sequence[Sample]) -> list[float]:
    """log pi / pi_base of each sample, nats, at the temperature it was drawn at.

    Their mean is the KL of the sampled policy to the base. Sums are in float32, padded to one
    length, as the sampler's are.
    """
    drawn = np.zeros((len(samples), max(len(s["log_probs"]) for s in samples)), np.float32)
    for row, sample in zip(drawn, samples):
        row[: len(sample["log_probs"])] = sample["log_probs"]
    return [float(row.sum()) - s["base_log_prob"] for row, s in zip(drawn, samples)]


def side_by_side(base: Sequence[Sample], trained: Sequence[Sample]) -> list[dict[str, Any]]:
    """The first samples of the first prompts, with their scores if they have any."""

    def score(sample: Sample) -> float | None:
        return score_of(sample) if sample["scores"] else None

    firsts = zip(by_prompt(base)[:SHOWN], by_prompt(trained))
    return [
        {
            "prompt": a["prompt"] if isinstance(a["prompt"], str) else a["prompt"][-1]["content"],
            "base": a["text"],
            "base_score": score(a),
            "trained": b["text"],
            "trained_score": score(b),
        }
        for (a, *_), (b, *_) in firsts
    ]
