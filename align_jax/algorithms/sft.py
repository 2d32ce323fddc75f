"""Supervised fine-tuning: maximise the likelihood of demonstrations.

Loss of a batch: the mean over all response tokens of `-log pi(y_t | x, y_<t)`. Prompt tokens carry
none (Ouyang et al. 2022, arXiv:2203.02155, section 3.5); the EOS that ends a response does.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from align_jax.algorithms import Source
from align_jax.data.batching import check_lengths
from align_jax.data.dataset import Records, examples_of
from align_jax.losses.log_probs import negative_log_likelihood
from align_jax.models.transformer import Transformer
from align_jax.training import pretrained
from align_jax.training.offline import OfflineConfig, evaluate_loss, train_offline
from align_jax.training.scoring import target_log_probs
from align_jax.training.step import Batch, LossSums
from align_jax.training.workdir import Result, Workdir

KIND = "sft"


@dataclasses.dataclass(frozen=True)
class Config(OfflineConfig):
    """The settings of a supervised run."""

    algorithm: str = "sft"


def loss_sums(model: Transformer, batch: Batch) -> LossSums:
    """Summed negative log-likelihood of a batch's targets, in nats, and their number."""
    log_probs, entropy = target_log_probs(model, batch)
    mask = batch["target_mask"]
    nll = negative_log_likelihood(log_probs, mask)
    metrics = {"policy/entropy_avg": jnp.where(mask > 0, entropy, 0.0).sum()}
    return LossSums(nll.sum(), mask.sum(), metrics)


def train(
    model: Transformer,
    tokenizer: Any,
    records: Records,
    config: Config,
    *,
    held_out: Records = (),
    workdir: Workdir | str | None = None,
    mesh: Mesh | None = None,
    donate: bool = False,
) -> Result:
    """Fine-tunes a model on demonstrations.

    Args:
      records: demonstrations (docs/data.md, kind `sft`): a list of dicts, a source, or examples.
      held_out: more of them; their loss in nats a token is `summary["eval"]`.
      workdir: keeps checkpoints and metrics, so that the same call goes on where it was stopped.
        Without one nothing is left behind.
      mesh: where to train; None keeps the model's placement.
      donate: lets training use the model's memory. `model` is unusable afterwards.

    Raises:
      RunError: sizes that do not fit data, model or machine; a loss that is not finite.
      DataError: a record that cannot be used.
    """
    examples = examples_of(records, tokenizer, config.data, kind=KIND)
    held_out = examples_of(held_out, tokenizer, config.data, kind=KIND)
    check_lengths(config.data, held_out, range(len(held_out)))
    folder = Workdir.of(workdir, config)
    model, mesh = pretrained.as_configured(config, model, mesh, donate=donate)
    directory = folder and folder.path
    model, metrics, _ = train_offline(
        config, directory, model, mesh, examples, loss_sums, description="SFT"
    )
    return Result(model, metrics, _evaluated(config, model, mesh, held_out), directory)


def sources(config: Config) -> list[Source]:
    """Where records come from."""
    data = config.data
    return [(data.source, KIND, data), (data.eval_source, KIND, data)]


def run(config: Config, workdir: Workdir) -> dict[str, Any]:
    """`train` with the model and the data that the config names; returns the summary."""
    tokenizer = pretrained.load_pretrained_tokenizer(config.model)
    examples = examples_of(config.data.source, tokenizer, config.data, kind=KIND)
    held_out = examples_of(config.data.eval_source, tokenizer, config.data, kind=KIND)
    mesh = pretrained.open_mesh(config)
    model = pretrained.load_pretrained(config, config.model, mesh)
    result = train(
        model,
        tokenizer,
        examples,
        config,
        held_out=held_out,
        workdir=workdir,
        mesh=mesh,
        donate=True,
    )
    return result.summary


def evaluate(config: Config, workdir: Workdir) -> dict[str, Any]:
    """The trained model's loss on `config.data.eval_source`, in nats a token."""
    tokenizer = pretrained.load_pretrained_tokenizer(config.model)
    held_out = examples_of(config.data.eval_source, tokenizer, config.data, kind=KIND)
    check_lengths(config.data, held_out, range(len(held_out)))
    mesh = pretrained.open_mesh(config)
    model = pretrained.restored_model(config, workdir.path, mesh)
    return _evaluated(config, model, mesh, held_out)


def _evaluated(config: Config, model: Transformer, mesh: Mesh, examples: list) -> dict[str, Any]:
    if not examples:
        return {}
    metrics = evaluate_loss(config, model, mesh, examples, loss_sums)
    return {"eval": metrics | {"perplexity": float(jnp.exp(metrics["loss"]))}}
