"""The one place that knows how model families differ: configurations and names of tensors.

Families: `llama` (Llama 2 and 3, Mistral, SmolLM2) and `gpt2`. A checkpoint's `config.json` becomes
a `TransformerConfig` and back; a table maps each of our parameters to the tensor that holds it in a
Hugging Face checkpoint.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
from jax.tree_util import tree_flatten_with_path

from align_jax.errors import ModelError
from align_jax.models.transformer import Transformer, TransformerConfig


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """How one of our parameters (one layer's slice of it) lies in a Hugging Face checkpoint.

    Attributes:
      name: the tensor's name; `{}` stands for the layer's number.
      rows: how many of our leading axes are folded into the matrix's rows; 0 for vectors.
      transposed: stored (out, in) as `torch.nn.Linear` does; else (in, out) as GPT-2's Conv1D.
      part: (i, n) where the tensor holds n equal parameters side by side on its last axis.
    """

    name: str
    rows: int = 1
    transposed: bool = False
    part: tuple[int, int] = (0, 1)

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The checkpoint tensor's shape when one layer's parameter has this shape."""
        if self.rows == 0:
            return (math.prod(shape) * self.part[1],)
        matrix = math.prod(shape[: self.rows]), math.prod(shape[self.rows :]) * self.part[1]
        return matrix[::-1] if self.transposed else matrix

    def from_stored(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The checkpoint's tensor as one layer of our parameter, a view where possible."""
        i, n = self.part
        width = tensor.shape[-1] // n
        tensor = tensor[..., i * width : (i + 1) * width]
        return (tensor.T if self.transposed else tensor).reshape(shape)

    def to_stored(self, layer: np.ndarray) -> np.ndarray:
        """The inverse of `from_stored`, for one part."""
        if self.rows == 0:
            return layer.reshape(-1)
        matrix = layer.reshape(math.prod(layer.shape[: self.rows]), -1)
        return matrix.T if self.transposed else matrix


_LLAMA_LAYER = "model.layers.{}."
_GPT2_LAYER = "transformer.h.{}."

# Our parameter's path -> where it lies. Paths under `blocks` are stacked over layers.
TENSORS: dict[str, dict[str, TensorRule]] = {
    "llama": {
        "embedding": TensorRule("model.embed_tokens.weight"),
        "unembedding": TensorRule("lm_head.weight"),
        "final_norm.scale": TensorRule("model.norm.weight", 0),
        "blocks.attention_norm.scale": TensorRule(_LLAMA_LAYER + "input_layernorm.weight", 0),
        "blocks.mlp_norm.scale": TensorRule(_LLAMA_LAYER + "post_attention_layernorm.weight", 0),
        "blocks.attention.query": TensorRule(_LLAMA_LAYER + "self_attn.q_proj.weight", 1, True),
        "blocks.attention.key": TensorRule(_LLAMA_LAYER + "self_attn.k_proj.weight", 1, True),
        "blocks.attention.value": TensorRule(_LLAMA_LAYER + "self_attn.v_proj.weight", 1, True),
        "blocks.attention.output": TensorRule(_LLAMA_LAYER + "self_attn.o_proj.weight", 2, True),
        "blocks.mlp.gate": TensorRule(_LLAMA_LAYER + "mlp.gate_proj.weight", 1, True),
        "blocks.mlp.up": TensorRule(_LLAMA_LAYER + "mlp.up_proj.weight", 1, True),
        "blocks.mlp.down": TensorRule(_LLAMA_LAYER + "mlp.down_proj.weight"),
    },
    "gpt2": {
        "embedding": TensorRule("transformer.wte.weight"),
        "position_embedding": TensorRule("transformer.wpe.weight"),
        "unembedding": TensorRule("lm_head.weight"),
        "final_norm.scale": TensorRule("transformer.ln_f.weight", 0),
        "final_norm.bias": TensorRule("transformer.ln_f.bias", 0),
        "blocks.attention_norm.scale": TensorRule(_GPT2_LAYER + "ln_1.weight", 0),
        "blocks.attention_norm.bias": TensorRule(_GPT2_LAYER + "ln_1.bias", 0),
        "blocks.mlp_norm.scale": TensorRule(_GPT2_LAYER + "ln_2.weight", 0),
        "blocks.mlp_norm.bias": TensorRule(_GPT2_LAYER + "ln_2.bias", 0),
        "blocks.attention.output": TensorRule(_GPT2_LAYER + "attn.c_proj.weight", 2),
        "blocks.attention.output_bias": TensorRule(_GPT2_LAYER + "attn.c_proj.bias", 0),
        "blocks.mlp.up": TensorRule(_GPT2_LAYER + "mlp.c_fc.weight"),
        "blocks.mlp.up_bias": TensorRule(_GPT2_LAYER + "mlp.c_fc.bias", 0),
        "blocks.mlp.down": TensorRule(_GPT2_LAYER + "mlp.c_proj.weight", 1, True),
        "blocks.mlp.down_bias": TensorRule(_GPT2_LAYER + "mlp.c_proj.bias", 0),
        **{
            f"blocks.attention.{name}{bias}": TensorRule(
                _GPT2_LAYER + f"attn.c_attn.{'bias' if bias else 'weight'}",
                0 if bias else 1,
                part=(i, 3),
            )
            for i, name in enumerate(("query", "key", "value"))
            for bias in ("", "_bias")
        },
    },
}

# What a base model saved without its language-model head leaves off the names above.
BASE_PREFIXES = {"llama": "model.", "gpt2": "transformer."}

# Constants that some checkpoints carry along (causal masks, rotary tables).
IGNORED_SUFFIXES = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


class StoredTensor(NamedTuple):
    """A checkpoint tensor: its shape, and by part our parameter and layer (None: not stacked)."""

    shape: tuple[int, ...]
    parts: list[tuple[str, int | None]]


def stored_tensors(model: Transformer) -> dict[str, StoredTensor]:
    """What a Hugging Face checkpoint of `model` (arrays or shapes) holds, by name."""
    rules = TENSORS[model.config.family]
    tensors: dict[str, StoredTensor] = {}
    leaves = {parameter_path(keys): leaf for keys, leaf in tree_flatten_with_path(model)[0]}
    for path, rule in rules.items():
        if path not in leaves:
            continue
        shape = leaves[path].shape
        layers = range(shape[0]) if path.startswith("blocks.") else [None]
        for layer in layers:
            one = shape if layer is None else shape[1:]
            stored = tensors.setdefault(
                rule.name.format(layer), StoredTensor(rule.stored_shape(one), [])
            )
            stored.parts.append((path, layer))
    return tensors


def parameter_path(keys: tuple) -> str:
    """A key path of the model's pytree as in `TENSORS`, `blocks.attention.query` say."""
    return ".".join(key.name for key in keys[:-1])  # the last key is nnx.Param's own field


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
    if kind in ("llama", "mistral"):
        config = _llama_config(hf, kind)
    elif kind == "gpt2":
        config = _gpt2_config(hf)
    else:
        raise ModelError(
            f"config.json: model_type {kind!r} is not supported; supported are 'llama' (Llama 2 "
            "and 3, SmolLM2), 'mistral' and 'gpt2'."
        )
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"config.json: {config.num_heads} attention heads cannot share {config.num_kv_heads} "
            "key-value heads evenly."
        )
    return config


def _llama_config(hf: dict[str, Any], kind: str) -> TransformerConfig:
    _only(hf, "hidden_act", "silu")
    _only(hf, "attention_bias", False)
    _only(hf, "mlp_bias", False)
    heads, hidden = _size(hf, "num_attention_heads"), _size(hf, "hidden_size")
    mistral = kind == "mistral"
    theta, scaling = _rope(hf)
    return TransformerConfig(
        family="llama",
        vocab_size=_size(hf, "vocab_size"),
        hidden_size=hidden,
        num_layers=_size(hf, "num_hidden_layers"),
        num_heads=heads,
        # An absent key means what transformers' own class defaults to, here and below.
        num_kv_heads=_size(hf, "num_key_value_heads", 8 if mistral else heads),
        head_dim=_size(hf, "head_dim", hidden // heads),
        mlp_size=_size(hf, "intermediate_size"),
        context_length=_size(hf, "max_position_embeddings", 131_072 if mistral else 2048),
        norm="rms",
        norm_epsilon=float(hf.get("rms_norm_eps", 1e-6)),
        activation="silu",
        gated_mlp=True,
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=hf.get("sliding_window", 4096) if mistral else None,
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
    )


def _gpt2_config(hf: dict[str, Any]) -> TransformerConfig:
    activation = hf.get("activation_function", "gelu_new")
    if activation not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ModelError(f"config.json: activation_function {activation!r} is not supported.")
    _only(hf, "scale_attn_weights", True)
    _only(hf, "scale_attn_by_inverse_layer_idx", False)
    _only(hf, "add_cross_attention", False)
    heads, hidden = _size(hf, "n_head"), _size(hf, "n_embd")
    return TransformerConfig(
        family="gpt2",
        vocab_size=_size(hf, "vocab_size"),
        hidden_size=hidden,
        num_layers=_size(hf, "n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        mlp_size=_size(hf, "n_inner", 4 * hidden),
        context_length=_size(hf, "n_positions", 1024),
        norm="layer",
        norm_epsilon=float(hf.get("layer_norm_epsilon", 1e-5)),
        activation="gelu_tanh",
        gated_mlp=False,
        use_bias=True,
        learned_positions=True,
        tie_embeddings=bool(hf.get("tie_word_embeddings", True)),
    )


def _rope(hf: dict[str, Any]) -> tuple[float, tuple[tuple[str, float], ...] | None]:
    """Theta and scaling, as transformers 5 spells them (`rope_parameters`) or 4 does."""
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    if any(isinstance(value, dict) for value in rope.values()):
        raise ModelError(
            "config.json: rope_parameters that differ between layers are not supported."
        )
    _only({**hf, **rope}, "partial_rotary_factor", 1.0)
    theta = float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ModelError(
            f"config.json: rope type {kind!r} is not supported, only 'default' and 'llama3' are."
        )
    rope.setdefault("original_max_position_embeddings", hf.get("max_position_embeddings"))
    names = ("factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings")
    missing = [name for name in names if rope.get(name) is None]
    if missing:
        raise ModelError(f"config.json: rope type 'llama3' needs {', '.join(missing)}.")
    return theta, tuple((name, float(rope[name])) for name in names)


def _size(hf: dict[str, Any], key: str, default: int | None = None) -> int:
    value = hf.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or value <= 0:
        raise ModelError(f"config.json: {key!r} must be a positive integer, got {value!r}.")
    return value


def _only(hf: dict[str, Any], key: str, supported: Any) -> None:
    value = hf.get(key)
    if value is not None and value != supported:
        raise ModelError(f"config.json: {key}={value!r} is not supported, only {supported!r} is.")


def config_to_hf(
    config: TransformerConfig,
    *,
    dtype: str,
    bos_token_id: int | None,
    eos_token_id: int | None,
    pad_token_id: int | None,
) -> dict[str, Any]:
    """The `config.json` that transformers 4 and 5 load such a model with."""
    shared = {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": dtype,
        "torch_dtype": dtype,  # transformers before 4.56
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }
    if config.family == "gpt2":
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_embd": config.hidden_size,
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "n_inner": config.mlp_size,
            "n_positions": config.context_length,
            "layer_norm_epsilon": config.norm_epsilon,
            "activation_function": "gelu_new",
            **shared,
        }
    scaling = None
    if config.rope_scaling is not None:
        scaling = dict(config.rope_scaling)
        scaling["original_max_position_embeddings"] = int(
            scaling["original_max_position_embeddings"]
        )
        scaling["rope_type"] = "llama3"
    windowed = config.sliding_window is not None
    return {
        "architectures": ["MistralForCausalLM" if windowed else "LlamaForCausalLM"],
        "model_type": "mistral" if windowed else "llama",
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
        **({"sliding_window": config.sliding_window} if windowed else {}),
        **shared,
    }
