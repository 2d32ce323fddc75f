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

import os
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from align_jax.algorithms import Source, reward_normalization
from align_jax.algorithms.comparisons import (
    attach,
    comparisons_kind,
    load_comparisons,
    load_held_out,
    pairs_of,
    texts_of,
)
from align_jax.data.loader import sample_with_replacement
from align_jax.data.records import Record
from align_jax.data.tokenise import Example
from align_jax.errors import RunError
from align_jax.evaluation.calibration import accuracy, calibrate
from align_jax.evaluation.calibration_report import format_calibration, write_calibration_report
from align_jax.files import write_json
from align_jax.losses import ranking
from align_jax.models.heads import ScalarModel, response_scores, without_unembedding
from align_jax.progress import progress
from align_jax.rewards.model import DIRECTORY, RewardModel, RewardScale, save_reward_model
from align_jax.training import offline, pretrained
from align_jax.training.metrics import read_metrics
from align_jax.training.step import Batch, LossFunction, LossSums
from align_jax.training.workdir import Workdir

LOSSES = ("pairwise", "best_of_k", "all_pairs", "plackett_luce")

_DETAILS = ("reliability", "by_difference", "by_strength", "rewards")

SCORED_TOGETHER = 256  # held-out records, between two marks of the progress bar

# Stands for minus infinity where a record has fewer responses than another: exp of it is 0, and
# differences of it are 0 and not nan.
_LOWEST = -1e30


def default_reward_model_config() -> ConfigDict:
    """The fields of a reward model's config beside `data` and `optimizer`."""
    config = offline.default_offline_config()
    config.update(
        {
            "algorithm": "reward_model",
            "loss": "pairwise",
            # A name of comparisons.MARGINS, or "": the records' own `margin`. In a config file also
            # {strength: margin}, assigned within `with config.ignore_type():`.
            "margins": "",
            "label_smoothing": 0.0,
            "center_coefficient": 0.0,
            "ensemble": 1,  # members, each with its own head, order and sample of the data
            "held_out": 0,  # this many of the last records of data.source are for evaluation only
            "normalization": {
                "kind": "none",  # | "mean_std" (Ziegler: 0 and 1) | "mean" (Stiennon: 0)
                "source": "",  # of reference texts, or of prompts that `policy` continues
                "policy": "",  # "": the source has completions
                "limit": 256,
                "max_new_tokens": 64,
            },
        }
    )
    return config


def make_loss(config: ConfigDict) -> LossFunction:
    """The loss of a batch of records under `config.loss`, summed over records.

    The batch holds `margin` `[B]` and, in the order of the responses, `ranks` `[B K]` float32: nan
    where a record has fewer than K responses. Metrics are means over the pairs of a record that
    its ranks order (for best_of_k: the best and each other one).

    Raises:
      RunError: an unknown loss, or options that are another loss's.
    """
    if config.loss not in LOSSES:
        raise RunError(f"config.loss is {config.loss!r}; expected one of {', '.join(LOSSES)}.")
    if not 0 <= config.label_smoothing < 0.5:
        raise RunError(
            f"config.label_smoothing is {config.label_smoothing}; expected from 0 to below 0.5."
        )
    if config.center_coefficient < 0:
        raise RunError(
            f"config.center_coefficient is {config.center_coefficient}; expected 0 or more."
        )
    if config.loss != "pairwise":
        for name in ("margins", "label_smoothing", "center_coefficient"):
            if config[name]:
                raise RunError(f"config.{name} is for config.loss = 'pairwise' only.")

    def loss_sums(model: ScalarModel, batch: Batch) -> LossSums:
        count = batch["margin"].shape[0]
        scores = response_scores(model, batch).reshape(count, -1)
        ranks = batch["ranks"].reshape(count, -1)
        better = ranks[:, :, None] < ranks[:, None, :]  # false wherever a rank is nan
        pairs = better.sum((1, 2))
        values = _losses(config, scores, ranks, batch["margin"])
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
        return LossSums((weight * values).sum(), weight.sum(), sums)

    return loss_sums


def _losses(config: ConfigDict, scores, ranks, margin):
    """`[B]` nats from scores and ranks `[B,K]`."""
    if config.loss == "pairwise":
        return ranking.bradley_terry_loss(
            scores[:, 0],
            scores[:, 1],
            margin=margin,
            label_smoothing=config.label_smoothing,
            center_coefficient=config.center_coefficient,
        )
    if config.loss == "all_pairs":
        return ranking.all_pairs_loss(scores, ranks)
    # A response that is not there comes last and has no weight among those that are.
    present = ~jnp.isnan(ranks)
    scores = jnp.where(present, scores, _LOWEST)
    ranks = jnp.where(present, ranks, jnp.inf)
    if config.loss == "plackett_luce":
        return ranking.plackett_luce_loss(scores, ranks)
    return ranking.best_of_k_loss(scores, jnp.argmin(ranks, axis=1))


def check(config: ConfigDict) -> None:
    """Raises `RunError` for a config that no data and no model could make right."""
    make_loss(config)
    reward_normalization.check(config)
    if config.ensemble < 1:
        raise RunError(f"config.ensemble is {config.ensemble}; expected at least 1.")
    offline.check_sizes(config)


def sources(config: ConfigDict) -> list[Source]:
    """Where records come from."""
    data, kind = config.data, comparisons_kind(config)
    comparisons = [(data.source, kind, data), (data.eval_source, kind, data)]
    return [*comparisons, *reward_normalization.sources(config)]


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    """Trains every member, sets its zero and unit, saves all as one; returns the summary."""
    check(config)
    tokenizer = pretrained.load_pretrained_tokenizer(config.model)
    examples, held_out = load_comparisons(config, tokenizer)
    mesh = pretrained.open_mesh(config)
    reference = None
    if config.normalization.kind != "none":
        reference = reward_normalization.reference_texts(config, workdir, mesh)
    folder = workdir.path / DIRECTORY
    if not folder.exists():
        # What a run killed while saving left behind is incomplete.
        partial = workdir.path / f".{DIRECTORY}"
        shutil.rmtree(partial, ignore_errors=True)
        for member in range(config.ensemble):
            model = train_member(config, workdir, member, examples)
            data = config.data
            scale = RewardScale(
                max_length=data.max_length,
                max_prompt_length=data.max_prompt_length or None,
                min_prompt_length=data.min_prompt_length,
            )
            if reference is not None:
                raw = RewardModel([(model, scale)], tokenizer, mesh=mesh).member_scores(*reference)
                scale = reward_normalization.scale_from(config, raw[0], scale)
            target = partial / str(member) if config.ensemble > 1 else partial
            save_reward_model(model, tokenizer, target, scale=scale)
            del model
        if jax.process_index() == 0:
            if config.ensemble > 1:
                members = [str(member) for member in range(config.ensemble)]
                write_json(partial / "reward.json", {"members": members})
            os.replace(partial, folder)
        if jax.process_count() > 1:  # who has written nothing goes on to read it
            multihost_utils.sync_global_devices(f"saved {folder}")
    return _report(config, workdir, mesh, held_out) if held_out else {}


def evaluate(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    """Accuracy and calibration of a finished run's model on `data.eval_source` or `held_out`."""
    tokenizer = pretrained.load_pretrained_tokenizer(config.model)
    if config.data.eval_source:  # the data it was trained on may be gone
        held_out = load_held_out(config, config.data.eval_source, tokenizer)
    else:
        held_out = load_comparisons(config, tokenizer)[1]
    return _report(config, workdir, pretrained.open_mesh(config), held_out)


def train_member(
    config: ConfigDict, workdir: Workdir, member: int, examples: Sequence[Example]
) -> ScalarModel:
    """One trained model; members differ by their first head, their order and sample of the data."""
    settings = config.copy_and_resolve_references()
    # No seed of one ensemble is one of another's.
    settings.seed = config.seed * config.ensemble + member
    directory = workdir.path
    description = config.loss
    if config.ensemble > 1:
        directory = directory / "members" / str(member)
        directory.mkdir(parents=True, exist_ok=True)
        description = f"{config.loss} {member + 1}/{config.ensemble}"
        examples = [examples[i] for i in sample_with_replacement(len(examples), settings.seed)]
    transformer, mesh = pretrained.open_model(settings)
    transformer = without_unembedding(transformer)
    model = ScalarModel(transformer, key=jax.random.key(settings.seed))
    return offline.train(
        settings,
        directory,
        model,
        mesh,
        examples,
        make_loss(settings),
        attach=attach,
        description=description,
    )


def _report(
    config: ConfigDict, workdir: Workdir, mesh: Mesh, records: Sequence[Record]
) -> dict[str, Any]:
    """Accuracy and calibration of what was saved, scored as it will be; written to `report/`."""
    reward = RewardModel.load(workdir.path, mesh=mesh, compute_dtype=config.compute_dtype)
    with progress(description="scoring", total=len(records), unit="record") as bar:
        parts = []
        for start in range(0, len(records), SCORED_TOGETHER):
            part = records[start : start + SCORED_TOGETHER]
            parts.append(reward.member_log_odds(*texts_of(part)))
            bar.update(len(part))
    members = np.concatenate(parts, axis=1)
    pairs = pairs_of(records, reward.mean_log_odds(members))
    summary = calibrate(**pairs)
    if len(members) > 1:
        of_members = [pairs_of(records, one) for one in members]
        differences = [np.subtract(one["chosen"], one["rejected"]) for one in of_members]
        summary["ensemble"] = {
            "accuracy": [accuracy(one["chosen"], one["rejected"]) for one in of_members],
            # Of differences: the zero of each member's log-odds is its own.
            "disagreement": float(np.std(differences, axis=0).mean()),
        }
    source = config.data.eval_source or f"{config.data.source}, the last {config.held_out}"
    print(format_calibration(summary))
    page = write_calibration_report(
        workdir.path / "report",
        title=f"Reward model ({config.loss}) on {config.model}",
        summary=summary | {"data": source, "config": config.to_dict()},
        curves=read_metrics(workdir.path) if len(members) == 1 else (),
        chosen=np.array(pairs["chosen"]),
        rejected=np.array(pairs["rejected"]),
    )
    print(f"Report: {page}")
    # The rows of the report's curves are in its summary.json.
    return {"eval": {k: v for k, v in summary.items() if k not in _DETAILS}}
