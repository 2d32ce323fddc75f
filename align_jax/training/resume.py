"""What both loops begin with: the lock, the newest checkpoint, and metrics that go on from it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from align_jax.training.checkpoint import Checkpointer
from align_jax.training.metrics import MetricWriter
from align_jax.training.pretrained import RunConfig
from align_jax.training.state import TrainState
from align_jax.training.workdir import only_run_in


class Resumed(NamedTuple):
    """A run that begins, or goes on.

    Attributes:
      state: the newest checkpoint's, or the one given.
      data: the JSON object that was saved with it; None for a run that begins.
      checkpointer: None for a run without a directory.
      writer: of metrics; it keeps the rows up to the checkpoint.
    """

    state: TrainState
    data: dict[str, Any] | None
    checkpointer: Checkpointer | None
    writer: MetricWriter


@contextlib.contextmanager
def resumed(config: RunConfig, directory: Path | None, state: TrainState) -> Iterator[Resumed]:
    """Locks a run's directory, restores its newest checkpoint and opens its files until the end.

    Args:
      directory: the run's; None keeps nothing on disk.
      state: before the first step; its structure and shardings are those of the checkpoint.

    Raises:
      RunError: another run holds the directory, or the checkpoint is another model's.
    """
    checkpointer = data = step = None
    with contextlib.ExitStack() as stack:
        if directory is not None:
            stack.enter_context(only_run_in(directory))
            checkpointer = Checkpointer(directory / "checkpoints", clean=True)
            stack.callback(checkpointer.close)
            if checkpointer.latest_step() is not None:
                state, data = checkpointer.restore(state)
                # Not `latest_step`: where the newest is damaged, the one before was read.
                step = int(state.step)
        project = config.wandb_project or None
        writer = MetricWriter(directory, resume_step=step, wandb_project=project)
        yield Resumed(state, data, checkpointer, stack.enter_context(writer))
