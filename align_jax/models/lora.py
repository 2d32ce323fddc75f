"""Low-rank adapters on a frozen transformer (LoRA, Hu et al. 2021, arXiv:2106.09685).

A kernel W stays as it is, and what training adds to it has rank r:

    y = x W + (alpha / r) (x A) B,    A [inputs, r] random, B [r, outputs] zero      (eq. 3)

so that an adapted model starts as its base, exactly. The product A B is never formed in training,
and neither is the gradient of W. The base with its adapters off is the reference policy; it shares
the base's arrays.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from align_jax.distributed.partitioning import named_sharding
from align_jax.models.dimensions import PARAMETER_DIMENSIONS, PROJECTIONS
from align_jax.models.frozen import freeze, unfreeze
from align_jax.models.linear import Adapters
from align_jax.models.transformer import Transformer

Array = jax.Array


def add_adapters(
    model: Transformer,
    *,
    rank: int,
    alpha: float,
    key: Array,
    targets: Sequence[str] | None = None,
    mesh: Mesh | None = None,
) -> Transformer:
    """The model, frozen, with new adapters that are trained; shares the model's arrays.

    Args:
      model: a transformer without adapters.
      rank: r.
      alpha: the update is scaled by `alpha / rank`.
      key: PRNG key of the random factors.
      targets: names of `PROJECTIONS`; by default all that the model has.
      mesh: places the adapters by the rules of `distributed/partitioning.py`.

    Raises:
      ValueError: a rank, alpha or target that makes no sense, the argument's name in front; or a
        model that has adapters already.
    """
    if model.adapters is not None:
        raise ValueError("the model has adapters already; merge them first (merge_adapters).")
    present = [name for name in PROJECTIONS if name != "gate" or model.config.gated_mlp]
    chosen = present if targets is None else list(targets)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank is {rank!r}; expected a whole number of at least 1.")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha!r}; expected a number above 0.")
    unknown = [name for name in chosen if name not in present]
    if unknown or not chosen:
        named = f"names {unknown[0]!r}" if unknown else "is empty"
        raise ValueError(f"targets {named}; this model has {', '.join(present)}.")

    def make(key: Array) -> Adapters:
        return Adapters(model.config, rank=rank, alpha=alpha, key=key, targets=chosen)

    shardings = None
    if mesh is not None:

        def place(path, leaf):
            dimensions = ("layers", *PARAMETER_DIMENSIONS[path[-2].name])
            return named_sharding(mesh, dimensions, leaf.shape)

        shardings = jax.tree_util.tree_map_with_path(place, jax.eval_shape(make, key))
    return _with_adapters(freeze(model), jax.jit(make, out_shardings=shardings)(key))


def without_adapters(model: Transformer) -> Transformer:
    """The model its adapters were added to, as a frozen view on the same arrays: the reference."""
    return _with_adapters(model, None)


def merge_adapters(model: Transformer) -> Transformer:
    """A plain, trainable transformer with `W + (alpha / r) A B` as its kernels, dtypes kept.

    Kernels are new arrays, everything else is shared; a model without adapters comes back as such.
    """
    merged = unfreeze(without_adapters(model))
    if model.adapters is None:
        return merged
    for name in model.adapters.targets:
        attention, mlp = merged.blocks.attention, merged.blocks.mlp
        parameter = getattr(attention if hasattr(attention, name) else mlp, name)
        a, b = (getattr(model.adapters, f"{name}_{side}")[...] for side in "ab")
        parameter.set_value(_merged(name, parameter[...], a, b, model.adapters.scale))
    return merged


def _merged(name: str, kernel: Array, a: Array, b: Array, scale: float) -> Array:
    inputs, outputs = PROJECTIONS[name]
    inputs_first = PARAMETER_DIMENSIONS[name] == inputs + outputs

    def merge(kernel, a, b):
        layers, rank = a.shape[0], a.shape[-1]
        delta = jnp.einsum(
            "lir,lro->lio" if inputs_first else "lir,lro->loi",
            a.reshape(layers, -1, rank),
            b.reshape(layers, rank, -1),
            precision=jax.lax.Precision.HIGHEST,
        )
        updated = kernel.astype(jnp.float32) + scale * delta.reshape(kernel.shape)
        return updated.astype(kernel.dtype)

    return jax.jit(merge, out_shardings=kernel.sharding)(kernel, a, b)


def _with_adapters(model: Transformer, adapters: Adapters | None) -> Transformer:
    copy = jax.tree.map(lambda x: x, model)  # new modules around the same arrays
    copy.adapters = adapters
    return copy
