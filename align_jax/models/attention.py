"""Who attends to whom (the project's one mask rule), rotary positions, and causal attention.

Mask rule: query i sees key j if j is not later in the row, belongs to the same segment, and is on
the prompt (branch 0) or on the same branch. Padding is segment 0: it sees only padding, and nothing
real sees it, wherever in the row it stands.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from align_jax.models.config import TransformerConfig

Array = jax.Array

# A query block of this length only meets the keys up to its own end: half of the work of full
# attention for long rows, while every matrix product stays large enough to run at speed.
QUERY_BLOCK = 128


def rotary_frequencies(positions: Array, config: TransformerConfig) -> tuple[Array, Array]:
    """Cosines and sines `[B,T,1,d/2]` of rotary embeddings (Su et al. 2021), half-rotation layout.

    `config.rope_scaling` applies Llama 3.1's stretching of the low frequencies.
    """
    d = config.head_dim
    inverse = config.rope_theta ** (-np.arange(0, d, 2, dtype=np.float64) / d)
    if config.rope_scaling is not None:
        s = dict(config.rope_scaling)
        original = s["original_max_position_embeddings"]
        wavelength = 2 * math.pi / inverse
        smooth = (original / wavelength - s["low_freq_factor"]) / (
            s["high_freq_factor"] - s["low_freq_factor"]
        )
        smooth = np.clip(smooth, 0.0, 1.0)
        inverse = (1 - smooth) * inverse / s["factor"] + smooth * inverse
    angles = positions[..., None, None].astype(jnp.float32) * jnp.asarray(inverse, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the halves of `[B,T,H,d]` against each other, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def visible(
    query_index: Array,
    key_index: Array,
    query_segments: Array | None,
    key_segments: Array | None,
    query_branches: Array | None,
    key_branches: Array | None,
) -> Array:
    """The mask rule, `[B or 1, Tq, Tk]` bool. See the module's docstring."""
    mask = (key_index[None, :] <= query_index[:, None])[None]
    if query_segments is not None:
        mask = mask & (query_segments[:, :, None] == key_segments[:, None, :])
    if query_branches is not None:
        on_prompt = key_branches[:, None, :] == 0
        mask = mask & (on_prompt | (query_branches[:, :, None] == key_branches[:, None, :]))
    return mask


def attention(
    queries: Array,
    keys: Array,
    values: Array,
    *,
    segment_ids: Array | None = None,
    branch_ids: Array | None = None,
    sliding_window: int | None = None,
    positions: Array | None = None,
) -> Array:
    """Causal grouped-query attention, softmax in float32.

    Args:
      queries: `[B,T,H,d]`.
      keys, values: `[B,T,K,d]`, K divides H.
      segment_ids, branch_ids: `[B,T]`, see the mask rule.
      sliding_window: keys at least this many positions back are not seen (Mistral); needs
        `positions`.
      positions: `[B,T]`.

    Returns:
      `[B,T,H,d]`.
    """
    length = queries.shape[1]
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        cut = lambda x, a, b: None if x is None else x[:, a:b]  # noqa: E731
        mask = visible(
            jnp.arange(start, end),
            jnp.arange(end),
            cut(segment_ids, start, end),
            cut(segment_ids, 0, end),
            cut(branch_ids, start, end),
            cut(branch_ids, 0, end),
        )
        if sliding_window is not None:
            distance = positions[:, start:end, None] - positions[:, None, :end]
            mask = mask & (distance < sliding_window)
        blocks.append(masked_attention(queries[:, start:end], keys[:, :end], values[:, :end], mask))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def masked_attention(queries: Array, keys: Array, values: Array, mask: Array) -> Array:
    """`[B,Tq,H,d], [B,Tk,K,d], [B,Tk,K,d], [B or 1,Tq,Tk] -> [B,Tq,H,d]`.

    The H/K query heads of a group are folded into the rows of one matrix product with their shared
    keys.
    """
    b, t, h, d = queries.shape
    k = keys.shape[2]
    folded = queries.reshape(b, t, k, h // k, d)
    scores = jnp.einsum("btkgd,bskd->bkgts", folded, keys, preferred_element_type=jnp.float32) * (
        d**-0.5
    )
    # Finite, so that a row that sees nothing (padding under a window) stays finite.
    scores = jnp.where(mask[:, None, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, values).reshape(b, t, h, d)
