"""Direct preference optimisation and its relatives: a policy from pairs, without a reward model.

DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7): with the implicit reward
`r(x, y) = beta (log pi(y|x) - log pi_ref(y|x))`, the loss of a pair is `-log sigmoid(r_chosen -
r_rejected)`: ln 2 before the first update. The reference's log-probabilities never change, so they
are computed once (`training/reference.py`) and travel with the batch.

A falling `rewards/chosen` is no bug: the loss only asks for a margin, and both log-probabilities
often fall (Razin et al. 2024, arXiv:2410.08847). Watch it beside `rewards/margins`.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from align_jax.data.chat import Example
from align_jax.losses import preference as losses
from align_jax.models.interchange import load_tokenizer
from align_jax.models.transformer import Transformer
from align_jax.training import offline
from align_jax.training.errors import RunError
from align_jax.training.reference import reference_log_probs
from align_jax.training.scoring import sum_by_response, target_log_probs
from align_jax.training.step import Batch, LossFunction, LossSums
from align_jax.training.workdir import Workdir

KIND = "preference"

# Losses of four log-probabilities and beta.
LOSSES = {
    "dpo": losses.dpo_loss,
    "ipo": losses.ipo_loss,
    "robust_dpo": losses.robust_dpo_loss,
    "exo": losses.exo_loss,
    "nca": losses.nca_loss,
    "sppo": losses.sppo_loss,
    "apo_zero": losses.apo_zero_loss,
    "apo_down": losses.apo_down_loss,
    "discopop": losses.discopop_loss,
    "rso_hinge": losses.rso_hinge_loss,
}


def make_loss(config: ConfigDict) -> LossFunction:
    """The loss of a batch of pairs under `config.loss` and `config.beta`, summed over pairs.

    A batch may hold `weight` `[pairs]`: how often a pair counts, in the loss and in the metrics. A
    soft label p is a pair and its reverse with weights p and 1 - p.
    """
    if config.loss not in LOSSES:
        raise RunError(f"config.loss is {config.loss!r}; expected one of {sorted(LOSSES)}.")
    pair_loss, beta = LOSSES[config.loss], config.beta

    def loss_sums(model: Transformer, batch: Batch) -> LossSums:
        reference = batch["reference_log_probs"]
        token_log_probs, _ = target_log_probs(model, batch)
        log_probs = sum_by_response(token_log_probs, batch, reference.shape[0])
        chosen, rejected = log_probs[0::2], log_probs[1::2]
        ref_chosen, ref_rejected = reference[0::2], reference[1::2]
        values = pair_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
        chosen_reward = beta * (chosen - ref_chosen)
        rejected_reward = beta * (rejected - ref_rejected)
        metrics = {
            "rewards/chosen": chosen_reward,
            "rewards/rejected": rejected_reward,
            "rewards/margins": chosen_reward - rejected_reward,
            "rewards/accuracies": (chosen_reward > rejected_reward).astype(jnp.float32),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        weight = batch.get("weight", jnp.ones_like(values))
        sums = {name: (weight * value).sum() for name, value in metrics.items()}
        return LossSums((weight * values).sum(), weight.sum(), sums)

    return loss_sums


def attach_reference(examples: Sequence[Example], log_probs: np.ndarray) -> offline.Attach:
    """Gives every example's batch the reference's log-probabilities `[examples, 2]` of its pair."""
    by_id = {example.id: row for example, row in zip(examples, log_probs, strict=True)}
    return lambda example: {"reference_log_probs": by_id[example.id]}


def train(
    config: ConfigDict,
    workdir: Workdir,
    model: Transformer,
    mesh: Mesh,
    examples: Sequence[Example],
    reference: np.ndarray,
) -> Transformer:
    """Trains `model` (consumed) on pairs with the reference's log-probabilities `[examples, 2]`."""
    return offline.train(
        config,
        workdir.path,
        model,
        mesh,
        examples,
        make_loss(config),
        attach=attach_reference(examples, reference),
        description=config.loss.upper(),
    )


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    """Trains as configured, the model it starts from being the reference; returns the summary."""
    make_loss(config)
    tokenizer = load_tokenizer(config.model)
    examples = offline.load_examples(config.data, config.data.source, tokenizer, kind=KIND)
    held_out = _held_out(config, tokenizer)
    model, mesh = offline.open_model(config)
    offline.check(config, workdir.path, model, len(examples))
    reference = reference_log_probs(model, mesh, examples, config.data)
    held_out_reference = held_out and reference_log_probs(model, mesh, held_out, config.data)
    model = train(config, workdir, model, mesh, examples, reference)
    return _evaluated(config, model, mesh, held_out, held_out_reference)


def evaluate(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    """Loss, accuracy and margin of the trained implicit reward on `config.data.eval_source`."""
    held_out = _held_out(config, load_tokenizer(config.model))
    base, mesh = offline.open_model(config)
    model = offline.restored_model(config, workdir.path, mesh)
    reference = held_out and reference_log_probs(base, mesh, held_out, config.data)
    return _evaluated(config, model, mesh, held_out, reference)


def _held_out(config, tokenizer) -> list[Example]:
    source = config.data.eval_source
    return offline.load_examples(config.data, source, tokenizer, kind=KIND) if source else []


def _evaluated(config, model, mesh, examples, reference) -> dict[str, Any]:
    if not examples:
        return {}
    attach = attach_reference(examples, reference)
    metrics = offline.evaluate(config, model, mesh, examples, make_loss(config), attach=attach)
    return {"eval": metrics}
