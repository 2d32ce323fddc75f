"""Scalar heads: a reward or a value per position on top of a transformer's hidden states."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from align_jax.models.config import TransformerConfig
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

    @property
    def config(self) -> TransformerConfig:
        return self.transformer.config


def response_scores(model: ScalarModel, batch: dict[str, Array]) -> Array:
    """The scalar at each response's last token, EOS included: `[N]` (layout: docs/data.md).

    That token sees its prompt and its response and nothing else of the batch.
    """
    scalars = model(
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        branch_ids=batch["branch_ids"],
    )
    return scalars[batch["response_row"], batch["response_end"]]


def without_unembedding(transformer: Transformer) -> Transformer:
    """The same transformer without an untied projection to the vocabulary; arrays are shared.

    A reward model never projects to the vocabulary: for Llama 2 7B that is 2 % of the parameters
    and of the optimizer's state.
    """
    if transformer.unembedding is None:
        return transformer
    bare = jax.tree.map(lambda x: x, transformer)
    bare.unembedding = None
    bare.config = dataclasses.replace(transformer.config, tie_embeddings=True)
    return bare
