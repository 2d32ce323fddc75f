"""Progress on the terminal: a bar, or now and then a line in a log file."""

import math
import sys
from collections.abc import Iterable

from tqdm import tqdm


class _Lines(tqdm):
    """tqdm in a log file: a line at a time instead of one line overwritten."""

    @staticmethod
    def status_printer(file):
        def print_status(status: str) -> None:
            if not status.strip():
                return
            file.write(status.rstrip() + "\n")
            file.flush()

        return print_status

    def close(self) -> None:
        shown = self.last_print_t >= self.start_t + self.delay
        if not self.disable and shown and self.last_print_n < self.n:
            self.display()
        # What was never shown, tqdm closes without printing: here, not the last line a second time.
        self.delay = math.inf
        super().close()


def progress(
    iterable: Iterable | None = None,
    *,
    description: str,
    total: float | None = None,
    unit: str = "it",
    initial: int = 0,
) -> tqdm:
    """tqdm with speed and time left, over `iterable` or, given `total`, moved by `.update(n)`.

    On a terminal a bar. Elsewhere (a log file, CI) at most one line every 10 seconds, and none
    for what is done sooner. `initial` is where a continued run goes on; close it or use `with`.
    """
    settings = dict(desc=description, total=total, unit=unit, initial=initial, file=sys.stderr)
    if sys.stderr.isatty():
        return tqdm(iterable, dynamic_ncols=True, **settings)
    return _Lines(iterable, ncols=80, delay=10, mininterval=10, **settings)
