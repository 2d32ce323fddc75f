"""Comparisons: from records to examples with ranks and margins, to pairs, and what ties in them."""

import dataclasses
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from align_jax.data.records import Record
from align_jax.data.tokenise import Example
from align_jax.errors import RunError
from align_jax.losses.ranking import RankingLoss

_log = logging.getLogger(__name__)

# Margins by preference strength (Touvron et al. 2023, appendix A.3.3, table 27): significantly
# better, better, slightly better, negligibly better or unsure.
MARGINS = {
    "llama2_small": {"3": 1.0, "2": 2 / 3, "1": 1 / 3, "0": 0.0},
    "llama2_large": {"3": 3.0, "2": 2.0, "1": 1.0, "0": 0.0},
}


def kind_of_records(loss: RankingLoss) -> str:
    """The kind of record that a loss learns from (docs/data.md)."""
    return "ranked" if loss.ranked else "preference"


def as_rankings(
    examples: Sequence[Example],
    loss: RankingLoss,
    *,
    margins: Mapping[str, float] | None = None,
) -> list[Example]:
    """Checks ranks and margins; gives every example the same number of responses.

    Empty responses with rank nan are added to examples that have fewer: all batches of one length
    then have one shape, whatever K their records have. `extras` gets `ranks` `[K]` and `margin`.

    Args:
      margins: the margin of each strength; by default an example keeps its own margin, or 0.

    Raises:
      RunError: not exactly one best response where the loss needs that; a strength without a
        margin; not one example with a response better than another.
    """
    most = max(len(example.responses) for example in examples)
    out = []
    for example in examples:
        missing = most - len(example.responses)
        ranks = np.array(example.extras.get("ranks", (0, 1)), np.float32)
        if loss.only_best:
            best = int((ranks == 0).sum())
            if best != 1:
                raise RunError(
                    f"{example.extras['where']}: {best} completions have rank 0; the loss "
                    f"{loss.name} needs exactly one."
                )
            ranks = (ranks > 0).astype(np.float32)
        extras = example.extras | {
            "ranks": np.append(ranks, np.full(missing, np.nan, np.float32)),
            "margin": _margin(example, margins),
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


def warn_of_ties(examples: Sequence[Example]) -> None:
    """Warns of comparisons that teach nothing, with how many there are and where the first is.

    These are a pair or ranking whose responses became the same tokens (perhaps by the cut at
    `max_length`), and a ranking that puts all of its responses in one place.
    """
    tied = [example for example in examples if _is_tied(example)]
    if tied:
        _log.warning(
            "%d of %d comparisons are between responses of the same tokens or the same rank, which "
            "teaches nothing; the first is %s",
            len(tied),
            len(examples),
            tied[0].extras.get("where", f"example {tied[0].id}"),
        )


def _is_tied(example: Example) -> bool:
    """Whether every two responses of different rank are the same tokens."""
    ranks = np.asarray(example.extras.get("ranks", (0, 1)), np.float32)
    return not any(
        (first < second or second < first) and not np.array_equal(one, other)
        for (first, one), (second, other) in itertools.combinations(
            zip(ranks, example.responses), 2
        )
    )


def _margin(example: Example, margins: Mapping[str, float] | None) -> float:
    if margins is None:
        return example.extras.get("margin", 0.0)
    where, strength = example.extras["where"], example.extras.get("strength")
    if strength is None:
        raise RunError(f"{where}: no 'strength', which config.margins turns into a margin.")
    if strength_name(strength) not in margins:
        raise RunError(
            f"{where}: strength {strength!r} is not in config.margins; it has {', '.join(margins)}."
        )
    return float(margins[strength_name(strength)])


def strength_name(strength: str | float) -> str:
    """A strength as tables and reports name it: 3.0 is "3"."""
    return strength if isinstance(strength, str) else f"{strength:g}"


def attach(example: Example) -> dict[str, np.ndarray]:
    """What a batch gets of an example of `as_rankings` beside its tokens."""
    margin = np.array([example.extras["margin"]], np.float32)
    return {"ranks": example.extras["ranks"], "margin": margin}


def records_to_judge(
    records: Sequence[Record], examples: Sequence[Example], loss: RankingLoss
) -> list[Record]:
    """The records that `examples` were made from, ranked as far as the loss reads their ranks.

    Raises:
      RunError: records that training would refuse; see `as_rankings`.
    """
    if not examples:
        return []
    chosen = [records[example.id] for example in as_rankings(examples, loss)]
    if loss.only_best:
        return [one | {"ranks": [int(rank > 0) for rank in one["ranks"]]} for one in chosen]
    return chosen


def texts_of(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """All responses of the comparisons, record by record, and the record of each."""
    owners, texts = [], []
    for record in records:
        for response in record.get("completions") or (record["chosen"], record["rejected"]):
            owners.append(record)
            texts.append(response if isinstance(response, str) else response[0]["content"])
    return owners, texts


def pairs_of(records: Sequence[Record], scores: np.ndarray) -> dict[str, Any]:
    """Every pair that the records order, as arguments of `calibrate`.

    The strength of a preference is the record's, or in a ranking the difference of the ranks.

    Args:
      scores: of the texts of `texts_of`, `[N]`.
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
