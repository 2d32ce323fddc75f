"""Supervised fine-tuning: maximise the likelihood of demonstrations.

Loss of a batch: the mean over all response tokens of `-log pi(y_t | x, y_<t)`. Prompt tokens carry
none (Ouyang et al. 2022, arXiv:2203.02155, section 3.5); the EOS that ends a response does.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax.numpy as jnp
from jax.sharding import Mesh

from align_jax.algorithms import Source, read_sources
from align_jax.data.batching import check_lengths
from align_jax.data.dataset import Records, examples_of
from align_jax.errors import RunError
from align_jax.evaluation import evaluators
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

    offered_evaluators: ClassVar[tuple[str, ...]] = ("loss", "samples", "win_rate", "kl")

    algorithm: str = "sft"

    def __post_init__(self):
        super().__post_init__()
        evaluators.check_evaluators(self)


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
      donate: lets training use the model's memory. `model` is unusable afterwards, also to
        `config.evaluators` that compare with it.

    Raises:
      RunError: sizes that do not fit data, model or machine; a loss that is not finite.
      DataError: a record that cannot be used.
    """
    examples = examples_of(records, tokenizer, config.data, kind=KIND)
    held_out = examples_of(held_out, tokenizer, config.data, kind=KIND)
    check_lengths(config.data, held_out, range(len(held_out)))
    measured = evaluators.load_held_out(config, tokenizer, kind=KIND)
    if donate and evaluators.needs_base(config):
        raise RunError("config.evaluators compare with the base model: donate=False keeps it.")
    base = None if donate else pretrained.as_base(config, model)
    folder = Workdir.of(workdir, config)
    directory = folder and folder.path
    model, mesh = pretrained.as_configured(
        config, model, tokenizer, mesh, donate=donate, directory=directory
    )
    model, metrics, _ = train_offline(
        config, directory, model, mesh, examples, loss_sums, description="SFT"
    )
    summary = _evaluated(config, model, mesh, held_out)
    context = _context(config, measured, model, tokenizer, mesh, base, directory)
    summary |= evaluators.run_evaluators(config, context)
    return Result(model, metrics, summary, directory)


def sources(config: Config) -> list[Source]:
    """Where records come from."""
    data = config.data
    return [
        (data.source, KIND, data),
        (data.eval_source, KIND, data),
        *evaluators.sources_of(config, kind=KIND),
    ]


def run(config: Config, workdir: Workdir) -> dict[str, Any]:
    """`train` with the model and the data that the config names; returns the summary."""
    tokenizer = pretrained.load_pretrained_tokenizer(config.model)
    examples = examples_of(config.data.source, tokenizer, config.data, kind=KIND)
    held_out = examples_of(config.data.eval_source, tokenizer, config.data, kind=KIND)
    read_sources(evaluators.sources_of(config, kind=KIND))
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
        donate=not evaluators.needs_base(config),
    )
    return result.summary


def evaluate(config: Config, workdir: Workdir) -> dict[str, Any]:
    """The trained model's loss on `config.data.eval_source`, nats a token, and its evaluators."""
    tokenizer = pretrained.load_pretrained_tokenizer(config.model)
    held_out = examples_of(config.data.eval_source, tokenizer, config.data, kind=KIND)
    check_lengths(config.data, held_out, range(len(held_out)))
    measured = evaluators.load_held_out(config, tokenizer, kind=KIND)
    mesh = pretrained.open_mesh(config)
    model = pretrained.restored_model(config, workdir.path, mesh)
    base = None
    if evaluators.needs_base(config):
        base = pretrained.load_pretrained(config, config.model, mesh)
    context = _context(config, measured, model, tokenizer, mesh, base, workdir.path)
    summary = _evaluated(config, model, mesh, held_out)
    return summary | evaluators.run_evaluators(config, context)


def _evaluated(config: Config, model: Transformer, mesh: Mesh, examples: list) -> dict[str, Any]:
    if not examples:
        return {}
    return {"eval": _loss(config, model, mesh, examples)}


def _loss(config: Config, model: Transformer, mesh: Mesh, examples: list) -> dict[str, float]:
    metrics = evaluate_loss(config, model, mesh, examples, loss_sums)
    return metrics | {"perplexity": float(jnp.exp(metrics["loss"]))}


def _context(config, measured, model, tokenizer, mesh, base, directory) -> evaluators.Context:
    return evaluators.Context(
        measured,
        model,
        tokenizer,
        mesh,
        base=base,
        loss=functools.partial(_loss, config, model, mesh),
        seed=config.seed,
        directory=directory,
    )
