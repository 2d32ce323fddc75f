"""One decoder-only transformer; what differs between families is a field of its config.

The modules are `flax.nnx` modules used as plain pytrees: `jax.value_and_grad`, optax and `jax.jit`
take the model itself. Layers are stacked along a leading axis and run by `lax.scan`, so compile
time does not grow with depth. Hidden states come out; the projection to the vocabulary is the
loss's business, which needs it at some positions only.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from align_jax.distributed.partitioning import constrain
from align_jax.models.attention import attention, rotary_frequencies, rotate
from align_jax.models.config import TransformerConfig
from align_jax.models.linear import Adapters, linear

Array = jax.Array


def _normal(key: Array, *shape: int) -> nnx.Param:
    return nnx.Param(0.02 * jax.random.normal(key, shape, jnp.float32))


class Norm(nnx.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019) or layer norm, in float32."""

    def __init__(self, config: TransformerConfig):
        self.config = config
        self.scale = nnx.Param(jnp.ones(config.hidden_size, jnp.float32))
        self.bias = (
            nnx.Param(jnp.zeros(config.hidden_size, jnp.float32))
            if config.norm == "layer"
            else None
        )

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        if self.config.norm == "layer":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.config.norm_epsilon)
        y = y * self.scale[...]
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(x.dtype)


class Attention(nnx.Module):
    """Projections of grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: TransformerConfig, *, key: Array):
        c, keys = config, jax.random.split(key, 4)
        self.config = config
        self.query = _normal(keys[0], c.hidden_size, c.num_heads, c.head_dim)
        self.key = _normal(keys[1], c.hidden_size, c.num_kv_heads, c.head_dim)
        self.value = _normal(keys[2], c.hidden_size, c.num_kv_heads, c.head_dim)
        self.output = _normal(keys[3], c.num_heads, c.head_dim, c.hidden_size)
        zeros = lambda *shape: nnx.Param(jnp.zeros(shape)) if c.use_bias else None  # noqa: E731
        self.query_bias = zeros(c.num_heads, c.head_dim)
        self.key_bias = zeros(c.num_kv_heads, c.head_dim)
        self.value_bias = zeros(c.num_kv_heads, c.head_dim)
        self.output_bias = zeros(c.hidden_size)

    def project(
        self, x: Array, rotary: tuple[Array, Array] | None, adapters: Adapters | None
    ) -> tuple[Array, Array, Array]:
        """`[B,T,D]` to queries `[B,T,H,d]`, keys and values `[B,T,K,d]`, rotated if rotary."""
        queries, keys, values = (
            linear(self, name, x, adapters) for name in ("query", "key", "value")
        )
        if rotary is not None:
            queries, keys = rotate(queries, *rotary), rotate(keys, *rotary)
        return queries, keys, values

    def merge(self, heads: Array, adapters: Adapters | None) -> Array:
        """`[B,T,H,d]` back to `[B,T,D]`."""
        return linear(self, "output", heads, adapters, inputs=2)


class MLP(nnx.Module):
    """Two-layer perceptron, gated (Shazeer 2020, arXiv:2002.05202) or plain."""

    def __init__(self, config: TransformerConfig, *, key: Array):
        c, keys = config, jax.random.split(key, 3)
        self.config = config
        self.gate = _normal(keys[0], c.hidden_size, c.mlp_size) if c.gated_mlp else None
        self.up = _normal(keys[1], c.hidden_size, c.mlp_size)
        # Output first: see `linear._matmul_backward`, which here wants the cotangent in front.
        self.down = _normal(keys[2], c.hidden_size, c.mlp_size)
        self.up_bias = nnx.Param(jnp.zeros(c.mlp_size)) if c.use_bias else None
        self.down_bias = nnx.Param(jnp.zeros(c.hidden_size)) if c.use_bias else None

    def __call__(self, x: Array, adapters: Adapters | None) -> Array:
        activate = jax.nn.silu if self.config.activation == "silu" else jax.nn.gelu
        up = linear(self, "up", x, adapters)
        if self.gate is not None:
            up = activate(linear(self, "gate", x, adapters)) * up
        else:
            up = activate(up)
        y = jnp.einsum("btf,df->btd", up, self.down[...].astype(x.dtype))
        if adapters is not None:
            y = adapters.add("down", up, y)
        return y if self.down_bias is None else y + self.down_bias[...].astype(x.dtype)


class Block(nnx.Module):
    """One pre-norm layer."""

    def __init__(self, config: TransformerConfig, *, key: Array):
        keys = jax.random.split(key)
        self.attention_norm = Norm(config)
        self.attention = Attention(config, key=keys[0])
        self.mlp_norm = Norm(config)
        self.mlp = MLP(config, key=keys[1])


# (layer index, queries [B,T,H,d], keys [B,T,K,d], values [B,T,K,d], state) -> (heads [B,T,H,d],
# state)
Attend = Callable[[Array, Array, Array, Array, Any], tuple[Array, Any]]


class Transformer(nnx.Module):
    """A decoder-only transformer with stacked layers.

    Args:
      config: sizes and family.
      key: PRNG key of the random initialisation, N(0, 0.02^2).
    """

    def __init__(self, config: TransformerConfig, *, key: Array):
        keys = jax.random.split(key, 4)
        self.config = config
        self.embedding = _normal(keys[0], config.vocab_size, config.hidden_size)
        self.position_embedding = (
            _normal(keys[1], config.context_length, config.hidden_size)
            if config.learned_positions
            else None
        )
        self.blocks = jax.vmap(lambda k: Block(config, key=k))(
            jax.random.split(keys[2], config.num_layers)
        )
        self.final_norm = Norm(config)
        self.unembedding = (
            None
            if config.tie_embeddings
            else _normal(keys[3], config.vocab_size, config.hidden_size)
        )
        self.adapters: Adapters | None = nnx.data(None)  # stacked as `blocks` are

    def __call__(
        self,
        tokens: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        branch_ids: Array | None = None,
    ) -> Array:
        """Hidden states after the final norm.

        Args:
          tokens: `[B,T]` int32.
          positions: `[B,T]` int32; by default counted from each segment's first token.
          segment_ids: `[B,T]` int32, tokens attend within their segment only; 0 is padding, on
            either side. By default one segment per row.
          branch_ids: `[B,T]` int32; 0 is a prompt, other values are alternative continuations of it
            that do not see each other. By default there is one branch.

        Returns:
          `[B,T,D]` in the compute dtype; at padding, finite numbers that mean nothing.
        """
        if positions is None:
            positions = segment_positions(tokens.shape, segment_ids)

        def attend(_, queries, keys, values, state):
            heads = attention(
                queries,
                keys,
                values,
                segment_ids=segment_ids,
                branch_ids=branch_ids,
                sliding_window=self.config.sliding_window,
                positions=positions,
            )
            return heads, state

        hidden, _ = self.run_layers(tokens, positions, attend, None)
        return hidden

    def run_layers(
        self, tokens: Array, positions: Array, attend: Attend, state: Any
    ) -> tuple[Array, Any]:
        """Embeds, runs every layer with the given attention, norms: `[B,T] -> [B,T,D]`, state.

        The sampler passes an `attend` that keeps a key-value cache in `state`.
        """
        dtype = jnp.dtype(self.config.compute_dtype)
        x = self.embedding[...][tokens]
        if self.position_embedding is not None:
            x = x + self.position_embedding[...][positions]
            rotary = None
        else:
            rotary = rotary_frequencies(positions, self.config)
        x = constrain(x.astype(dtype), "batch", "sequence", "features")

        def layer(carry, inputs):
            x, state = carry
            block, adapters, index = inputs
            normed = block.attention_norm(x)
            queries, keys, values = block.attention.project(normed, rotary, adapters)
            heads, state = attend(index, queries, keys, values, state)
            heads = checkpoint_name(heads, "heads")
            x = x + block.attention.merge(heads, adapters)
            x = x + block.mlp(block.mlp_norm(x), adapters)
            return (constrain(x, "batch", "sequence", "features"), state), None

        if self.config.remat != "none":
            policy = {
                "linear": jax.checkpoint_policies.save_only_these_names("linear", "heads"),
                "full": jax.checkpoint_policies.nothing_saveable,
            }[self.config.remat]
            layer = jax.checkpoint(layer, prevent_cse=False, policy=policy)
        (x, state), _ = jax.lax.scan(
            layer, (x, state), (self.blocks, self.adapters, jnp.arange(self.config.num_layers))
        )
        return self.final_norm(x), state

    @property
    def output_embedding(self) -> Array:
        """The `[V,D]` matrix that hidden states are projected with, float32."""
        table = self.embedding if self.unembedding is None else self.unembedding
        return table[...]

    def logits(self, hidden: Array) -> Array:
        """`[B,T,D] -> [B,T,V]` float32."""
        return jnp.einsum(
            "...d,vd->...v",
            hidden,
            self.output_embedding.astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )


def segment_positions(shape: tuple[int, int], segment_ids: Array | None) -> Array:
    """The position rule: `[B,T]`, counted from the first token of each segment."""
    index = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    if segment_ids is None:
        return index
    starts = jnp.concatenate(
        [jnp.ones((shape[0], 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
