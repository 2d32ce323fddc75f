"""Checkpoints: one flat, named dictionary of arrays and one JSON object, written by Orbax.

Names are the paths of the leaves in the train state (`model.blocks.mlp.up`, ...), so a checkpoint
does not depend on how a library spells its containers. Orbax writes beside the final place and
renames: a run killed while saving still has the checkpoint before.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from align_jax.training.errors import RunError


def flatten(tree: Any, *, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Leaves under dotted names."""

    def name(path):
        # The last key of a parameter is flax's own field of nnx.Param, `value`.
        keys = path[:-1] if getattr(path[-1], "name", None) == "value" else path
        return ".".join(
            str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in keys
        )

    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return {name(path): leaf for path, leaf in leaves}


def unflatten(tree: Any, leaves: dict[str, Any]) -> Any:
    """The inverse of `flatten`, into the structure of `tree`."""
    structure = jax.tree.structure(tree)
    return jax.tree.unflatten(structure, [leaves[name] for name in flatten(tree)])


class Checkpointer:
    """Saves and restores train states under `directory`, keeping the newest.

    Args:
      directory: `WORKDIR/checkpoints`.
      clean: remove what a killed run left half-written; only for the one process that saves.
    """

    def __init__(self, directory: Path, *, clean: bool = False):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.directory = Path(directory).resolve()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(1),
                enable_async_checkpointing=True,
                cleanup_tmp_directories=clean,
            ),
            item_handlers={
                "model": ocp.StandardCheckpointHandler(),
                "optimizer": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
            },
        )

    def latest_step(self) -> int | None:
        """Step of the newest finished checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, state: Any, data: dict[str, Any]) -> None:
        """Starts writing a train state; its arrays may be donated as soon as this returns.

        Raises:
          RunError: the disk is full; also from `wait` and `close`, since writing goes on beside.
        """
        args = self._ocp.args
        with self._naming_a_full_disk():
            self._manager.save(
                int(state.step),
                args=args.Composite(
                    model=args.StandardSave(flatten(state.model)),
                    optimizer=args.StandardSave(flatten(state.optimizer)),
                    data=args.JsonSave(data),
                ),
            )

    def restore(self, state: Any) -> tuple[Any, dict[str, Any]]:
        """The newest checkpoint, in the structure and with the shardings of the state `state`.

        Raises:
          RunError: the checkpoint holds other names or shapes.
        """
        step = self.latest_step()
        items = {"model": state.model, "optimizer": state.optimizer}
        restored = self._restore(step, items, with_data=True)
        parts = {name: unflatten(tree, restored[name]) for name, tree in items.items()}
        step = jax.device_put(np.int32(step), state.step.sharding)
        return state._replace(step=step, **parts), restored["data"]

    def restore_model(self, model: Any) -> Any:
        """The newest checkpoint's model alone, as `restore`."""
        restored = self._restore(self.latest_step(), {"model": model}, with_data=False)
        return unflatten(model, restored["model"])

    def _restore(self, step: int, items: dict[str, Any], *, with_data: bool) -> dict[str, Any]:
        args = self._ocp.args
        metadata = self._manager.item_metadata(step)
        wanted = {}
        for item, tree in items.items():
            leaves = flatten(tree)
            self._check(step, leaves, metadata[item])
            abstract = {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
                for name, leaf in leaves.items()
            }
            wanted[item] = args.StandardRestore(abstract)
        if with_data:
            wanted["data"] = args.JsonRestore()
        return self._manager.restore(step, args=args.Composite(**wanted))

    def _check(self, step: int, wanted: dict[str, Any], saved: Any) -> None:
        different = sorted(wanted.keys() ^ saved.keys())
        if different:
            has = "has no" if different[0] in wanted else "also has"
            raise RunError(
                f"the checkpoint of step {step} in {self.directory} {has} {different[0]}: it "
                "belongs to another model. Use the config it was made with, or another --workdir."
            )
        for name, leaf in wanted.items():
            if tuple(saved[name].shape) != tuple(leaf.shape):
                raise RunError(
                    f"the checkpoint of step {step} in {self.directory} has {name} of shape "
                    f"{tuple(saved[name].shape)}, this config's model has {tuple(leaf.shape)}. Use "
                    "the config it was made with, or another --workdir."
                )

    def wait(self) -> None:
        """Returns when what was saved is on disk, and raises what went wrong on the way."""
        with self._naming_a_full_disk():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases the background threads."""
        with self._naming_a_full_disk():
            self._manager.close()

    @contextlib.contextmanager
    def _naming_a_full_disk(self) -> Iterator[None]:
        try:
            yield
        # TensorStore makes a ValueError of what the operating system said.
        except (OSError, ValueError) as error:
            if os.strerror(errno.ENOSPC) not in str(error):
                raise
            raise RunError(
                f"the disk is full: a checkpoint could not be written to {self.directory}. What "
                "was saved before is whole; free some space, and the same command continues."
            ) from error


def require_space(directory: Path, state: Any, copies: int) -> None:
    """Raises `RunError` if `copies` checkpoints of `state` will not fit on the disk."""
    needed = copies * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise RunError(
            f"{directory} has {free / 2**30:.2f} GiB free, and checkpoints need "
            f"{needed / 2**30:.2f} GiB. Free some space or choose another --workdir."
        )
