"""GPT-2."""

from typing import Any

from align_jax.errors import ModelError
from align_jax.models.config import TransformerConfig
from align_jax.models.families.base import (
    MAX_LAYERS,
    Family,
    TensorRule,
    flag,
    head_width,
    number,
    only,
    size,
)
from align_jax.text import brief

_LAYER = "transformer.h.{}."

_TENSORS = {
    "embedding": TensorRule("transformer.wte.weight"),
    "position_embedding": TensorRule("transformer.wpe.weight"),
    "unembedding": TensorRule("lm_head.weight"),
    "final_norm.scale": TensorRule("transformer.ln_f.weight", 0),
    "final_norm.bias": TensorRule("transformer.ln_f.bias", 0),
    "blocks.attention_norm.scale": TensorRule(_LAYER + "ln_1.weight", 0),
    "blocks.attention_norm.bias": TensorRule(_LAYER + "ln_1.bias", 0),
    "blocks.mlp_norm.scale": TensorRule(_LAYER + "ln_2.weight", 0),
    "blocks.mlp_norm.bias": TensorRule(_LAYER + "ln_2.bias", 0),
    "blocks.attention.output": TensorRule(_LAYER + "attn.c_proj.weight", 2),
    "blocks.attention.output_bias": TensorRule(_LAYER + "attn.c_proj.bias", 0),
    "blocks.mlp.up": TensorRule(_LAYER + "mlp.c_fc.weight"),
    "blocks.mlp.up_bias": TensorRule(_LAYER + "mlp.c_fc.bias", 0),
    "blocks.mlp.down": TensorRule(_LAYER + "mlp.c_proj.weight", 1, True),
    "blocks.mlp.down_bias": TensorRule(_LAYER + "mlp.c_proj.bias", 0),
    **{
        f"blocks.attention.{name}{bias}": TensorRule(
            _LAYER + f"attn.c_attn.{'bias' if bias else 'weight'}",
            0 if bias else 1,
            part=(i, 3),
        )
        for i, name in enumerate(("query", "key", "value"))
        for bias in ("", "_bias")
    },
}


class GPT2(Family):
    """Learned positions, layer norms, a plain MLP, biases everywhere."""

    name = "gpt2"
    model_types = ("gpt2",)
    causal_class = "GPT2LMHeadModel"
    classification_class = "GPT2ForSequenceClassification"
    base_prefix = "transformer."
    tensors = _TENSORS

    def config_from_hf(self, hf: dict[str, Any]) -> TransformerConfig:
        activation = hf.get("activation_function", "gelu_new")
        if activation not in ("gelu_new", "gelu_pytorch_tanh"):
            raise ModelError(
                f"config.json: activation_function {brief(activation)} is not supported."
            )
        only(hf, "scale_attn_weights", True)
        only(hf, "scale_attn_by_inverse_layer_idx", False)
        only(hf, "add_cross_attention", False)
        heads, hidden = size(hf, "n_head"), size(hf, "n_embd")
        return TransformerConfig(
            family=self.name,
            vocab_size=size(hf, "vocab_size"),
            hidden_size=hidden,
            num_layers=size(hf, "n_layer", most=MAX_LAYERS),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_width(hidden, heads),
            mlp_size=size(hf, "n_inner", 4 * hidden),
            context_length=size(hf, "n_positions", 1024),
            norm="layer",
            norm_epsilon=number(hf, "layer_norm_epsilon", 1e-5, above=0),
            activation="gelu_tanh",
            gated_mlp=False,
            use_bias=True,
            learned_positions=True,
            tie_embeddings=flag(hf, "tie_word_embeddings", True),
        )

    def config_to_hf(self, config: TransformerConfig) -> dict[str, Any]:
        return {
            "n_embd": config.hidden_size,
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "n_inner": config.mlp_size,
            "n_positions": config.context_length,
            "layer_norm_epsilon": config.norm_epsilon,
            "activation_function": "gelu_new",
        }
