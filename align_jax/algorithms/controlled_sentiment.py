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

import dataclasses
import functools
from typing import Any, ClassVar

import jax

from align_jax.algorithms import Source, preference
from align_jax.data.builtin import review_openings
from align_jax.data.samples import Sample, pairs_from_samples
from align_jax.errors import RunError
from align_jax.evaluation.policies import DISTINCT_SAMPLES, summarise, write_comparison
from align_jax.evaluation.report import format_summary
from align_jax.generation.rollout import Sampling
from align_jax.generation.sampler import MAX_SAMPLES
from align_jax.models.tokenizers import encode_texts
from align_jax.models.transformer import Transformer
from align_jax.rewards.rules import RULES, of_completions
from align_jax.settings import Settings
from align_jax.training import pretrained
from align_jax.training.offline import count_steps
from align_jax.training.phases import Phases
from align_jax.training.sampling import draw_samples, with_log_probs_under
from align_jax.training.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class HeldOut(Settings, key="config.evaluation"):
    """What the report is made of."""

    prompts: int = 40  # held-out openings
    base_samples: int = 20  # of each, by the base model: the pool of best-of-n
    trained_samples: int = 8  # of each, by the trained model

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "prompts")
        self.at_least(4 * DISTINCT_SAMPLES, "base_samples")
        self.at_least(DISTINCT_SAMPLES, "trained_samples")
        self.at_most(MAX_SAMPLES, "base_samples", "trained_samples")


@dataclasses.dataclass(frozen=True)
class Config(preference.Config):
    """The settings of the experiment: those of `preference`, whose pairs are sampled."""

    # Its own report has what is measured here.
    offered_evaluators: ClassVar[tuple[str, ...]] = ()

    algorithm: str = "controlled_sentiment"
    reward: str = "vader"  # a rule of rewards/rules.py
    sampling: Sampling = Sampling(samples=4)  # of the training openings
    evaluation: HeldOut = HeldOut()

    def __post_init__(self):
        super().__post_init__()
        if self.reward not in RULES:
            raise RunError(f"config.reward is {self.reward!r}; expected one of {sorted(RULES)}.")
        loss = preference.LOSSES[self.loss]
        # Sampled pairs come with the log-probabilities of whole responses, and nothing else.
        if loss.labelled or any(preference.PROVIDERS[name].prepare for name in loss.reads):
            raise RunError(f"config.loss = {self.loss!r} needs other examples than sampled pairs.")
        if self.sampling.temperature != 1.0:
            # The sampler's log-probabilities are the reference's, and the trainer's are at 1.
            raise RunError(
                f"config.sampling.temperature is {self.sampling.temperature}; expected 1.0."
            )
        self.at_least(1, "sampling.prompts")
        self.at_least(2, "sampling.samples")
        self.at_default("the pairs are sampled", "data.source", "data.eval_source", "data.score")


def sources(config: Config) -> list[Source]:
    """None: the openings are made, and what is trained on is sampled."""
    return []


def run(config: Config, workdir: Workdir) -> dict[str, Any]:
    """Runs every phase that has not been run; returns the summary of the report."""
    s, e = config.sampling, config.evaluation
    tokenizer = pretrained.load_pretrained_tokenizer(config.model)
    phases, mesh = Phases(workdir.path), pretrained.open_mesh(config)
    base = functools.cache(lambda: pretrained.load_pretrained(config, config.model, mesh))

    def draw(name: str, model: Transformer, split: str, prompts: int, count: int, fold: int):
        openings = review_openings(split, prompts, seed=config.seed)
        return draw_samples(
            model,
            mesh,
            tokenizer,
            [{"prompt": text} for text in openings],
            encode_texts(tokenizer, openings, behind_text=False),
            count=count,
            sampling=s,
            reward=of_completions(RULES[config.reward]),
            key=jax.random.fold_in(jax.random.key(config.seed), fold),
            description=name,
        )

    if not phases.done("train"):
        count_steps(config, workdir.path, pretrained.with_adapters(config, base(), mesh), s.prompts)
    train_samples = phases.run(
        "sample", lambda: draw("sampling train", base(), "train", s.prompts, s.samples, 0)
    )
    base_samples = phases.run(
        "sample_base",
        lambda: draw("sampling base", base(), "held_out", e.prompts, e.base_samples, 1),
    )

    def train() -> list[Sample]:
        examples, reference = pairs_from_samples(train_samples)
        model = base()
        base.cache_clear()  # the trainer consumes the arrays
        settings = {"workdir": workdir, "mesh": mesh, "donate": True}
        preference.train(model, tokenizer, examples, config, reference=reference, **settings)
        return [{"pairs": len(examples)}]

    pairs = phases.run("train", train)[0]["pairs"]

    def sample_trained() -> list[Sample]:
        model = pretrained.restored_model(config, workdir.path, mesh)
        samples = draw("sampling trained", model, "held_out", e.prompts, e.trained_samples, 2)
        del model
        return with_log_probs_under(base(), mesh, samples, config.data, temperature=s.temperature)

    trained_samples = phases.run("sample_trained", sample_trained)
    summary = summarise(base_samples, trained_samples)
    summary |= {"seconds": phases.seconds, "seed": config.seed, "pairs": pairs}
    summary["config"] = config.to_dict()
    title = f"{config.loss.upper()} on controlled sentiment: {config.model}"
    write_comparison(workdir.path, title, summary, base_samples, trained_samples)
    print(format_summary(summary))
    print(f"\nReport: {workdir.path / 'report' / 'index.html'}")
    return summary


def evaluate(config: Config, workdir: Workdir) -> dict[str, Any]:
    """The numbers of a finished run, from its samples."""
    phases = Phases(workdir.path)
    base, trained = (phases.read(name) for name in ("sample_base", "sample_trained"))
    return summarise(base, trained)
