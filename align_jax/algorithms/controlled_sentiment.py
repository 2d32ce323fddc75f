"""Controlled sentiment generation (Rafailov et al. 2023, arXiv:2305.18290, 6.1), whole.

1. Sample several continuations of each training opening from the base model, and score them with
   the ground-truth reward.
2. Pair the best with the worst of each opening. They are the base model's own samples, so the
   log-probabilities they were sampled with are the reference's.
3. Train DPO on the pairs.
4. Sample base and trained model on openings from templates never trained on, and report.

The paper trains on movie-review prefixes with a sentiment classifier; here both are made or
packaged (neutral openings from a grammar, VADER), so the experiment runs anywhere. Every phase
ends in a file under the run's directory, and is not run again when it is there.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from align_jax.algorithms import preference
from align_jax.data.builtin import review_openings
from align_jax.data.chat import Example
from align_jax.evaluation import statistics
from align_jax.evaluation.report import format_summary, write_report
from align_jax.generation import generate
from align_jax.models.interchange import load_tokenizer
from align_jax.models.transformer import Transformer
from align_jax.rewards.rules import RULES
from align_jax.training import offline
from align_jax.training.errors import RunError
from align_jax.training.metrics import progress, read_metrics
from align_jax.training.reference import compute_log_probs
from align_jax.training.workdir import Workdir, write_file, write_json

# Corpora are compared at this many samples a prompt: distinct-2 falls as a corpus grows.
DISTINCT_SAMPLES = 4

# A continuation: {prompt, prompt_tokens, text, tokens, log_prob, score}; log_prob in nats.
Sample = dict[str, Any]


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    """Runs every phase that has not been run; returns the summary of the report."""
    if config.reward not in RULES:
        raise RunError(f"config.reward is {config.reward!r}; expected one of {sorted(RULES)}.")
    preference.make_loss(config)
    s, e = config.sampling, config.evaluation
    for name, count, least in (
        ("sampling.samples", s.samples, 2),
        ("evaluation.base_samples", e.base_samples, 4 * DISTINCT_SAMPLES),
        ("evaluation.trained_samples", e.trained_samples, DISTINCT_SAMPLES),
    ):
        if count < least:
            raise RunError(f"config.{name} is {count}; expected at least {least}.")
    tokenizer = load_tokenizer(config.model)
    phases = _Phases(workdir.path)
    train_openings = review_openings("train", s.prompts, seed=config.seed)
    held_out = review_openings("held_out", e.prompts, seed=config.seed)
    key = jax.random.key(config.seed)
    model_and_mesh = None

    def base() -> tuple[Transformer, Mesh]:
        nonlocal model_and_mesh
        model_and_mesh = model_and_mesh or offline.open_model(config)
        return model_and_mesh

    def sampled(name: str, openings: list[str], count: int, fold: int) -> Callable[[], list]:
        return lambda: _sample(
            config, *base(), tokenizer, openings, count, jax.random.fold_in(key, fold), name
        )

    if not phases.done("train"):
        offline.check(config, workdir.path, base()[0], s.prompts)
    train_samples = phases.run("sample", sampled("sampling train", train_openings, s.samples, 0))
    base_samples = phases.run("sample_base", sampled("sampling base", held_out, e.base_samples, 1))

    def train() -> list[Sample]:
        nonlocal model_and_mesh
        examples, reference = make_pairs(train_samples, s.samples)
        model, mesh = base()
        model_and_mesh = None  # the trainer consumes the arrays
        preference.train(config, workdir, model, mesh, examples, reference)
        return [{"pairs": len(examples)}]

    pairs = phases.run("train", train)[0]["pairs"]

    def sample_trained() -> list[Sample]:
        mesh = offline.open_mesh(config)
        model = offline.restored_model(config, workdir.path, mesh)
        fold = jax.random.fold_in(key, 2)
        samples = _sample(
            config, model, mesh, tokenizer, held_out, e.trained_samples, fold, "sampling trained"
        )
        del model
        return _with_base_log_probs(config, samples, *base())

    trained_samples = phases.run("sample_trained", sample_trained)
    summary = summarise(base_samples, trained_samples, config.evaluation)
    summary |= {"seconds": phases.seconds, "seed": config.seed, "pairs": pairs}
    summary["config"] = config.to_dict()
    write_report(
        workdir.path / "report",
        title=f"{config.loss.upper()} on controlled sentiment: {config.model}",
        summary=summary,
        curves=read_metrics(workdir.path),
        rewards={
            "base": _grid(base_samples, "score", e.base_samples),
            "trained": _grid(trained_samples, "score", e.trained_samples),
        },
        samples=_side_by_side(base_samples, trained_samples, e),
    )
    print(format_summary(summary))
    print(f"\nReport: {workdir.path / 'report' / 'index.html'}")
    return summary


def evaluate(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    """The numbers of a finished run, from its samples."""
    phases = _Phases(workdir.path)
    base, trained = (phases.read(name) for name in ("sample_base", "sample_trained"))
    return summarise(base, trained, config.evaluation)


def make_pairs(samples: Sequence[Sample], per_prompt: int) -> tuple[list[Example], np.ndarray]:
    """Best against worst sample of each prompt; a prompt whose samples all tie is left out.

    Returns:
      examples, and the base model's log-probabilities `[examples, 2]` of chosen and rejected, nats.

    Raises:
      RunError: every prompt's samples tie.
    """
    examples, log_probs = [], []
    for start in range(0, len(samples), per_prompt):
        group = sorted(samples[start : start + per_prompt], key=lambda sample: sample["score"])
        worst, best = group[0], group[-1]
        if best["score"] == worst["score"]:
            continue
        responses = tuple(np.array(sample["tokens"], np.int32) for sample in (best, worst))
        examples.append(
            Example(
                id=start // per_prompt,
                prompt=np.array(best["prompt_tokens"], np.int32),
                responses=responses,
                response_masks=tuple(np.ones(len(r), np.float32) for r in responses),
                extras={},
            )
        )
        log_probs.append([best["log_prob"], worst["log_prob"]])
    if not examples:
        raise RunError(
            "every opening's samples have the same score, so there is no pair to learn from: raise "
            "config.sampling.samples or config.sampling.max_new_tokens."
        )
    return examples, np.array(log_probs, np.float32)


def summarise(
    base: Sequence[Sample], trained: Sequence[Sample], evaluation: ConfigDict
) -> dict[str, Any]:
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


def _sample(
    config: ConfigDict,
    model: Transformer,
    mesh: Mesh,
    tokenizer: Any,
    openings: Sequence[str],
    count: int,
    key: jax.Array,
    description: str,
) -> list[Sample]:
    """`count` scored samples of every opening, opening by opening."""
    s = config.sampling
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in openings]
    groups: list[list[Sample]] = [[] for _ in openings]
    with (
        jax.set_mesh(mesh),
        progress(description=description, total=len(openings) * count, unit="sample") as bar,
    ):
        for first in range(0, len(openings), s.batch_prompts):
            for round_ in range(0, count, s.batch_samples):
                chosen = range(first, min(first + s.batch_prompts, len(openings)))
                round_key = jax.random.fold_in(key, round_)
                keys = jax.vmap(jax.random.fold_in, (None, 0))(round_key, np.array(chosen))
                size = min(s.batch_samples, count - round_)
                drawn = jax.device_get(
                    generate(
                        model,
                        [prompts[i] for i in chosen],
                        key=keys,
                        max_new_tokens=s.max_new_tokens,
                        stop_tokens=(tokenizer.eos_token_id,),
                        samples_per_prompt=size,
                    )
                )
                for row, (tokens, mask, log_probs) in enumerate(zip(*drawn, strict=True)):
                    index, tokens = chosen[row // size], tokens[mask > 0].tolist()
                    groups[index].append(
                        {
                            "prompt": openings[index],
                            "prompt_tokens": prompts[index],
                            "text": tokenizer.decode(tokens, skip_special_tokens=True),
                            "tokens": tokens,
                            "log_prob": float(log_probs.sum()),
                        }
                    )
                bar.update(len(chosen) * size)
    samples = [sample for group in groups for sample in group]
    scores = RULES[config.reward]([sample["text"] for sample in samples])
    return [sample | {"score": float(score)} for sample, score in zip(samples, scores)]


def _with_base_log_probs(
    config: ConfigDict, samples: Sequence[Sample], model: Transformer, mesh: Mesh
) -> list[Sample]:
    """Adds each sample's log-probability under the base model: the other half of the KL.

    The samples of an opening are the responses of one example, so that it is computed once for
    them.
    """
    count = config.evaluation.trained_samples
    examples = []
    for start in range(0, len(samples), count):
        group = samples[start : start + count]
        responses = tuple(np.array(sample["tokens"], np.int32) for sample in group)
        examples.append(
            Example(
                id=start // count,
                prompt=np.array(group[0]["prompt_tokens"], np.int32),
                responses=responses,
                response_masks=tuple(np.ones(len(r), np.float32) for r in responses),
                extras={},
            )
        )
    data = ConfigDict(config.data.to_dict() | {"batch_size": 4, "rows": 0})
    log_probs = compute_log_probs(model, mesh, examples, data).ravel()
    return [s | {"base_log_prob": float(value)} for s, value in zip(samples, log_probs)]


def _grid(samples: Sequence[Sample], field: str, per_prompt: int) -> np.ndarray:
    """`[prompts, per_prompt]` of one field."""
    values = np.array([sample[field] for sample in samples])
    return values.reshape(-1, per_prompt)


def _side_by_side(
    base: Sequence[Sample], trained: Sequence[Sample], evaluation: ConfigDict
) -> list[dict[str, Any]]:
    """The first samples of the first 12 prompts: not chosen for looks."""
    pairs = zip(base[:: evaluation.base_samples], trained[:: evaluation.trained_samples])
    return [
        {
            "prompt": a["prompt"],
            "base": a["text"],
            "base_score": a["score"],
            "trained": b["text"],
            "trained_score": b["score"],
        }
        for a, b in list(pairs)[:12]
    ]


class _Phases:
    """Runs a phase once: its records go to `samples/NAME.jsonl`, its seconds to `seconds.json`."""

    def __init__(self, directory: Path):
        self._directory = directory / "samples"
        self._seconds_file = self._directory / "seconds.json"
        self.seconds: dict[str, float] = {}
        if self._seconds_file.exists():
            self.seconds = json.loads(self._seconds_file.read_text(encoding="utf-8"))

    def _file(self, name: str) -> Path:
        return self._directory / f"{name}.jsonl"

    def done(self, name: str) -> bool:
        return self._file(name).exists()

    def run(self, name: str, phase: Callable[[], list[Sample]]) -> list[Sample]:
        if not self.done(name):
            started = time.monotonic()
            records = phase()
            self._directory.mkdir(exist_ok=True)
            lines = "".join(json.dumps(record) + "\n" for record in records)
            self.seconds[name] = time.monotonic() - started
            write_json(self._seconds_file, self.seconds)
            write_file(self._file(name), lines.encode("utf-8"))
        return self.read(name)

    def read(self, name: str) -> list[Sample]:
        file = self._file(name)
        if not self.done(name):
            raise RunError(f"{file} is not there: the run has not finished its phase {name!r}.")
        lines = file.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
