"""Trained and frozen parameters: taken apart and put together, arrays shared."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from align_jax.models.frozen import Frozen, combine, freeze, partition, unfreeze
from align_jax.models.heads import ScalarModel
from align_jax.models.interchange import load_model


def test_partition_has_an_inverse_and_copies_nothing():
    model = ScalarModel(load_model("tiny"), key=jax.random.key(0))
    model.transformer = freeze(model.transformer)
    trained, frozen = partition(model)
    assert [leaf.shape for leaf in jax.tree.leaves(trained)] == [(), (32,)]
    assert len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(model)) - 2
    again = combine(trained, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(model)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True))


def test_a_model_without_frozen_parameters_is_its_own_trained_part():
    model = load_model("tiny")
    trained, frozen = partition(model)
    assert jax.tree.structure(trained) == jax.tree.structure(model)
    assert not jax.tree.leaves(frozen)
    assert partition({"w": 1.0}) == ({"w": 1.0}, {"w": None})


def test_freezing_keeps_arrays_and_results_and_has_an_inverse():
    model, tokens = load_model("tiny"), np.arange(12).reshape(2, 6)
    frozen = freeze(model)
    assert isinstance(frozen.blocks.mlp.up, Frozen)
    assert isinstance(model.blocks.mlp.up, nnx.Param)
    np.testing.assert_array_equal(frozen(tokens), model(tokens))
    again = unfreeze(frozen)
    assert jax.tree.structure(again) == jax.tree.structure(model)
    assert again.embedding[...] is model.embedding[...]


def test_the_gradient_and_adams_state_are_of_the_trained_part():
    model = ScalarModel(load_model("tiny"), key=jax.random.key(0))
    model.transformer = freeze(model.transformer)
    trained, frozen = partition(model)
    tokens = np.arange(12).reshape(2, 6)
    gradient = jax.grad(lambda part: jnp.square(combine(part, frozen)(tokens)).sum())(trained)
    moments = jax.tree.leaves(optax.adam(1e-3).init(trained))
    assert [leaf.shape for leaf in jax.tree.leaves(gradient)] == [(), (32,)]
    assert [leaf.shape for leaf in moments] == [(), (), (32,), (), (32,)]  # count, mu, nu
