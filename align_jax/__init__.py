"""Aligning language models in JAX: losses, models, training and evaluation."""
