"""Direct preference optimisation and its relatives: a policy from pairs, without a reward model.

DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7): with the implicit reward
`r(x, y) = beta (log pi(y|x) - log pi_ref(y|x))`, the loss of a pair is `-log sigmoid(r_chosen -
r_rejected)`: ln 2 before the first update. The reference's log-probabilities never change, so they
are computed once (`training/reference.py`) and travel with the batch.

A falling `rewards/chosen` is no bug: the loss only asks for a margin, and both log-probabilities
often fall (Razin et al. 2024, arXiv:2410.08847). Watch it beside `rewards/margins`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from align_jax.algorithms import Source
from align_jax.algorithms.pair_losses import LOSSES, make_pair_loss, needs_reference, reads
from align_jax.data import batching, dataset
from align_jax.data.tokenise import Example
from align_jax.errors import DataError
from align_jax.losses.preference import wpo_weights
from align_jax.models.lora import without_adapters
from align_jax.models.transformer import Transformer
from align_jax.training import offline, pretrained
from align_jax.training.reference import reference_log_probs
from align_jax.training.scoring import log_probs_from_states, predicting_states, sum_by_response
from align_jax.training.step import Batch, LossFunction, LossSums
from align_jax.training.workdir import Workdir

__all__ = ["LOSSES", "attach_reference", "evaluate", "load_pairs", "make_loss", "run", "train"]

Array = jax.Array


def make_loss(config: ConfigDict) -> LossFunction:
    """The loss of a batch of pairs under `config.loss`, `.beta` and `.loss_options`, summed.

    A batch may hold `weight` `[pairs]`: how often a pair counts, in the loss and in the metrics. A
    soft label p is a pair and its reverse with weights p and 1 - p. Rewards are `beta` x what the
    loss compares: log-ratios, or without a reference log-probabilities, per token where it averages
    them.

    Raises:
      RunError: see `pair_losses.make_pair_loss`.
    """
    pair_loss, names, beta = make_pair_loss(config), reads(config.loss), config.beta

    def loss_sums(model: Transformer, batch: Batch) -> LossSums:
        reference = batch["reference_log_probs"]
        states = predicting_states(model, batch)
        token_log_probs, _ = log_probs_from_states(model, states, batch)

        def sums(values: Array) -> Array:
            return sum_by_response(values, batch, reference.shape[0])

        log_probs, lengths = sums(token_log_probs), sums(jnp.ones_like(token_log_probs))
        averages = log_probs / jnp.maximum(lengths, 1)
        values = _both(log_probs) | _both(reference, "ref_{}")
        values |= _both(averages, "{}_average") | _both(lengths, "{}_length")
        if "chosen_weight" in names:
            # At temperature 1/2 a log-probability is 2 log pi(y_t) - log sum_v pi(v)^2.
            frozen, frozen_states = jax.lax.stop_gradient((model, states))
            sharp, _ = log_probs_from_states(frozen, frozen_states, batch, temperature=0.5)
            sharp = sums(sharp) / jnp.maximum(lengths, 1)
            means = jnp.stack([averages, 2 * averages - sharp])[..., None]
            values |= _both(wpo_weights(*means, jnp.ones_like(means[0])), "{}_weight")
        if "kl" in names:
            # The second response of an example is another example's.
            kl = jnp.mean(values["rejected"] - values["ref_rejected"])
            values |= {"kl": kl, "desirable": batch["desirable"]}
        pair_losses = pair_loss(values)
        metrics = _single_metrics(values, beta) if "kl" in names else _metrics(values, names, beta)
        weight = batch.get("weight", jnp.ones_like(pair_losses))
        totals = {name: (weight * value).sum() for name, value in metrics.items()}
        return LossSums((weight * pair_losses).sum(), weight.sum(), totals)

    return loss_sums


def _both(values: Array, name: str = "{}") -> dict[str, Array]:
    return {name.format("chosen"): values[0::2], name.format("rejected"): values[1::2]}


def _metrics(values: dict[str, Array], names: tuple[str, ...], beta: float) -> dict[str, Array]:
    chosen, rejected = (beta * values[name] for name in names[:2])
    if "ref_chosen" in names:
        chosen -= beta * values["ref_chosen"]
        rejected -= beta * values["ref_rejected"]
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
        "logps/chosen": values["chosen"],
        "logps/rejected": values["rejected"],
    }


def _single_metrics(values: dict[str, Array], beta: float) -> dict[str, Array]:
    """Of KTO: a margin is a reward's, with its sign turned for an undesirable response."""
    reward = beta * (values["chosen"] - values["ref_chosen"])
    margin = jnp.where(values["desirable"] > 0, reward, -reward)
    return {
        "rewards/margins": margin,
        "rewards/accuracies": (margin > 0).astype(jnp.float32),
        "objective/kl": jnp.full_like(reward, values["kl"]),
    }


def check(config: ConfigDict) -> None:
    """Raises `RunError` for a config that no data and no model could make right."""
    make_loss(config)
    offline.check_sizes(config)


def sources(config: ConfigDict) -> list[Source]:
    """Where records come from."""
    data, kind = config.data, _kind(config)
    return [(data.source, kind, data), (data.eval_source, kind, data)]


def _kind(config: ConfigDict) -> str:
    return "labelled" if config.loss == "kto" else "preference"


def load_pairs(config: ConfigDict, source: str, tokenizer: Any) -> list[Example]:
    """The examples of a source, each of two responses, as `config.loss` wants them."""
    examples = dataset.load_examples(config.data, source, tokenizer, kind=_kind(config))
    if config.loss == "kto":
        return with_mismatched(examples, config.data.max_length)
    if config.loss == "ld_dpo":
        return desensitized(examples, config.loss_options.alpha)
    return examples


def with_mismatched(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Adds to each example of one response that of the next: KTO's sample for its KL.

    (x, y') of unrelated x and y' stands in for a sample of the policy (Ethayarajh et al. 2024,
    section 4.1). It is cut to `max_length` with its prompt. `DataError` for less than two examples.
    """
    if len(examples) < 2:
        raise DataError("config.loss = 'kto' needs at least two records.")
    others = [*examples[1:], examples[0]]

    def cut(example: Example, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        return arrays[0][: max(max_length - len(example.prompt), 1)]

    return [
        dataclasses.replace(
            one,
            responses=(*one.responses, cut(one, other.responses)),
            response_masks=(*one.response_masks, cut(one, other.response_masks)),
        )
        for one, other in zip(examples, others)
    ]


def desensitized(examples: Sequence[Example], alpha: float) -> list[Example]:
    """Pairs whose tokens past the shorter response's length weigh `alpha` (LD-DPO, 2409.06411)."""

    def weighted(mask: np.ndarray, length: float) -> np.ndarray:
        return np.where(np.cumsum(mask) <= length, mask, np.float32(alpha) * mask)

    return [
        dataclasses.replace(
            one,
            response_masks=tuple(
                weighted(mask, min(m.sum() for m in one.response_masks))
                for mask in one.response_masks
            ),
        )
        for one in examples
    ]


def attach_reference(examples: Sequence[Example], log_probs: np.ndarray) -> batching.Attach:
    """Gives every example's batch the reference's log-probabilities `[examples, 2]` of its pair.

    And, where its record has one, its label.
    """
    by_id = {example.id: row for example, row in zip(examples, log_probs, strict=True)}

    def attach(example: Example) -> dict[str, np.ndarray]:
        values = {"reference_log_probs": by_id[example.id]}
        if "label" in example.extras:
            values["desirable"] = np.array([example.extras["label"]], np.float32)
        return values

    return attach


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
    check(config)
    tokenizer = pretrained.load_pretrained_tokenizer(config.model)
    examples = load_pairs(config, config.data.source, tokenizer)
    held_out = _held_out(config, tokenizer)
    model, mesh = pretrained.open_model(config)
    num_steps = offline.check(config, workdir.path, model, len(examples))
    offline.check_training_lengths(config, examples, num_steps)
    reference = _reference(config, model, mesh, examples)
    held_out_reference = _reference(config, model, mesh, held_out)
    model = train(config, workdir, model, mesh, examples, reference)
    return _evaluated(config, model, mesh, held_out, held_out_reference)


def evaluate(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    """Loss, accuracy and margin of the trained implicit reward on `config.data.eval_source`."""
    held_out = _held_out(config, pretrained.load_pretrained_tokenizer(config.model))
    base, mesh = pretrained.open_model(config)
    model = pretrained.restored_model(config, workdir.path, mesh)
    reference = _reference(config, base, mesh, held_out)
    return _evaluated(config, model, mesh, held_out, reference)


def _held_out(config, tokenizer) -> list[Example]:
    if not config.data.eval_source:
        return []
    examples = load_pairs(config, config.data.eval_source, tokenizer)
    batching.check_lengths(config.data, examples, range(len(examples)))
    if needs_reference(config.loss):
        batching.check_lengths(config.data, examples, batching.by_length(examples))
    return examples


def _reference(config, model, mesh, examples) -> np.ndarray:
    if not (examples and needs_reference(config.loss)):
        return np.zeros((len(examples), 2), np.float32)
    return reference_log_probs(without_adapters(model), mesh, examples, config.data)


def _evaluated(config, model, mesh, examples, reference) -> dict[str, Any]:
    if not examples:
        return {}
    attach = attach_reference(examples, reference)
    metrics = offline.evaluate(config, model, mesh, examples, make_loss(config), attach=attach)
    return {"eval": metrics}
