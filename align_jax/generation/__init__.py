"""Sampling from a model: `generate`."""

from align_jax.generation.sampler import Generation, generate

__all__ = ["Generation", "generate"]
