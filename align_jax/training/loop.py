"""The offline loop: iterate a data set, step, log, save; stop cleanly; continue exactly."""

import signal
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from align_jax.data.pipeline import Loader
from align_jax.training.checkpoint import Checkpointer
from align_jax.training.errors import RunError
from align_jax.training.metrics import MetricWriter, progress
from align_jax.training.step import TrainState, place_batch


class Interrupted(Exception):
    """A signal asked the run to stop; everything needed to go on has been saved."""

    def __init__(self, signum: int, step: int):
        self.signum = signum
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}, which is saved. "
            "The same command continues from there."
        )


class StopSignals:
    """Turns the first SIGTERM or SIGINT into a flag; a second one acts as usual."""

    def __init__(self):
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        # Only the main thread may install handlers; in a notebook's worker thread there are none.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: Any) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __exit__(self, *exception: Any) -> None:
        self._restore()


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
