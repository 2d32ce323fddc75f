"""The deterministic loader: its whole state is one global example index.

The data set repeats without end, each epoch in its own order; the global index counts examples from
the start of epoch 0. A batch depends on (data, seed, index) alone, so a run resumed at an index, on
any number of processes, sees what the uninterrupted run would have seen.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np

from align_jax.errors import DataError


def permutation(size: int, *key: int) -> np.ndarray:
    """Returns a permutation `[size]` that depends on `key` (one or two integers) alone.

    Sorting raw Philox words, whose stream numpy guarantees, and not `Generator.permutation`, whose
    algorithm numpy may change: a run must resume under another numpy.
    """
    return np.argsort(_words(size, key), kind="stable")


def sample_with_replacement(size: int, *key: int) -> np.ndarray:
    """`size` numbers below `size` that depend on `key` alone, as `permutation`'s do."""
    return numbers_below(np.full(size, size), *key)


def numbers_below(bounds: np.ndarray, *key: int) -> np.ndarray:
    """A number from 0 to below each of `bounds` `[N]`, all above 0; they depend on `key` alone."""
    return (_words(len(bounds), key) % bounds.astype(np.uint64)).astype(np.int64)


def _words(size: int, key: Sequence[int]) -> np.ndarray:
    state = np.array([part % 2**64 for part in (*key, 0)[:2]], np.uint64)
    return np.random.Philox(key=state).random_raw(size)


class Loader:
    """Batches of `batch_size` examples at any global example index.

    `collate` turns a list of examples into a batch; `examples` carry an `id`. A batch may span two
    epochs. Raises DataError if the data set is empty or smaller than one batch.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        *,
        batch_size: int,
        seed: int,
        collate: Callable[[list[Any]], Any],
        shuffle: bool = True,
    ):
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; expected at least 1")
        if batch_size > len(examples):
            raise DataError(
                f"batch_size {batch_size} is larger than the data set of {len(examples)} examples: "
                "lower batch_size or give more data"
            )
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.collate = collate
        self.shuffle = shuffle
        # Two epochs: the one being read, and the next where a batch spans both.
        self._order = functools.lru_cache(maxsize=2)(self._epoch_order)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        size = len(self.examples)
        return permutation(size, self.seed, epoch) if self.shuffle else np.arange(size)

    def places(self, example_index: int, count: int) -> Iterator[int]:
        """Places in `examples` of the `count` that come from `example_index` on."""
        if example_index < 0:
            raise DataError(f"the example index is {example_index}; expected 0 or more")
        for index in range(example_index, example_index + count):
            epoch, offset = divmod(index, len(self.examples))
            yield int(self._order(epoch)[offset])

    def batch_at(self, example_index: int) -> tuple[Any, list[int]]:
        """Returns `(batch, example_ids)` of the examples from `example_index` on."""
        chosen = [self.examples[i] for i in self.places(example_index, self.batch_size)]
        return self.collate(chosen), [example.id for example in chosen]

    def batches(
        self, start: int = 0, *, prefetch: int = 2
    ) -> Generator[tuple[Any, list[int]], None, None]:
        """Yields `batch_at(start)`, `batch_at(start + batch_size)`, ... without end.

        A thread makes up to `prefetch` (at least 1) batches ahead. An error in it is raised here,
        with its own traceback; closing the iterator, or dropping it, ends the thread.
        """
        if prefetch < 1:
            raise DataError(f"prefetch is {prefetch}; expected at least 1")
        ready: queue.SimpleQueue = queue.SimpleQueue()
        slots = threading.Semaphore(prefetch)
        stopped = threading.Event()

        def produce() -> None:
            index = start
            while True:
                slots.acquire()
                if stopped.is_set():
                    return
                try:
                    ready.put((self.batch_at(index), None))
                except BaseException as error:
                    ready.put((None, error))
                    return
                index += self.batch_size

        thread = threading.Thread(target=produce, name="align_jax-loader", daemon=True)
        thread.start()
        try:
            while True:
                item, error = ready.get()
                if error is not None:
                    raise error
                slots.release()
                yield item
        finally:
            stopped.set()
            slots.release()
            thread.join()

    def __iter__(self) -> Iterator[tuple[Any, list[int]]]:
        return self.batches()
