"""The linear maps of a transformer: a kernel, its bias, and the low-rank adapter beside it."""

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

if TYPE_CHECKING:
    from align_jax.models.lora import Adapters

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


def linear(
    module: nnx.Module, name: str, x: Array, adapters: "Adapters | None", *, inputs: int = 1
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
