"""What the offline algorithms share: from a config, records and a loss to a trained model."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from align_jax.data.batching import (
    build_batch,
    example_size,
    longest_row,
    num_tokens,
    round_up_to_bucket,
)
from align_jax.data.chat import Example, encode_records
from align_jax.data.formats import Record
from align_jax.data.pipeline import Loader
from align_jax.data.sources import load_as_configured
from align_jax.models.frozen import partition
from align_jax.models.transformer import Transformer
from align_jax.training.checkpoint import Checkpointer, require_space
from align_jax.training.errors import RunError
from align_jax.training.loop import fit
from align_jax.training.metrics import MetricWriter, progress
from align_jax.training.optimizer import make_optimizer, make_schedule
from align_jax.training.pretrained import default_run_config
from align_jax.training.step import LossFunction, init_state, make_train_step, place_batch

# Values of one example that travel with its batch: per response, in the order of its responses.
Attach = Callable[[Example], dict[str, np.ndarray]]


def default_data_config(**overrides: Any) -> ConfigDict:
    """The fields of `config.data` that the offline algorithms read; lengths are in tokens."""
    config = ConfigDict(
        {
            "source": "",  # see docs/data.md
            "eval_source": "",  # held-out records, evaluated by `python -m align_jax evaluate`
            "limit": 0,  # read this many records; 0 reads all
            "invalid": "error",  # "error" | "drop": what a record with wrong fields does
            "max_length": 1024,
            "max_prompt_length": 0,  # 0: what the longest response leaves of max_length
            "min_prompt_length": 16,  # a response that leaves its prompt less is too long
            "overlong": "error",  # "error" | "truncate" | "drop": what a too long response does
            "batch_size": 16,
            "accumulation": 1,  # micro-batches a batch is split into
            "rows": 0,  # rows a micro-batch is packed into; 0: one example a row
            "length_buckets": tuple(64 * i for i in range(1, 129)),
            "target_buckets": tuple(64 * i for i in range(1, 129)),
        }
    )
    config.update(overrides)
    return config


def default_offline_config() -> ConfigDict:
    """The fields of an offline algorithm's config beside `data`, `optimizer` and its own."""
    config = default_run_config()
    config.update(
        num_epochs=1.0,
        num_steps=0,  # 0: what num_epochs comes to
        log_every=1,
    )
    return config


def load_examples(data: ConfigDict, source: str, tokenizer: Any, *, kind: str) -> list[Example]:
    """Reads, checks and tokenises every record of a source before anything is computed."""
    records = load_as_configured(data, source, kind=kind)
    return tokenised(data, records, tokenizer, kind=kind)


def tokenised(
    data: ConfigDict, records: Sequence[Record], tokenizer: Any, *, kind: str
) -> list[Example]:
    """Examples of records, cut, left out or refused as `data` says; their ids are the places."""
    with progress(description="tokenising", total=len(records), unit="record") as bar:
        return encode_records(
            records,
            tokenizer,
            kind=kind,
            max_length=data.max_length,
            max_prompt_length=data.max_prompt_length or None,
            min_prompt_length=data.min_prompt_length,
            overlong=data.overlong,
            progress=bar.update,
        )


def make_collate(
    data: ConfigDict, attach: Attach | None = None
) -> Callable[[Sequence[Example]], dict[str, np.ndarray]]:
    """A function from examples to a batch; with accumulation, micro-batches are its first axis."""
    parts = data.accumulation

    def collate(examples: Sequence[Example]) -> dict[str, np.ndarray]:
        size = len(examples) // parts
        groups = [examples[i : i + size] for i in range(0, len(examples), size)]
        lengths, targets = data.length_buckets, data.target_buckets
        build = lambda group: build_batch(  # noqa: E731
            group,
            rows=_num_rows(data, len(group)),
            length_buckets=lengths,
            target_buckets=targets,
        )
        batches = [build(group) for group in groups]
        if len(batches) > 1:
            # One shape for all micro-batches: the widest's.
            lengths = (max(batch["tokens"].shape[1] for batch in batches),)
            targets = (max(batch["targets"].shape[1] for batch in batches),)
            batches = [build(group) for group in groups]
        if attach is not None:
            for batch, group in zip(batches, groups):
                values = [attach(example) for example in group]
                batch |= {name: np.concatenate([v[name] for v in values]) for name in values[0]}
        if parts == 1:
            return batches[0]
        return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}

    return collate


def _num_rows(data: ConfigDict, num_examples: int) -> int:
    return min(data.rows or num_examples, num_examples)


def _unaccumulated(data: ConfigDict) -> ConfigDict:
    """`data` with micro-batches for batches: what runs by itself fits where they do."""
    size = data.batch_size // data.accumulation
    return ConfigDict(data.to_dict() | {"batch_size": size, "accumulation": 1})


def by_length(examples: Sequence[Example]) -> np.ndarray:
    """Places of examples, the shortest first: the order in which `score_responses` batches them."""
    return np.argsort([num_tokens(example) for example in examples], kind="stable")


def score_responses(
    score: Callable[[dict[str, jax.Array]], jax.Array],
    mesh: Mesh,
    examples: Sequence[Example],
    data: ConfigDict,
    *,
    description: str,
) -> np.ndarray:
    """A number for every response, `[examples, K]` float32; similar lengths share a batch.

    `score` takes a batch and returns a replicated array of the numbers of its responses in order;
    what is past them is left out. Raises `DataError` as `check_lengths` does.
    """
    data = _unaccumulated(data)
    collate = make_collate(data)
    responses = len(examples[0].responses)
    order = by_length(examples)
    check_lengths(data, examples, order)
    out = np.zeros((len(examples), responses), np.float32)
    with (
        jax.set_mesh(mesh),
        progress(description=description, total=len(examples), unit="example") as bar,
    ):
        for start in range(0, len(examples), data.batch_size):
            chosen = order[start : start + data.batch_size]
            batch = place_batch(collate([examples[i] for i in chosen]), mesh, accumulated=False)
            values = np.asarray(score(batch))[: len(chosen) * responses]
            out[chosen] = values.reshape(len(chosen), responses)
            bar.update(len(chosen))
    return out


def check_sizes(config: ConfigDict) -> None:
    """Raises `RunError` for counts or a schedule that no data and no model could make right."""
    data = config.data
    counts = {f"data.{name}": data[name] for name in ("batch_size", "accumulation")}
    counts |= {name: config[name] for name in ("log_every", "checkpoint_every")}
    for name, count in counts.items():
        if count < 1:
            raise RunError(f"config.{name} is {count}; expected at least 1.")
    if data.batch_size % data.accumulation:
        raise RunError(
            f"config.data.batch_size = {data.batch_size} is no multiple of "
            f"config.data.accumulation = {data.accumulation}."
        )
    make_schedule(config.optimizer, 1)


def check_context(config: ConfigDict, model: Transformer) -> None:
    """Raises `RunError` for texts longer than the model's context."""
    if config.data.max_length > model.config.context_length:
        raise RunError(
            f"config.data.max_length = {config.data.max_length} is more than the model's context "
            f"of {model.config.context_length} tokens."
        )


def check_lengths(data: ConfigDict, examples: Sequence[Example], order: Iterable[int]) -> None:
    """Raises `DataError` for an example, or a row of packed ones, that no bucket of `data` holds.

    `order` has the places of the examples as they come, micro-batch after micro-batch: it decides
    which of them share a row, and is not read where none do.
    """
    sizes = [example_size(example) for example in examples]
    if data.rows:
        size, order, rows = data.batch_size // data.accumulation, iter(order), []
        while group := [sizes[place] for place in itertools.islice(order, size)]:
            rows.append(longest_row(group, rows=_num_rows(data, len(group))))
        sizes = rows
    tokens, targets = (max(parts) for parts in zip(*sizes))
    round_up_to_bucket(tokens, data.length_buckets)
    round_up_to_bucket(targets, data.target_buckets, key="data.target_buckets")


def check_training_lengths(config: ConfigDict, examples: Sequence[Example], num_steps: int) -> None:
    """`check_lengths` of every batch of a training, so that none ends it after hours."""
    size = config.data.batch_size
    loader = Loader(examples, batch_size=size, seed=config.seed, collate=list)
    check_lengths(config.data, examples, loader.places(0, num_steps * size))


def check(config: ConfigDict, directory: Path, model: Transformer, num_examples: int) -> int:
    """The number of steps of a run; fails now for what would stop it after hours.

    Raises:
      RunError: sizes in the config that do not fit each other, the data or the model, an unknown
        schedule, too little disk space for the checkpoints.
    """
    check_sizes(config)
    check_context(config, model)
    data = config.data
    if data.batch_size > num_examples:
        raise RunError(
            f"config.data.batch_size = {data.batch_size} is more than there are examples: "
            f"{num_examples}."
        )
    num_steps = config.num_steps or round(config.num_epochs * num_examples / data.batch_size)
    if num_steps < 1:
        raise RunError(
            f"config.num_epochs = {config.num_epochs} of {num_examples} examples is less than "
            f"half a batch of config.data.batch_size = {data.batch_size}."
        )
    optimizer = make_optimizer(config.optimizer, num_steps)
    trained, _ = partition(model)
    state = jax.eval_shape(lambda m: (m, optimizer.init(m)), trained)
    require_space(directory, state)
    return num_steps


def train(
    config: ConfigDict,
    directory: Path,
    model: Transformer,
    mesh: Mesh,
    examples: Sequence[Example],
    loss_function: LossFunction,
    *,
    attach: Attach | None = None,
    description: str,
) -> Transformer:
    """Trains `model` (consumed) on `examples` in a run directory, or goes on where it was stopped.

    Raises:
      RunError: see `check`; a checkpoint of another model; a loss that is not finite.
      DataError: see `check_lengths`.
      Interrupted: see `fit`.
    """
    data = config.data
    num_steps = check(config, directory, model, len(examples))
    check_training_lengths(config, examples, num_steps)
    loader = Loader(
        examples, batch_size=data.batch_size, seed=config.seed, collate=make_collate(data, attach)
    )
    optimizer = make_optimizer(config.optimizer, num_steps)
    state = init_state(model, optimizer, mesh)
    train_step = make_train_step(
        loss_function,
        optimizer,
        make_schedule(config.optimizer, num_steps),
        state,
        mesh,
        accumulated=data.accumulation > 1,
    )
    checkpointer = Checkpointer(directory / "checkpoints", clean=True)
    try:
        resumed = checkpointer.latest_step()
        if resumed is not None:
            state, _ = checkpointer.restore(state)
        with MetricWriter(
            directory, resume_step=resumed, wandb_project=config.wandb_project or None
        ) as writer:
            state = fit(
                state,
                train_step,
                loader,
                mesh=mesh,
                num_steps=num_steps,
                checkpointer=checkpointer,
                writer=writer,
                checkpoint_every=config.checkpoint_every,
                log_every=config.log_every,
                accumulated=data.accumulation > 1,
                description=description,
            )
    finally:
        checkpointer.close()
    return state.model


def evaluate(
    config: ConfigDict,
    model: Transformer,
    mesh: Mesh,
    examples: Sequence[Example],
    loss_function: LossFunction,
    *,
    attach: Attach | None = None,
) -> dict[str, float]:
    """The loss and its metrics over all examples, in order, without training."""
    data = _unaccumulated(config.data)
    collate = make_collate(data, attach)
    totals: dict[str, float] = {}
    run = jax.jit(loss_function)
    with (
        jax.set_mesh(mesh),
        progress(description="evaluating", total=len(examples), unit="example") as bar,
    ):
        for start in range(0, len(examples), data.batch_size):
            part = examples[start : start + data.batch_size]
            sums = run(model, place_batch(collate(part), mesh, accumulated=False))
            values = {"loss": sums.loss, "weight": sums.weight, **sums.metrics}
            for name, value in jax.device_get(values).items():
                totals[name] = totals.get(name, 0.0) + float(value)
            bar.update(len(part))
    weight = totals.pop("weight")
    return {name: total / weight for name, total in totals.items()}
