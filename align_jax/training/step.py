"""The train step: gradients of a summed loss, accumulated, normalised, clipped, applied."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from align_jax.distributed.partitioning import named_sharding, replicated
from align_jax.models.transformer import parameter_dimensions
from align_jax.training.checkpoint import flatten, unflatten

Array = jax.Array
Batch = dict[str, Array]


class TrainState(NamedTuple):
    """What a step reads and writes: everything a checkpoint needs but the place in the data."""

    step: Array
    model: nnx.Module
    optimizer: optax.OptState


class LossSums(NamedTuple):
    """A loss over part of a batch, as sums, so that parts add up to the whole whatever their sizes.

    Attributes:
      loss: sum of the loss over what it is a mean of (tokens, pairs).
      weight: how many of those there are.
      metrics: sums over the same units.
    """

    loss: Array
    weight: Array
    metrics: dict[str, Array]


LossFunction = Callable[[nnx.Module, Batch], LossSums]


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Shardings of a state (or of its shapes): moments lie as their parameters do."""
    names = flatten(parameter_dimensions(state.model), is_leaf=lambda x: isinstance(x, tuple))
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
        replicated(mesh), unflatten(state.model, model), unflatten(state.optimizer, optimizer)
    )


def init_state(
    model: nnx.Module, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The state before the first step; the model's arrays are used, not copied."""
    shapes = jax.eval_shape(lambda m: TrainState(jnp.int32(0), m, optimizer.init(m)), model)
    shardings = state_shardings(shapes, mesh)
    moments = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(model)
    step = jax.device_put(jnp.int32(0), replicated(mesh))
    return TrainState(step, jax.device_put(model, shardings.model), moments)


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh, *, accumulated: bool) -> Batch:
    """Puts a global batch, known to every host, on the mesh.

    Arrays of rows (`[rows, width]`, and `[accumulation, rows, width]` when `accumulated`) are
    split by rows; arrays of one value per response lie whole on every device.
    """
    lead = (None,) if accumulated else ()

    def place(x):
        names = lead + (("batch", None) if x.ndim == 2 + len(lead) else (None,))
        sharding = named_sharding(mesh, names, x.shape)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return {name: place(x) for name, x in batch.items()}


def make_train_step(
    loss_function: LossFunction,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: TrainState,
    mesh: Mesh,
    *,
    accumulated: bool,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Compiles `(state, batch) -> (state, metrics)`, once per batch shape; the state is donated.

    With `accumulated`, every array of the batch has a leading axis of micro-batches. Their summed
    losses' gradients are added and divided once by the whole batch's weight, so that the result is
    that of the undivided batch however unequal the parts are (TRL's #2617 averaged averages).
    """

    def gradients(model, batch):
        def objective(model):
            sums = loss_function(model, batch)
            # An undivided batch is normalised here, which spares a pass over all gradients.
            return sums.loss if accumulated else sums.loss / jnp.maximum(sums.weight, 1.0), sums

        (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(model)
        return sums, grads

    def train_step(state: TrainState, batch: Batch):
        if accumulated:
            shapes = jax.eval_shape(gradients, state.model, jax.tree.map(lambda x: x[0], batch))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            (sums, grads), _ = jax.lax.scan(
                lambda total, part: (
                    jax.tree.map(jnp.add, total, gradients(state.model, part)),
                    None,
                ),
                zeros,
                batch,
            )
            grads = jax.tree.map(lambda g: g / jnp.maximum(sums.weight, 1.0), grads)
        else:
            sums, grads = gradients(state.model, batch)
        scale = 1.0 / jnp.maximum(sums.weight, 1.0)
        updates, moments = optimizer.update(grads, state.optimizer, state.model)
        metrics = {
            "loss": sums.loss * scale,
            **{name: total * scale for name, total in sums.metrics.items()},
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        model = optax.apply_updates(state.model, updates)
        return TrainState(state.step + 1, model, moments), metrics

    shardings = state_shardings(state, mesh)
    return jax.jit(
        train_step,
        in_shardings=(shardings, None),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=(0,),
    )
