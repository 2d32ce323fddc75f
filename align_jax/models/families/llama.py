"""Llama 2 and 3, SmolLM2."""

from typing import Any, ClassVar

from align_jax.errors import ModelError
from align_jax.models.config import TransformerConfig
from align_jax.models.families.base import (
    MAX_LAYERS,
    Family,
    TensorRule,
    flag,
    head_width,
    mapping,
    number,
    only,
    size,
)
from align_jax.text import brief

_LAYER = "model.layers.{}."

_TENSORS = {
    "embedding": TensorRule("model.embed_tokens.weight"),
    "unembedding": TensorRule("lm_head.weight"),
    "final_norm.scale": TensorRule("model.norm.weight", 0),
    "blocks.attention_norm.scale": TensorRule(_LAYER + "input_layernorm.weight", 0),
    "blocks.mlp_norm.scale": TensorRule(_LAYER + "post_attention_layernorm.weight", 0),
    "blocks.attention.query": TensorRule(_LAYER + "self_attn.q_proj.weight", 1, True),
    "blocks.attention.key": TensorRule(_LAYER + "self_attn.k_proj.weight", 1, True),
    "blocks.attention.value": TensorRule(_LAYER + "self_attn.v_proj.weight", 1, True),
    "blocks.attention.output": TensorRule(_LAYER + "self_attn.o_proj.weight", 2, True),
    "blocks.mlp.gate": TensorRule(_LAYER + "mlp.gate_proj.weight", 1, True),
    "blocks.mlp.up": TensorRule(_LAYER + "mlp.up_proj.weight", 1, True),
    "blocks.mlp.down": TensorRule(_LAYER + "mlp.down_proj.weight"),
}


class Llama(Family):
    """Rotary positions, root-mean-square norms, a gated MLP, grouped-query attention, no biases."""

    name = "llama"
    model_types = ("llama",)
    models = "Llama 2 and 3, SmolLM2"
    causal_class = "LlamaForCausalLM"
    classification_class = "LlamaForSequenceClassification"
    base_prefix = "model."
    tensors = _TENSORS

    # An absent key means what transformers' class defaults to, here and below.
    default_kv_heads: ClassVar[int | None] = None  # None: as many as there are attention heads
    default_context_length: ClassVar[int] = 2048

    def config_from_hf(self, hf: dict[str, Any]) -> TransformerConfig:
        only(hf, "hidden_act", "silu")
        only(hf, "attention_bias", False)
        only(hf, "mlp_bias", False)
        heads, hidden = size(hf, "num_attention_heads"), size(hf, "hidden_size")
        theta, scaling = _rope(hf)
        head_dim = hf.get("head_dim")
        return TransformerConfig(
            family=self.name,
            vocab_size=size(hf, "vocab_size"),
            hidden_size=hidden,
            num_layers=size(hf, "num_hidden_layers", most=MAX_LAYERS),
            num_heads=heads,
            num_kv_heads=size(hf, "num_key_value_heads", self.default_kv_heads or heads),
            head_dim=head_width(hidden, heads) if head_dim is None else size(hf, "head_dim"),
            mlp_size=size(hf, "intermediate_size"),
            context_length=size(hf, "max_position_embeddings", self.default_context_length),
            norm="rms",
            norm_epsilon=number(hf, "rms_norm_eps", 1e-6, above=0),
            activation="silu",
            gated_mlp=True,
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=flag(hf, "tie_word_embeddings", False),
        )

    def config_to_hf(self, config: TransformerConfig) -> dict[str, Any]:
        if config.sliding_window is not None:
            raise ModelError("the family 'llama' has no sliding window; 'mistral' has one.")
        scaling = None
        if config.rope_scaling is not None:
            scaling = dict(config.rope_scaling)
            scaling["original_max_position_embeddings"] = int(
                scaling["original_max_position_embeddings"]
            )
            scaling["rope_type"] = "llama3"
        return {
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "intermediate_size": config.mlp_size,
            "max_position_embeddings": config.context_length,
            "rms_norm_eps": config.norm_epsilon,
            "hidden_act": "silu",
            "rope_theta": config.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": {
                "rope_theta": config.rope_theta,
                **(scaling or {"rope_type": "default"}),
            },
        }


def _rope(hf: dict[str, Any]) -> tuple[float, tuple[tuple[str, float], ...] | None]:
    """Theta and scaling, in the spelling of transformers 5 (`rope_parameters`) or 4."""
    rope = {**mapping(hf, "rope_scaling"), **mapping(hf, "rope_parameters")}
    if any(isinstance(value, dict) for value in rope.values()):
        raise ModelError(
            "config.json: rope_parameters that differ between layers are not supported."
        )
    only({**hf, **rope}, "partial_rotary_factor", 1.0)
    theta = number({**hf, **rope}, "rope_theta", 10_000.0, above=0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ModelError(
            f"config.json: rope type {brief(kind)} is not supported, only 'default' and 'llama3' "
            "are."
        )
    rope.setdefault("original_max_position_embeddings", hf.get("max_position_embeddings"))
    names = ("factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings")
    missing = [name for name in names if rope.get(name) is None]
    if missing:
        raise ModelError(f"config.json: rope type 'llama3' needs {', '.join(missing)}.")
    return theta, tuple((name, number(rope, name, above=0)) for name in names)
