"""The named dimensions of every parameter.

`distributed/partitioning.py` says which axis of the mesh a name is split over.
"""

import jax
from flax import nnx

# The dimensions of every parameter, by the last name of its path.
PARAMETER_DIMENSIONS: dict[str, tuple[str | None, ...]] = {
    "embedding": ("vocab", "embed"),
    "position_embedding": (None, "embed"),
    "unembedding": ("vocab", "embed"),
    "query": ("embed", "heads", "head_dim"),
    "key": ("embed", "kv_heads", "head_dim"),
    "value": ("embed", "kv_heads", "head_dim"),
    "output": ("heads", "head_dim", "embed"),
    "query_bias": ("heads", "head_dim"),
    "key_bias": ("kv_heads", "head_dim"),
    "value_bias": ("kv_heads", "head_dim"),
    "output_bias": ("embed",),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("embed", "mlp"),
    "up_bias": ("mlp",),
    "down_bias": ("embed",),
    "scale": ("embed",),
    "bias": ("embed",),
    "head_kernel": ("embed",),
    "head_bias": (),
}

# The kernels that low-rank adapters can stand beside: input and output dimensions.
PROJECTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "query": (("embed",), ("heads", "head_dim")),
    "key": (("embed",), ("kv_heads", "head_dim")),
    "value": (("embed",), ("kv_heads", "head_dim")),
    "output": (("heads", "head_dim"), ("embed",)),
    "gate": (("embed",), ("mlp",)),
    "up": (("embed",), ("mlp",)),
    "down": (("mlp",), ("embed",)),
}
for _name, (_inputs, _outputs) in PROJECTIONS.items():
    PARAMETER_DIMENSIONS[f"{_name}_a"] = (*_inputs, "rank")
    PARAMETER_DIMENSIONS[f"{_name}_b"] = ("rank", *_outputs)


def parameter_dimensions(model: nnx.Module) -> nnx.Module:
    """A tree like `model` whose leaves are the names of each parameter's dimensions."""

    def dimensions(path, leaf):
        names = [key.name for key in path[:-1]]  # the last key is nnx.Param's own field
        named = PARAMETER_DIMENSIONS[names[-1]]
        return ("layers", *named) if {"blocks", "adapters"} & set(names) else named

    return jax.tree_util.tree_map_with_path(dimensions, model)
