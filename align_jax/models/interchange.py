"""The public door: models in from, and out to, other people's files.

In: a Hugging Face directory (safetensors), a hub id, a GGUF file, or the words `smollm2`, `tiny`,
`tiny:gpt2`. Out: a Hugging Face directory that `transformers` loads. No pickle is ever read.
`align_jax.rewards.model` reads and writes reward models.
"""

from align_jax.errors import ModelError
from align_jax.models.export import save_model
from align_jax.models.loading import abstract_model, load_model
from align_jax.models.tokenizers import load_tokenizer

__all__ = ["ModelError", "abstract_model", "load_model", "load_tokenizer", "save_model"]
