"""Reward models: a scalar head on a language model, fitted to comparisons.

A response is scored at its last token, EOS included. `config.loss` says what a comparison is:

    pairwise        one response beats another; Bradley-Terry, perhaps with a margin
                    Ouyang et al. 2022 (arXiv:2203.02155) eq. 1; Touvron et al. 2023
                    (arXiv:2307.09288) eq. 2
    best_of_k       one of K is the best           Ziegler et al. 2019 (arXiv:1909.08593) eq. 1
    all_pairs       K are ranked: the mean over their pairs               Ouyang et al. 2022 eq. 1
    plackett_luce   K are ranked: the likelihood of the whole order       Zhu et al. 2023

A record is one row of the batch: its prompt is computed once, its K responses stand side by side,
and its pairs, which are anything but independent, are never split over batches.

The comparisons leave the zero and the unit of a reward free. `config.normalization` fixes them
afterwards on texts of a reference policy, and the result is stored with the model.
"""

import dataclasses
import functools
import math
import numbers
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from align_jax.algorithms import Source, reward_normalization
from align_jax.algorithms.comparisons import (
    MARGINS,
    as_rankings,
    attach,
    kind_of_records,
    pairs_of,
    records_to_judge,
    texts_of,
    warn_of_ties,
)
from align_jax.algorithms.reward_normalization import Normalization, ReferenceTexts
from align_jax.data.dataset import records_of, tokenised
from align_jax.data.loader import sample_with_replacement
from align_jax.data.records import Record
from align_jax.data.tokenise import Example
from align_jax.distributed import hosts
from align_jax.distributed.partitioning import replicated
from align_jax.errors import RunError
from align_jax.evaluation import evaluators
from align_jax.evaluation.calibration import accuracy, calibrate
from align_jax.evaluation.calibration_report import format_calibration, write_calibration_report
from align_jax.files import write_json
from align_jax.losses.ranking import LOSSES, RankingLoss
from align_jax.models.heads import ScalarModel, response_scores, without_unembedding
from align_jax.models.transformer import Transformer
from align_jax.progress import progress
from align_jax.rewards.model import DIRECTORY, RewardModel, RewardScale, save_reward_model
from align_jax.training import pretrained
from align_jax.training.metrics import read_metrics
from align_jax.training.offline import OfflineConfig, evaluate_loss, train_offline
from align_jax.training.scoring import score_responses
from align_jax.training.step import Batch, LossSums
from align_jax.training.workdir import Result, Workdir

_DETAILS = ("reliability", "by_difference", "by_strength", "rewards")

SCORED_TOGETHER = 256  # held-out records, between two marks of the progress bar


@dataclasses.dataclass(frozen=True)
class Config(OfflineConfig):
    """The settings of a reward model's run."""

    offered_evaluators: ClassVar[tuple[str, ...]] = ("loss", "calibration")

    algorithm: str = "reward_model"
    loss: str = "pairwise"  # a name of losses.ranking.LOSSES
    # A name of comparisons.MARGINS, or {strength: margin}, which a config file assigns within
    # `with config.ignore_type():`. "": the records' own `margin`.
    margins: str | Mapping[str, float] = ""
    label_smoothing: float = 0.0  # probability, below 0.5, that a comparison is flipped
    center_coefficient: float = 0.0  # weight of (chosen + rejected)^2, which holds rewards near 0
    ensemble: int = 1  # members, each with its own head, order and sample of the data
    held_out: int = 0  # this many of the last records of data.source are for evaluation only
    normalization: Normalization = Normalization()

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "ensemble")
        self.at_most(1000, "ensemble")
        self.at_least(0, "held_out")
        self.one_of(LOSSES, "loss")
        self._check_fields_of_losses()
        self._check_margins()
        evaluators.check_evaluators(self)

    def _check_fields_of_losses(self) -> None:
        for name in {name: None for loss in LOSSES.values() for name in _fields_read_by(loss)}:
            readers = [loss.name for loss in LOSSES.values() if name in _fields_read_by(loss)]
            if self.loss not in readers:
                listed = " or ".join(map(repr, readers))
                self.at_default(f"{name} is for config.loss = {listed} only", name)
        for option in self.ranking_loss.options:
            value = getattr(self, option.name)
            try:
                option.check(value)
            except ValueError as error:
                expected = option.expected
                raise RunError(f"config.{option.name} is {value}; expected {expected}.") from error

    def _check_margins(self) -> None:
        if self.margins and isinstance(self.margins, str):
            self.one_of(MARGINS, "margins")
        elif self.margins:
            for strength, margin in self.margins.items():
                if not isinstance(margin, numbers.Real) or not math.isfinite(margin):
                    raise RunError(
                        f"config.margins[{strength!r}] is {margin!r}; expected a finite number."
                    )

    @property
    def ranking_loss(self) -> RankingLoss:
        """The loss that `loss` names."""
        return LOSSES[self.loss]

    @property
    def margin_of_strength(self) -> Mapping[str, float] | None:
        """The table that `margins` names or is; None where a record's own margin counts."""
        return MARGINS.get(self.margins) if isinstance(self.margins, str) else self.margins or None


def _fields_read_by(loss: RankingLoss) -> list[str]:
    """Fields of `Config` that act on this loss, but not on every other."""
    margins = ["margins"] if "margin" in loss.reads else []
    return margins + [option.name for option in loss.options]


def loss_sums(config: Config, model: ScalarModel, batch: Batch) -> LossSums:
    """The loss of a batch of records, in nats, summed over records.

    The batch holds `margin` `[B]` and, in the order of the responses, `ranks` `[B K]` float32: nan
    where a record has fewer than K responses. Metrics are means over the pairs of a record that
    its ranks order (for best_of_k: the best and each other one).
    """
    count = batch["margin"].shape[0]
    scores = response_scores(model, batch).reshape(count, -1)
    ranks = batch["ranks"].reshape(count, -1)
    better = ranks[:, :, None] < ranks[:, None, :]  # false wherever a rank is nan
    pairs = better.sum((1, 2))
    loss = config.ranking_loss
    values = {"rewards": scores, "ranks": ranks, "margin": batch["margin"]}
    losses = loss(values, **{option.name: getattr(config, option.name) for option in loss.options})
    # A record whose responses all tie says nothing.
    weight = (pairs > 0).astype(jnp.float32)
    share = better / jnp.maximum(pairs, 1)[:, None, None]
    first, second = scores[:, :, None], scores[:, None, :]
    right = (first > second) + 0.5 * (first == second)
    metrics = {
        "rewards/chosen": first,
        "rewards/rejected": second,
        "rewards/margins": first - second,
        "rewards/accuracies": right,
    }
    sums = {name: (share * value).sum() for name, value in metrics.items()}
    return LossSums((weight * losses).sum(), weight.sum(), sums)


# Comparisons from Python: dicts, or a source that `data.sources` reads.
Comparisons = Sequence[Mapping[str, Any]] | str | os.PathLike


class Inputs(NamedTuple):
    """What a reward model is made from beside a language model: see `read_inputs`.

    Attributes:
      examples: to train on, of `as_rankings`.
      held_out: records to evaluate on.
      held_out_source: where they come from, in words.
      reference: what sets zero and unit; None without normalization.
      measured: the held-out data of every evaluator.
    """

    examples: list[Example]
    held_out: list[Record]
    held_out_source: str
    reference: ReferenceTexts | None
    measured: list[Any]


def read_inputs(
    records: Comparisons,
    tokenizer: Any,
    config: Config,
    *,
    held_out: Comparisons,
    directory: Path | None,
    mesh: Mesh,
) -> Inputs:
    """Reads and checks everything that training reads, each source once.

    Args:
      records: to train on, but for the last `config.held_out`.
      held_out: to evaluate on instead; may be empty.
      directory: the run's; keeps the texts that `config.normalization.policy` samples.

    Raises:
      RunError: more records held out than there are, or other records for them too; see
        `as_rankings` and `reference_texts`.
      DataError: a source that cannot be read, or a record that cannot be used.
    """
    if config.held_out and held_out:
        other = "config.data.eval_source" if config.data.eval_source else "the argument held_out"
        raise RunError(
            f"config.held_out = {config.held_out} and {other} both say what to evaluate on: set "
            "one of them."
        )
    parsed, examples = _read(records, tokenizer, config)
    examples, last = _without_the_last(examples, config)
    loss, source = config.ranking_loss, f"{_in_words(records)}, the last {config.held_out}"
    if held_out:
        (parsed, last), source = _read(held_out, tokenizer, config), _in_words(held_out)
    rankings = as_rankings(examples, loss, margins=config.margin_of_strength)
    warn_of_ties(rankings)
    return Inputs(
        rankings,
        records_to_judge(parsed, last, loss),
        source,
        reward_normalization.reference_texts(config.normalization, config, directory, mesh),
        evaluators.load_held_out(config, tokenizer, kind=kind_of_records(loss)),
    )


def _without_the_last(
    examples: list[Example], config: Config
) -> tuple[list[Example], list[Example]]:
    """Those to train on, and the `config.held_out` others."""
    kept = len(examples) - config.held_out
    if kept <= 0:
        has = "config.data.source has" if config.data.source else "there are"
        raise RunError(f"config.held_out is {config.held_out}, and {has} {len(examples)} records.")
    return examples[:kept], examples[kept:]


def _read(
    records: Comparisons, tokenizer: Any, config: Config
) -> tuple[list[Record], list[Example]]:
    kind = kind_of_records(config.ranking_loss)
    parsed = records_of(records, config.data, kind=kind)
    return parsed, tokenised(config.data, parsed, tokenizer, kind=kind)


def _in_words(records: Comparisons) -> str:
    return str(records) if isinstance(records, str | os.PathLike) else f"{len(records)} records"


def train(
    model: Transformer,
    tokenizer: Any,
    records: Comparisons | Inputs,
    config: Config,
    *,
    held_out: Comparisons = (),
    workdir: Workdir | str | os.PathLike | None = None,
    mesh: Mesh | None = None,
    donate: bool = False,
) -> Result:
    """Fits a reward model, or an ensemble, to comparisons and sets its zero and unit.

    Args:
      model: each member starts from it.
      records: comparisons (docs/data.md, kind `preference` or `ranked` by `config.loss`), or what
        `read_inputs` made of them.
      held_out: more of them; their accuracy and calibration are `summary["eval"]`. Leave it empty
        to use the last `config.held_out` records, or where `records` are of `read_inputs`.
      workdir: keeps checkpoints, metrics, the reward model (`WORKDIR/reward_model`) and a report,
        so that the same call goes on where it was stopped. Without one nothing is left behind.
      mesh: where to train; None keeps the model's placement.
      donate: lets training use the model's memory. `model` is unusable afterwards.

    Returns:
      `model` is the `RewardModel`, as it was saved if there is a workdir. The metrics of an
      ensemble name their `member`.

    Raises:
      RunError: sizes that do not fit data, model or machine; a loss that is not finite; see
        `read_inputs`.
      DataError: a record that cannot be used.
    """
    folder = Workdir.of(workdir, config)
    directory = folder and folder.path
    mesh = mesh or pretrained.mesh_of(model)
    inputs = records
    if not isinstance(inputs, Inputs):
        inputs = read_inputs(
            inputs, tokenizer, config, held_out=held_out, directory=directory, mesh=mesh
        )
    if directory is None:
        members = [
            train_member(model, tokenizer, inputs, config, number, mesh=mesh, donate=donate)
            for number in range(config.ensemble)
        ]
        reward = RewardModel([one[:2] for one in members], tokenizer, mesh=mesh)
        metrics = [one.metrics for one in members]
    else:
        train_and_save(model, tokenizer, inputs, config, directory, mesh=mesh, donate=donate)
        del model  # before what was saved takes as much memory
        reward = RewardModel.load(directory, mesh=mesh, compute_dtype=config.compute_dtype)
        metrics = [read_metrics(folder) for folder in _member_directories(config, directory)]
    if config.ensemble > 1:
        metrics = [[row | {"member": i} for row in rows] for i, rows in enumerate(metrics)]
    summary = _evaluated(reward, inputs.held_out, inputs.held_out_source, config, directory)
    summary |= _measured(reward, inputs.measured, tokenizer, mesh, config, directory)
    return Result(reward, [row for rows in metrics for row in rows], summary, directory)


class Member(NamedTuple):
    """One trained member, its scale, and the metrics of its training."""

    model: ScalarModel
    scale: RewardScale
    metrics: list[dict[str, float]]


def train_member(
    model: Transformer,
    tokenizer: Any,
    inputs: Inputs,
    config: Config,
    number: int,
    *,
    mesh: Mesh,
    directory: Path | None = None,
    donate: bool,
) -> Member:
    """Trains member `number`; members differ by their first head, order and sample of the data.

    Args:
      directory: the member's; None keeps nothing on disk.
      donate: lets the training of the last member use the memory of `model`.
    """
    # The seeds of one ensemble's members are no other ensemble's.
    config = dataclasses.replace(config, seed=config.seed * config.ensemble + number)
    examples, description = inputs.examples, config.loss
    if config.ensemble > 1:
        examples = [examples[i] for i in sample_with_replacement(len(examples), config.seed)]
        description = f"{config.loss} {number + 1}/{config.ensemble}"
    donate = donate and number == config.ensemble - 1
    start = without_unembedding(model)
    transformer, mesh = pretrained.as_configured(
        config, start, tokenizer, mesh, donate=donate, directory=directory
    )
    trained, metrics, _ = train_offline(
        config,
        directory,
        ScalarModel(transformer, key=jax.random.key(config.seed)),
        mesh,
        examples,
        functools.partial(loss_sums, config),
        attach=attach,
        description=description,
    )
    scale = RewardScale(
        max_length=config.data.max_length,
        max_prompt_length=config.data.max_prompt_length or None,
        min_prompt_length=config.data.min_prompt_length,
    )
    if inputs.reference is not None:
        raw = RewardModel([(trained, scale)], tokenizer, mesh=mesh)
        scalars = raw.member_scores(*inputs.reference)[0]
        scale = reward_normalization.normalized_scale(
            scale, scalars, config.normalization, model=config.model
        )
    return Member(trained, scale, metrics)


def train_and_save(
    model: Transformer,
    tokenizer: Any,
    inputs: Inputs,
    config: Config,
    directory: Path,
    *,
    mesh: Mesh,
    donate: bool,
) -> None:
    """Trains every member and saves all as one, unless that is done.

    A run killed while saving leaves a hidden directory, which the next attempt removes: there is a
    whole reward model in `directory` or none.
    """
    folder = directory / DIRECTORY
    if hosts.on_first_host(folder.exists):
        return
    partial = directory / f".{DIRECTORY}"
    hosts.on_first_host(lambda: shutil.rmtree(partial, ignore_errors=True))
    for number, own in enumerate(_member_directories(config, directory)):
        own.mkdir(parents=True, exist_ok=True)
        member = train_member(
            model, tokenizer, inputs, config, number, mesh=mesh, directory=own, donate=donate
        )
        target = partial / str(number) if config.ensemble > 1 else partial
        save_reward_model(member.model, tokenizer, target, scale=member.scale)
        del member

    def put_in_place() -> None:
        if config.ensemble > 1:
            members = [str(number) for number in range(config.ensemble)]
            write_json(partial / "reward.json", {"members": members})
        os.replace(partial, folder)

    hosts.on_first_host(put_in_place)


def _member_directories(config: Config, directory: Path) -> list[Path]:
    """Where each member keeps its checkpoints and metrics: a single one in the run's directory."""
    if config.ensemble == 1:
        return [directory]
    return [directory / "members" / str(number) for number in range(config.ensemble)]


def sources(config: Config) -> list[Source]:
    """Where records come from."""
    data, kind = config.data, kind_of_records(config.ranking_loss)
    comparisons = [(data.source, kind, data), (data.eval_source, kind, data)]
    return [
        *comparisons,
        *reward_normalization.sources(config.normalization, data),
        *evaluators.sources_of(config, kind=kind),
    ]


def run(config: Config, workdir: Workdir) -> dict[str, Any]:
    """`train` with the model and the data that the config names; returns the summary."""
    tokenizer = pretrained.load_pretrained_tokenizer(config.model)
    mesh = pretrained.open_mesh(config)
    inputs = read_inputs(
        config.data.source,
        tokenizer,
        config,
        held_out=config.data.eval_source,
        directory=workdir.path,
        mesh=mesh,
    )
    # The model has no other name, so that `train` can give its memory back.
    result = train(
        without_unembedding(pretrained.load_pretrained(config, config.model, mesh)),
        tokenizer,
        inputs,
        config,
        workdir=workdir,
        mesh=mesh,
        donate=True,
    )
    return result.summary


def evaluate(config: Config, workdir: Workdir) -> dict[str, Any]:
    """Accuracy and calibration of a finished run's model on `data.eval_source` or `held_out`."""
    tokenizer = pretrained.load_pretrained_tokenizer(config.model)
    source = config.data.eval_source
    if source:  # the data it was trained on may be gone
        records, examples = _read(source, tokenizer, config)
    else:
        records, examples = _read(config.data.source, tokenizer, config)
        _, examples = _without_the_last(examples, config)
        source = f"{config.data.source}, the last {config.held_out}"
    held_out = records_to_judge(records, examples, config.ranking_loss)
    mesh = pretrained.open_mesh(config)
    reward = RewardModel.load(workdir.path, mesh=mesh, compute_dtype=config.compute_dtype)
    return _evaluated(reward, held_out, source, config, workdir.path)


def _evaluated(
    reward: RewardModel,
    records: Sequence[Record],
    source: str,
    config: Config,
    directory: Path | None,
) -> dict[str, Any]:
    """Accuracy and calibration on records from `source`, and a report of them in the directory."""
    if not records:
        return {}
    scores = _member_log_odds(reward, records)
    pairs = pairs_of(records, reward.mean_log_odds(scores))
    summary = calibrate(**pairs)
    if len(scores) > 1:
        of_members = [pairs_of(records, own) for own in scores]
        differences = [np.subtract(own["chosen"], own["rejected"]) for own in of_members]
        summary["ensemble"] = {
            "accuracy": [accuracy(own["chosen"], own["rejected"]) for own in of_members],
            # Differences, since the zero of each member's log-odds is arbitrary.
            "disagreement": float(np.std(differences, axis=0).mean()),
        }
    if directory is not None:
        print(format_calibration(summary))
        page = write_calibration_report(
            directory / "report",
            title=f"Reward model ({config.loss}) on {config.model}",
            summary=summary | {"data": source, "config": config.to_dict()},
            curves=read_metrics(directory) if len(scores) == 1 else (),
            chosen=np.array(pairs["chosen"]),
            rejected=np.array(pairs["rejected"]),
        )
        print(f"Report: {page}")
    # The rows of the report's curves are in its summary.json.
    return {"eval": {name: value for name, value in summary.items() if name not in _DETAILS}}


def _measured(
    reward: RewardModel,
    held_out: list[Any],
    tokenizer: Any,
    mesh: Mesh,
    config: Config,
    directory: Path | None,
) -> dict[str, Any]:
    """What evaluators measure of a reward model; of an ensemble the mean over its members."""

    def held_out_loss(examples: list[Example]) -> dict[str, float]:
        loss = config.ranking_loss
        examples = as_rankings(examples, loss, margins=config.margin_of_strength)
        function = functools.partial(loss_sums, config)
        rows = [
            evaluate_loss(config, model, mesh, examples, function, attach=attach)
            for model, _ in reward.members
        ]
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}

    def pair_rewards(examples: list[Example]) -> tuple[np.ndarray, np.ndarray]:
        score = jax.jit(response_scores, out_shardings=replicated(mesh))
        log_odds = [
            score_responses(
                functools.partial(score, model), mesh, examples, config.data, description="scoring"
            )
            for model, _ in reward.members
        ]
        chosen, rejected = reward.mean_log_odds(np.array(log_odds)).T
        return chosen, rejected

    context = evaluators.Context(
        held_out,
        reward,
        tokenizer,
        mesh,
        loss=held_out_loss,
        pair_rewards=pair_rewards,
        seed=config.seed,
        directory=directory,
    )
    return evaluators.run_evaluators(config, context, report="report/evaluators")


def _member_log_odds(reward: RewardModel, records: Sequence[Record]) -> np.ndarray:
    """`RewardModel.member_log_odds` of all responses of the records, `[members, N]`."""
    parts = []
    with progress(description="scoring", total=len(records), unit="record") as bar:
        for start in range(0, len(records), SCORED_TOGETHER):
            part = records[start : start + SCORED_TOGETHER]
            parts.append(reward.member_log_odds(*texts_of(part)))
            bar.update(len(part))
    return np.concatenate(parts, axis=1)
