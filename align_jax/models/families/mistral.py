"""Mistral: Llama with a sliding window."""

import dataclasses
from typing import Any

from align_jax.models.config import TransformerConfig
from align_jax.models.families.base import size
from align_jax.models.families.llama import Llama


class Mistral(Llama):
    """Llama with a window: a query sees the last `sliding_window` keys, or all if that is None."""

    name = "mistral"
    model_types = ("mistral",)
    models = ""
    causal_class = "MistralForCausalLM"
    classification_class = "MistralForSequenceClassification"
    default_kv_heads = 8
    default_context_length = 131_072

    def config_from_hf(self, hf: dict[str, Any]) -> TransformerConfig:
        # null is no window, absent is the default
        window = hf.get("sliding_window", 4096)
        window = None if window is None else size(hf, "sliding_window", 4096)
        return dataclasses.replace(super().config_from_hf(hf), sliding_window=window)

    def config_to_hf(self, config: TransformerConfig) -> dict[str, Any]:
        plain = dataclasses.replace(config, sliding_window=None)
        return super().config_to_hf(plain) | {"sliding_window": config.sliding_window}
