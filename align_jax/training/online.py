"""The online loop: generate, score, iterate what was generated; stop cleanly; continue exactly.

An algorithm says what one iteration does; here is what every online algorithm shares: sampling
completions of a batch of prompts, laying them out as batches for the train step, and the loop
around iterations. A run is a sequence of whole iterations: whatever interrupts it, it goes on from
the end of one, with keys and prompts that depend on the iteration's number alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from align_jax.errors import RunError
from align_jax.progress import progress
from align_jax.training.checkpoint import Checkpointer
from align_jax.training.metrics import MetricWriter
from align_jax.training.signals import Interrupted, StopSignals
from align_jax.training.state import TrainState

# What an algorithm keeps between iterations beside its state: JSON numbers by name.
Memory = dict[str, float]


Iterate = Callable[
    [TrainState, Memory, int], tuple[TrainState, Memory, dict[str, float], list[dict[str, Any]]]
]


def fit(
    state: TrainState,
    memory: Memory,
    iterate: Iterate,
    *,
    mesh: Mesh,
    num_iterations: int,
    checkpointer: Checkpointer,
    writer: MetricWriter,
    save_samples: Callable[[int, list[dict[str, Any]]], None],
    checkpoint_every: int,
    description: str,
) -> TrainState:
    """Runs iterations until `num_iterations`, from `memory["iteration"]` on, saving the last state.

    `iterate(state, memory, iteration)` returns the next state and memory, the iteration's metrics
    and its samples. A stop signal ends the run after the iteration it came in.

    Raises:
      RunError: a metric is not finite.
      Interrupted: SIGTERM or SIGINT came; the state has been saved.
    """
    first = int(memory["iteration"])
    bar = progress(description=description, total=num_iterations, initial=first, unit="iteration")
    with bar, StopSignals() as stop, jax.set_mesh(mesh):
        for iteration in range(first, num_iterations):
            state, memory, metrics, samples = iterate(state, memory, iteration)
            memory = memory | {"iteration": iteration + 1}
            broken = sorted(name for name, value in metrics.items() if not np.isfinite(value))
            if broken:
                raise RunError(
                    f"{', '.join(broken)} not finite in iteration {iteration}, on the prompts "
                    f"{sorted({sample['prompt_id'] for sample in samples})[:8]} and others. "
                    "Nothing was saved since the last checkpoint; lower "
                    "config.optimizer.learning_rate."
                )
            save_samples(iteration, samples)
            writer.write(int(state.step), metrics)
            bar.update(1)
            last = iteration + 1 == num_iterations or stop.received is not None
            if last or (iteration + 1) % checkpoint_every == 0:
                checkpointer.save(state, memory)
            if stop.received is not None:
                break
        checkpointer.wait()
        if stop.received is not None:
            raise Interrupted(stop.received, int(state.step))
    return state
