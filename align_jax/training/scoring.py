"""Log-probabilities of a batch's targets: the one place where hidden states meet the vocabulary."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from align_jax.data.batching import by_length, check_lengths, make_collate
from align_jax.data.dataset import Data
from align_jax.data.tokenise import Example
from align_jax.distributed.partitioning import constrain
from align_jax.losses.log_probs import chunked_token_log_probs
from align_jax.models.transformer import Transformer
from align_jax.progress import progress
from align_jax.training.step import place_batch

Array = jax.Array

# Positions of a row projected to the vocabulary at a time.
CHUNK_SIZE = 64


def predicting_states(model: Transformer, batch: dict[str, Array]) -> Array:
    """The hidden states `[R,S,D]` that predict a batch's targets (layout: docs/data.md)."""
    hidden = model(
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        branch_ids=batch["branch_ids"],
    )
    predicting = jnp.take_along_axis(hidden, batch["predict_from"][..., None], axis=1)
    return constrain(predicting, "batch", None, "features")


def log_probs_from_states(
    model: Transformer, states: Array, batch: dict[str, Array], *, temperature: float = 1.0
) -> tuple[Array, Array]:
    """Log-probabilities and entropies `[R,S]`, nats, of targets at a temperature.

    Only the hidden states that predict a target are projected, `CHUNK_SIZE` a row at a time.
    """
    return chunked_token_log_probs(
        states,
        model.output_embedding,
        batch["targets"],
        chunk_size=CHUNK_SIZE,
        temperature=temperature,
    )


def target_log_probs(
    model: Transformer, batch: dict[str, Array], *, temperature: float = 1.0
) -> tuple[Array, Array]:
    """`log_probs_from_states` of the model's own states."""
    states = predicting_states(model, batch)
    return log_probs_from_states(model, states, batch, temperature=temperature)


def sum_by_response(values: Array, batch: dict[str, Array], num_responses: int) -> Array:
    """Sums per-target values, weighted, over each response's targets: `[R,S] -> [N]`."""
    weights = batch["target_mask"]
    counted = jnp.where(weights > 0, values * weights, 0.0)
    return jax.ops.segment_sum(counted.ravel(), batch["target_response"].ravel(), num_responses)


def by_response(values: Array, batch: dict[str, Array], shape: tuple[int, int]) -> Array:
    """Per-target values in the order of each response's tokens: `[R,S] -> [N,T]`, 0 elsewhere.

    `shape` is `(N, T)`; every token of a response must be a target, as for sampled responses.
    """
    response, counted = batch["target_response"], batch["target_mask"] > 0
    index = jnp.broadcast_to(jnp.arange(response.shape[1]), response.shape)
    # The targets of a response stand together; the first of them is where the number changes.
    first = jnp.concatenate(
        [jnp.ones_like(counted[:, :1]), response[:, 1:] != response[:, :-1]], axis=1
    )
    place = index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    outside = jnp.where(counted, place, shape[1])
    return jnp.zeros(shape, values.dtype).at[response, outside].set(values, mode="drop")


def score_responses(
    score: Callable[[dict[str, jax.Array]], jax.Array],
    mesh: Mesh,
    examples: Sequence[Example],
    data: Data,
    *,
    description: str,
) -> np.ndarray:
    """A number for every response, `[examples, K]` float32; similar lengths share a batch.

    `score` takes a batch and returns a replicated array of the numbers of its responses in order;
    what is past them is left out. Raises `DataError` as `check_lengths` does.
    """
    data = data.unaccumulated()
    collate = make_collate(data)
    responses = len(examples[0].responses)
    order = by_length(examples)
    check_lengths(data, examples, order)
    out = np.zeros((len(examples), responses), np.float32)
    with (
        jax.set_mesh(mesh),
        progress(description=description, total=len(examples), unit="example") as bar,
    ):
        for start in range(0, len(examples), data.batch_size):
            chosen = order[start : start + data.batch_size]
            batch = place_batch(collate([examples[i] for i in chosen]), mesh, accumulated=False)
            values = np.asarray(score(batch))[: len(chosen) * responses]
            out[chosen] = values.reshape(len(chosen), responses)
            bar.update(len(chosen))
    return out
