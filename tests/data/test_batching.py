import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_jax.data.batching import (
    build_batch,
    example_size,
    longest_row,
    make_collate,
    round_up_to_bucket,
    separate_responses,
)
from align_jax.data.dataset import Data
from align_jax.data.tokenise import Example
from align_jax.errors import DataError

BUCKETS = (8, 16, 64, 256)


def example(prompt, responses, masks=None, id=0):
    masks = masks or [[1] * len(response) for response in responses]
    return Example(
        id=id,
        prompt=np.array(prompt, np.int32),
        responses=tuple(np.array(response, np.int32) for response in responses),
        response_masks=tuple(np.array(mask, np.float32) for mask in masks),
        extras={},
    )


def predictions_in(batch):
    """Every (response, context, target) of the arrays, by the mask rule of the model alone."""
    found = collections.Counter()
    rows, slots = np.nonzero(batch["target_mask"])
    for r, s in zip(rows, slots, strict=True):
        query = batch["predict_from"][r, s]
        segment, branch = batch["segment_ids"][r], batch["branch_ids"][r]
        assert segment[query] > 0
        seen = [
            j
            for j in range(query + 1)
            if segment[j] == segment[query] and branch[j] in (0, branch[query])
        ]
        assert list(batch["positions"][r, seen]) == list(range(len(seen)))
        context = tuple(batch["tokens"][r, seen].tolist())
        found[int(batch["target_response"][r, s]), context, int(batch["targets"][r, s])] += 1
    return found


def predictions_of(examples):
    """The same from the examples, one response after the other."""
    expected = collections.Counter()
    number = 0
    for one in examples:
        for response, mask in zip(one.responses, one.response_masks, strict=True):
            for j, token in enumerate(response.tolist()):
                context = (*one.prompt.tolist(), *response[:j].tolist())
                if mask[j] and context:
                    expected[number, context, token] += 1
            number += 1
    return expected


@st.composite
def _response(draw):
    tokens = draw(st.lists(st.integers(0, 9), min_size=1, max_size=7))
    mask = draw(st.lists(st.sampled_from([0, 1]), min_size=len(tokens), max_size=len(tokens)))
    return tokens, mask


_example = st.builds(
    lambda prompt, pairs: example(prompt, [p[0] for p in pairs], [p[1] for p in pairs]),
    st.lists(st.integers(0, 9), max_size=9),
    st.lists(_response(), min_size=1, max_size=3),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(_example, min_size=1, max_size=6), st.data())
def test_a_batch_holds_exactly_the_predictions_of_its_examples(examples, data):
    rows = data.draw(st.integers(1, len(examples)))
    batch = build_batch(examples, rows=rows, length_buckets=BUCKETS, target_buckets=BUCKETS)
    assert predictions_in(batch) == predictions_of(examples)
    real = batch["segment_ids"] > 0
    assert real.sum() == sum(len(e.prompt) + sum(map(len, e.responses)) for e in examples)
    for r in range(rows):
        length = real[r].sum()
        assert real[r, :length].all(), "rows are padded on the right"
        for name in ("tokens", "positions", "branch_ids"):
            assert not batch[name][r, length:].any()
        slots = int(batch["target_mask"][r].sum())
        for name in ("predict_from", "targets", "target_mask", "target_response"):
            assert not batch[name][r, slots:].any()
    for name, array in batch.items():
        assert array.dtype == (np.float32 if name == "target_mask" else np.int32)
        if not name.startswith("response_"):
            assert array.shape[0] == rows and array.shape[1] in BUCKETS
    responses = [response for e in examples for response in e.responses]
    prompts = [e.prompt for e in examples for _ in e.responses]
    ends = zip(batch["response_row"], batch["response_end"], strict=True)
    for (r, end), prompt, response in zip(ends, prompts, responses, strict=True):
        segment, branch = batch["segment_ids"][r], batch["branch_ids"][r]
        assert segment[end] > 0 and branch[end] > 0
        alike = (segment == segment[end]) & (branch == branch[end])
        assert np.flatnonzero(alike)[-1] == end
        np.testing.assert_array_equal(batch["tokens"][r, alike], response)
        on_prompt = (segment == segment[end]) & (branch == 0)
        np.testing.assert_array_equal(batch["tokens"][r, on_prompt], prompt)


@settings(max_examples=50, deadline=None)
@given(st.lists(_example, min_size=1, max_size=4))
def test_separate_rows_predict_what_shared_rows_predict(examples):
    arguments = dict(length_buckets=BUCKETS, target_buckets=BUCKETS)
    shared = build_batch(examples, rows=len(examples), **arguments)
    copies = separate_responses(examples)
    separate = build_batch(copies, rows=len(copies), **arguments)
    assert predictions_in(shared) == predictions_in(separate)
    assert set(np.unique(separate["branch_ids"])) <= {0, 1}


def test_a_preference_pair_by_hand():
    pairs = [example([5, 6], [[7, 2], [8]]), example([5], [[9], [2]])]
    batch = build_batch(pairs, rows=2, length_buckets=(6,), target_buckets=(4,))
    expected = {
        "tokens": [[5, 6, 7, 2, 8, 0], [5, 9, 2, 0, 0, 0]],
        "positions": [[0, 1, 2, 3, 2, 0], [0, 1, 1, 0, 0, 0]],
        "segment_ids": [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]],
        "branch_ids": [[0, 0, 1, 1, 2, 0], [0, 1, 2, 0, 0, 0]],
        "predict_from": [[1, 2, 1, 0], [0, 0, 0, 0]],
        "targets": [[7, 2, 8, 0], [9, 2, 0, 0]],
        "target_mask": [[1, 1, 1, 0], [1, 1, 0, 0]],
        "target_response": [[0, 0, 1, 0], [2, 3, 0, 0]],
        "response_row": [0, 0, 1, 1],
        "response_end": [3, 4, 1, 2],
    }
    assert set(batch) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(batch[name], values, err_msg=name)


def test_a_target_keeps_the_weight_of_its_token():
    one = example([5, 6], [[7, 2, 9], [8, 2]], masks=[[1, 0.25, 0], [0.5, 1]])
    batch = build_batch([one], rows=1, length_buckets=(8,), target_buckets=(5,))
    np.testing.assert_array_equal(batch["targets"], [[7, 2, 8, 2, 0]])
    np.testing.assert_array_equal(batch["target_mask"], [[1, 0.25, 0.5, 1, 0]])


def test_text_without_a_prompt_does_not_predict_its_first_token():
    batch = build_batch(
        [example([], [[4, 5, 2]])], rows=1, length_buckets=(4,), target_buckets=(4,)
    )
    assert predictions_in(batch) == {(0, (4,), 5): 1, (0, (4, 5), 2): 1}


def test_packing_balances_rows_and_is_deterministic():
    rng = np.random.default_rng(0)
    examples = [example([1] * n, [[2] * 3]) for n in rng.integers(1, 40, size=32)]
    arguments = dict(rows=4, length_buckets=(512,), target_buckets=(64,))
    batch = build_batch(examples, **arguments)
    lengths = (batch["segment_ids"] > 0).sum(axis=1)
    assert lengths.max() - lengths.min() <= 4, lengths
    for name, array in build_batch(examples, **arguments).items():
        np.testing.assert_array_equal(array, batch[name])


def test_widths_are_the_smallest_buckets():
    one = example([1] * 5, [[2] * 4])
    for buckets, width in (((9, 12), 9), ((16, 12), 12)):
        batch = build_batch([one], rows=1, length_buckets=buckets, target_buckets=(4, 8))
        assert batch["tokens"].shape == (1, width) and batch["targets"].shape == (1, 4)
    with pytest.raises(DataError, match=r"^9 fits .* \(4, 8\) of data.length_buckets"):
        build_batch([one], rows=1, length_buckets=(4, 8), target_buckets=(8,))
    with pytest.raises(DataError, match=r"^4 fits .* \(2,\) of data.target_buckets: .*least 4"):
        build_batch([one], rows=1, length_buckets=(16,), target_buckets=(2,))
    with pytest.raises(DataError, match="2 rows for 1 examples"):
        build_batch([one], rows=2, length_buckets=(16,), target_buckets=(8,))
    assert [round_up_to_bucket(n, (8, 4)) for n in (0, 4, 5, 8)] == [4, 4, 8, 8]


@settings(max_examples=100, deadline=None)
@given(st.lists(_example, min_size=1, max_size=6), st.data())
def test_the_longest_row_is_known_without_building_the_batch(examples, data):
    rows = data.draw(st.integers(1, len(examples)))
    batch = build_batch(examples, rows=rows, length_buckets=(10**4,), target_buckets=(10**4,))
    tokens = (batch["segment_ids"] > 0).sum(1).max()
    targets = (batch["target_mask"] > 0).sum(1).max()
    sizes = [example_size(example) for example in examples]
    assert longest_row(sizes, rows=rows) == (tokens, targets)


# --- values of tokens


def with_extras(one):
    """The example whose tokens carry themselves, and twice themselves and their place."""
    pairs = tuple(
        np.stack([2 * tokens, np.arange(len(tokens))], 1).astype(np.float32)
        for tokens in one.responses
    )
    return dataclasses.replace(one, token_extras={"token": one.responses, "pair": pairs})


def check_extras(batch):
    """Every target's values are its own, and nothing else has any."""
    counted = batch["target_mask"] > 0
    assert batch["token"].dtype == np.int32 and batch["pair"].dtype == np.float32
    assert batch["pair"].shape == (*counted.shape, 2)
    np.testing.assert_array_equal(batch["token"], batch["targets"])
    np.testing.assert_array_equal(batch["pair"][..., 0], 2 * batch["targets"])
    assert not batch["token"][~counted].any() and not batch["pair"][~counted].any()


@settings(max_examples=100, deadline=None)
@given(st.lists(_example, min_size=1, max_size=6), st.data())
def test_values_of_tokens_stand_where_their_targets_do(examples, data):
    rows = data.draw(st.integers(1, len(examples)))
    examples = [with_extras(one) for one in examples]
    arguments = dict(length_buckets=BUCKETS, target_buckets=BUCKETS)
    batch = build_batch(examples, rows=rows, **arguments)
    check_extras(batch)
    # The place of every target in its response, in the order of the responses.
    expected, number = collections.Counter(), 0
    for one in examples:
        for mask in one.response_masks:
            places = np.flatnonzero(mask)
            expected.update((number, int(j)) for j in places if j or len(one.prompt))
            number += 1
    counted = batch["target_mask"] > 0
    places = batch["pair"][..., 1][counted].astype(int).tolist()
    assert collections.Counter(zip(batch["target_response"][counted], places)) == expected
    copies = separate_responses(examples)
    check_extras(build_batch(copies, rows=len(copies), **arguments))


def test_values_of_tokens_with_prompts_that_have_no_target():
    examples = [
        example([1, 2], []),
        example([1], [[3, 4], [5]]),
        example([], [[6, 7, 8]]),
        example([9], [[6, 7]], masks=[[0, 0]]),
    ]
    batch = build_batch(
        [with_extras(one) for one in examples], rows=2, length_buckets=(16,), target_buckets=(8,)
    )
    check_extras(batch)
    assert sorted(batch["pair"][batch["target_mask"] > 0].tolist()) == [
        [6, 0],
        [8, 1],
        [10, 0],
        [14, 1],
        [16, 2],
    ]


def test_values_of_tokens_in_micro_batches_of_unequal_width():
    examples = [example([1], [list(range(2, 2 + n))]) for n in (3, 9, 1, 2)]
    data = Data(
        batch_size=4, accumulation=2, rows=1, length_buckets=(8, 16), target_buckets=(4, 16)
    )
    batch = make_collate(data)([with_extras(one) for one in examples])
    assert batch["pair"].shape == (2, 1, 16, 2)
    check_extras(batch)


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"value": (np.zeros(1), np.zeros(1))}, r"'value' of example 1 .* \[1, 1\] .*\[2, 1\]"),
        ({"value": (np.zeros(2),)}, r"'value' of example 1 .* \[2\] tokens, not \[2, 1\]"),
        ({"value": (np.zeros((2, 3)), np.zeros((1, 4)))}, r"shape \(4,\) .* of \(3,\)"),
        ({"value": (np.zeros(2), np.zeros(1, np.int32))}, "are int32 .* expected float64"),
        ({"targets": (np.zeros(2), np.zeros(1))}, "no array of a batch"),
    ],
)
def test_values_that_do_not_fit_the_tokens_are_refused(extras, message):
    one = dataclasses.replace(example([1], [[2, 3], [4]], id=1), token_extras=extras)
    with pytest.raises(DataError, match=message):
        build_batch([one], rows=1, length_buckets=(8,), target_buckets=(8,))


def test_all_examples_have_the_same_values():
    examples = [with_extras(example([1], [[2]])), example([1], [[2]], id=7)]
    with pytest.raises(DataError, match=r"example 7: \[\]; expected .* 0: \['pair', 'token'\]"):
        build_batch(examples, rows=2, length_buckets=(8,), target_buckets=(8,))
