"""The online loop: generate, score, iterate what was generated; stop cleanly; continue exactly.

An algorithm says what one iteration does; the loop around iterations is here. A run is a sequence
of whole iterations: whatever interrupts it, it goes on from the end of one, with keys and prompts
that depend on the iteration's number alone.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from align_jax.distributed import hosts
from align_jax.errors import RunError
from align_jax.generation.samples import Sample, write_samples
from align_jax.progress import progress
from align_jax.training.checkpoint import Checkpointer
from align_jax.training.metrics import MetricWriter, read_metrics
from align_jax.training.not_finite import causes
from align_jax.training.pretrained import RunConfig
from align_jax.training.resume import resumed
from align_jax.training.signals import Interrupted, StopSignals
from align_jax.training.state import TrainState

# What an algorithm keeps between iterations beside its state: JSON numbers by name.
Memory = dict[str, Any]


Iterate = Callable[
    [TrainState, Memory, int], tuple[TrainState, Memory, dict[str, float], list[Sample]]
]


def train_online(
    config: RunConfig,
    directory: Path | None,
    mesh: Mesh,
    state: TrainState,
    memory: Memory,
    iterate: Iterate,
    *,
    num_iterations: int,
    description: str,
) -> tuple[TrainState, list[dict[str, float]]]:
    """Runs the iterations of a run, or goes on where it was stopped.

    Args:
      directory: the run's; None keeps nothing on disk.
      state, memory: before the first iteration; the state is consumed.
      iterate: see `fit_online`.

    Returns:
      the last state, and the metrics of every iteration.

    Raises: as `fit_online`; RunError also for a checkpoint of another model.
    """
    with resumed(config, directory, state) as run:
        state = run.state  # the one before is not kept in memory beside it
        memory = memory if run.data is None else run.data

        def save_samples(iteration: int, samples: list[Sample]) -> None:
            if directory is not None and hosts.first():
                write_samples(directory / "samples" / f"iteration_{iteration:06d}.jsonl", samples)

        state = fit_online(
            state,
            memory,
            iterate,
            mesh=mesh,
            num_iterations=num_iterations,
            checkpointer=run.checkpointer,
            writer=run.writer,
            save_samples=save_samples,
            checkpoint_every=config.checkpoint_every,
            description=description,
        )
    # The file has the rows from before a stop on every host, the writer on the first one only.
    return state, run.writer.rows if directory is None else read_metrics(directory)


def fit_online(
    state: TrainState,
    memory: Memory,
    iterate: Iterate,
    *,
    mesh: Mesh,
    num_iterations: int,
    checkpointer: Checkpointer | None,
    writer: MetricWriter,
    save_samples: Callable[[int, list[Sample]], None],
    checkpoint_every: int,
    description: str,
) -> TrainState:
    """Runs iterations until `num_iterations`, from `memory["iteration"]` on, saving the last state.

    `iterate(state, memory, iteration)` returns the next state and memory, the iteration's metrics
    and its samples. A stop signal ends the run after the iteration it came in. Without a
    checkpointer nothing is saved, and a signal acts as usual.

    Raises:
      RunError: a metric is not finite.
      Interrupted: SIGTERM, SIGHUP or SIGINT came; the state has been saved.
    """
    first = int(memory["iteration"])
    bar = progress(description=description, total=num_iterations, initial=first, unit="iteration")
    stopped_by: int | None = None
    signals = StopSignals(active=checkpointer is not None)
    with bar, signals as stop, jax.set_mesh(mesh):
        for iteration in range(first, num_iterations):
            updates = int(state.step)
            state, memory, metrics, samples = iterate(state, memory, iteration)
            memory = memory | {"iteration": iteration + 1}
            broken = sorted(name for name, value in metrics.items() if not np.isfinite(value))
            if broken:
                # The objective is that of the samples, from before the iteration's updates.
                if not any(name.startswith("objective/") for name in broken):
                    updates = int(state.step) - 1
                raise RunError(
                    f"{', '.join(broken)} not finite in iteration {iteration}, on the prompts "
                    f"{sorted({sample['prompt_id'] for sample in samples})[:8]} and others. "
                    + causes("the rewards of its completions", updates=updates)
                )
            save_samples(iteration, samples)
            writer.write(int(state.step), metrics)
            bar.update(1)
            stopped_by = stop.agreed(now=True)
            last = iteration + 1 == num_iterations or stopped_by is not None
            if checkpointer is not None and (last or (iteration + 1) % checkpoint_every == 0):
                checkpointer.save(state, memory)
            if stopped_by is not None:
                break
        if checkpointer is not None:
            checkpointer.wait()
        if stopped_by is not None:
            raise Interrupted(stopped_by, int(state.step))
    return state
