"""What the offline algorithms share: from a config, records and a loss to a trained model."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from align_jax.data.batching import (
    Attach,
    check_lengths,
    make_collate,
    unaccumulated,
)
from align_jax.data.loader import Loader
from align_jax.data.tokenise import Example
from align_jax.errors import RunError
from align_jax.models.frozen import partition
from align_jax.models.transformer import Transformer
from align_jax.progress import progress
from align_jax.training.checkpoint import Checkpointer, require_space
from align_jax.training.metrics import MetricWriter
from align_jax.training.optimizer import make_optimizer, make_schedule
from align_jax.training.pretrained import default_run_config
from align_jax.training.signals import Interrupted, StopSignals
from align_jax.training.state import TrainState, init_state
from align_jax.training.step import LossFunction, make_train_step, place_batch


def default_offline_config() -> ConfigDict:
    """The fields of an offline algorithm's config beside `data`, `optimizer` and its own."""
    config = default_run_config()
    config.update(
        num_epochs=1.0,
        num_steps=0,  # 0: what num_epochs comes to
        log_every=1,
    )
    return config


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
    data = unaccumulated(config.data)
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


def fit(
    state: TrainState,
    train_step: Callable[[TrainState, dict], tuple[TrainState, dict]],
    loader: Loader,
    *,
    mesh: Mesh,
    num_steps: int,
    checkpointer: Checkpointer,
    writer: MetricWriter,
    checkpoint_every: int,
    log_every: int,
    accumulated: bool,
    description: str,
) -> TrainState:
    """Runs `train_step` until `num_steps`, from wherever `state` is, and saves the last state.

    The place in the data is `step * batch_size`, so a state says where to go on. Metrics of every
    step are checked, and those of every `log_every`-th written.

    Raises:
      RunError: a loss or gradient is not finite; names the step and the batch's example ids.
      Interrupted: SIGTERM or SIGINT came; the state has been saved.
    """
    first = int(state.step)
    pending: tuple[int, list[int], dict] | None = None

    def settle() -> None:
        # Reads the metrics of the step before, while the device works on this one.
        nonlocal pending
        if pending is None:
            return
        (step, ids, metrics), pending = pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        broken = [name for name in ("loss", "grad_norm") if not np.isfinite(values[name])]
        if broken:
            raise RunError(
                f"{' and '.join(broken)} not finite at step {step} (loss {values['loss']}, "
                f"grad_norm {values['grad_norm']}) on the batch of examples {ids}. Nothing was "
                "saved since the last checkpoint; look at these examples or lower "
                "config.optimizer.learning_rate."
            )
        if step % log_every == 0 or step == num_steps:
            writer.write(step, values)
        bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)

    def save(state: TrainState) -> None:
        settle()
        checkpointer.save(state, {"next_example": int(state.step) * loader.batch_size})

    batches = loader.batches(first * loader.batch_size)
    bar = progress(description=description, total=num_steps, initial=first, unit="step")
    with bar, StopSignals() as stop, jax.set_mesh(mesh):
        try:
            for step in range(first + 1, num_steps + 1):
                batch, ids = next(batches)
                placed = place_batch(batch, mesh, accumulated=accumulated)
                state, metrics = train_step(state, placed)
                settle()
                pending = (step, ids, metrics)
                bar.update(1)
                if step == num_steps or step % checkpoint_every == 0 or stop.received is not None:
                    save(state)
                if stop.received is not None:
                    break
        finally:
            batches.close()
        checkpointer.wait()
        if stop.received is not None:
            raise Interrupted(stop.received, int(state.step))
    return state
