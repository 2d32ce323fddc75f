"""What several hosts agree on: where they could differ, the first decides and the others are told.

Files, caches, clocks, signals and Python rewards may differ from host to host, and a host that
goes another way than the rest stops all of them in the next collective operation. On one process
every function here does nothing or returns what it was given.

Every host calls these functions in the same order. JSON values and barriers go through the
coordination service that `jax.distributed.initialize` starts on the first host; flags and arrays
go through the devices.
"""

import atexit
import contextlib
import ctypes
import functools
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np

# jax has no public way to its coordination service.
from jax._src.distributed import global_state as _jax_state
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from align_jax.errors import DataError, ModelError, RewardError, RunError

Value = TypeVar("Value")

# A host that is not heard of for this many seconds is missing, and the others end.
SILENCE = 40.0
# A host that sees another fail gives itself this many seconds to fail of the same cause.
GRACE = 5.0
_PERIOD = 2.0  # seconds between two signs of life
_DAY = 24 * 60 * 60 * 1000  # milliseconds; whoever waits so long is ended by `_Watch`
_CHUNK = 2**20  # characters of JSON in one message
_ROOM = "align_jax"
_END = "end"  # the last sign of life of a host that is done
_USER_ERRORS = (RunError, DataError, ModelError, RewardError)

_numbers = itertools.count()
_failure: str | None = None  # what this host has told the others it ends with
_watch: "_Watch | None" = None


def several() -> bool:
    """Whether this process is one of several."""
    return _jax_state.client is not None and _jax_state.num_processes > 1


def first() -> bool:
    """Whether this is the host that writes files and decides."""
    return not several() or _jax_state.process_id == 0


def barrier(name: str) -> None:
    """Returns when all hosts are here; goes between a file's writing and others' reading it."""
    if several():
        key = f"{_ROOM}/barrier/{next(_numbers)}/{name}"
        _jax_state.client.wait_at_barrier(key, timeout_in_ms=_DAY)


def broadcast_json(value: Value) -> Value:
    """The first host's `value`; the others' is ignored. Anything that JSON can hold."""
    if not several():
        return value
    client = _jax_state.client
    key = f"{_ROOM}/json/{next(_numbers)}"
    if first():
        text = json.dumps(value)
        parts = [text[start : start + _CHUNK] for start in range(0, len(text), _CHUNK)]
        for number, part in enumerate(parts):
            client.key_value_set(f"{key}/{number}", part)
        client.key_value_set(f"{key}/parts", str(len(parts)))
    else:
        count = int(client.blocking_key_value_get(f"{key}/parts", _DAY))
        parts = [client.blocking_key_value_get(f"{key}/{n}", _DAY) for n in range(count)]
        value = json.loads("".join(parts))
    barrier("told")
    if first():
        client.key_value_delete(f"{key}/")
    return value


def broadcast_array(value: np.ndarray) -> np.ndarray:
    """The first host's array; the others give one of the same shape and type."""
    return multihost_utils.broadcast_one_to_all(value) if several() else value


def gathered(leaf: jax.Array) -> jax.Array | np.ndarray:
    """The whole array on this host. If it is spread over several hosts, all of them call this."""
    if leaf.is_fully_addressable:
        return leaf
    return multihost_utils.process_allgather(leaf, tiled=True)


def on_first_host(function: Callable[[], Value]) -> Value:
    """The result of `function`, which runs on the first host alone; it is told as JSON.

    Raises:
      RunError, DataError, ModelError, RewardError: raised by `function`: on every host.
      RunError: on the others, where `function` raised anything else.
    """
    if not several():
        return function()
    if first():
        try:
            value = function()
        except Exception as error:
            broadcast_json({"error": type(error).__name__, "message": str(error)})
            raise
        return broadcast_json({"value": value})["value"]
    told = broadcast_json({})
    if "error" not in told:
        return told["value"]
    kinds = {kind.__name__: kind for kind in _USER_ERRORS}
    if told["error"] in kinds:
        raise kinds[told["error"]](told["message"])
    raise RunError(f"the first host failed: {told['error']}: {told['message']}")


def largest(value: int) -> Callable[[], int]:
    """Starts to compare the hosts' values; the call that is returned waits for the largest.

    The comparison is queued on the devices behind what they are doing. Waiting for the answer a
    step later costs nothing.
    """
    if not several():
        return lambda: value
    mesh, compare = _comparison()
    sharding = NamedSharding(mesh, PartitionSpec("devices"))
    with jax.set_mesh(mesh):
        values = jax.make_array_from_callback(
            (mesh.size,), sharding, lambda index: np.full(1, value, np.int32)
        )
        answer = compare(values)
    return lambda: int(answer)


def any_host(flag: bool) -> bool:
    """Whether `flag` is true on any host."""
    return bool(largest(int(flag))())


@functools.cache
def _comparison() -> tuple[Mesh, Callable[[jax.Array], jax.Array]]:
    mesh = jax.make_mesh((jax.device_count(),), ("devices",), (jax.sharding.AxisType.Auto,))
    return mesh, jax.jit(
        lambda values: values.max(), out_shardings=NamedSharding(mesh, PartitionSpec())
    )


# --- hosts that are missing, and hosts that fail


def watch() -> None:
    """Ends this process with a message when another host is missing or has failed.

    `initialize_distributed` calls it once the hosts have met.
    """
    global _watch
    if several() and _watch is None:
        _watch = _Watch()
        _watch.start()
        atexit.register(_watch.leave)  # before jax's own, which waits for all hosts
        _say_so_when_jax_aborts()


@contextlib.contextmanager
def telling_failures(*, except_for: type[Exception]) -> Iterator[None]:
    """An exception that ends this host's run is told to the others, so that they end as well.

    Args:
      except_for: what all hosts raise together.
    """
    try:
        yield
    except except_for:
        raise
    except BaseException as error:
        if several():
            if isinstance(error, jax.errors.JaxRuntimeError):
                # A collective operation fails at once when a host dies. `_Watch` needs a while to
                # see which, and ends this process.
                time.sleep(SILENCE + 2 * _PERIOD)
            users = isinstance(error, _USER_ERRORS)
            name = "" if users else f"{type(error).__name__}: "
            _tell_failure(f"{name}{error}", status=2 if users else 1)
        raise


def _tell_failure(message: str, *, status: int) -> None:
    global _failure
    _failure = message
    _watch.failed_with = status
    key = f"{_ROOM}/failed/{_jax_state.process_id}"
    _jax_state.client.key_value_set(key, message, allow_overwrite=True)


class _Watch(threading.Thread):
    """Gives signs of life to the other hosts, and looks for theirs."""

    def __init__(self):
        super().__init__(name="align_jax hosts", daemon=True)
        self.failed_with: int | None = None  # this host's exit status, once it has told
        self._client = _jax_state.client
        self._me, self._count = _jax_state.process_id, _jax_state.num_processes
        self._left = threading.Event()
        self._heard = {host: ("", time.monotonic()) for host in range(self._count)}
        self._client.key_value_set(f"{_ROOM}/name/{self._me}", socket.gethostname())

    def run(self) -> None:
        for number in itertools.count():
            if self._left.wait(_PERIOD):
                return
            try:
                self._give_sign(str(number))
                signs, failures = self._read("alive"), self._read("failed")
            except Exception:  # the coordination service is gone, or slow
                if not _first_host_answers():
                    _end(_first_host_is_gone())
                continue
            self._look_at(signs)
            others = {host: text for host, text in failures.items() if host != self._me}
            if others and self.failed_with is None:
                if not self._left.wait(GRACE) and self.failed_with is None:
                    host, text = min(others.items())
                    self._give_sign(_END)  # a host that failed waits for the others to know
                    _end(f"{self._called(host)} has failed, so this one ends as well: {text}")

    def leave(self) -> None:
        """Run at exit: a host that is done is not missing, and one that failed waits for nobody."""
        self._left.set()
        with contextlib.suppress(Exception):
            self._give_sign(_END)
            if self.failed_with is None:
                return
            end = time.monotonic() + GRACE + 2 * _PERIOD
            while time.monotonic() < end:  # the others read this host's message through it
                over = self._read("failed").keys() | {
                    host for host, sign in self._read("alive").items() if sign == _END
                }
                if len(over) == self._count:
                    break
                time.sleep(0.2)
        sys.stdout.flush()
        sys.stderr.flush()
        if self.failed_with is not None:
            os._exit(self.failed_with)  # jax would wait for hosts that are gone

    def _give_sign(self, sign: str) -> None:
        self._client.key_value_set(f"{_ROOM}/alive/{self._me}", sign, allow_overwrite=True)

    def _read(self, folder: str) -> dict[int, str]:
        found = self._client.key_value_dir_get(f"{_ROOM}/{folder}/")
        return {int(key.rsplit("/", 1)[-1]): value for key, value in found}

    def _look_at(self, signs: dict[int, str]) -> None:
        now = time.monotonic()
        for host, (sign, since) in self._heard.items():
            if signs.get(host, "") not in (sign, _END) or signs.get(host) == _END:
                self._heard[host] = signs[host], now
            elif now - since > SILENCE and host != self._me:
                _end(
                    f"{self._called(host)} is missing: it was not heard of for {SILENCE:.0f} "
                    "seconds. Its process was killed, or its machine or network is gone. "
                    "The checkpoints are whole: start the same command on all hosts, and it "
                    "continues."
                )

    def _called(self, host: int) -> str:
        name = dict(self._read("name")).get(host, "unknown")
        return f"host {host} of {self._count} ({name})"


def _end(message: str) -> None:
    print(f"\nalign-jax: error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def _first_host_answers() -> bool:
    host, _, port = _jax_state.coordinator_address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
            return True
    except OSError:
        return False


def _first_host_is_gone() -> str:
    return (
        f"host 0 of {_jax_state.num_processes} is missing: nobody answers at "
        f"{_jax_state.coordinator_address}, where the hosts meet. Its process was killed, or its "
        "machine or network is gone. The checkpoints are whole: start the same command on all "
        "hosts, and it continues."
    )


def _say_so_when_jax_aborts() -> None:
    """Replaces jax's abort by a message when the first host is gone.

    A process that loses its coordinator is aborted by a thread of jax's, at once and without a
    hook: the callback that jaxlib takes for this fails with std::bad_cast (0.10.2). Python's own
    handlers run in the main thread, too late for SIGABRT, hence ctypes.
    """

    def aborted(number: int) -> None:
        if _watch.failed_with is not None:  # the first host has read why, and has ended first
            os._exit(_watch.failed_with)
        if not _first_host_answers():
            _end(_first_host_is_gone())
        libc.signal(number, None)  # something else is wrong: abort as usual

    global _abort_handler  # C does not keep it alive
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    _abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    libc.signal(signal.SIGABRT, ctypes.cast(_abort_handler, ctypes.c_void_p))
