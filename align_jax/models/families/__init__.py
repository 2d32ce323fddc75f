"""How model families differ: one object in one file each, and the list of them.

A checkpoint's `config.json` becomes a `TransformerConfig` and back, and each of our parameters has
a place in its tensors. A new family is a new file here and a new entry of `FAMILIES`.
"""

from typing import Any

from align_jax.errors import ModelError
from align_jax.models.config import TransformerConfig
from align_jax.models.families.base import Family
from align_jax.models.families.gpt2 import GPT2
from align_jax.models.families.llama import Llama
from align_jax.models.families.mistral import Mistral
from align_jax.text import brief

FAMILIES: dict[str, Family] = {family.name: family for family in (Llama(), Mistral(), GPT2())}


def family_of(config: TransformerConfig) -> Family:
    """The family that `config.family` names."""
    return FAMILIES[config.family]


def config_from_hf(hf: dict[str, Any]) -> TransformerConfig:
    """The `TransformerConfig` of a Hugging Face `config.json`, of transformers 4 or 5.

    Raises:
      ModelError: another architecture, or a feature of it that this transformer does not have.
    """
    kind = hf.get("model_type")
    if hf.get("quantization_config"):
        raise ModelError(
            "config.json: 'quantization_config' is set, but only GGUF files may be quantised; "
            "use the unquantised model, or a GGUF file of it."
        )
    family = next((family for family in FAMILIES.values() if kind in family.model_types), None)
    if family is None:
        raise ModelError(
            f"config.json: model_type {brief(kind)} is not supported; supported are {_supported()}."
        )
    config = family.config_from_hf(hf)
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"config.json: {config.num_heads} attention heads cannot share {config.num_kv_heads} "
            "key-value heads evenly."
        )
    if not config.learned_positions and config.head_dim % 2:
        raise ModelError(
            f"config.json: 'head_dim' is {config.head_dim}; rotary positions need an even number."
        )
    return config


def _supported() -> str:
    """`'a' (its models), 'b' and 'c'`: every family, for an error message."""
    names = [
        " or ".join(map(repr, family.model_types))
        + (f" ({family.models})" if family.models else "")
        for family in FAMILIES.values()
    ]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def config_to_hf(
    config: TransformerConfig,
    *,
    dtype: str,
    bos_token_id: int | None,
    eos_token_id: int | None,
    pad_token_id: int | None,
) -> dict[str, Any]:
    """The `config.json` that transformers 4 and 5 load such a model with."""
    family = family_of(config)
    return {
        "architectures": [family.causal_class],
        "model_type": family.name,
        **family.config_to_hf(config),
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": dtype,
        "torch_dtype": dtype,  # transformers before 4.56
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }
