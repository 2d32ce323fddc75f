"""From a source to tokenised examples, as a run's `config.data` says."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from align_jax.data.records import Record, parse_record
from align_jax.data.samples import PREFIX, examples_of_samples
from align_jax.data.sources import INVALID, load_as_configured
from align_jax.data.tokenise import OVERLONG, SPECIAL_TOKENS, Example, encode_records
from align_jax.errors import RunError
from align_jax.progress import progress
from align_jax.settings import Settings


@dataclasses.dataclass(frozen=True)
class Data(Settings, key="config.data"):
    """Which records a run reads, and how they become batches; lengths are in tokens."""

    source: str = ""  # see docs/data.md
    eval_source: str = ""  # held-out records, evaluated by `python -m align_jax evaluate`
    limit: int = 0  # read this many records; 0 reads all
    score: str = ""  # of a source samples:PATH: the score that ranks; "": its reward or only one
    invalid: str = "error"  # "error" | "drop": what a record with wrong fields does
    max_length: int = 1024
    max_prompt_length: int = 0  # 0: what the longest response leaves of max_length
    min_prompt_length: int = 16  # a response that leaves its prompt less is too long
    overlong: str = "error"  # "error" | "truncate" | "drop": what a too long response does
    special_tokens: str = "text"  # "text" | "allow": how records' text of special tokens is read
    batch_size: int = 16
    accumulation: int = 1  # micro-batches a batch is split into
    rows: int = 0  # rows a micro-batch is packed into; 0: one example a row
    length_buckets: tuple[int, ...] = tuple(64 * i for i in range(1, 129))
    target_buckets: tuple[int, ...] = tuple(64 * i for i in range(1, 129))

    def __post_init__(self):
        super().__post_init__()
        self.at_least(0, "limit", "max_prompt_length", "rows")
        self.at_least(1, "min_prompt_length", "batch_size", "accumulation")
        self.at_least(2, "max_length")
        self.one_of(INVALID, "invalid")
        self.one_of(OVERLONG, "overlong")
        self.one_of(SPECIAL_TOKENS, "special_tokens")
        # From Python the samples may be named in the call.
        named = [one for one in (self.source, self.eval_source) if one]
        if named and not any(one.startswith(PREFIX) for one in named):
            self.at_default(f"config.data.source is no {PREFIX}PATH", "score")
        for name in ("length_buckets", "target_buckets"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise RunError(f"config.data.{name} is empty or has a bucket that is not above 0.")

    @property
    def micro_batch_size(self) -> int:
        """Examples of one micro-batch."""
        return self.batch_size // self.accumulation

    def unaccumulated(self) -> "Data":
        """`self` with the micro-batch size as batch size and no accumulation.

        Scoring and evaluation then need no more memory than training.
        """
        return dataclasses.replace(self, batch_size=self.micro_batch_size, accumulation=1)


# Dicts, or a source that `data.sources` reads.
RawRecords = Sequence[Mapping[str, Any]] | str | os.PathLike

# Records for `train`: these, or examples made before.
Records = RawRecords | Sequence[Example]


def records_of(records: RawRecords, data: Data, *, kind: str) -> list[Record]:
    """Reads a source, or checks records from Python.

    Raises:
      DataError: a source that cannot be read, or a record that cannot be used.
    """
    if isinstance(records, str | os.PathLike):
        return load_as_configured(data, os.fspath(records), kind=kind)
    return [parse_record(one, kind=kind, where=f"records[{i}]") for i, one in enumerate(records)]


def load_source(
    data: Data, source: str | os.PathLike, *, kind: str
) -> list[Record] | list[Example]:
    """The records of a source; of `samples:PATH`, which holds tokens already, the examples.

    Raises: as `examples_of`.
    """
    if os.fspath(source).startswith(PREFIX):
        return _load_samples(data, os.fspath(source), kind=kind)
    return load_as_configured(data, os.fspath(source), kind=kind)


def _load_samples(data: Data, source: str, *, kind: str) -> list[Example]:
    return examples_of_samples(
        source,
        kind=kind,
        score=data.score,
        limit=data.limit,
        max_length=data.max_length,
        overlong=data.overlong,
    )


def examples_of(records: Records, tokenizer: Any, data: Data, *, kind: str) -> list[Example]:
    """Reads, checks and tokenises records before anything is computed; no source, no examples.

    Examples are returned as they are: whoever made them has checked them.

    Raises:
      DataError: a source that cannot be read, or a record that cannot be used.
      RunError: samples without the score that `data` names, or whose scores all tie.
    """
    if isinstance(records, str | os.PathLike):
        if not records:
            return []
        if os.fspath(records).startswith(PREFIX):
            return _load_samples(data, os.fspath(records), kind=kind)
    else:
        given: list[Any] = list(records)
        if all(isinstance(one, Example) for one in given):
            return given
        records = given
    return tokenised(data, records_of(records, data, kind=kind), tokenizer, kind=kind)


def tokenised(data: Data, records: Sequence[Record], tokenizer: Any, *, kind: str) -> list[Example]:
    """Examples of records, cut, left out or refused as `data` says; their ids are the places."""
    with progress(description="tokenising", total=len(records), unit="record") as bar:
        return encode_records(
            records,
            tokenizer,
            kind=kind,
            max_length=data.max_length,
            max_prompt_length=data.max_prompt_length or None,
            min_prompt_length=data.min_prompt_length,
            overlong=data.overlong,
            special_tokens=data.special_tokens,
            progress=bar.update,
        )


def prompts_of(
    records: RawRecords, tokenizer: Any, data: Data, *, max_new_tokens: int
) -> tuple[list[Record], list[Example]]:
    """Prompts, and their tokens with room for a completion; an example's id is its record's place.

    Args:
      records: dicts with a `prompt`, or a source.
      data: its `limit`, `invalid`, `max_length` and `max_prompt_length` are read.
      max_new_tokens: of a completion.

    Raises:
      RunError: no room for a prompt.
      DataError: a source that cannot be read, or a record that cannot be used.
    """
    room = data.max_length - max_new_tokens
    if room < 1:
        raise RunError(
            f"config.data.max_length = {data.max_length} leaves no room for a prompt beside "
            f"config.sampling.max_new_tokens = {max_new_tokens}."
        )
    parsed = records_of(records, data, kind="prompt")
    examples = encode_records(
        parsed,
        tokenizer,
        kind="prompt",
        max_length=data.max_length,
        max_prompt_length=min(data.max_prompt_length or room, room),
        special_tokens=data.special_tokens,
    )
    return parsed, examples
