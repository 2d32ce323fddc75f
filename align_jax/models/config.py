"""The configuration of a transformer: its sizes, and what differs between families."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and family differences of a decoder-only transformer.

    `models/families` fills these fields from a checkpoint's own configuration.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    context_length: int
    family: str = "llama"  # a name of `families.FAMILIES`
    norm: str = "rms"  # "rms" | "layer" (with bias)
    norm_epsilon: float = 1e-5
    activation: str = "silu"  # "silu" | "gelu_tanh"
    gated_mlp: bool = True
    use_bias: bool = False
    learned_positions: bool = False  # False: rotary
    rope_theta: float = 10_000.0
    rope_scaling: tuple[tuple[str, float], ...] | None = None  # Llama 3.1's, as sorted items
    sliding_window: int | None = None
    tie_embeddings: bool = True
    compute_dtype: str = "float32"
    remat: str = "none"  # "none" | "linear" (keep projections) | "full" (keep layer inputs)
