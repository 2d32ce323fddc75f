"""The offline loop: iterate a data set, step, log, save; stop cleanly; continue exactly."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from align_jax.data.batching import Attach, check_lengths, make_collate
from align_jax.data.dataset import Data
from align_jax.data.loader import Loader
from align_jax.data.tokenise import Example
from align_jax.errors import RunError
from align_jax.losses.preference import Running
from align_jax.models.frozen import partition
from align_jax.models.heads import ScalarModel
from align_jax.models.transformer import Transformer
from align_jax.progress import progress
from align_jax.training.checkpoint import Checkpointer, require_space
from align_jax.training.metrics import MetricWriter
from align_jax.training.not_finite import causes
from align_jax.training.optimizer import Optimizer, make_optimizer, make_schedule
from align_jax.training.pretrained import RunConfig
from align_jax.training.resume import resumed
from align_jax.training.signals import Interrupted, StopSignals
from align_jax.training.state import TrainState, init_state
from align_jax.training.step import LossFunction, make_train_step, place_batch

MAX_EPOCHS, MAX_STEPS = 10**5, 10**7


@dataclasses.dataclass(frozen=True)
class OfflineConfig(RunConfig):
    """What every algorithm that iterates a data set sets beside its own fields."""

    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    num_epochs: float = 1.0
    num_steps: int = 0  # 0: what num_epochs comes to
    log_every: int = 1  # steps

    def __post_init__(self):
        super().__post_init__()
        self.at_least(0, "num_epochs", "num_steps")
        # Before the first step all batches are looked at, so that none fails after hours.
        self.at_most(MAX_EPOCHS, "num_epochs")
        self.at_most(MAX_STEPS, "num_steps")
        self.at_least(1, "log_every")
        if self.data.batch_size % self.data.accumulation:
            raise RunError(
                f"config.data.batch_size = {self.data.batch_size} is no multiple of "
                f"config.data.accumulation = {self.data.accumulation}."
            )


def check_context(data: Data, model: Transformer | ScalarModel) -> None:
    """Raises `RunError` for texts longer than the model's context."""
    if data.max_length > model.config.context_length:
        raise RunError(
            f"config.data.max_length = {data.max_length} is more than the model's context "
            f"of {model.config.context_length} tokens."
        )


def check_training_lengths(
    config: OfflineConfig, examples: Sequence[Example], num_steps: int
) -> None:
    """`check_lengths` of every batch of a training, so that none ends it after hours."""
    size = config.data.batch_size
    loader = Loader(examples, batch_size=size, seed=config.seed, collate=list)
    check_lengths(config.data, examples, loader.places(0, num_steps * size))


def count_steps(
    config: OfflineConfig,
    directory: Path | None,
    model: Transformer | ScalarModel,
    num_examples: int,
) -> int:
    """The number of steps of a run; fails now for what would stop it after hours.

    Raises:
      RunError: sizes in the config that do not fit the data or the model, or too little disk space
        in `directory` for the checkpoints.
    """
    data = config.data
    check_context(data, model)
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
    config.optimizer.check_steps(num_steps)
    if directory is not None:
        optimizer = make_optimizer(config.optimizer, num_steps)
        trained, _ = partition(model)
        state = jax.eval_shape(lambda m: (m, optimizer.init(m)), trained)
        require_space(directory, state)
    return num_steps


Model = TypeVar("Model", Transformer, ScalarModel)


def plan_steps(
    config: OfflineConfig,
    directory: Path | None,
    model: Transformer | ScalarModel,
    examples: Sequence[Example],
) -> int:
    """`count_steps` of a training on `examples`, every batch of which fits.

    Raises:
      RunError: see `count_steps`.
      DataError: see `check_lengths`.
    """
    num_steps = count_steps(config, directory, model, len(examples))
    check_training_lengths(config, examples, num_steps)
    return num_steps


class Trained(NamedTuple, Generic[Model]):
    """What `train_offline` returns.

    Attributes:
      model: the trained model.
      metrics: the metrics of every `log_every`-th step.
      running: the running state that the loss ended with; {} if it has none.
    """

    model: Model
    metrics: list[dict[str, float]]
    running: dict[str, jax.Array]


def train_offline(
    config: OfflineConfig,
    directory: Path | None,
    model: Model,
    mesh: Mesh,
    examples: Sequence[Example],
    loss_function: LossFunction,
    *,
    attach: Attach | None = None,
    running: Running | None = None,
    num_steps: int | None = None,
    description: str,
) -> Trained[Model]:
    """Trains `model` (consumed) on `examples`, or goes on where the run was stopped.

    Args:
      directory: the run's; None keeps nothing on disk.
      attach: gives an example's batch more values; see `data.batching.Attach`.
      running: the state that the loss function takes as a third argument, and its update.
      num_steps: of `plan_steps`, where the caller has called it before something costly; None calls
        it here.

    Raises:
      RunError, DataError: see `plan_steps`.
      RunError: a checkpoint of another model; a loss that is not finite.
      Interrupted: see `fit_offline`.
    """
    data = config.data
    if num_steps is None:
        num_steps = plan_steps(config, directory, model, examples)
    loader = Loader(
        examples, batch_size=data.batch_size, seed=config.seed, collate=make_collate(data, attach)
    )
    optimizer = make_optimizer(config.optimizer, num_steps)
    state = init_state(model, optimizer, mesh, running and running.start())
    train_step = make_train_step(
        loss_function,
        optimizer,
        make_schedule(config.optimizer, num_steps),
        state,
        mesh,
        accumulated=data.accumulation > 1,
        update_running=running and running.update,
    )
    with resumed(config, directory, state) as run:
        state = run.state  # the one before is not kept in memory beside it
        state = fit_offline(
            state,
            train_step,
            loader,
            mesh=mesh,
            num_steps=num_steps,
            checkpointer=run.checkpointer,
            writer=run.writer,
            checkpoint_every=config.checkpoint_every,
            log_every=config.log_every,
            accumulated=data.accumulation > 1,
            description=description,
        )
    return Trained(state.model, run.writer.rows, state.running)


def fit_offline(
    state: TrainState,
    train_step: Callable[[TrainState, dict], tuple[TrainState, dict]],
    loader: Loader,
    *,
    mesh: Mesh,
    num_steps: int,
    checkpointer: Checkpointer | None,
    writer: MetricWriter,
    checkpoint_every: int,
    log_every: int,
    accumulated: bool,
    description: str,
) -> TrainState:
    """Runs `train_step` until `num_steps`, from wherever `state` is, and saves the last state.

    The place in the data is `step * batch_size`, so a state says where to go on. Metrics of every
    step are checked, and those of every `log_every`-th written. Without a checkpointer nothing is
    saved, and a signal acts as usual.

    Raises:
      RunError: a loss or gradient is not finite; names the step and the batch's example ids.
      Interrupted: SIGTERM, SIGHUP or SIGINT came; the state has been saved.
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
                f"grad_norm {values['grad_norm']}) on the batch of examples {ids}. "
                + causes("these examples", updates=step - 1)
            )
        if step % log_every == 0 or step == num_steps:
            writer.write(step, values)
        bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)

    def save(state: TrainState) -> None:
        settle()
        if checkpointer is not None:
            checkpointer.save(state, {"next_example": int(state.step) * loader.batch_size})

    batches = loader.batches(first * loader.batch_size)
    stopped_by: int | None = None
    bar = progress(description=description, total=num_steps, initial=first, unit="step")
    signals = StopSignals(active=checkpointer is not None)
    with bar, signals as stop, jax.set_mesh(mesh):
        try:
            for step in range(first + 1, num_steps + 1):
                batch, ids = next(batches)
                placed = place_batch(batch, mesh, accumulated=accumulated)
                state, metrics = train_step(state, placed)
                settle()
                pending = (step, ids, metrics)
                bar.update(1)
                last = step == num_steps
                stopped_by = stop.agreed(now=last)
                if last or step % checkpoint_every == 0 or stopped_by is not None:
                    save(state)
                if stopped_by is not None:
                    break
        finally:
            batches.close()
        if checkpointer is not None:
            checkpointer.wait()
        if stopped_by is not None:
            raise Interrupted(stopped_by, int(state.step))
    return state


def evaluate_loss(
    config: OfflineConfig,
    model: Transformer | ScalarModel,
    mesh: Mesh,
    examples: Sequence[Example],
    loss_function: LossFunction,
    *,
    attach: Attach | None = None,
    running: dict[str, jax.Array] | None = None,
) -> dict[str, float]:
    """The loss and its metrics over all examples, in order, without training.

    A loss function with a running state takes `running`, which stays as it is.
    """
    data = config.data.unaccumulated()
    collate = make_collate(data, attach)
    totals: dict[str, float] = {}
    run = jax.jit(loss_function)
    with (
        jax.set_mesh(mesh),
        progress(description="evaluating", total=len(examples), unit="example") as bar,
    ):
        for start in range(0, len(examples), data.batch_size):
            part = examples[start : start + data.batch_size]
            placed = place_batch(collate(part), mesh, accumulated=False)
            sums = run(model, placed, *([running] if running else []))
            values = {"loss": sums.loss, "weight": sums.weight, **sums.metrics}
            for name, value in jax.device_get(values).items():
                totals[name] = totals.get(name, 0.0) + float(value)
            bar.update(len(part))
    weight = totals.pop("weight")
    return {name: total / weight for name, total in totals.items()}
