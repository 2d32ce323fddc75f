"""Models, prompts and keys for the tests of the sampler."""

import dataclasses
import functools

import jax
import numpy as np

from align_jax.models.interchange import load_model
from align_jax.models.transformer import Transformer


@functools.cache
def model_of(name):
    """Weights three times those of the initialisation: distributions with something to sample."""
    if name == "window":
        config = dataclasses.replace(load_model("tiny").config, sliding_window=6)
        model = Transformer(config, key=jax.random.key(1))
    else:
        model = load_model(name)
    return jax.tree.map(lambda x: 3 * x, model)


def prompts_of(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 264, length).tolist() for length in lengths]


def keys_of(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)
