"""The one table of partition rules: which mesh axes each named dimension is split over.

Models name the dimensions of their parameters and activations; nothing else in the project
mentions a mesh axis. The layout is that of ZeRO-3 / FSDP (Rajbhandari et al. 2020,
arXiv:1910.02054) combined with the tensor parallelism of Megatron-LM (Shoeybi et al. 2019,
arXiv:1909.08053): the contraction over `heads` and `mlp` is split over `tensor`, parameters are
stored split over `fsdp`, and rows of a batch over every axis that is not `tensor` or `context`.
"""

import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "context")

RULES: dict[str | None, tuple[str, ...]] = {
    # activations and batches
    "batch": ("data", "fsdp"),
    "sequence": ("context",),
    "features": (),
    # parameters
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "head_dim": (),
    "rank": (),
    "layers": (),
    None: (),
}


def partition_spec(
    dimensions: tuple[str | None, ...], shape: tuple[int, ...], mesh
) -> PartitionSpec:
    """The `PartitionSpec` of an array with these named dimensions.

    A dimension whose size the axes do not divide stays whole (three KV heads on `tensor=2`, say):
    the result is the same numbers with less memory saved, where an error would forbid the model.

    Args:
      dimensions: one name of `RULES` per array dimension.
      shape: the array's shape.
      mesh: a `Mesh` or `AbstractMesh` with the axes of `MESH_AXES`.
    """
    if len(dimensions) != len(shape):
        raise ValueError(f"dimensions {dimensions} do not fit an array of shape {shape}.")
    entries = []
    for name, size in zip(dimensions, shape, strict=True):
        axes = RULES[name]
        split = math.prod(mesh.shape.get(axis, 1) for axis in axes)
        entries.append(axes if split > 1 and size % split == 0 else None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *dimensions: str | None) -> jax.Array:
    """Pins an activation's layout on the mesh in context (`jax.set_mesh`); a no-op without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(dimensions, x.shape, mesh))


def named_sharding(
    mesh: Mesh, dimensions: tuple[str | None, ...], shape: tuple[int, ...]
) -> NamedSharding:
    """The `NamedSharding` of an array with these named dimensions on `mesh`."""
    return NamedSharding(mesh, partition_spec(dimensions, shape, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())
