"""Supervised fine-tuning: maximise the likelihood of demonstrations.

Loss of a batch: the mean over all response tokens of `-log pi(y_t | x, y_<t)`. Prompt tokens carry
none (Ouyang et al. 2022, arXiv:2203.02155, section 3.5); the EOS that ends a response does.
"""

from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from align_jax.algorithms import Source
from align_jax.data import batching, dataset
from align_jax.data.tokenise import Example
from align_jax.losses.log_probs import negative_log_likelihood
from align_jax.models.transformer import Transformer
from align_jax.training import offline, pretrained
from align_jax.training.scoring import target_log_probs
from align_jax.training.step import Batch, LossSums
from align_jax.training.workdir import Workdir

KIND = "sft"


def loss_sums(model: Transformer, batch: Batch) -> LossSums:
    """Summed negative log-likelihood of a batch's targets, in nats, and their number."""
    log_probs, entropy = target_log_probs(model, batch)
    mask = batch["target_mask"]
    nll = negative_log_likelihood(log_probs, mask)
    metrics = {"policy/entropy_avg": jnp.where(mask > 0, entropy, 0.0).sum()}
    return LossSums(nll.sum(), mask.sum(), metrics)


def check(config: ConfigDict) -> None:
    """Raises `RunError` for a config that no data and no model could make right."""
    offline.check_sizes(config)


def sources(config: ConfigDict) -> list[Source]:
    """Where records come from."""
    data = config.data
    return [(data.source, KIND, data), (data.eval_source, KIND, data)]


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    """Trains as configured; returns the summary."""
    check(config)
    tokenizer = pretrained.load_pretrained_tokenizer(config.model)
    examples = dataset.load_examples(config.data, config.data.source, tokenizer, kind=KIND)
    held_out = _held_out(config, tokenizer)
    model, mesh = pretrained.open_model(config)
    model = offline.train(config, workdir.path, model, mesh, examples, loss_sums, description="SFT")
    return _evaluated(config, model, mesh, held_out)


def evaluate(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    """The trained model's loss on `config.data.eval_source`, in nats a token."""
    held_out = _held_out(config, pretrained.load_pretrained_tokenizer(config.model))
    mesh = pretrained.open_mesh(config)
    model = pretrained.restored_model(config, workdir.path, mesh)
    return _evaluated(config, model, mesh, held_out)


def _held_out(config, tokenizer) -> list[Example]:
    if not config.data.eval_source:
        return []
    examples = dataset.load_examples(config.data, config.data.eval_source, tokenizer, kind=KIND)
    batching.check_lengths(config.data, examples, range(len(examples)))
    return examples


def _evaluated(config, model, mesh, examples) -> dict[str, Any]:
    if not examples:
        return {}
    metrics = offline.evaluate(config, model, mesh, examples, loss_sums)
    return {"eval": metrics | {"perplexity": float(jnp.exp(metrics["loss"]))}}
