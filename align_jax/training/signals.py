"""Stopping cleanly: the first SIGTERM or SIGINT lets a loop save what it has."""

import signal
import threading
from typing import Any


class Interrupted(Exception):
    """A signal asked the run to stop; everything needed to go on has been saved."""

    def __init__(self, signum: int, step: int):
        self.signum = signum
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}, which is saved. "
            "The same command continues from there."
        )


class StopSignals:
    """Turns the first SIGTERM or SIGINT into a flag; a second one acts as usual.

    Args:
      active: False leaves signals as they are, for a loop that could save nothing.
    """

    def __init__(self, *, active: bool = True):
        self._active = active
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        # Only the main thread may install handlers; in a notebook's worker thread there are none.
        if self._active and threading.current_thread() is threading.main_thread():
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
