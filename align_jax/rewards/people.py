"""People as the comparer, through two files: pairs out, labels in.

`pairs.jsonl` is written: one `{"id", "prompt", "first", "second"}` a line. `labels.jsonl` is what
people write: one `{"id", "preferred"}` a line, where `preferred` is "first", "second" or "tie"
(null or absent: not labelled yet). Other fields are left alone, so a copy of the pairs with
`preferred` filled in is a file of labels. Until it is whole the run stops with `WaitingForLabels`;
the same command then goes on.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align_jax.data.sources import read_file
from align_jax.distributed import hosts
from align_jax.errors import RewardError
from align_jax.files import write_file
from align_jax.rewards.base import Records, text_of

PREFERRED = {"first": 1.0, "tie": 0.5, "second": 0.0}


class WaitingForLabels(RewardError):
    """Nothing is wrong: people have yet to label; the message says which pairs, and where."""


class PeopleJudge:
    """A comparer whose answers people write into a file.

    Args:
      directory: of `pairs.jsonl` and `labels.jsonl`; made if missing. One for each round: asking
        for other pairs in the same directory is an error. On several hosts they share it.

    A call raises:
      WaitingForLabels: labels are missing.
      RewardError: a label for no pair, labels that contradict each other, an unknown preference, a
        line without an id (the message names file and line); other pairs in the directory, or a
        directory that cannot be written to.
      DataError: the file cannot be read as JSON lines.

    Pairs are shown in the order they are given in: whoever asks should draw it, or put both
    completions from one policy.
    """

    name = "people"

    def __init__(self, directory: str | os.PathLike):
        self.pairs, self.labels = (Path(directory) / f"{n}.jsonl" for n in ("pairs", "labels"))

    def __call__(self, records: Records, first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        pairs = [_pair(*one) for one in zip(records, first, second, strict=True)]
        unique = {pair["id"]: pair for pair in pairs}  # a pair that is asked twice is shown once
        hosts.on_first_host(lambda: self._write_pairs(list(unique.values())))
        labels = hosts.on_first_host(lambda: self._read_labels(set(unique)))
        missing = [id for id in unique if id not in labels]
        if missing:
            raise WaitingForLabels(
                f"waiting for people: {len(missing)} of {len(unique)} pairs in {self.pairs} have "
                f"no label in {self.labels} (the first: {missing[0]}). Write one line for each, "
                f'{{"id": "{missing[0]}", "preferred": "first"}}, or "second", or "tie"; then '
                "start the same command again."
            )
        return np.array([labels[pair["id"]] for pair in pairs], np.float32)

    def _write_pairs(self, pairs: Sequence[Mapping[str, str]]) -> None:
        text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        content = text.encode("utf-8")
        try:
            if self.pairs.exists():
                if self.pairs.read_bytes() == content:
                    return
                raise RewardError(
                    f"{self.pairs} holds other pairs than those to be compared now: the run or "
                    "its config has changed since it was written. Move it and its labels away, or "
                    "start in another workdir."
                )
            self.pairs.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.pairs, content)
        except OSError as error:
            raise RewardError(f"{self.pairs} cannot be written: {error}.") from error

    def _read_labels(self, known: set[str]) -> dict[str, float]:
        """{id: probability that the first is better}, of the pairs labelled so far."""
        labels: dict[str, float] = {}
        origins: dict[str, str] = {}
        for where, row in read_file(str(self.labels)) if self.labels.exists() else ():
            id = row.get("id") if isinstance(row, dict) else None
            if not isinstance(id, str):
                raise RewardError(f"{where}: a label needs the 'id' of its pair; found {row!r}.")
            if id not in known:
                near = difflib.get_close_matches(id, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise RewardError(f"{where}: there is no pair {id!r} in {self.pairs}.{hint}")
            preferred = row.get("preferred")
            if preferred is None:
                continue
            if not isinstance(preferred, str) or preferred not in PREFERRED:
                raise RewardError(
                    f"{where}: field 'preferred': found {preferred!r}, expected 'first', 'second' "
                    "or 'tie'."
                )
            if labels.setdefault(id, PREFERRED[preferred]) != PREFERRED[preferred]:
                raise RewardError(
                    f"{where}: pair {id!r} is labelled {preferred!r} here and otherwise at "
                    f"{origins[id]}; keep one of the two lines (or write 'tie' once)."
                )
            origins.setdefault(id, where)
        return labels


def _pair(record: Mapping[str, Any], first: str, second: str) -> dict[str, str]:
    texts = {"prompt": text_of(record["prompt"]), "first": first, "second": second}
    digest = hashlib.blake2b(json.dumps(list(texts.values())).encode(), digest_size=8)
    return {"id": digest.hexdigest(), **texts}
