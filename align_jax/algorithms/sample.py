"""Sampling as a stage: completions of prompts, scored, in a file that later stages train on.

    model=PATH_OR_RUN  data.source=PROMPTS  sampling.samples=K  reward=vader

writes `samples/samples.jsonl` (data/samples.py has its fields). With `data.source=samples:PATH`, a
later stage of `preference` trains on the best against the worst completion of each prompt (as
rejection sampling does, Liu et al. 2023, arXiv:2309.06657), one of `sft` on the best of K (Stiennon
et al. 2020, arXiv:2009.01325; Touvron et al. 2023, section 3.2.3): on the tokens that were drawn.

A comparer scores a completion by its share of won comparisons with the prompt's other ones.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from align_jax.algorithms import Source
from align_jax.data.dataset import Data, RawRecords, prompts_of
from align_jax.data.samples import Sample, by_prompt
from align_jax.errors import RunError
from align_jax.evaluation import statistics
from align_jax.generation.rollout import Sampling, stop_tokens
from align_jax.models.transformer import Transformer
from align_jax.rewards.base import Comparer, Reward, check_records
from align_jax.rewards.configured import (
    check_comparer,
    check_reward,
    make_comparer,
    make_reward,
)
from align_jax.settings import Described
from align_jax.training import pretrained
from align_jax.training.phases import Phases
from align_jax.training.pretrained import RunConfig
from align_jax.training.sampling import draw_samples, with_scores, with_wins
from align_jax.training.workdir import Workdir

# The file of a run: samples/samples.jsonl.
PHASE = "samples"


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """The settings of a run that samples from `model`, a path or another run."""

    algorithm: str = "sample"
    data: Data = Data()  # the prompts: source, limit, invalid, max_length, max_prompt_length
    # prompts: the first ones of the source, 0 takes all; a chunk that a kill can lose is
    # batch_prompts of them.
    sampling: Sampling = Sampling(prompts=0, batch_prompts=32)
    reward: Described = ""  # "": none
    comparer: Described = ""  # "": none

    def __post_init__(self):
        super().__post_init__()
        if self.reward:
            check_reward(self.reward)
        if self.comparer:
            check_comparer(self.comparer)
            if self.sampling.samples < 2:
                raise RunError(
                    "config.comparer compares the samples of a prompt: config.sampling.samples is "
                    f"{self.sampling.samples}; expected at least 2."
                )
        self.at_default("sampling trains nothing", "lora", "wandb_project")
        self.at_default("sampling trains nothing", "checkpoint_every", "data.accumulation")
        self.at_default("samples are no rows of batches", "data.rows", "data.score")
        self.at_default("config.data.source has the prompts", "data.eval_source")


def draw(
    model: Transformer,
    tokenizer: Any,
    records: RawRecords,
    sampling: Sampling,
    *,
    reward: Reward | None = None,
    comparer: Comparer | None = None,
    seed: int = 0,
    data: Data | None = None,
    mesh: Mesh | None = None,
) -> list[Sample]:
    """Scored completions of prompts, as data/samples.py has them.

    Args:
      records: dicts with a `prompt`, or a source.
      sampling: `prompts` takes the first ones, 0 all of them; `samples` of each.
      reward, comparer: callables (rewards/base.py); the scores are "reward" and "wins".
      seed: a completion depends on it, on the prompt's place and on its own number only.
      data: how prompts are read and cut; None for the defaults.
      mesh: where the model lies; None keeps its placement.

    Raises:
      RunError: fewer prompts than `sampling.prompts`, or none that fits.
      DataError, RewardError: a prompt, or a score, that cannot be used.
    """
    drawing = _Drawing(tokenizer, records, data or Data(), sampling, reward, comparer)
    mesh = mesh or pretrained.mesh_of(model)
    chunks = [drawing.chunk(i, model, mesh, seed) for i in range(drawing.chunks)]
    return drawing.scored([sample for chunk in chunks for sample in chunk])


class _Drawing:
    """The prompts of one call or run, chunk by chunk, and what scores their completions."""

    def __init__(
        self,
        tokenizer: Any,
        records: RawRecords,
        data: Data,
        sampling: Sampling,
        reward: Reward | None,
        comparer: Comparer | None,
    ):
        stop_tokens(tokenizer, sampling)
        records, examples = prompts_of(
            records, tokenizer, data, max_new_tokens=sampling.max_new_tokens
        )
        if sampling.prompts > len(records):
            raise RunError(
                f"config.sampling.prompts = {sampling.prompts} is more than there are prompts: "
                f"{len(records)}. Set it to 0 for all of them."
            )
        count = sampling.prompts or len(records)
        self.tokenizer, self.sampling = tokenizer, sampling
        self.reward, self.comparer = reward, comparer
        self.records, self.examples = records[:count], examples[:count]
        for judge in filter(None, (reward, comparer)):
            check_records(judge, self.records)
        self.size = sampling.batch_prompts or count
        self.chunks = -(-count // self.size)

    def chunk(self, number: int, model: Transformer, mesh: Mesh, seed: int) -> list[Sample]:
        """The completions of one chunk, not yet scored: the same whatever was drawn before."""
        first = number * self.size
        part = slice(first, first + self.size)
        return draw_samples(
            model,
            mesh,
            self.tokenizer,
            self.records[part],
            [example.prompt for example in self.examples[part]],
            count=self.sampling.samples,
            sampling=self.sampling,
            key=jax.random.key(seed),
            description=f"sampling {number + 1}/{self.chunks}",
            first_prompt=first,
        )

    def scored(self, samples: list[Sample]) -> list[Sample]:
        """All completions with their scores: together, as some rewards are relative to the rest."""
        asked = [self.records[sample["prompt_id"]] for sample in samples]
        if self.reward is not None:
            samples = with_scores(samples, self.reward, asked)
        if self.comparer is not None:
            samples = with_wins(samples, self.comparer, asked)
        return samples


def sources(config: Config) -> list[Source]:
    """Where the prompts come from."""
    return [(config.data.source, "prompt", config.data)]


def run(config: Config, workdir: Workdir) -> dict[str, Any]:
    """Draws and scores what has not been drawn; returns the summary of the scores."""
    if not config.data.source:
        raise RunError("config.data.source is empty: name the prompts to be completed.")

    def prepare():
        tokenizer = pretrained.load_pretrained_tokenizer(config.model)
        mesh = pretrained.open_mesh(config)
        settings = {"tokenizer": tokenizer, "mesh": mesh}
        reward = make_reward(config.reward, **settings) if config.reward else None
        comparer = None
        if config.comparer:
            labels = workdir.path / "labels"
            comparer = make_comparer(config.comparer, directory=labels, **settings)
        source, data, sampling = config.data.source, config.data, config.sampling
        drawing = _Drawing(tokenizer, source, data, sampling, reward, comparer)
        # Not loaded where every chunk is there and only labels were waited for.
        model = functools.cache(lambda: pretrained.load_pretrained(config, config.model, mesh))
        chunks = [
            lambda i=i: drawing.chunk(i, model(), mesh, config.seed) for i in range(drawing.chunks)
        ]
        return chunks, drawing.scored

    samples = Phases(workdir.path).run_in_chunks(PHASE, prepare)
    print(f"Samples: {workdir.path / 'samples' / PHASE}.jsonl")
    return _summary(samples)


def evaluate(config: Config, workdir: Workdir) -> dict[str, Any]:
    """The summary of a finished run, from its samples."""
    return _summary(Phases(workdir.path).read(PHASE))


def _summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """How many there are, how many ended, and each score's mean with its interval by prompt."""
    groups = by_prompt(samples)
    scores = {}
    for name in samples[0]["scores"]:
        values = np.array([[sample["scores"][name] for sample in group] for group in groups])
        mean, half_width = statistics.mean_ci95(values)
        best = float(values.max(1).mean())
        scores[name] = {"mean": mean, "ci95": half_width, "best": best}
    return {
        "prompts": len(groups),
        "samples": len(samples),
        "ended": float(np.mean([sample["ended"] for sample in samples])),
        "scores": scores,
    }
