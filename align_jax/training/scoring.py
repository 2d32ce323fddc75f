"""Log-probabilities of a batch's targets: the one place where hidden states meet the vocabulary."""

import jax
import jax.numpy as jnp

from align_jax.distributed.partitioning import constrain
from align_jax.losses.log_probs import chunked_token_log_probs
from align_jax.models.transformer import Transformer

Array = jax.Array

# Positions of a row projected to the vocabulary at a time.
CHUNK_SIZE = 64


def target_log_probs(
    model: Transformer, batch: dict[str, Array], *, temperature: float = 1.0
) -> tuple[Array, Array]:
    """Log-probabilities and entropies `[R,S]`, nats, of a batch's targets (layout: docs/data.md).

    Only the hidden states that predict a target are projected, `CHUNK_SIZE` a row at a time.
    """
    hidden = model(
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        branch_ids=batch["branch_ids"],
    )
    predicting = jnp.take_along_axis(hidden, batch["predict_from"][..., None], axis=1)
    return chunked_token_log_probs(
        constrain(predicting, "batch", None, "features"),
        model.output_embedding,
        batch["targets"],
        chunk_size=CHUNK_SIZE,
        temperature=temperature,
    )


def sum_by_response(values: Array, batch: dict[str, Array], num_responses: int) -> Array:
    """Sums per-target values over each response's counted targets: `[R,S] -> [N]`."""
    counted = jnp.where(batch["target_mask"] > 0, values, 0.0)
    return jax.ops.segment_sum(counted.ravel(), batch["target_response"].ravel(), num_responses)
