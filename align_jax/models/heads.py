"""Scalar heads: a reward or a value per position on top of a transformer's hidden states."""

import jax
import jax.numpy as jnp
from flax import nnx

from align_jax.models.transformer import Transformer

Array = jax.Array


class ScalarHead(nnx.Module):
    """`[...,D] -> [...]` float32, an affine map of hidden states.

    Args:
      hidden_size: D.
      key: PRNG key of N(0, 1/(D+1)), the reward head of Stiennon et al. 2020 (arXiv:2009.01325,
        B.1); None starts at zero, as value heads do.
    """

    def __init__(self, hidden_size: int, *, key: Array | None):
        scale = (hidden_size + 1) ** -0.5
        kernel = (
            jnp.zeros(hidden_size, jnp.float32)
            if key is None
            else scale * jax.random.normal(key, (hidden_size,), jnp.float32)
        )
        self.head_kernel = nnx.Param(kernel)
        self.head_bias = nnx.Param(jnp.zeros((), jnp.float32))

    def __call__(self, hidden: Array) -> Array:
        return hidden.astype(jnp.float32) @ self.head_kernel[...] + self.head_bias[...]


class ScalarModel(nnx.Module):
    """A transformer whose every position has a scalar: a reward model or a critic."""

    def __init__(self, transformer: Transformer, *, key: Array | None):
        self.transformer = transformer
        self.head = ScalarHead(transformer.config.hidden_size, key=key)

    def __call__(self, tokens: Array, **kwargs) -> Array:
        """`[B,T] -> [B,T]`; keyword arguments as for `Transformer`."""
        return self.head(self.transformer(tokens, **kwargs))
