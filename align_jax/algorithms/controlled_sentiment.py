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

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from align_jax.algorithms import Source, preference
from align_jax.data.builtin import review_openings
from align_jax.data.tokenise import Example
from align_jax.errors import RunError
from align_jax.evaluation.policies import (
    DISTINCT_SAMPLES,
    Sample,
    draw_samples,
    summarise,
    with_log_probs_under,
    write_comparison,
)
from align_jax.evaluation.report import format_summary
from align_jax.models.transformer import Transformer
from align_jax.rewards.rules import RULES
from align_jax.training import offline, pretrained
from align_jax.training.phases import Phases
from align_jax.training.workdir import Workdir


def sources(config: ConfigDict) -> list[Source]:
    """None: the openings are made, and what is trained on is sampled."""
    return []


def check(config: ConfigDict) -> None:
    """Raises `RunError` for a config that no model could make right."""
    if config.reward not in RULES:
        raise RunError(f"config.reward is {config.reward!r}; expected one of {sorted(RULES)}.")
    preference.check(config)
    if config.loss in ("kto", "ld_dpo"):
        raise RunError(f"config.loss = {config.loss!r} needs other examples than sampled pairs.")
    s, e = config.sampling, config.evaluation
    if s.temperature != 1.0:
        # The sampler's log-probabilities are the reference's, and the trainer's are at 1.
        raise RunError(f"config.sampling.temperature is {s.temperature}; expected 1.0.")
    for name, count, least in (
        ("sampling.samples", s.samples, 2),
        ("evaluation.base_samples", e.base_samples, 4 * DISTINCT_SAMPLES),
        ("evaluation.trained_samples", e.trained_samples, DISTINCT_SAMPLES),
    ):
        if count < least:
            raise RunError(f"config.{name} is {count}; expected at least {least}.")


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    """Runs every phase that has not been run; returns the summary of the report."""
    check(config)
    s, e = config.sampling, config.evaluation
    tokenizer = pretrained.load_pretrained_tokenizer(config.model)
    phases = Phases(workdir.path)
    train_openings = review_openings("train", s.prompts, seed=config.seed)
    held_out = review_openings("held_out", e.prompts, seed=config.seed)
    key = jax.random.key(config.seed)
    model_and_mesh = None

    def base() -> tuple[Transformer, Mesh]:
        nonlocal model_and_mesh
        model_and_mesh = model_and_mesh or pretrained.open_model(config)
        return model_and_mesh

    def draw(name: str, model: Transformer, mesh: Mesh, openings: list[str], count: int, fold: int):
        return draw_samples(
            model,
            mesh,
            tokenizer,
            [{"prompt": text} for text in openings],
            [tokenizer(text, add_special_tokens=False).input_ids for text in openings],
            count=count,
            sampling=s,
            reward=lambda _, texts: RULES[config.reward](texts),
            key=jax.random.fold_in(key, fold),
            description=name,
        )

    if not phases.done("train"):
        offline.check(config, workdir.path, base()[0], s.prompts)
    train_samples = phases.run(
        "sample", lambda: draw("sampling train", *base(), train_openings, s.samples, 0)
    )
    base_samples = phases.run(
        "sample_base", lambda: draw("sampling base", *base(), held_out, e.base_samples, 1)
    )

    def train() -> list[Sample]:
        nonlocal model_and_mesh
        examples, reference = make_pairs(train_samples, s.samples)
        model, mesh = base()
        model_and_mesh = None  # the trainer consumes the arrays
        preference.train(config, workdir, model, mesh, examples, reference)
        return [{"pairs": len(examples)}]

    pairs = phases.run("train", train)[0]["pairs"]

    def sample_trained() -> list[Sample]:
        mesh = pretrained.open_mesh(config)
        model = pretrained.restored_model(config, workdir.path, mesh)
        samples = draw("sampling trained", model, mesh, held_out, e.trained_samples, 2)
        del model
        return with_log_probs_under(
            *base(), samples, e.trained_samples, config.data, temperature=s.temperature
        )

    trained_samples = phases.run("sample_trained", sample_trained)
    summary = summarise(base_samples, trained_samples, config.evaluation)
    summary |= {"seconds": phases.seconds, "seed": config.seed, "pairs": pairs}
    summary["config"] = config.to_dict()
    write_comparison(
        workdir.path,
        f"{config.loss.upper()} on controlled sentiment: {config.model}",
        summary,
        base_samples,
        trained_samples,
        e,
    )
    print(format_summary(summary))
    print(f"\nReport: {workdir.path / 'report' / 'index.html'}")
    return summary


def evaluate(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    """The numbers of a finished run, from its samples."""
    phases = Phases(workdir.path)
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
        responses = [sample["tokens"] for sample in (best, worst)]
        prompt = best["prompt_tokens"]
        examples.append(Example.of_samples(start // per_prompt, prompt, responses))
        log_probs.append([best["log_prob"], worst["log_prob"]])
    if not examples:
        raise RunError(
            "every opening's samples have the same score, so there is no pair to learn from: raise "
            "config.sampling.samples or config.sampling.max_new_tokens."
        )
    return examples, np.array(log_probs, np.float32)
