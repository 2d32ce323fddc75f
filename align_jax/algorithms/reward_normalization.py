"""The zero and the unit of a trained reward: gain and bias from texts of a reference policy."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from align_jax.algorithms import Source
from align_jax.data.dataset import Data, records_of
from align_jax.data.records import Record
from align_jax.data.sources import load_as_configured
from align_jax.data.tokenise import encode_records
from align_jax.errors import RunError
from align_jax.files import write_file
from align_jax.generation.rollout import Sampling, roll_out
from align_jax.progress import progress
from align_jax.rewards.model import RewardScale
from align_jax.settings import Settings
from align_jax.training import pretrained
from align_jax.training.offline import OfflineConfig

KINDS = ("none", "mean_std", "mean")

BATCH = 32  # prompts continued together


@dataclasses.dataclass(frozen=True)
class Normalization(Settings, key="config.normalization"):
    """What the rewards of reference texts become."""

    kind: str = "none"  # | "mean_std" (Ziegler: 0 and 1) | "mean" (Stiennon: 0)
    source: str = ""  # of reference texts, or of prompts that `policy` continues
    policy: str = ""  # a model or a run; "": the source has completions
    limit: int = 256  # read this many records; 0 reads all
    max_new_tokens: int = 64  # of a completion that `policy` samples

    def __post_init__(self):
        super().__post_init__()
        self.one_of(KINDS, "kind")
        self.at_least(0, "limit")
        self.at_least(1, "max_new_tokens")
        if self.kind == "none":
            unread = "config.normalization.kind is 'none', so nothing would be normalised"
            choices = "(mean_std and mean would)"
            self.at_default(f"{unread} {choices}", "source", "policy", "limit")
        elif not self.source:
            raise RunError(
                f"config.normalization.kind = {self.kind!r} needs config.normalization.source: "
                "records with prompt and completion, or prompts that config.normalization.policy "
                "continues."
            )
        if not self.policy:
            self.at_default("config.normalization.policy is ''", "max_new_tokens")


class ReferenceTexts(NamedTuple):
    """Texts whose rewards set the zero and the unit: records with `prompt`, and completions."""

    records: list[Record]
    completions: list[str]


def sources(normalization: Normalization, data: Data) -> list[Source]:
    """Where the texts of the reference, or their prompts, come from."""
    if normalization.kind == "none":
        return []
    kind = "prompt" if normalization.policy else "sft"
    return [(normalization.source, kind, _limited(data, normalization))]


def _limited(data: Data, normalization: Normalization) -> Data:
    """The texts of the reference are read as those of the run, but for how many."""
    return dataclasses.replace(data, limit=normalization.limit)


def reference_texts(
    normalization: Normalization, config: OfflineConfig, directory: Path | None, mesh: Mesh
) -> ReferenceTexts | None:
    """Reads the texts from `normalization.source`, or samples them; None without normalization.

    `normalization.policy` continues prompts once, at temperature 1. The completions are kept in
    `samples/reference.jsonl` of the run's directory, if it has one.

    Raises:
      RunError: a record without prompt and completion.
    """
    if normalization.kind == "none":
        return None
    data = _limited(config.data, normalization)
    if not normalization.policy:
        return _as_texts(load_as_configured(data, normalization.source, kind="sft"))
    if directory is None:
        samples = _sample(normalization, config, mesh)
        return _as_texts(records_of(samples, data, kind="sft"))
    file = directory / "samples" / "reference.jsonl"
    if not file.exists():
        samples = _sample(normalization, config, mesh)
        file.parent.mkdir(exist_ok=True)
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        write_file(file, lines.encode("utf-8"))
    return _as_texts(load_as_configured(data, str(file), kind="sft"))


def _as_texts(records: Sequence[Record]) -> ReferenceTexts:
    records = [_with_completion(record) for record in records]
    completions = [record["completion"] for record in records]
    return ReferenceTexts(
        records, [text if isinstance(text, str) else text[0]["content"] for text in completions]
    )


def _with_completion(record: Record) -> Record:
    """A demonstration as prompt and completion; the last turn of a dialogue is its completion."""
    if "messages" in record:
        *prompt, answer = record["messages"]
        record = record | {"prompt": prompt, "completion": [answer]}
    if "completion" not in record:
        raise RunError(f"{record['where']}: a reference text needs 'prompt' and 'completion'.")
    return record


def _sample(
    normalization: Normalization, config: OfflineConfig, mesh: Mesh
) -> list[dict[str, Any]]:
    """Prompts of `normalization.source`, each with a completion by `normalization.policy`."""
    data = _limited(config.data, normalization)
    records = load_as_configured(data, normalization.source, kind="prompt")
    tokenizer = pretrained.load_pretrained_tokenizer(normalization.policy)
    policy = pretrained.load_pretrained(config, normalization.policy, mesh)
    room = policy.config.context_length - normalization.max_new_tokens
    examples = encode_records(
        records,
        tokenizer,
        kind="prompt",
        max_length=room,
        special_tokens=data.special_tokens,
    )
    sampling = Sampling(max_new_tokens=normalization.max_new_tokens)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1), len(examples))
    texts: list[str] = []
    with progress(description="reference", total=len(examples), unit="sample") as bar:
        for start in range(0, len(examples), BATCH):
            prompts = [example.prompt for example in examples[start : start + BATCH]]
            chosen = keys[start : start + BATCH]
            texts += roll_out(policy, mesh, tokenizer, prompts, sampling, keys=chosen).texts
            bar.update(len(prompts))
    return [
        {"prompt": record["prompt"], "completion": text}
        for record, text in zip(records, texts, strict=True)
    ]


def normalized_scale(
    scale: RewardScale, scalars: np.ndarray, normalization: Normalization, *, model: str
) -> RewardScale:
    """`scale` with what gives reference scalars `[N]` mean 0 and, for "mean_std", deviation 1.

    Sources: Ziegler et al. 2019 (arXiv:1909.08593), section 2; Stiennon et al. 2020
    (arXiv:2009.01325), section 3.4: only the mean, over the demonstrations.

    Args:
      model: what the reward model was trained from; kept for the reader.

    Raises:
      RunError: all scalars are equal, so no gain gives them a unit.
    """
    mean, std = float(scalars.mean()), float(scalars.std())
    with_unit = normalization.kind == "mean_std"
    if with_unit and not std > 0:
        raise RunError(
            f"the {len(scalars)} reference texts of config.normalization.source all have the score "
            f"{mean}: no gain gives them standard deviation 1."
        )
    gain = 1 / std if with_unit else 1.0
    origin: dict[str, Any] = {"normalization": normalization.to_dict(), "texts": len(scalars)}
    origin |= {"mean": mean, "std": std, "model": model}
    return dataclasses.replace(scale, gain=gain, bias=-gain * mean, origin=origin)
