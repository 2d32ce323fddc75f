"""From a source to tokenised examples, as a run's `config.data` says."""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from align_jax.data.records import Record
from align_jax.data.sources import load_as_configured
from align_jax.data.tokenise import Example, encode_records
from align_jax.progress import progress


def default_data_config(**overrides: Any) -> ConfigDict:
    """The fields of `config.data` that the offline algorithms read; lengths are in tokens."""
    config = ConfigDict(
        {
            "source": "",  # see docs/data.md
            "eval_source": "",  # held-out records, evaluated by `python -m align_jax evaluate`
            "limit": 0,  # read this many records; 0 reads all
            "invalid": "error",  # "error" | "drop": what a record with wrong fields does
            "max_length": 1024,
            "max_prompt_length": 0,  # 0: what the longest response leaves of max_length
            "min_prompt_length": 16,  # a response that leaves its prompt less is too long
            "overlong": "error",  # "error" | "truncate" | "drop": what a too long response does
            "batch_size": 16,
            "accumulation": 1,  # micro-batches a batch is split into
            "rows": 0,  # rows a micro-batch is packed into; 0: one example a row
            "length_buckets": tuple(64 * i for i in range(1, 129)),
            "target_buckets": tuple(64 * i for i in range(1, 129)),
        }
    )
    config.update(overrides)
    return config


def load_examples(data: ConfigDict, source: str, tokenizer: Any, *, kind: str) -> list[Example]:
    """Reads, checks and tokenises every record of a source before anything is computed."""
    records = load_as_configured(data, source, kind=kind)
    return tokenised(data, records, tokenizer, kind=kind)


def tokenised(
    data: ConfigDict, records: Sequence[Record], tokenizer: Any, *, kind: str
) -> list[Example]:
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
            progress=bar.update,
        )
