"""Comparisons for a reward model: from records to examples with ranks and margins, and to pairs."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from align_jax.data import dataset
from align_jax.data.records import Record
from align_jax.data.sources import load_as_configured
from align_jax.data.tokenise import Example
from align_jax.errors import RunError

# Margins by preference strength (Touvron et al. 2023, appendix A.3.3, table 27): significantly
# better, better, slightly better, negligibly better or unsure.
MARGINS = {
    "llama2_small": {"3": 1.0, "2": 2 / 3, "1": 1 / 3, "0": 0.0},
    "llama2_large": {"3": 3.0, "2": 2.0, "1": 1.0, "0": 0.0},
}


def load_comparisons(config: ConfigDict, tokenizer: Any) -> tuple[list[Example], list[Record]]:
    """Examples to train on, as of `prepare`, and records to evaluate on.

    Raises:
      RunError: more records held out than there are, or another source for them too; see `prepare`.
    """
    if config.held_out and config.data.eval_source:
        raise RunError(
            f"config.held_out = {config.held_out} and config.data.eval_source both say what to "
            "evaluate on: set one of them."
        )
    records, examples = _load(config, config.data.source, tokenizer)
    kept = len(examples) - config.held_out
    if not 0 < kept <= len(examples):
        raise RunError(
            f"config.held_out is {config.held_out}, and config.data.source has {len(examples)} "
            "records."
        )
    if config.data.eval_source:
        held_out = load_held_out(config, config.data.eval_source, tokenizer)
    else:
        held_out = _to_judge(config, records, examples[kept:]) if config.held_out else []
    return prepare(config, examples[:kept]), held_out


def load_held_out(config: ConfigDict, source: str, tokenizer: Any) -> list[Record]:
    """Records to evaluate on, each of which training would accept; see `load_comparisons`."""
    return _to_judge(config, *_load(config, source, tokenizer))


def _to_judge(
    config: ConfigDict, records: Sequence[Record], examples: Sequence[Example]
) -> list[Record]:
    """The records of examples, with what they say to the loss: best_of_k knows but the best."""
    chosen = [records[e.id] for e in prepare(config, examples, margins=False)]
    if config.loss == "best_of_k":
        return [r | {"ranks": [int(rank > 0) for rank in r["ranks"]]} for r in chosen]
    return chosen


def _load(config: ConfigDict, source: str, tokenizer: Any) -> tuple[list[Record], list[Example]]:
    kind = comparisons_kind(config)
    records = load_as_configured(config.data, source, kind=kind)
    return records, dataset.tokenised(config.data, records, tokenizer, kind=kind)


def comparisons_kind(config: ConfigDict) -> str:
    """The kind of record that the config's loss learns from."""
    return "preference" if config.loss == "pairwise" else "ranked"


def prepare(
    config: ConfigDict, examples: Sequence[Example], *, margins: bool = True
) -> list[Example]:
    """Checks ranks and margins; gives every example the same number of responses.

    Empty responses fill up what is missing, with rank nan: all batches of one length then have one
    shape, whatever K its records have. `extras` gets `ranks` `[K]` and `margin`,
    which is 0 without `margins`: an evaluation has no use for it.

    Raises:
      RunError: best_of_k without exactly one best response; a strength without a margin; not one
        record with a response better than another.
    """
    most = max(len(example.responses) for example in examples)
    out = []
    for example in examples:
        missing = most - len(example.responses)
        ranks = np.array(example.extras.get("ranks", (0, 1)), np.float32)
        if config.loss == "best_of_k":
            best = int((ranks == 0).sum())
            if best != 1:
                raise RunError(
                    f"{example.extras['where']}: {best} completions have rank 0; the loss "
                    "best_of_k needs exactly one."
                )
            ranks = (ranks > 0).astype(np.float32)
        extras = example.extras | {
            "ranks": np.append(ranks, np.full(missing, np.nan, np.float32)),
            "margin": _margin(config, example) if margins else 0.0,
        }
        empty = (np.zeros(0, np.int32),) * missing
        out.append(
            dataclasses.replace(
                example,
                responses=example.responses + empty,
                response_masks=example.response_masks + (np.zeros(0, np.float32),) * missing,
                extras=extras,
            )
        )
    if not any(np.nanmax(e.extras["ranks"]) > np.nanmin(e.extras["ranks"]) for e in out):
        raise RunError(
            f"all {len(out)} records rank all of their completions alike, which says nothing."
        )
    return out


def _margin(config: ConfigDict, example: Example) -> float:
    if not config.margins:
        return example.extras.get("margin", 0.0)
    table = config.margins
    if isinstance(table, str):
        if table not in MARGINS:
            raise RunError(f"config.margins is {table!r}; expected one of {', '.join(MARGINS)}.")
        table = MARGINS[table]
    where, strength = example.extras["where"], example.extras.get("strength")
    if strength is None:
        raise RunError(f"{where}: no 'strength', which config.margins turns into a margin.")
    if strength_name(strength) not in table:
        raise RunError(
            f"{where}: strength {strength!r} is not in config.margins; it has {', '.join(table)}."
        )
    return float(table[strength_name(strength)])


def strength_name(strength: str | float) -> str:
    """A strength as tables and reports name it: 3.0 is "3"."""
    return strength if isinstance(strength, str) else f"{strength:g}"


def attach(example: Example) -> dict[str, np.ndarray]:
    """What of an example of `prepare` travels with its batch."""
    margin = np.array([example.extras["margin"]], np.float32)
    return {"ranks": example.extras["ranks"], "margin": margin}


def texts_of(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """All responses of the comparisons, record by record, and the record of each."""
    owners, texts = [], []
    for record in records:
        for response in record.get("completions") or (record["chosen"], record["rejected"]):
            owners.append(record)
            texts.append(response if isinstance(response, str) else response[0]["content"])
    return owners, texts


def pairs_of(records: Sequence[Record], scores: np.ndarray) -> dict[str, Any]:
    """Every pair that the records order, of the scores of `texts_of`: arguments of `calibrate`.

    The strength of a preference is the record's, or in a ranking the difference of the ranks.
    """
    pairs: dict[str, list] = {
        name: [] for name in ("chosen", "rejected", "responses", "groups", "strengths")
    }
    first = 0
    for record in records:
        ranks = np.array(record.get("ranks", (0, 1)))
        for i, j in np.argwhere(ranks[:, None] < ranks[None, :]):
            pairs["responses"].append((first + i, first + j))
            pairs["chosen"].append(scores[first + i])
            pairs["rejected"].append(scores[first + j])
            pairs["groups"].append(json.dumps(record["prompt"]))
            ranked = float(ranks[j] - ranks[i]) if "ranks" in record else None
            pairs["strengths"].append(record.get("strength", ranked))
        first += len(ranks)
    return pairs
