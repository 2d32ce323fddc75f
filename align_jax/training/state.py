"""The train state: what a step reads and writes, and how it lies on a mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from align_jax.distributed.partitioning import named_sharding, replicated
from align_jax.models.dimensions import parameter_dimensions
from align_jax.models.frozen import partition
from align_jax.trees import flatten, unflatten

Array = jax.Array


class TrainState(NamedTuple):
    """What a step reads and writes: everything a checkpoint needs but the place in the data.

    Attributes:
      step: the number of steps taken.
      model: any tree of parameters: a module, or a policy with its critic.
      optimizer: its state, of the model's trained parameters alone.
      running: what the loss carries from one step to the next, scalars by name; {} for most losses.
    """

    step: Array
    model: Any
    optimizer: optax.OptState
    running: dict[str, Array] = {}


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Shardings of a state (or of its shapes): moments lie as their parameters do."""
    names = flatten(parameter_dimensions(state.model), is_leaf=lambda x: type(x) is tuple)
    model = {
        name: named_sharding(mesh, names[name], leaf.shape)
        for name, leaf in flatten(state.model).items()
    }

    def like_its_parameter(name):
        parts = name.split(".")
        suffixes = (".".join(parts[i:]) for i in range(len(parts)))
        return next((model[suffix] for suffix in suffixes if suffix in model), replicated(mesh))

    optimizer = {name: like_its_parameter(name) for name in flatten(state.optimizer)}
    return TrainState(
        replicated(mesh),
        unflatten(state.model, model),
        unflatten(state.optimizer, optimizer),
        dict.fromkeys(state.running, replicated(mesh)),
    )


def init_state(
    model: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    running: dict[str, Array] | None = None,
) -> TrainState:
    """The state before the first step; the model's arrays are used, not copied.

    `running` is what the loss starts with, where it has a running state.
    """
    running = running or {}
    trained, _ = partition(model)
    shapes = TrainState(jnp.int32(0), model, jax.eval_shape(optimizer.init, trained), running)
    shardings = state_shardings(shapes, mesh)
    moments = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(trained)
    step = jax.device_put(jnp.int32(0), replicated(mesh))
    model = jax.device_put(model, shardings.model)
    return TrainState(step, model, moments, jax.device_put(running, shardings.running))
