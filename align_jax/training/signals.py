"""Stopping cleanly: SIGTERM, SIGHUP or Ctrl-C lets a loop save what it has, on all hosts at once.

A signal is noted at once and acted on at the next place where something can be saved: a
compilation, which holds the main thread for minutes, ends first. Schedulers repeat their SIGTERM,
so a repetition changes nothing; only a second Ctrl-C acts as usual.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from align_jax.distributed import hosts

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# The signal that came outside of every loop, None if none did: the next loop acts on it.
_noted: int | None = None
# Whether the main thread has seen a signal, and in how many loops it is.
_handled = threading.Event()
_loops = 0
_PATIENCE = 5.0  # seconds for the main thread to see a signal


class Interrupted(Exception):
    """A signal asked the run to stop; everything needed to go on has been saved."""

    def __init__(self, signum: int, step: int):
        self.signum = signum
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}, which is saved. "
            "The same command continues from there."
        )


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP came where there was nothing to save."""

    def __init__(self, signum: int):
        self.signum = signum
        super().__init__(
            f"stopped by {signal.Signals(signum).name}. The same command goes on from what is "
            "finished."
        )


@contextlib.contextmanager
def stopping_between_loops() -> Iterator[None]:
    """Around a whole run: a signal outside of every loop raises `Stopped` or KeyboardInterrupt.

    On several hosts it is only noted: the next loop's hosts agree on a step, since one that left
    alone would leave the others waiting. It is also noted in case the exception is lost in one of
    jax's callbacks, as KeyboardInterrupt often is.
    """
    global _noted

    def receive(number: int, frame: Any) -> None:
        global _noted
        _handled.set()
        again, _noted = _noted is not None, number
        if not hosts.several() and (not again or number == signal.SIGINT):
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)

    restore = _install(receive)
    silence = _speak_for_a_busy_main_thread()
    try:
        yield
    finally:
        silence()
        restore()
        _noted = None


def _speak_for_a_busy_main_thread() -> Callable[[], None]:
    """Answers a signal that the main thread cannot: it compiles, or waits for the other hosts.

    In a loop there may be something to save, so that the main thread is waited for. Outside there
    is nothing, and the process ends. The function returned ends the listening.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    over = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def listen() -> None:
        said = False
        while numbers := os.read(reader, 64):
            stopping = [number for number in numbers if number in _STOPPING]
            # A thread may come late: what it hears of a run that is over is not for the next one.
            if said or not stopping or _handled.wait(_PATIENCE) or over.is_set():
                continue
            said, name = True, signal.Signals(stopping[0]).name
            if _loops or hosts.several():
                _say(f"{name} is noted. The run saves what it has and stops when it can.")
            elif not (_handled.wait(_PATIENCE) or _loops or over.is_set()):
                _say(str(Stopped(stopping[0])))
                os._exit(128 + stopping[0])
        os.close(reader)

    def silence() -> None:
        over.set()
        signal.set_wakeup_fd(before)
        os.close(writer)

    _handled.clear()
    threading.Thread(target=listen, name="align_jax signals", daemon=True).start()
    return silence


def _say(message: str) -> None:
    print(f"\nalign-jax: {message}", file=sys.stderr, flush=True)


class StopSignals:
    """Turns SIGTERM, SIGHUP or SIGINT into a flag; a second SIGINT acts as usual.

    A signal that came too late for the loop to stop for acts as usual when the loop is over.

    Args:
      active: False leaves signals as they are, for a loop that could save nothing.
    """

    def __init__(self, *, active: bool = True):
        self._active = active
        self.received: int | None = None
        self._told: Callable[[], int] | None = None
        self._restore: Callable[[], None] = lambda: None

    def __enter__(self) -> "StopSignals":
        global _loops
        _loops += self._active
        if self._active:
            self.received = _noted
            self._restore = _install(self._receive)
        return self

    def agreed(self, *, now: bool) -> int | None:
        """The signal that all hosts stop for after this step, None to go on.

        Every host calls it once a step. On one host it is what was received. On several they are
        asked in every step, and the answer is read a step later so that nobody waits for the
        device.

        Args:
          now: wait for this step's answer: in the last step, and where steps take long.
        """
        if not self._active or not hosts.several():
            return self.received
        asked = hosts.largest(self.received or 0)
        answer = asked if now else self._told
        earlier, self._told = self._told, asked
        found = answer() if answer is not None else 0
        if now and earlier is not None:
            found = max(found, earlier())
        return found or None

    def _receive(self, number: int, frame: Any) -> None:
        _handled.set()
        if self.received is not None and number == signal.SIGINT:
            self._restore()
            raise KeyboardInterrupt
        if self.received is None:
            self.received = number

    def __exit__(self, kind: type | None, *exception: Any) -> None:
        global _loops
        _loops -= self._active
        self._restore()
        if kind is None and self.received is not None:
            signal.raise_signal(self.received)


def _install(handler: Callable[[int, Any], None]) -> Callable[[], None]:
    """Handles the signals that stop a run; the function returned puts the old handlers back."""
    # Only the main thread may install handlers; in a notebook's worker thread there are none.
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    previous = {
        number: signal.signal(number, handler)
        for number in _STOPPING
        # What runs under nohup outlives its terminal.
        if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN)
    }

    def restore() -> None:
        for number, old in previous.items():
            signal.signal(number, old)

    return restore
