"""The train step: gradients of a summed loss, accumulated, normalised, clipped, applied.

What is trained is written in the model (`models/frozen.py`). Frozen parameters get no gradient and
no optimizer state, and the step neither consumes nor returns them: the arrays a model shares with
its reference, or with another model, stay valid for all of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from align_jax.distributed.partitioning import named_sharding
from align_jax.models.frozen import combine, partition
from align_jax.training.state import TrainState, state_shardings

Array = jax.Array
Batch = dict[str, Array]


class LossSums(NamedTuple):
    """A loss over part of a batch, as sums, so that parts add up to the whole whatever their sizes.

    Attributes:
      loss: sum of the loss over what it is a mean of (tokens, pairs).
      weight: how many of those there are.
      metrics: sums over the same units.
      statistics: sums over the same units, from which a running state is updated.
    """

    loss: Array
    weight: Array
    metrics: dict[str, Array]
    statistics: dict[str, Array] = {}


# `(model, batch) -> LossSums`; with a running state `(model, batch, running) -> LossSums`. A batch
# is a `Batch`, or a tree of arrays that the loss knows.
LossFunction = Callable[..., LossSums]

# `(running, statistics, weight) -> running`, of sums over a whole batch.
UpdateRunning = Callable[[dict[str, Array], dict[str, Array], Array], dict[str, Array]]


def place_batch(batch: Any, mesh: Mesh, *, accumulated: bool) -> Any:
    """Puts a global batch, known to every host, on the mesh: a dictionary or any tree of arrays.

    Arrays of rows (`[rows, width, ...]`, and `[accumulation, rows, width, ...]` when `accumulated`)
    are split by rows; arrays of one value per response, and scalars, lie whole on every device.
    """
    lead = (None,) if accumulated else ()

    def place(x):
        rest = x.ndim - len(lead)
        names = (*lead, *(("batch", *[None] * (rest - 1)) if rest > 1 else [None] * rest))
        sharding = named_sharding(mesh, names, x.shape)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, batch)


class TrainStep:
    """A compiled `(state, batch) -> (state, metrics)`; see `make_train_step`."""

    def __init__(self, jitted: Callable):
        self._jitted = jitted

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        trained, frozen = partition(state.model)
        new, metrics = self._jitted(state._replace(model=trained), frozen, batch)
        return new._replace(model=combine(new.model, frozen)), metrics

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """The step for these arrays or shapes, to be compiled and inspected without running it."""
        trained, frozen = partition(state.model)
        return self._jitted.lower(state._replace(model=trained), frozen, batch)

    def _cache_size(self) -> int:  # as of a jitted function
        return self._jitted._cache_size()


def make_train_step(
    loss_function: LossFunction,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: TrainState,
    mesh: Mesh,
    *,
    accumulated: bool,
    update_running: UpdateRunning | None = None,
) -> TrainStep:
    """Compiles `(state, batch) -> (state, metrics)`, once per batch shape.

    The state is donated but for its frozen parameters, which come back as the same arrays.

    With `accumulated`, every array of the batch has a leading axis of micro-batches. Their summed
    losses' gradients are added and divided once by the whole batch's weight, so that the result is
    that of the undivided batch however unequal the parts are (TRL's #2617 averaged averages).

    With `update_running`, the loss function also takes `state.running`: every micro-batch takes the
    state from before the step, which is then updated once, from the sums over the whole batch.
    """

    def gradients(trained, frozen, running, batch):
        def objective(trained):
            sums = loss_function(combine(trained, frozen), batch, *running)
            # An undivided batch is normalised here, which spares a pass over all gradients.
            return sums.loss if accumulated else sums.loss / jnp.maximum(sums.weight, 1.0), sums

        (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(trained)
        return sums, grads

    def train_step(state: TrainState, frozen: nnx.Module, batch: Batch):
        # `state.model` is the trained part.
        running = () if update_running is None else (state.running,)
        if accumulated:
            first = jax.tree.map(lambda x: x[0], batch)
            shapes = jax.eval_shape(gradients, state.model, frozen, running, first)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            (sums, grads), _ = jax.lax.scan(
                lambda total, part: (
                    jax.tree.map(jnp.add, total, gradients(state.model, frozen, running, part)),
                    None,
                ),
                zeros,
                batch,
            )
            grads = jax.tree.map(lambda g: g / jnp.maximum(sums.weight, 1.0), grads)
        else:
            sums, grads = gradients(state.model, frozen, running, batch)
        scale = 1.0 / jnp.maximum(sums.weight, 1.0)
        updates, moments = optimizer.update(grads, state.optimizer, state.model)
        metrics = {
            "loss": sums.loss * scale,
            **{name: total * scale for name, total in sums.metrics.items()},
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        trained = optax.apply_updates(state.model, updates)
        new = TrainState(state.step + 1, trained, moments, state.running)
        if update_running is not None:
            updated = update_running(state.running, sums.statistics, sums.weight)
            new = new._replace(running=updated)
        return new, metrics

    shardings = state_shardings(state, mesh)
    trained, frozen = partition(shardings.model)
    shardings = shardings._replace(model=trained)
    return TrainStep(
        jax.jit(
            train_step,
            in_shardings=(shardings, frozen, None),
            out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
            donate_argnums=(0,),
        )
    )
