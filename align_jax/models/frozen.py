"""Which parameters are trained: a property of each parameter, written in its type.

A parameter that is trained is an `nnx.Param`, one that is not is `Frozen`. Whoever differentiates,
optimises, donates or saves takes a model apart with `partition` and needs no list of names.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Model = TypeVar("Model")


class Frozen(nnx.Variable):
    """A parameter that training leaves alone: no gradient, no optimizer state, never donated."""


def freeze(model: Model) -> Model:
    """The model with every parameter frozen; shares its arrays."""
    return _retype(model, nnx.Param, Frozen)


def unfreeze(model: Model) -> Model:
    """The model with every parameter trained; shares its arrays."""
    return _retype(model, Frozen, nnx.Param)


def partition(tree: Model) -> tuple[Model, Model]:
    """The trained and the frozen part, each of them `tree` with None for the leaves of the other.

    A leaf that is no `Frozen` (a bare array of a plain dictionary, say) is trained.
    """
    trained = jax.tree.map(
        lambda x: jax.tree.map(lambda _: None, x) if _is_frozen(x) else x, tree, is_leaf=_is_frozen
    )
    frozen = jax.tree.map(
        lambda x: x if _is_frozen(x) else jax.tree.map(lambda _: None, x), tree, is_leaf=_is_frozen
    )
    return trained, frozen


def combine(trained: Model, frozen: Model) -> Model:
    """The inverse of `partition`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda x: x is None
    )


def _is_frozen(x: Any) -> bool:
    return isinstance(x, Frozen)


def _retype(model: Model, old: type, new: type) -> Model:
    return jax.tree.map(
        lambda x: new(x.get_value()) if isinstance(x, old) else x,
        model,
        is_leaf=lambda x: isinstance(x, old),
    )


def own_trained(model: Model) -> Model:
    """The model with copies of what is trained, for a step that consumes it; the rest is shared."""
    trained, frozen = partition(model)
    return combine(jax.tree.map(jnp.copy, trained), frozen)
