"""The zero and the unit of a trained reward: gain and bias from texts of a reference policy."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from align_jax.algorithms import Source
from align_jax.data.records import Record
from align_jax.data.sources import load_as_configured
from align_jax.data.tokenise import encode_records
from align_jax.errors import RunError
from align_jax.files import write_file
from align_jax.generation.rollout import default_sampling_config, roll_out
from align_jax.progress import progress
from align_jax.rewards.model import RewardScale
from align_jax.training import pretrained
from align_jax.training.workdir import Workdir

KINDS = ("none", "mean_std", "mean")

BATCH = 32  # prompts continued together


def check(config: ConfigDict) -> None:
    """Raises `RunError` for a `config.normalization` that cannot be done."""
    n = config.normalization
    if n.kind not in KINDS:
        raise RunError(
            f"config.normalization.kind is {n.kind!r}; expected one of {', '.join(KINDS)}."
        )
    for name in ("source", "policy"):
        if n.kind == "none" and n[name]:
            raise RunError(
                f"config.normalization.{name} is {n[name]!r}, but config.normalization.kind is "
                "'none', so nothing would be normalised: set it to mean_std or mean, or the other "
                "to ''."
            )
    if n.kind != "none" and not n.source:
        raise RunError(
            f"config.normalization.kind = {n.kind!r} needs config.normalization.source: records "
            "with prompt and completion, or prompts that config.normalization.policy continues."
        )


def sources(config: ConfigDict) -> list[Source]:
    """Where the texts of the reference, or their prompts, come from."""
    n = config.normalization
    if n.kind == "none":
        return []
    return [(n.source, "prompt" if n.policy else "sft", _data(config))]


def _data(config: ConfigDict) -> ConfigDict:
    """How the texts of the reference are read: as those of the run, but for how many."""
    return ConfigDict(config.data.to_dict() | {"limit": config.normalization.limit})


def reference_texts(
    config: ConfigDict, workdir: Workdir, mesh: Mesh
) -> tuple[list[Record], list[str]]:
    """Prompts' records and the completions that set the zero and the unit.

    They are read from `normalization.source`, or sampled once by `normalization.policy` at
    temperature 1 and kept in `samples/reference.jsonl`.

    Raises:
      RunError: a record without prompt and completion.
    """
    n = config.normalization
    source, data = n.source, _data(config)
    if n.policy:
        file = workdir.path / "samples" / "reference.jsonl"
        if not file.exists():
            records = load_as_configured(data, source, kind="prompt")
            texts = _sample(config, records, mesh)
            lines = [
                json.dumps({"prompt": record["prompt"], "completion": text}) + "\n"
                for record, text in zip(records, texts, strict=True)
            ]
            file.parent.mkdir(exist_ok=True)
            write_file(file, "".join(lines).encode("utf-8"))
        source = str(file)
    records = [_with_completion(record) for record in load_as_configured(data, source, kind="sft")]
    texts = [record["completion"] for record in records]
    return records, [text if isinstance(text, str) else text[0]["content"] for text in texts]


def _with_completion(record: Record) -> Record:
    """A demonstration as prompt and completion; of a dialogue the last turn is the completion."""
    if "messages" in record:
        *prompt, answer = record["messages"]
        record = record | {"prompt": prompt, "completion": [answer]}
    if "completion" not in record:
        raise RunError(f"{record['where']}: a reference text needs 'prompt' and 'completion'.")
    return record


def _sample(config: ConfigDict, records: Sequence[Record], mesh: Mesh) -> list[str]:
    n = config.normalization
    tokenizer = pretrained.load_pretrained_tokenizer(n.policy)
    policy = pretrained.load_pretrained(config, n.policy, mesh)
    room = policy.config.context_length - n.max_new_tokens
    examples = encode_records(records, tokenizer, kind="prompt", max_length=room)
    sampling = default_sampling_config(max_new_tokens=n.max_new_tokens)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1), len(examples))
    texts: list[str] = []
    with progress(description="reference", total=len(examples), unit="sample") as bar:
        for start in range(0, len(examples), BATCH):
            prompts = [example.prompt for example in examples[start : start + BATCH]]
            chosen = keys[start : start + BATCH]
            texts += roll_out(policy, mesh, tokenizer, prompts, sampling, keys=chosen).texts
            bar.update(len(prompts))
    return texts


def scale_from(config: ConfigDict, scalars: np.ndarray, scale: RewardScale) -> RewardScale:
    """`scale` with what gives reference scalars `[N]` mean 0 and, for "mean_std", deviation 1.

    Sources: Ziegler et al. 2019 (arXiv:1909.08593), section 2; Stiennon et al. 2020
    (arXiv:2009.01325), section 3.4: only the mean, over the demonstrations.

    Raises:
      RunError: all scalars are equal, so no gain gives them a unit.
    """
    n = config.normalization
    mean, std = float(scalars.mean()), float(scalars.std())
    if n.kind == "mean_std" and not std > 0:
        raise RunError(
            f"the {len(scalars)} reference texts of config.normalization.source all have the score "
            f"{mean}: no gain gives them standard deviation 1."
        )
    gain = 1 / std if n.kind == "mean_std" else 1.0
    origin: dict[str, Any] = {"normalization": n.to_dict(), "texts": len(scalars)}
    origin |= {"mean": mean, "std": std, "model": config.model}
    return dataclasses.replace(scale, gain=gain, bias=-gain * mean, origin=origin)
