"""The linear maps of a transformer: a kernel, its bias, and the low-rank adapter beside it."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from align_jax.models.config import TransformerConfig
from align_jax.models.dimensions import PROJECTIONS

Array = jax.Array


@jax.custom_vjp
def matmul(x: Array, kernel: Array) -> Array:
    """`[B,T,D] @ [D,F]`, with a kernel gradient that is fast on a CPU.

    The gradient of a kernel that nothing is differentiated by is dead code: it is not computed.
    """
    return jnp.einsum("btd,df->btf", x, kernel)


def _matmul_forward(x, kernel):
    return matmul(x, kernel), (x, kernel)


def _matmul_backward(residuals, dy):
    # JAX's own rule puts the cotangent first in the kernel's gradient, and XLA on a CPU then
    # computes the activation's derivative straight into a transposed buffer: a fifth of the step
    # on one fusion.
    x, kernel = residuals
    return jnp.einsum("btf,df->btd", dy, kernel), jnp.einsum("btd,btf->df", x, dy)


matmul.defvjp(_matmul_forward, _matmul_backward)


class Adapters(nnx.Module):
    """The low-rank factors of every adapted projection, stacked over layers (see `models/lora.py`).

    A is `NAME_a`, `[L, *inputs, r]`, drawn from N(0, 1/(3 fan-in)). B is `NAME_b`,
    `[L, r, *outputs]`, and starts at zero. The paper says "random Gaussian" and gives no variance.
    This is the variance in the authors' code, so published learning rates carry over.

    Args:
      config: sizes of the adapted transformer.
      rank: r.
      alpha: the update is scaled by `alpha / rank`.
      key: PRNG key of A.
      targets: the projections to adapt, names of `PROJECTIONS`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        rank: int,
        alpha: float,
        key: Array,
        targets: Sequence[str],
    ):
        self.scale = alpha / rank
        sizes = {
            "embed": config.hidden_size,
            "heads": config.num_heads,
            "kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "mlp": config.mlp_size,
        }
        # Every projection has a key, adapted or not: its A does not depend on the other targets.
        keys = dict(zip(PROJECTIONS, jax.random.split(key, len(PROJECTIONS)), strict=True))
        for name in targets:
            inputs, outputs = (tuple(sizes[d] for d in side) for side in PROJECTIONS[name])
            std = (3 * math.prod(inputs)) ** -0.5
            a = std * jax.random.normal(keys[name], (config.num_layers, *inputs, rank))
            setattr(self, f"{name}_a", nnx.Param(a))
            setattr(self, f"{name}_b", nnx.Param(jnp.zeros((config.num_layers, rank, *outputs))))

    @property
    def targets(self) -> tuple[str, ...]:
        """The adapted projections."""
        return tuple(name for name in PROJECTIONS if hasattr(self, f"{name}_a"))

    def add(self, name: str, x: Array, y: Array) -> Array:
        """`y + scale (x A) B` in one layer, or `y` if the projection is not adapted.

        Args:
          name: the projection.
          x: `[B,T,inputs]`.
          y: `[B,T,outputs]`, what the kernel makes of x.
        """
        if name not in self.targets:
            return y
        a, b = (getattr(self, f"{name}_{side}")[...].astype(x.dtype) for side in "ab")
        rank = a.shape[-1]
        low = checkpoint_name(matmul(x, a.reshape(-1, rank)), "linear")
        return y + matmul(self.scale * low, b.reshape(rank, -1))


def linear(
    module: nnx.Module, name: str, x: Array, adapters: Adapters | None, *, inputs: int = 1
) -> Array:
    """Applies `module.NAME`, `module.NAME_bias` if there is one, and the adapter of that name.

    Contracts the last `inputs` dimensions of `x`, `[B,T,...]`, with the first ones of the kernel.
    """
    w = getattr(module, name)[...].astype(x.dtype)
    bias = getattr(module, f"{name}_bias", None)
    size = math.prod(w.shape[:inputs])
    x = x.reshape(*x.shape[:2], size)
    y = matmul(x, w.reshape(size, -1))
    if adapters is not None:
        y = adapters.add(name, x, y)
    y = y.reshape(*x.shape[:2], *w.shape[inputs:])
    y = y if bias is None else y + bias[...].astype(x.dtype)
    return checkpoint_name(y, "linear")
