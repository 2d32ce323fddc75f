"""Direct preference optimisation: a stand-in until the branch `pref` is merged (take theirs)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from align_jax.algorithms import Source
from align_jax.data import batching
from align_jax.data.dataset import examples_of
from align_jax.data.tokenise import Example
from align_jax.errors import RunError
from align_jax.losses.preference import LOSSES
from align_jax.models.lora import without_adapters
from align_jax.models.transformer import Transformer
from align_jax.settings import Settings
from align_jax.training import pretrained
from align_jax.training.offline import OfflineConfig, train_offline
from align_jax.training.reference import reference_log_probs as compute_reference
from align_jax.training.scoring import log_probs_from_states, predicting_states, sum_by_response
from align_jax.training.step import Batch, LossSums
from align_jax.training.workdir import Result, Workdir

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LossOptions(Settings, key="config.loss_options"):
    label_smoothing: float | None = None
    margin: float | None = None
    alpha: float | None = None
    tau: float | None = None
    gamma: float | None = None
    win_probability: float | None = None
    desirable_weight: float | None = None
    undesirable_weight: float | None = None
    sft_weight: float | None = None
    divergence: str | None = None


@dataclasses.dataclass(frozen=True)
class Config(OfflineConfig):
    algorithm: str = "preference"
    loss: str = "dpo"
    loss_options: LossOptions = LossOptions()
    beta: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        self.one_of(sorted(LOSSES), "loss")


def make_loss(config):
    def loss_sums(model: Transformer, batch: Batch) -> LossSums:
        reference = batch["reference_log_probs"]
        states = predicting_states(model, batch)
        token_log_probs, _ = log_probs_from_states(model, states, batch)

        def sums(values: Array) -> Array:
            return sum_by_response(values, batch, reference.shape[0])

        log_probs = sums(token_log_probs)
        values = _both(log_probs) | _both(reference, "ref_{}")
        pair_losses = LOSSES["dpo"](values, beta=config.beta)
        metrics = _metrics(values, LOSSES["dpo"].reads, config.beta)
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


def attach_reference(examples: Sequence[Example], log_probs: np.ndarray) -> batching.Attach:
    by_id = {example.id: row for example, row in zip(examples, log_probs, strict=True)}
    return lambda example: {"reference_log_probs": by_id[example.id]}


def train(
    model: Transformer,
    tokenizer: Any,
    records: Any,
    config: Config,
    *,
    held_out: Any = (),
    workdir: Workdir | str | None = None,
    mesh: Any = None,
    donate: bool = False,
    reference_log_probs: np.ndarray | None = None,
) -> Result:
    examples = examples_of(records, tokenizer, config.data, kind="preference")
    folder = Workdir.of(workdir, config)
    model, mesh = pretrained.as_configured(config, model, mesh, donate=donate)
    if reference_log_probs is None:
        reference_log_probs = compute_reference(
            without_adapters(model), mesh, examples, config.data
        )
    model, metrics = train_offline(
        config,
        folder and folder.path,
        model,
        mesh,
        examples,
        make_loss(config),
        attach=attach_reference(examples, reference_log_probs),
        description=config.loss.upper(),
    )
    return Result(model, metrics, {}, folder and folder.path)


def sources(config: Config) -> list[Source]:
    data = config.data
    return [(data.source, "preference", data), (data.eval_source, "preference", data)]


def run(config: Config, workdir: Workdir) -> dict[str, Any]:
    tokenizer = pretrained.load_pretrained_tokenizer(config.model)
    examples = examples_of(config.data.source, tokenizer, config.data, kind="preference")
    mesh = pretrained.open_mesh(config)
    model = pretrained.load_pretrained(config, config.model, mesh)
    settings = {"workdir": workdir, "mesh": mesh, "donate": True}
    return train(model, tokenizer, examples, config, **settings).summary


def evaluate(config: Config, workdir: Workdir) -> dict[str, Any]:
    raise RunError("the branch `pref` has this.")
