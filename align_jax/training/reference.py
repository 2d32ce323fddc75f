"""Log-probabilities under the reference model: computed once, kept on disk."""

import dataclasses
import functools
import hashlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from align_jax.data.dataset import Data
from align_jax.data.tokenise import ENCODER_VERSION, Example
from align_jax.distributed import hosts
from align_jax.distributed.partitioning import replicated
from align_jax.files import write_file
from align_jax.models.transformer import Transformer
from align_jax.training.scoring import score_responses, sum_by_response, target_log_probs
from align_jax.trees import fingerprint


def cache_directory() -> Path:
    """`$ALIGN_JAX_CACHE`, or `align_jax` under the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "align_jax"
    return Path(os.environ.get("ALIGN_JAX_CACHE", default)).expanduser()


def reference_log_probs(
    model: Transformer, mesh: Mesh, examples: Sequence[Example], data: Data
) -> np.ndarray:
    """Summed log-probability of every response under `model`: `[examples, responses]`, nats.

    Cached under a key of the model's parameters and configuration, of the encoder's version, and of
    every token and mask, hence of the lengths they were cut to: another model, data set or limit
    never meets a stale file. The key and a checksum stand in the file, too; a file that they do not
    fit is made anew, which is said. The first host's cache counts: the others are told.
    """
    key = _key(model, examples)
    file = cache_directory() / "reference" / f"{key}.npz"
    shape = (len(examples), len(examples[0].responses))
    values = _read(file, key, shape) if hosts.first() else None
    if hosts.broadcast_json(values is not None):
        return hosts.broadcast_array(np.zeros(shape, np.float32) if values is None else values)
    values = compute_log_probs(model, mesh, examples, data)
    hosts.on_first_host(lambda: _write(file, key, values))
    return values


def _read(file: Path, key: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """The values in a cache file; None if there is none, or one of other or changed values."""
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as content:
            values, found = content["values"], str(content["checksum"])
        if values.dtype != np.float32 or values.shape != shape:
            raise ValueError(f"it holds {values.dtype} {values.shape}, not float32 {shape}")
        if found != _checksum(key, values):
            raise ValueError("its checksum does not fit its values")
    # numpy and zipfile raise anything on damaged files.
    except Exception as error:
        print(
            f"warning: the cached reference log-probabilities in {file} cannot be used ({error}); "
            "they are computed anew.",
            file=sys.stderr,
        )
        return None
    return values


def _write(file: Path, key: str, values: np.ndarray) -> None:
    content = io.BytesIO()
    np.savez(content, values=values, checksum=np.array(_checksum(key, values)))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, content.getvalue())


def _checksum(key: str, values: np.ndarray) -> str:
    """A digest of the key and the values; a file copied to another key's name does not fit."""
    return hashlib.sha256(key.encode() + np.ascontiguousarray(values).tobytes()).hexdigest()


def compute_log_probs(
    model: Transformer,
    mesh: Mesh,
    examples: Sequence[Example],
    data: Data,
    *,
    temperature: float = 1.0,
) -> np.ndarray:
    """`reference_log_probs` without the cache; examples of equal lengths share a batch."""
    responses = len(examples[0].responses)

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def score(model, batch):
        log_probs, _ = target_log_probs(model, batch, temperature=temperature)
        return sum_by_response(log_probs, batch, data.batch_size * responses)

    return score_responses(
        lambda batch: score(model, batch), mesh, examples, data, description="reference"
    )


def _key(model: Transformer, examples: Sequence[Example]) -> str:
    config = dataclasses.replace(model.config, remat="none")  # changes no number
    digest = hashlib.sha256(f"encoder {ENCODER_VERSION} {config!r}".encode())
    digest.update(fingerprint(model).encode())
    for example in examples:
        for part in (example.prompt, *example.responses, *example.response_masks):
            digest.update(np.int64(len(part)).tobytes())
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()
