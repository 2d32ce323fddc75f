"""Direct preference optimisation and its relatives: a policy from preferences, no reward model.

DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7): with the implicit reward
`r(x, y) = beta (log pi(y|x) - log pi_ref(y|x))`, the loss of a pair is `-log sigmoid(r_chosen -
r_rejected)`: ln 2 before the first update. The reference's log-probabilities never change, so they
are computed once (`training/reference.py`) and travel with the batch.

`losses.preference.LOSSES` has one object for every `config.loss`. It says which values its loss
reads; `PROVIDERS` says where each of these values comes from.

A falling `rewards/chosen` is no bug: the loss only asks for a margin, and both log-probabilities
often fall (Razin et al. 2024, arXiv:2410.08847). Watch it beside `rewards/margins`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from align_jax.algorithms import Source, read_sources
from align_jax.algorithms.comparisons import warn_of_ties
from align_jax.data.batching import Attach, by_length, check_lengths
from align_jax.data.dataset import Data, Records, examples_of
from align_jax.data.loader import numbers_below
from align_jax.data.tokenise import Example
from align_jax.errors import DataError, RunError
from align_jax.evaluation import evaluators
from align_jax.losses.preference import LOSSES, PreferenceLoss, wpo_weights
from align_jax.models.lora import without_adapters
from align_jax.models.transformer import Transformer
from align_jax.settings import Settings
from align_jax.training import pretrained
from align_jax.training.offline import (
    OfflineConfig,
    evaluate_loss,
    plan_steps,
    train_offline,
)
from align_jax.training.reference import compute_log_probs, reference_log_probs
from align_jax.training.scoring import log_probs_from_states, predicting_states, sum_by_response
from align_jax.training.step import Batch, LossFunction, LossSums
from align_jax.training.workdir import Result, Workdir

Array = jax.Array

if TYPE_CHECKING:

    class LossOptions(Settings):
        """A type checker cannot know the fields, which are made of the losses below."""

        def __init__(self, **options: float | str | None): ...
        def __getattr__(self, option: str) -> Any: ...

else:
    # The fields of `config.loss_options`: every option of every loss. None leaves a loss its
    # default.
    LossOptions = dataclasses.make_dataclass(
        "LossOptions",
        sorted(
            {
                (option.name, option.value_type | None, None)
                for loss in LOSSES.values()
                for option in loss.all_options
            }
        ),
        bases=(Settings,),
        namespace={
            "key": "config.loss_options",
            "__module__": __name__,
            "__doc__": "The options of the losses; None leaves a loss its own default.",
        },
        frozen=True,
    )


@dataclasses.dataclass(frozen=True)
class Config(OfflineConfig):
    """The settings of a run on preferences."""

    offered_evaluators: ClassVar[tuple[str, ...]] = (
        "loss",
        "samples",
        "win_rate",
        "kl",
        "calibration",
    )

    algorithm: str = "preference"
    loss: str = "dpo"  # a name in `losses.preference.LOSSES`
    beta: float = 0.1  # strength of the KL penalty, or what takes its place in the loss
    loss_options: LossOptions = LossOptions()

    def __post_init__(self):
        super().__post_init__()
        if self.loss not in LOSSES:
            raise RunError(f"config.loss is {self.loss!r}; expected one of {sorted(LOSSES)}.")
        check_loss(LOSSES[self.loss], self)
        evaluators.check_evaluators(self)
        kinds = [one["kind"] for one in self.evaluators]
        if LOSSES[self.loss].labelled and "calibration" in kinds:
            raise RunError(f"config.loss = {self.loss!r} has no pairs for 'calibration'.")


def options_of(config: Config) -> dict[str, float | str]:
    """The options that a config sets."""
    return {k: value for k, value in config.loss_options.to_dict().items() if value is not None}


def check_loss(loss: PreferenceLoss, config: Config) -> None:
    """Raises `RunError` for a `config.beta` or `config.loss_options` that the loss cannot have."""

    def key(found: re.Match) -> str:
        return "config.beta" if found[1] == "beta" else f"config.loss_options.{found[1]}"

    try:
        loss.check(config.beta, options_of(config))
    except ValueError as error:
        # Infinite numbers have been refused before.
        message = re.sub(r"`(\w+)`", key, str(error)).replace("a finite number", "a number")
        raise RunError(message if message.endswith("?") else f"{message}.") from error
    for name in loss.reads:
        if name not in PROVIDERS:
            raise RunError(
                f"the loss {loss.name!r} reads {name!r}; expected some of {sorted(PROVIDERS)}."
            )


# What a loss reads.


class Scored:
    """A batch of B examples with K responses each, under the policy.

    Attributes:
      batch: its arrays.
      sums: `[B,K]` log-probability of every response, nats. Its tokens weigh what their masks say.
      lengths: `[B,K]` response tokens, weighted likewise.
      reference: `[B,K]` as `sums`, under the reference.
    """

    def __init__(self, model: Transformer, batch: Batch, *, labelled: bool):
        self.batch = batch
        reference = batch["reference_log_probs"]
        count = len(batch["desirable"]) if labelled else len(reference) // 2
        self.reference = reference.reshape(count, -1)
        self._model, self._states = model, predicting_states(model, batch)
        log_probs, _ = log_probs_from_states(model, self._states, batch)
        self.sums = self._by_response(log_probs)
        self.lengths = self._by_response(jnp.ones_like(log_probs))

    def _by_response(self, values: Array) -> Array:
        summed = sum_by_response(values, self.batch, self.reference.size)
        return summed.reshape(self.reference.shape)

    @functools.cached_property
    def averages(self) -> Array:
        """`[B,K]` log-probability per token, nats."""
        return self.sums / jnp.maximum(self.lengths, 1)

    @functools.cached_property
    def wpo_weights(self) -> Array:
        """`[B,K]` how close to on-policy a response is; one more projection to the vocabulary."""
        # At temperature 1/2 a log-probability is 2 log pi(y_t) - log sum_v pi(v)^2.
        model, states = jax.lax.stop_gradient((self._model, self._states))
        sharp, _ = log_probs_from_states(model, states, self.batch, temperature=0.5)
        sharp = self._by_response(sharp) / jnp.maximum(self.lengths, 1)
        means = jnp.stack([self.averages, 2 * self.averages - sharp])[..., None]
        return wpo_weights(means[0], means[1], jnp.ones_like(means[0]))


@dataclasses.dataclass(frozen=True)
class Provider:
    """Where a value that a loss reads comes from.

    Attributes:
      value: takes it from a scored batch, `[B]`.
      prepare: `(examples, config) -> examples`, before tokens are scored; None leaves them.
    """

    value: Callable[[Scored], Array]
    prepare: Callable[[Sequence[Example], Config], list[Example]] | None = None


def with_unrelated(examples: Sequence[Example], config: Config) -> list[Example]:
    """Adds to each example of one response that of another prompt: KTO's sample for its KL.

    (x, y') of unrelated x and y' stands in for a sample of the policy (Ethayarajh et al. 2024,
    section 4.1). y' is drawn by `config.seed` from all examples with another prompt, so that the
    order of the records says nothing; it is cut to `max_length` with its prompt.

    Raises:
      DataError: all examples have the same prompt.
    """
    others = [examples[place] for place in _places_of_another_prompt(examples, config)]

    def both(one: Example, own: tuple, theirs: tuple) -> tuple[np.ndarray, ...]:
        return *own, theirs[0][: max(config.data.max_length - len(one.prompt), 1)]

    return [
        dataclasses.replace(
            one,
            responses=both(one, one.responses, other.responses),
            response_masks=both(one, one.response_masks, other.response_masks),
            token_extras={
                name: both(one, arrays, other.token_extras[name])
                for name, arrays in one.token_extras.items()
            },
        )
        for one, other in zip(examples, others, strict=True)
    ]


def _places_of_another_prompt(examples: Sequence[Example], config: Config) -> np.ndarray:
    """For every example the place of a random one with other prompt tokens, `[N]`."""
    numbers: dict[bytes, int] = {}
    prompts = np.array([numbers.setdefault(e.prompt.tobytes(), len(numbers)) for e in examples])
    if len(numbers) < 2:
        raise DataError(
            f"config.loss = {config.loss!r} compares each response with one to another prompt, "
            f"and there is one prompt only in {len(examples)} records."
        )
    order = np.argsort(prompts, kind="stable")  # records of one prompt stand together
    counts = np.bincount(prompts)
    after = np.cumsum(counts)[prompts]  # the place in `order` after those of the same prompt
    # The seed is offset so that this draw is not that of the loader, whose key is (seed, epoch).
    drawn = numbers_below(len(examples) - counts[prompts], config.seed + 2**36)
    return order[(after + drawn) % len(examples)]


def desensitized(examples: Sequence[Example], config: Config) -> list[Example]:
    """Pairs whose tokens past the shorter response's length weigh `alpha` (LD-DPO, 2409.06411).

    The weights are in the masks, so they act on all values, of policy and reference.
    """
    alpha = np.float32(config.loss_options.alpha)

    def weighted(mask: np.ndarray, length: float) -> np.ndarray:
        return np.where(np.cumsum(mask) <= length, mask, alpha * mask)

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


# A pair is (chosen, rejected), a labelled example (response,) or (response, unrelated).
PROVIDERS = {
    "chosen": Provider(lambda scored: scored.sums[:, 0]),
    "rejected": Provider(lambda scored: scored.sums[:, 1]),
    "ref_chosen": Provider(lambda scored: scored.reference[:, 0]),
    "ref_rejected": Provider(lambda scored: scored.reference[:, 1]),
    "chosen_average": Provider(lambda scored: scored.averages[:, 0]),
    "rejected_average": Provider(lambda scored: scored.averages[:, 1]),
    "chosen_length": Provider(lambda scored: scored.lengths[:, 0]),
    "rejected_length": Provider(lambda scored: scored.lengths[:, 1]),
    "chosen_weight": Provider(lambda scored: scored.wpo_weights[:, 0]),
    "rejected_weight": Provider(lambda scored: scored.wpo_weights[:, 1]),
    "chosen_desensitized": Provider(lambda scored: scored.sums[:, 0], desensitized),
    "rejected_desensitized": Provider(lambda scored: scored.sums[:, 1], desensitized),
    "ref_chosen_desensitized": Provider(lambda scored: scored.reference[:, 0], desensitized),
    "ref_rejected_desensitized": Provider(lambda scored: scored.reference[:, 1], desensitized),
    "response": Provider(lambda scored: scored.sums[:, 0]),
    "ref_response": Provider(lambda scored: scored.reference[:, 0]),
    "desirable": Provider(lambda scored: scored.batch["desirable"]),
    "unrelated": Provider(lambda scored: scored.sums[:, 1], with_unrelated),
    "ref_unrelated": Provider(lambda scored: scored.reference[:, 1], with_unrelated),
    "kl": Provider(
        lambda scored: jnp.mean(scored.sums[:, 1] - scored.reference[:, 1]), with_unrelated
    ),
}


def prepared(examples: list[Example], loss: PreferenceLoss, config: Config) -> list[Example]:
    """The examples as the providers of what the loss reads want them."""
    for prepare in dict.fromkeys(PROVIDERS[name].prepare for name in loss.reads):
        if prepare is not None and examples:
            examples = prepare(examples, config)
    return examples


# The loss of a batch.


def preference_loss(loss: PreferenceLoss, *, beta: float, **options: float | str) -> LossFunction:
    """The loss of a batch, summed: `(model, batch, running=None) -> LossSums`.

    A batch may hold `weight` `[B]`: how often an example counts, in the loss and in the metrics. A
    soft label p is a pair and its reverse with weights p and 1 - p. `running` is the loss's running
    state, None for its initial one.
    """
    shown = ("response",) if loss.labelled else ("chosen", "rejected", "chosen_average")

    def loss_sums(
        model: Transformer, batch: Batch, running: dict[str, Array] | None = None
    ) -> LossSums:
        scored = Scored(model, batch, labelled=loss.labelled)
        values = {
            name: PROVIDERS[name].value(scored) for name in dict.fromkeys((*loss.reads, *shown))
        }
        losses = loss(values, beta=beta, running=running, **options)
        weight = batch.get("weight", jnp.ones_like(losses))

        def sums(named: Mapping[str, Array | float]) -> dict[str, Array]:
            return {name: (weight * value).sum() for name, value in named.items()}

        metrics, statistics = _metrics(loss, values, beta), {}
        if loss.running is not None:
            state = loss.running.initial if running is None else running
            metrics |= {name: state[name] for name in loss.running.keywords}
            statistics = loss.running.statistics(values, beta)
        return LossSums((weight * losses).sum(), weight.sum(), sums(metrics), sums(statistics))

    return loss_sums


def _metrics(loss: PreferenceLoss, values: dict[str, Array], beta: float) -> dict[str, Array]:
    """Rewards are `beta` x what the loss compares; see `PreferenceLoss.rewards`."""
    if loss.labelled:
        (reward,) = loss.rewards(values, beta=beta)
        # The sign of an undesirable response's is turned.
        margin = jnp.where(values["desirable"] > 0, reward, -reward)
        metrics = {
            "rewards/margins": margin,
            "rewards/accuracies": (margin > 0).astype(jnp.float32),
        }
        return metrics | ({"objective/kl": values["kl"]} if "kl" in values else {})
    chosen, rejected = loss.rewards(values, beta=beta)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
        "logps/chosen": values["chosen"],
        "logps/rejected": values["rejected"],
    }


def attach_reference(examples: Sequence[Example], log_probs: np.ndarray) -> Attach:
    """Gives every example's batch the reference's log-probabilities `[examples, K]`.

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
    model: Transformer,
    tokenizer: Any,
    records: Records,
    config: Config,
    *,
    loss: PreferenceLoss | None = None,
    reference: np.ndarray | None = None,
    held_out: Records = (),
    workdir: Workdir | str | None = None,
    mesh: Mesh | None = None,
    donate: bool = False,
) -> Result:
    """Trains a policy on preferences; the model it starts from is the reference.

    Args:
      records: pairs, or labelled responses if the loss wants them (docs/data.md, kinds `preference`
        and `labelled`): a list of dicts, a source, or examples.
      loss: one of the caller's own instead of `config.loss`.
      reference: the reference's log-probabilities `[examples, K]` of all responses, nats, where
        they are known; None computes them.
      held_out: more records; the trained model's loss and rewards on them are `summary["eval"]`.
      workdir: keeps checkpoints and metrics, so that the same call goes on where it was stopped.
        Without one nothing is left behind.
      mesh: where to train; None keeps the model's placement.
      donate: lets training use the model's memory. `model` is unusable afterwards.

    Raises:
      RunError: sizes that do not fit data, model or machine; a loss that is not finite; `beta` or
        options that a loss of the caller's own cannot have.
      DataError: a record that cannot be used.
    """
    loss = LOSSES[config.loss] if loss is None else loss
    check_loss(loss, config)
    examples = _examples(records, tokenizer, loss, config)
    if not loss.labelled:
        warn_of_ties(examples)
    held_out = _held_out(held_out, tokenizer, loss, config)
    measured = evaluators.load_held_out(config, tokenizer, kind=_kind(loss))
    if donate and measured:
        raise RunError("config.evaluators compare with the base model: donate=False keeps it.")
    base = None if donate else pretrained.as_base(config, model)
    folder = Workdir.of(workdir, config)
    directory = folder and folder.path
    model, mesh = pretrained.as_configured(
        config, model, tokenizer, mesh, donate=donate, directory=directory
    )
    num_steps = plan_steps(config, directory, model, examples)
    if reference is None:
        reference = _reference(loss, model, mesh, examples, config.data)
    held_out_reference = _reference(loss, model, mesh, held_out, config.data)
    trained = train_offline(
        config,
        directory,
        model,
        mesh,
        examples,
        preference_loss(loss, beta=config.beta, **options_of(config)),
        attach=attach_reference(examples, reference),
        running=loss.running,
        num_steps=num_steps,
        description=loss.name.upper(),
    )
    summary = _evaluated(
        loss, config, trained.model, mesh, held_out, held_out_reference, trained.running
    )
    context = evaluators.Context(
        measured, trained.model, tokenizer, mesh, base, seed=config.seed, directory=directory
    )
    summary |= _measured(loss, config, context, trained.running)
    return Result(trained.model, trained.metrics, summary, directory)


def sources(config: Config) -> list[Source]:
    """Where records come from."""
    data, kind = config.data, _kind(LOSSES[config.loss])
    return [
        (data.source, kind, data),
        (data.eval_source, kind, data),
        *evaluators.sources_of(config, kind=kind),
    ]


def run(config: Config, workdir: Workdir) -> dict[str, Any]:
    """`train` with the model and the data that the config names; returns the summary."""
    kind = _kind(LOSSES[config.loss])
    tokenizer = pretrained.load_pretrained_tokenizer(config.model)
    examples = examples_of(config.data.source, tokenizer, config.data, kind=kind)
    held_out = examples_of(config.data.eval_source, tokenizer, config.data, kind=kind)
    read_sources(evaluators.sources_of(config, kind=kind))
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
        donate=not config.evaluators,
    )
    return result.summary


def evaluate(config: Config, workdir: Workdir) -> dict[str, Any]:
    """Loss, accuracy and margin of the trained implicit reward on `config.data.eval_source`.

    And what `config.evaluators` measure.
    """
    loss = LOSSES[config.loss]
    tokenizer = pretrained.load_pretrained_tokenizer(config.model)
    held_out = _held_out(config.data.eval_source, tokenizer, loss, config)
    measured = evaluators.load_held_out(config, tokenizer, kind=_kind(loss))
    mesh, base = pretrained.open_mesh(config), None
    model = pretrained.restored_model(config, workdir.path, mesh)
    if loss.needs_reference or measured:
        base = pretrained.load_pretrained(config, config.model, mesh)
    reference = _reference(loss, base, mesh, held_out, config.data)
    if not measured:
        base = None
    start = {} if loss.running is None else loss.running.start()
    running = pretrained.restored_running(start, workdir.path, mesh)
    context = evaluators.Context(
        measured, model, tokenizer, mesh, base, seed=config.seed, directory=workdir.path
    )
    summary = _evaluated(loss, config, model, mesh, held_out, reference, running)
    return summary | _measured(loss, config, context, running)


def _measured(
    loss: PreferenceLoss, config: Config, context: evaluators.Context, running: dict[str, Array]
) -> dict[str, Any]:
    """What evaluators measure of a trained policy; its base is the reference."""
    model, base, mesh, data = context.model, context.base, context.mesh, config.data

    def held_out_loss(examples: list[Example]) -> dict[str, float]:
        examples = prepared(examples, loss, config)
        reference = _reference(loss, base, mesh, examples, data)
        return _evaluated(loss, config, model, mesh, examples, reference, running)["eval"]

    def pair_rewards(examples: list[Example]) -> tuple[np.ndarray, ...]:
        examples = prepared(examples, loss, config)
        sums = compute_log_probs(model, mesh, examples, data)
        reference = _reference(loss, base, mesh, examples, data)
        lengths = np.array([[mask.sum() for mask in one.response_masks] for one in examples])
        values = {}
        for i, side in enumerate(("chosen", "rejected")):
            values[f"{side}_average"] = sums[:, i] / np.maximum(lengths[:, i], 1)
            for name in (side, f"{side}_desensitized"):
                values |= {name: sums[:, i], f"ref_{name}": reference[:, i]}
        chosen, rejected = loss.rewards(values, beta=config.beta)
        return np.asarray(chosen), np.asarray(rejected)

    context = dataclasses.replace(context, loss=held_out_loss, pair_rewards=pair_rewards)
    return evaluators.run_evaluators(config, context)


def _kind(loss: PreferenceLoss) -> str:
    return "labelled" if loss.labelled else "preference"


def _examples(
    records: Records, tokenizer: Any, loss: PreferenceLoss, config: Config
) -> list[Example]:
    found = examples_of(records, tokenizer, config.data, kind=_kind(loss))
    return prepared(found, loss, config)


def _held_out(
    records: Records, tokenizer: Any, loss: PreferenceLoss, config: Config
) -> list[Example]:
    """Examples whose rows fit the buckets, in the order of evaluating and of scoring them."""
    examples = _examples(records, tokenizer, loss, config)
    check_lengths(config.data, examples, range(len(examples)))
    if examples and loss.needs_reference:
        check_lengths(config.data, examples, by_length(examples))
    return examples


def _reference(
    loss: PreferenceLoss,
    model: Transformer | None,
    mesh: Mesh,
    examples: Sequence[Example],
    data: Data,
) -> np.ndarray:
    """The reference's log-probabilities `[examples, K]`; zeros for a loss that reads none."""
    if not examples:
        return np.zeros((0, 1), np.float32)
    if not loss.needs_reference:
        return np.zeros((len(examples), len(examples[0].responses)), np.float32)
    assert model is not None  # only a loss without reference, or no examples, need none
    return reference_log_probs(without_adapters(model), mesh, examples, data)


def _evaluated(
    loss: PreferenceLoss,
    config: Config,
    model: Transformer,
    mesh: Mesh,
    examples: Sequence[Example],
    reference: np.ndarray,
    running: dict[str, Array],
) -> dict[str, Any]:
    if not examples:
        return {}
    metrics = evaluate_loss(
        config,
        model,
        mesh,
        examples,
        preference_loss(loss, beta=config.beta, **options_of(config)),
        attach=attach_reference(examples, reference),
        running=running,
    )
    return {"eval": metrics}
