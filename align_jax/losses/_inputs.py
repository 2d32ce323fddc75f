"""What every loss does to its inputs: float checks, float32, matching shapes, safe masking."""

from typing import TypeGuard

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

# A hyperparameter: a Python number, or an array where it is traced or one value per example.
Number = float | jax.Array

# exp is exact up to this many nats and linear beyond. e^40 squared still fits in float32, so even
# the squared gradient norm that an optimiser takes of a hopeless example stays finite.
MAX_EXPONENT = 40.0


def as_float(name: str, x: ArrayLike) -> jax.Array:
    """`x` in float32 (float64 stays), or a TypeError that names the argument."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"`{name}` must hold floating-point numbers, but its dtype is {x.dtype}. "
            f"Convert it first, for example with {name}.astype(jnp.float32)."
        )
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def same_shape_floats(**named: ArrayLike) -> tuple[jax.Array, ...]:
    """`as_float` of every argument, which must agree in shape.

    Broadcasting [B] against [B, 1] would silently give [B, B], hence the ValueError.
    """
    arrays = {name: as_float(name, x) for name, x in named.items()}
    if len({x.shape for x in arrays.values()}) > 1:
        shapes = ", ".join(f"`{name}` {x.shape}" for name, x in arrays.items())
        raise ValueError(f"these arguments must have one shape: {shapes}")
    return tuple(arrays.values())


def as_mask(mask: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """`mask` (bool, or 0 and 1 in any dtype) as bool; ValueError if its shape is not `shape`."""
    mask = jnp.asarray(mask)
    if mask.shape != shape:
        raise ValueError(f"`mask` has shape {mask.shape}, but the values it masks have {shape}")
    return mask.astype(bool)


def log_ratios(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """(chosen - ref_chosen, rejected - ref_rejected) in nats; the reference gets no gradient."""
    chosen, rejected, ref_chosen, ref_rejected = same_shape_floats(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    return chosen - jax.lax.stop_gradient(ref_chosen), rejected - jax.lax.stop_gradient(
        ref_rejected
    )


def require(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless `condition`."""
    if not condition:
        raise ValueError(message)


def is_number(x: object) -> TypeGuard[float]:
    """Whether a hyperparameter is a plain number, and so can be checked even inside `jit`."""
    return isinstance(x, int | float)


def bounded_exp(x: jax.Array) -> jax.Array:
    """exp(x) up to MAX_EXPONENT, its tangent line beyond: finite, increasing, C1.

    Clipping instead would zero the gradient of exactly those examples that need it most.
    """
    return jnp.exp(jnp.minimum(x, MAX_EXPONENT)) * (1.0 + jnp.maximum(x - MAX_EXPONENT, 0.0))


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the last axis of the entries that count, 0 where none do."""
    return jnp.where(mask, x, 0.0).sum(-1) / jnp.maximum(mask.sum(-1), 1)
