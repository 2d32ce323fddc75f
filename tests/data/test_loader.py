import itertools
import threading
import time
import traceback
import types

import numpy as np
import pytest

from align_jax.data.loader import Loader, permutation
from align_jax.errors import DataError

PINNED = [6, 1, 8, 5, 2, 7, 9, 4, 3, 0]
EXAMPLES = [types.SimpleNamespace(id=100 + i) for i in range(10)]


def collate(examples):
    return np.array([example.id for example in examples])


def make(examples=EXAMPLES, batch_size=4, seed=3, collate=collate, **arguments):
    return Loader(examples, batch_size=batch_size, seed=seed, collate=collate, **arguments)


def take(iterator, count):
    try:
        return [ids for _, ids in itertools.islice(iterator, count)]
    finally:
        iterator.close()


def threads():
    return [t for t in threading.enumerate() if t.name == "align_jax-loader"]


def test_every_epoch_has_every_example_once_in_its_own_order():
    loader = make()
    stream = sum(take(loader.batches(), 10), [])
    epochs = [stream[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(100, 110)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert stream != sum(take(make(seed=4).batches(), 10), [])
    ordered = sum(take(make(shuffle=False).batches(), 5), [])
    assert ordered == list(range(100, 110)) * 2


def test_the_batch_is_collated_from_the_examples_it_names():
    batch, ids = make().batch_at(8)
    assert list(batch) == ids


def test_places_are_those_of_the_batches():
    loader = make()
    ids = sum((loader.batch_at(8 + 4 * step)[1] for step in range(3)), [])
    assert [EXAMPLES[place].id for place in loader.places(8, 12)] == ids


@pytest.mark.parametrize("start", [0, 4, 8, 12, 40, 4000])
def test_resuming_gives_the_batches_of_the_uninterrupted_run(start):
    loader = make()
    resumed = take(make().batches(start), 5)
    assert resumed == [loader.batch_at(start + 4 * step)[1] for step in range(5)]
    if start <= 40:
        assert resumed == take(loader.batches(), start // 4 + 5)[start // 4 :]


def test_the_order_is_the_same_with_every_numpy():
    # Pinned: an order that changes with a version would break resumed runs.
    assert permutation(10, 3, 0).tolist() == PINNED
    assert permutation(10, 3).tolist() == PINNED
    assert permutation(10, 3, 1).tolist() != PINNED
    assert sorted(permutation(10, -3, 1)) == list(range(10))


def test_prefetching_stays_a_little_ahead_and_stops():
    made = []

    def slow(examples):
        made.append(len(made))
        return collate(examples)

    before = len(threads())
    batches = make(collate=slow).batches(prefetch=2)
    next(batches)
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 3
    assert len(threads()) == before + 1
    batches.close()
    assert len(threads()) == before
    assert next(batches, None) is None


def test_a_dropped_iterator_ends_its_thread():
    before = len(threads())
    for _ in make():
        break
    assert len(threads()) == before


def test_errors_in_the_thread_reach_the_reader_with_their_traceback():
    def broken(examples):
        if examples[0].id == EXAMPLES[4].id:
            raise KeyError("bad example")
        return collate(examples)

    batches = make(collate=broken, shuffle=False).batches()
    next(batches)
    with pytest.raises(KeyError, match="bad example") as caught:
        next(batches)
    assert "in broken" in "".join(traceback.format_exception(caught.value))
    assert not threads()


def test_wrong_sizes():
    with pytest.raises(DataError, match="batch_size 11 is larger than the data set of 10 examples"):
        make(batch_size=11)
    with pytest.raises(DataError, match="batch_size is 0"):
        make(batch_size=0)
    with pytest.raises(DataError, match="example index is -4"):
        make().batch_at(-4)
    assert sorted(make(batch_size=10).batch_at(0)[1]) == [e.id for e in EXAMPLES]
