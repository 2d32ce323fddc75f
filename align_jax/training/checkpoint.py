"""Checkpoints: one flat, named dictionary of arrays and one JSON object, written by Orbax.

Names are the paths of the leaves in the train state (`model.blocks.mlp.up`, ...), so a checkpoint
does not depend on how a library spells its containers. Frozen parameters are not saved: they are
those of `config.model`, and a fingerprint in the checkpoint tells whether they still are. Another
fingerprint tells whether what was read is what was saved. Orbax writes beside the final place and
renames: a run killed while saving still has the checkpoint before. Two are kept, so that a damaged
one does not cost the run.
"""

import contextlib
import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from align_jax.distributed import hosts
from align_jax.errors import RunError
from align_jax.files import refusal, write_json
from align_jax.models.config import TransformerConfig
from align_jax.models.frozen import combine, partition
from align_jax.trees import fingerprint, flatten, unflatten

# The field of the JSON object that holds the fingerprints of frozen parameters, by item.
_FROZEN = "frozen_fingerprints"
# The field that holds the fingerprints of what was saved, by item.
_SAVED = "fingerprints"
# The field that holds the model's `TransformerConfig`.
_ARCHITECTURE = "architecture"
# In the directory of a step: the sizes of its files in bytes.
_SIZES = "file_sizes.json"
# How many checkpoints are kept, beside the one that is being written.
_KEPT = 2


class _DamagedError(RunError):
    """A checkpoint whose files are not what was written."""


def _frozen(tree: Any) -> str | None:
    """The fingerprint of the frozen parameters in a tree, None if it has none."""
    _, frozen = partition(tree)
    return fingerprint(frozen) if jax.tree.leaves(frozen) else None


def _items(state: Any) -> dict[str, Any]:
    """The parts of a state that can be read one without the other.

    A policy that is trained with a critic is an item of its own, as one trained alone. A loss
    without a running state has no item.
    """
    model = state.model
    parts = model._asdict() if isinstance(model, tuple) else {"model": model}
    parts = {k: x for k, x in parts.items() if x is not None} | {"optimizer": state.optimizer}
    return parts | ({"running": state.running} if state.running else {})


class Checkpointer:
    """Saves and restores train states under `directory`, keeping the newest two.

    Where the newest is damaged, the one before is read and a warning printed.

    Args:
      directory: `WORKDIR/checkpoints`.
      clean: remove what a killed run left half-written, and a damaged checkpoint once the one
        before has been read; only for the run that saves.
    """

    def __init__(self, directory: Path, *, clean: bool = False):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._clean = clean
        self._damaged: set[int] = set()
        self.directory = Path(directory).resolve()
        self._saved: int | None = None  # the step whose files are not recorded yet
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(_KEPT),
                enable_async_checkpointing=True,
                cleanup_tmp_directories=clean,
            ),
            item_handlers={
                "model": ocp.StandardCheckpointHandler(),
                "critic": ocp.StandardCheckpointHandler(),
                "optimizer": ocp.StandardCheckpointHandler(),
                "running": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
            },
        )

    def latest_step(self) -> int | None:
        """Step of the newest finished checkpoint not found damaged so far, None if there is none.

        What `restore` will read may be older: the state that it returns has the step.
        """
        steps = [step for step in self._manager.all_steps() if step not in self._damaged]
        return max(steps, default=None)

    def save(self, state: Any, data: dict[str, Any]) -> None:
        """Starts writing a train state; its arrays may be donated as soon as this returns.

        Raises:
          RunError: the disk is full; also from `wait` and `close`, since writing goes on beside.
        """
        args = self._ocp.args
        items = _items(state)
        frozen = {name: frozen for name, tree in items.items() if (frozen := _frozen(tree))}
        if frozen:
            data = data | {_FROZEN: frozen}
        saved = {name: flatten(partition(tree)[0]) for name, tree in items.items()}
        data = data | {_SAVED: {name: fingerprint(leaves) for name, leaves in saved.items()}}
        config = getattr(items["model"], "config", None)
        if isinstance(config, TransformerConfig):
            data = data | {_ARCHITECTURE: dataclasses.asdict(config)}
        self._saved = int(state.step)
        with self._naming_a_full_disk():
            self._manager.save(
                self._saved,
                args=args.Composite(
                    **{name: args.StandardSave(leaves) for name, leaves in saved.items()},
                    data=args.JsonSave(data),
                ),
            )

    def restore(self, state: Any) -> tuple[Any, dict[str, Any]]:
        """The newest checkpoint, in the structure and with the shardings of the state `state`.

        Frozen parameters are those of `state`.

        Raises:
          RunError: every checkpoint is damaged; one holds other names or shapes, or was made with
            other frozen parameters.
        """
        step, (parts, data) = self._newest(lambda step: self._read(step, _items(state)))
        step = jax.device_put(np.int32(step), state.step.sharding)
        optimizer, running = parts.pop("optimizer"), parts.pop("running", {})
        model = state.model._replace(**parts) if isinstance(state.model, tuple) else parts["model"]
        return state._replace(step=step, model=model, optimizer=optimizer, running=running), data

    def restore_model(self, model: Any) -> Any:
        """The newest checkpoint's model alone, as `restore`."""
        return self._newest(lambda step: self._read(step, {"model": model}))[1][0]["model"]

    def restore_running(self, running: dict[str, Any]) -> dict[str, Any]:
        """The newest checkpoint's running state alone, as `restore`."""
        return self._newest(lambda step: self._read(step, {"running": running}))[1][0]["running"]

    def restore_data(self) -> dict[str, Any]:
        """The newest checkpoint's JSON object alone."""
        return self._newest(lambda step: self._read(step, {}))[1][1]

    def architecture(self) -> TransformerConfig:
        """Sizes and family of the newest checkpoint's model."""

        def read(step: int) -> TransformerConfig:
            self._check_sizes(step)
            args = self._ocp.args.Composite(data=self._ocp.args.JsonRestore())
            fields = self._manager.restore(step, args=args)["data"][_ARCHITECTURE]
            scaling = fields["rope_scaling"]
            fields["rope_scaling"] = scaling and tuple((name, value) for name, value in scaling)
            return TransformerConfig(**fields)

        return self._newest(read)[1]

    def _newest(self, read: Callable[[int], Any]) -> tuple[int, Any]:
        """The newest checkpoint that `read` finds whole: its step, and what `read` returns."""
        first: _DamagedError | None = None
        steps = sorted(set(self._manager.all_steps()) - self._damaged, reverse=True)
        for step in steps:
            error = result = None
            try:
                with self._naming_damage(step):
                    result = read(step)
            except _DamagedError as damage:
                error = damage
            # A host that reads its part alone may be the only one to see the damage.
            if not hosts.any_host(error is not None):
                self._remove_damaged()
                return step, result
            error = error or _DamagedError(
                f"another host cannot read the checkpoint of step {step} in {self.directory}."
            )
            first = first or error
            self._damaged.add(step)
            if step != steps[-1] and hosts.first():
                print(f"warning: {error} The checkpoint before it is used.", file=sys.stderr)
        self._damaged.clear()
        raise first or RunError(f"there is no checkpoint in {self.directory}.")

    def _remove_damaged(self) -> None:
        # The run goes on from an older step, and comes by the damaged one's number again.
        if self._clean:
            for step in sorted(self._damaged):
                self._manager.delete(step)

    def _read(self, step: int, items: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        args = self._ocp.args
        self._check_sizes(step)
        metadata = self._manager.item_metadata(step)
        wanted = {}
        for item, tree in items.items():
            leaves = flatten(partition(tree)[0])
            self._check(step, leaves, metadata[item])
            abstract = {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
                for name, leaf in leaves.items()
            }
            wanted[item] = args.StandardRestore(abstract)
        wanted["data"] = args.JsonRestore()
        restored = self._manager.restore(step, args=args.Composite(**wanted))
        data = dict(restored["data"])
        data.pop(_ARCHITECTURE, None)
        saved_on, saved = data.pop(_FROZEN, {}), data.pop(_SAVED, {})
        parts = {}
        for item in items:
            # Older checkpoints have no fingerprints.
            if item in saved and fingerprint(dict(restored[item])) != saved[item]:
                raise ValueError(f"the numbers in {item} are not those that were saved")
        for item, tree in items.items():
            if saved_on.get(item) != _frozen(tree):
                # A critic that starts as the policy has the policy's parameters, which come first.
                key = "config.critic_init" if item == "critic" else "config.model"
                raise RunError(
                    f"the checkpoint of step {step} in {self.directory} was made on other frozen "
                    f"parameters than those given: the model that {key} names has changed "
                    "since. Put back the one the run began with, or use another --workdir."
                )
            trained, frozen = partition(tree)
            parts[item] = combine(unflatten(trained, restored[item]), frozen)
        return parts, data

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
            self._record_sizes()

    def close(self) -> None:
        """Waits, then releases the background threads."""
        with self._naming_a_full_disk():
            self._manager.close()
            self._record_sizes()

    def _record_sizes(self) -> None:
        if self._saved is None or not hosts.first():
            return
        folder, self._saved = self.directory / str(self._saved), None
        if not folder.is_dir():  # it could not be written, which has been said
            return
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        write_json(folder / _SIZES, sizes)

    def _check_sizes(self, step: int) -> None:
        folder = self.directory / str(step)
        # A run that was killed may have had no time to write them.
        if not (folder / _SIZES).is_file():
            return
        for name, size in json.loads((folder / _SIZES).read_text(encoding="utf-8")).items():
            file = folder / name
            found = f"{file.stat().st_size:,} bytes" if file.is_file() else "gone"
            if found != f"{size:,} bytes":
                raise ValueError(f"{name} had {size:,} bytes and is {found}")

    @contextlib.contextmanager
    def _naming_damage(self, step: int) -> Iterator[None]:
        try:
            yield
        except (RunError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        # Orbax and TensorStore raise anything, bare Exception included, on damaged files.
        except Exception as error:
            raise _DamagedError(
                f"the checkpoint of step {step} in {self.directory} cannot be read, so its files "
                f"are damaged or incomplete ({_first_line(error)}). Copy it there again from where "
                "it is whole; or remove that directory (and finished.json beside it), and the same "
                "command goes on from the checkpoint before, or from the beginning."
            ) from error

    @contextlib.contextmanager
    def _naming_a_full_disk(self) -> Iterator[None]:
        try:
            yield
        # TensorStore makes a ValueError of what the operating system said.
        except (OSError, ValueError) as error:
            reason = refusal(error)
            if reason is None:
                raise
            raise RunError(
                f"a checkpoint could not be written to {self.directory}: {reason}, and the same "
                "command continues. What was saved before is whole."
            ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:160]}"


def require_space(directory: Path, state: Any) -> None:
    """Raises `RunError` if the checkpoints that a run in `directory` has to write will not fit.

    Two are kept, and while one is written the two before are still there: a run that starts needs
    room for three, one that goes on has the first or two of them on the disk already.
    """
    saved = [file for file in directory.glob("checkpoints/*") if file.name.isdigit()]
    copies = _KEPT + 1 - min(len(saved), _KEPT)
    needed = copies * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise RunError(
            f"{directory} has {free / 2**30:.2f} GiB free, and checkpoints need "
            f"{needed / 2**30:.2f} GiB. Free some space or choose another --workdir."
        )
