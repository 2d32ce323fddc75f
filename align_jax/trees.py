"""Trees of arrays by dotted names: flattening, its inverse, and a fingerprint of the values."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def flatten(tree: Any, *, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Leaves under dotted names."""

    def name(path):
        # The last key of a parameter is flax's own field of nnx.Param, `value`.
        keys = path[:-1] if getattr(path[-1], "name", None) == "value" else path
        return ".".join(
            str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in keys
        )

    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return {name(path): leaf for path, leaf in leaves}


def unflatten(tree: Any, leaves: dict[str, Any]) -> Any:
    """The inverse of `flatten`, into the structure of `tree`."""
    structure = jax.tree.structure(tree)
    return jax.tree.unflatten(structure, [leaves[name] for name in flatten(tree)])


def fingerprint(tree: Any) -> str:
    """A digest of every array's name and exact value, the same on any mesh."""
    digest = hashlib.sha256()
    for name, value in sorted(flatten(_bit_sums(tree)).items()):
        digest.update(f"{name} {np.asarray(value).tolist()}".encode())
    return digest.hexdigest()


@jax.jit
def _bit_sums(tree: Any) -> Any:
    """Two 32-bit sums of every array's bits, weighted by place; exact on any sharding."""

    def sums(x: jax.Array) -> jax.Array:
        integer = jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == jnp.bool_
        words = x.astype(jnp.uint32 if integer else jnp.float32)
        bits = jax.lax.bitcast_convert_type(words, jnp.uint32)
        place = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        odd = place * jnp.uint32(2654435769) | jnp.uint32(1)
        mixed = (bits ^ (bits >> 15)) * jnp.uint32(2246822519)
        return jnp.stack([(bits * odd).sum(dtype=jnp.uint32), (mixed * odd).sum(dtype=jnp.uint32)])

    return jax.tree.map(sums, tree)
