"""Log-probabilities under the reference model: computed once, kept on disk."""

import dataclasses
import functools
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from align_jax.data.dataset import Data
from align_jax.data.tokenise import Example
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

    Cached under a key of the model's parameters and configuration and of every token and mask,
    hence of the lengths they were cut to: another model, data set or limit never meets a stale
    file.
    """
    file = cache_directory() / "reference" / f"{_key(model, examples)}.npy"
    if file.exists():
        return np.load(file, allow_pickle=False)
    values = compute_log_probs(model, mesh, examples, data)
    if jax.process_index() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        np.save(content, values)
        write_file(file, content.getvalue())
    return values


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
    digest = hashlib.sha256(repr(config).encode())
    digest.update(fingerprint(model).encode())
    for example in examples:
        for part in (example.prompt, *example.responses, *example.response_masks):
            digest.update(np.int64(len(part)).tobytes())
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()
