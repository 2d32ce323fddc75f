"""The batch layout of all offline algorithms: rows of right-padded, possibly packed examples.

R rows of T tokens, S targets a row, N responses in the batch (numbered through the examples in
order):

    tokens          [R,T] int32    0 where padded, never inspected
    positions       [R,T] int32    from 0 in each example; every response continues at len(prompt)
    segment_ids     [R,T] int32    0 = padding; the examples in a row are 1, 2, ...
    branch_ids      [R,T] int32    0 = prompt; 1, 2, ... = its responses, blind to each other
    predict_from    [R,S] int32    index in the row of the hidden state that predicts the target
    targets         [R,S] int32    the token to be predicted
    target_mask     [R,S] float32  the weight of the target: 1, 0 where padded
    target_response [R,S] int32    the response (0..N-1) the target belongs to, 0 where masked
    response_row    [N]   int32    the row that the response stands in
    response_end    [N]   int32    index in that row of its last token, EOS included
    NAME            [R,S,...]      `Example.token_extras` of the targets; 0 where padded

A prompt is there once for all its responses, and only positions with a target reach the vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from align_jax.data.tokenise import Example
from align_jax.errors import DataError

Batch = dict[str, np.ndarray]


def round_up_to_bucket(
    length: int, buckets: Sequence[int], *, key: str = "data.length_buckets"
) -> int:
    """Returns the smallest bucket that holds `length`.

    Raises DataError naming the config key `key` if none does.
    """
    fitting = [bucket for bucket in buckets if bucket >= length]
    if not fitting:
        raise DataError(
            f"{length} fits in none of the buckets {tuple(buckets)} of {key}: add a bucket of at "
            f"least {length}, lower data.max_length or, if data.rows packs examples, raise it"
        )
    return min(fitting)


def num_tokens(example: Example) -> int:
    """Tokens an example takes up in its row."""
    return len(example.prompt) + sum(map(len, example.responses))


def example_size(example: Example) -> tuple[int, int]:
    """`(tokens, targets)` an example takes up in its row."""
    return num_tokens(example), sum(int(counts.sum()) for counts in _target_places(example))


def longest_row(sizes: Sequence[tuple[int, int]], *, rows: int) -> tuple[int, int]:
    """`(tokens, targets)` of `build_batch`'s longest row for examples of these sizes."""
    members = _assign([tokens for tokens, _ in sizes], rows)
    tokens, targets = ([sum(sizes[i][part] for i in row) for row in members] for part in (0, 1))
    return max(tokens), max(targets)


def build_batch(
    examples: Sequence[Example],
    *,
    rows: int,
    length_buckets: Sequence[int],
    target_buckets: Sequence[int],
) -> Batch:
    """Lays `examples` out in `rows` rows, as the module's docstring says.

    As many rows as examples: example r is row r. Fewer rows: examples are packed, the longest first
    into the row with the fewest tokens. The first token of a response without a prompt has nothing
    to predict it and is no target. Raises DataError if no bucket holds the longest row, there are
    more rows than examples, or `token_extras` do not fit the examples.
    """
    if not 1 <= rows <= len(examples):
        raise DataError(
            f"{rows} rows for {len(examples)} examples: expected from 1 to {len(examples)}"
        )
    extras = _token_extras(examples)
    first_response = np.cumsum([0, *(len(example.responses) for example in examples)])
    response_row, response_end = np.zeros((2, first_response[-1]), np.int32)
    placed = [_Row(extras) for _ in range(rows)]
    assigned = _assign([num_tokens(example) for example in examples], rows)
    for r, (row, members) in enumerate(zip(placed, assigned, strict=True)):
        for segment, index in enumerate(members, start=1):
            ends = row.add(examples[index], segment, int(first_response[index]))
            numbers = slice(first_response[index], first_response[index + 1])
            response_row[numbers], response_end[numbers] = r, ends
    length = round_up_to_bucket(max(row.length for row in placed), length_buckets)
    targets = round_up_to_bucket(
        max(sum(map(len, row.columns["targets"])) for row in placed),
        target_buckets,
        key="data.target_buckets",
    )
    batch = {"response_row": response_row, "response_end": response_end}
    kinds = {name: ((), np.int32) for name in _TOKEN_ARRAYS + _TARGET_ARRAYS}
    kinds["target_mask"] = ((), np.float32)
    for name, (shape, dtype) in (kinds | extras).items():
        width = length if name in _TOKEN_ARRAYS else targets
        out = np.zeros((rows, width, *shape), dtype)
        for r, row in enumerate(placed):
            if row.columns[name]:
                values = np.concatenate(row.columns[name])
                out[r, : len(values)] = values
        batch[name] = out
    return batch


def _token_extras(examples: Sequence[Example]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of one token's value, by the names of the examples' `token_extras`.

    Raises DataError unless all examples have the same names, and one kind of value for each token.
    """
    kinds: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for example in examples:
        found = example.token_extras
        if found.keys() != examples[0].token_extras.keys() or found.keys() & _OWN_ARRAYS:
            raise DataError(
                f"token_extras of example {example.id}: {sorted(found)}; expected those of example "
                f"{examples[0].id}: {sorted(examples[0].token_extras)}, and no array of a batch"
            )
        for name, arrays in found.items():
            if list(map(len, arrays)) != list(map(len, example.responses)):
                raise DataError(
                    f"token_extras {name!r} of example {example.id} are for responses of "
                    f"{list(map(len, arrays))} tokens, not {list(map(len, example.responses))}"
                )
            for array in arrays:
                kind = (array.shape[1:], array.dtype)
                if kinds.setdefault(name, kind) != kind:
                    raise DataError(
                        f"token_extras {name!r} of example {example.id} are {kind[1]} of shape "
                        f"{kind[0]} for a token; expected {kinds[name][1]} of {kinds[name][0]}"
                    )
    return kinds


def separate_responses(examples: Sequence[Example]) -> list[Example]:
    """Gives every response its own example with its own copy of the prompt.

    The responses keep their numbers, so a batch of these must give the log-probabilities of the
    batch that shares the prompts.
    """
    return [
        dataclasses.replace(
            example,
            responses=(response,),
            response_masks=(mask,),
            token_extras={name: (arrays[i],) for name, arrays in example.token_extras.items()},
        )
        for example in examples
        for i, (response, mask) in enumerate(
            zip(example.responses, example.response_masks, strict=True)
        )
    ]


_TOKEN_ARRAYS = ("tokens", "positions", "segment_ids", "branch_ids")
_TARGET_ARRAYS = ("predict_from", "targets", "target_mask", "target_response")
_OWN_ARRAYS = {*_TOKEN_ARRAYS, *_TARGET_ARRAYS, "response_row", "response_end"}


class _Row:
    """One row while it is filled: for every array the pieces to be joined."""

    def __init__(self, extras: Iterable[str]) -> None:
        self.length = 0
        self.columns: dict[str, list[np.ndarray]] = {
            name: [] for name in (*_TOKEN_ARRAYS, *_TARGET_ARRAYS, *extras)
        }

    def add(self, example: Example, segment: int, first_response: int) -> list[int]:
        """Appends an example; returns the index in the row of each response's last token.

        An empty response ends where what stands before it does.
        """
        ends = []
        start, prompt_length = self.length, len(example.prompt)
        self._append_tokens(example.prompt, 0, segment, 0)
        parts = zip(example.responses, example.response_masks, _target_places(example), strict=True)
        for offset, (response, mask, counts) in enumerate(parts):
            begin = self.length
            self._append_tokens(response, prompt_length, segment, offset + 1)
            predictor = np.arange(begin - 1, begin - 1 + len(response))
            if len(response):
                # The first token is predicted by the end of the prompt, which stands elsewhere in
                # the row for every response but the first.
                predictor[0] = start + prompt_length - 1
            size = int(counts.sum())
            self.columns["predict_from"].append(predictor[counts])
            self.columns["targets"].append(np.asarray(response)[counts])
            self.columns["target_mask"].append(np.asarray(mask, np.float32)[counts])
            self.columns["target_response"].append(np.full(size, first_response + offset))
            for name, arrays in example.token_extras.items():
                self.columns[name].append(arrays[offset][counts])
            ends.append(max(self.length - 1, 0))
        return ends

    def _append_tokens(self, tokens: np.ndarray, position: int, segment: int, branch: int) -> None:
        size = len(tokens)
        self.columns["tokens"].append(tokens)
        self.columns["positions"].append(np.arange(position, position + size))
        self.columns["segment_ids"].append(np.full(size, segment))
        self.columns["branch_ids"].append(np.full(size, branch))
        self.length += size


def _target_places(example: Example) -> list[np.ndarray]:
    """For every response which of its tokens are targets; nothing predicts a text's first token."""
    places = [np.asarray(mask) > 0 for mask in example.response_masks]
    if not len(example.prompt):
        for counts in places:
            counts[:1] = False
    return places


def _assign(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Which examples go to which row; the longest first, each to the row with the fewest tokens."""
    if rows == len(lengths):
        return [[index] for index in range(rows)]
    members: list[list[int]] = [[] for _ in range(rows)]
    loads = [0] * rows
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        row = loads.index(min(loads))
        members[row].append(index)
        loads[row] += lengths[index]
    return members


# Values of one example that travel with its batch: per response, in the order of its responses.
Attach = Callable[[Example], dict[str, np.ndarray]]


def make_collate(
    data: Any, attach: Attach | None = None
) -> Callable[[Sequence[Example]], dict[str, np.ndarray]]:
    """A function from examples to a batch; with accumulation, micro-batches are its first axis."""
    parts = data.accumulation

    def collate(examples: Sequence[Example]) -> dict[str, np.ndarray]:
        size = len(examples) // parts
        groups = [examples[i : i + size] for i in range(0, len(examples), size)]
        lengths, targets = data.length_buckets, data.target_buckets
        build = lambda group: build_batch(  # noqa: E731
            group,
            rows=_num_rows(data, len(group)),
            length_buckets=lengths,
            target_buckets=targets,
        )
        batches = [build(group) for group in groups]
        if len(batches) > 1:
            # One shape for all micro-batches: the widest's.
            lengths = (max(batch["tokens"].shape[1] for batch in batches),)
            targets = (max(batch["targets"].shape[1] for batch in batches),)
            batches = [build(group) for group in groups]
        if attach is not None:
            for batch, group in zip(batches, groups):
                values = [attach(example) for example in group]
                batch |= {name: np.concatenate([v[name] for v in values]) for name in values[0]}
        if parts == 1:
            return batches[0]
        return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}

    return collate


def _num_rows(data: Any, num_examples: int) -> int:
    return min(data.rows or num_examples, num_examples)


def by_length(examples: Sequence[Example]) -> np.ndarray:
    """Places of examples, the shortest first: the order in which `score_responses` batches them."""
    return np.argsort([num_tokens(example) for example in examples], kind="stable")


def check_lengths(data: Any, examples: Sequence[Example], order: Iterable[int]) -> None:
    """Raises `DataError` for an example, or a row of packed ones, that no bucket of `data` holds.

    `order` has the places of the examples as they come, micro-batch after micro-batch: it decides
    which of them share a row, and is not read where none do.
    """
    if not examples:
        return
    sizes = [example_size(example) for example in examples]
    if data.rows:
        size, order, rows = data.batch_size // data.accumulation, iter(order), []
        while group := [sizes[place] for place in itertools.islice(order, size)]:
            rows.append(longest_row(group, rows=_num_rows(data, len(group))))
        sizes = rows
    tokens, targets = (max(parts) for parts in zip(*sizes))
    round_up_to_bucket(tokens, data.length_buckets)
    round_up_to_bucket(targets, data.target_buckets, key="data.target_buckets")
