"""Run by test_agreement.py on two hosts that differ in what they know, find and meet.

agreement.py FOLDER
"""

import contextlib
import io
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from align_jax.data.dataset import Data
from align_jax.data.tokenise import Example
from align_jax.distributed import hosts
from align_jax.distributed.mesh import initialize_distributed, make_mesh
from align_jax.distributed.partitioning import replicated
from align_jax.errors import DataError, RunError
from align_jax.models.interchange import load_model
from align_jax.training import reference
from align_jax.training.checkpoint import Checkpointer
from align_jax.training.optimizer import Optimizer, make_optimizer
from align_jax.training.phases import Phases
from align_jax.training.signals import StopSignals
from align_jax.training.state import init_state
from align_jax.training.workdir import only_run_in


def told(host):
    value = {"host": host, "text": "ä" * 3_000_000, "none": None}
    assert hosts.broadcast_json(value) == {**value, "host": 0}
    assert hosts.on_first_host(lambda: [host, 0.1]) == [0, 0.1]
    assert (hosts.broadcast_array(np.full(3, host, np.float32)) == 0).all()
    assert hosts.first() == (host == 0) and hosts.several()


def errors(host):
    def refuse():
        raise DataError(f"line 3 on host {host}")

    def fail():
        raise ValueError("no such thing")

    for function, kind, message in (
        (refuse, DataError, "line 3 on host 0"),
        (fail, (ValueError, RunError), "no such thing"),
    ):
        try:
            hosts.on_first_host(function)
        except kind as error:
            assert message in str(error)
        else:
            raise AssertionError("no error")


def flags(host):
    assert hosts.any_host(host == 1) and hosts.any_host(True) and not hosts.any_host(False)
    with StopSignals() as stop:
        found = []
        for step in range(6):
            if step == 2 and host == 1:
                stop.received = 15
            found.append(stop.agreed(now=step == 5))
        stop.received = None
    assert found == [None, None, None, 15, 15, 15], found
    with StopSignals() as stop:  # a signal in the last step
        stop.received = 15 if host == 1 else None
        assert stop.agreed(now=True) == 15
        stop.received = None


def files(host, folder):
    """A file that one host writes and the other reads; its phase is run on both or on none."""
    calls = []

    def phase():
        calls.append(host)
        return [{"host": host}]

    for _ in range(2):  # the second host has a disk of its own
        phases = Phases(folder / "phases" / str(host))
        (folder / "phases" / str(host)).mkdir(parents=True, exist_ok=True)
        assert phases.run("sample", phase) == [{"host": 0}]
    assert calls == [host]


def references(host, mesh):
    """A cache that is warm at one host, then at the other, then damaged at the first."""
    rng = np.random.default_rng(0)
    lengths = [(5, 4, 6), (2, 7, 3), (4, 1, 2), (3, 3, 3)]
    examples = []
    for index, (prompt, *responses) in enumerate(lengths):
        drawn = tuple(rng.integers(8, 264, size, np.int32) for size in responses)
        masks = tuple(np.ones(len(response), np.float32) for response in drawn)
        examples.append(
            Example(index, rng.integers(8, 264, prompt, np.int32), drawn, masks, extras={})
        )
    data = Data(batch_size=4, length_buckets=(32,), target_buckets=(16,))
    model = load_model("tiny", mesh=mesh)
    values = reference.reference_log_probs(model, mesh, examples, data)
    folder = reference.cache_directory() / "reference"
    assert folder.exists() == (host == 0)
    again = reference.reference_log_probs(model, mesh, examples, data)
    np.testing.assert_array_equal(again, values)
    if host == 0:
        (file,) = folder.iterdir()
        file.write_bytes(file.read_bytes()[:100])
    again = reference.reference_log_probs(model, mesh, examples, data)
    np.testing.assert_array_equal(again, values)


def checkpoints(host, mesh, folder):
    """The newest is damaged: both read the one before."""
    state = init_state(load_model("tiny", mesh=mesh), make_optimizer(Optimizer(), 10), mesh)
    checkpointer = Checkpointer(folder / "checkpoints", clean=True)
    for step in (1, 2):
        number = jax.device_put(jnp.int32(step), replicated(mesh))
        checkpointer.save(state._replace(step=number), {"next_example": step})
        checkpointer.wait()
    if host == 0:
        file = folder / "checkpoints" / "2" / "file_sizes.json"
        sizes = json.loads(file.read_text())
        file.write_text(json.dumps(dict.fromkeys(sizes, 1)))
    hosts.barrier("damaged")
    with contextlib.redirect_stderr(io.StringIO()) as said:
        restored, data = checkpointer.restore(state)
    assert int(restored.step) == 1 and data == {"next_example": 1}
    assert ("The checkpoint before it is used." in said.getvalue()) == (host == 0)
    checkpointer.close()


def locks(host, folder):
    with only_run_in(folder):
        hosts.barrier("locked")
        assert json.loads((folder / "run.lock").read_text())["pid"] > 0
        hosts.barrier("read")
    hosts.barrier("released")
    assert not (folder / "run.lock").exists()


def main(folder: pathlib.Path) -> None:
    initialize_distributed()
    host, mesh = jax.process_index(), make_mesh()
    told(host)
    errors(host)
    flags(host)
    files(host, folder)
    locks(host, folder)
    references(host, mesh)
    checkpoints(host, mesh, folder)


if __name__ == "__main__":
    with hosts.telling_failures(except_for=ZeroDivisionError):
        main(pathlib.Path(sys.argv[1]))
