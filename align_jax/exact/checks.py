"""What a loss must do whatever it converges to: shapes, dtypes, finite values, true gradients."""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from align_jax.exact.language import Array

# Sizes that all differ, so that an axis taken for another shows.
PAIRS = 5
PROMPTS, GROUP, LENGTH = 2, 3, 4
EXTREME = 1e4
STEP, TOLERANCE = 1e-5, 1e-6

Loss = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Kind:
    """How losses of one kind are called.

    Attributes:
      arguments: the names of the arrays, in the order in which the loss takes them.
      differentiated: how many of them, from the first, training differentiates by.
      stops_gradients: whether a correct loss may stop gradients of what it is differentiated by.
    """

    name: str
    arguments: tuple[str, ...]
    differentiated: int
    stops_gradients: bool = False

    @property
    def of_tokens(self) -> bool:
        return "mask" in self.arguments

    @property
    def returns(self) -> tuple[int, ...]:
        """The shape a loss must return for `inputs`."""
        return () if self.of_tokens else (PAIRS,)

    def inputs(self, draw: Callable[[tuple[int, ...]], Array]) -> list[Array]:
        """One array for each argument, drawn by shape; a mask is that of unequal lengths."""
        if not self.of_tokens:
            return [draw((PAIRS,)) for _ in self.arguments]
        shapes = {"rewards": (PROMPTS, GROUP)}
        mask = np.arange(LENGTH) < np.array([[1, 4, 2], [3, 2, 4]])[..., None]
        return [
            mask.astype(np.float64)
            if name == "mask"
            else draw(shapes.get(name, (PROMPTS, GROUP, LENGTH)))
            for name in self.arguments
        ]


KINDS = {
    kind.name: kind
    for kind in (
        Kind("pair", ("chosen", "rejected", "ref_chosen", "ref_rejected"), 2),
        Kind("token", ("log_probs", "old", "ref", "rewards", "mask"), 1, stops_gradients=True),
        Kind("reward", ("chosen", "rejected"), 2),
    )
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One property: what was found, and whether it holds. `passed` None: reported, not judged."""

    passed: bool | None
    found: str

    def __str__(self) -> str:
        mark = {True: "ok  ", False: "FAIL", None: "note"}[self.passed]
        return f"  {mark}  {self.found}"


def check_shape(loss: Loss, kind: Kind, rng: np.random.Generator) -> Check:
    """Float in, float of the right shape out. Nothing else can be checked where this fails."""
    inputs = kind.inputs(lambda shape: rng.normal(size=shape))
    dtypes = []
    for dtype in (jnp.float32, jnp.float64):
        out = jnp.asarray(loss(*(jnp.asarray(x, dtype) for x in inputs)))
        wanted = f"a scalar for [P,K,T] = {PROMPTS, GROUP, LENGTH}"
        if not kind.of_tokens:
            wanted = f"one loss a pair: shape {kind.returns} for {PAIRS} pairs"
        if out.shape != kind.returns:
            hint = " Arrays of [B] and [B,1] were broadcast." if out.ndim == 2 else ""
            return Check(False, f"returns shape {out.shape}, not {wanted}.{hint}")
        if not jnp.issubdtype(out.dtype, jnp.floating):
            return Check(False, f"returns {out.dtype} for {dtype.__name__} inputs, not floats")
        dtypes.append(f"{out.dtype} for {dtype.__name__}")
    return Check(True, f"returns {wanted}; {', '.join(dtypes)}")


def check_extremes(loss: Loss, kind: Kind, rng: np.random.Generator) -> Check:
    """Value and gradient in float32, as in training, at +-1e4 in every argument."""
    levels = (-EXTREME, 0.0, EXTREME)
    named = [name for name in kind.arguments if name != "mask"]
    batches = []
    for constants in itertools.product(levels, repeat=len(named)):
        given = iter(constants)
        batches.append(kind.inputs(lambda shape, given=given: np.full(shape, next(given))))
    batches += [kind.inputs(lambda shape: rng.choice(levels, shape)) for _ in range(47)]
    arrays = [jnp.asarray(np.stack(x), jnp.float32) for x in zip(*batches)]

    def total(*inputs):
        return jnp.sum(loss(*inputs))

    compute = jax.value_and_grad(total, argnums=tuple(range(kind.differentiated)))
    values, gradients = jax.jit(jax.vmap(compute))(*arrays)
    finite = {"value": np.isfinite(values)}
    for name, gradient in zip(kind.arguments, gradients):
        flat = np.asarray(gradient).reshape(len(values), -1)
        finite[f"gradient by `{name}`"] = np.isfinite(flat).all(-1)
    for what, good in finite.items():
        if not good.all():
            bad = int(np.argmin(good))
            where = ", ".join(
                f"{name} {x[bad].ravel()[0]:g}{'' if np.ptp(x[bad]) == 0 else ', ...'}"
                for name, x in zip(named, arrays)
            )
            return Check(
                False,
                f"the {what} is inf or nan in {(~good).sum()} of {len(good)} batches of -1e4, 0 "
                f"and 1e4 (float32), such as {where}",
            )
    found = f"values and gradients are finite at -1e4, 0 and 1e4 ({len(values)} batches)"
    return Check(True, found)


def check_gradients(loss: Loss, kind: Kind, rng: np.random.Generator) -> Check:
    """Gradients against central differences in float64, entry by entry.

    A loss that stops gradients on purpose (an importance weight, a baseline) differs from its
    differences; for a kind in which that is right, it is only reported.
    """
    inputs = kind.inputs(lambda shape: rng.normal(size=shape))
    count = kind.differentiated

    @jax.jit
    def total(*varied):
        return jnp.sum(loss(*varied, *inputs[count:]))

    gradients = jax.grad(total, argnums=tuple(range(count)))(*inputs[:count])
    error = 0.0
    for i, gradient in enumerate(gradients):
        for place in np.ndindex(inputs[i].shape):
            ends = []
            for step in (STEP, -STEP):
                moved = [x.copy() for x in inputs[:count]]
                moved[i][place] += step
                ends.append(float(total(*moved)))
            difference = (ends[0] - ends[1]) / (2 * STEP)
            error = np.fmax(error, abs(difference - float(gradient[place])))
            if not np.isfinite(difference):
                return Check(False, "is inf or nan at ordinary inputs (standard normal)")
    if error < TOLERANCE:
        return Check(True, f"gradients are the central differences (largest error {error:.0e})")
    return Check(
        None if kind.stops_gradients else False,
        f"gradients differ from central differences by up to {error:.2g}"
        + (": some are stopped" if kind.stops_gradients else ""),
    )


def check_mask(loss: Loss, kind: Kind, rng: np.random.Generator) -> Check:
    """What stands where the mask is 0 changes neither the loss nor the gradient elsewhere."""
    inputs = kind.inputs(lambda shape: rng.normal(size=shape))
    mask = inputs[kind.arguments.index("mask")]
    compute = jax.jit(jax.value_and_grad(loss))
    value, gradient = compute(*inputs)
    other = [
        np.where(mask > 0, x, x - 3.0) if x.shape == mask.shape and x is not mask else x
        for x in inputs
    ]
    moved_value, moved_gradient = compute(*other)
    hidden = np.abs(np.where(mask > 0, 0.0, gradient)).max()
    moved = np.abs(moved_gradient - gradient).max() + abs(float(moved_value - value))
    if hidden > 0 or not moved < 1e-12:
        return Check(False, "log-probabilities where the mask is 0 change the loss or its gradient")
    return Check(True, "what the mask hides changes nothing")


def check_independence(loss: Loss, kind: Kind, rng: np.random.Generator) -> Check:
    """Whether a pair's loss is that of the pair alone."""
    inputs = kind.inputs(lambda shape: rng.normal(size=shape))
    whole, part = loss(*inputs), loss(*(x[:3] for x in inputs))
    if np.allclose(whole[:3], part, rtol=1e-9, atol=1e-12):
        return Check(None, "a pair's loss does not depend on the other pairs of its batch")
    return Check(
        None,
        "a pair's loss depends on the other pairs of its batch; the limit is that of one batch of "
        "all pairs",
    )


def check_integers(loss: Loss, kind: Kind, rng: np.random.Generator) -> Check:
    """Whether integers are refused, which would hide a reward that was truncated."""
    inputs = kind.inputs(lambda shape: rng.integers(-3, 3, shape))
    try:
        loss(*(jnp.asarray(x, jnp.int32) for x in inputs))
    except Exception as error:
        cause = error.__cause__ or error
        return Check(None, f"integers are refused ({type(cause).__name__})")
    return Check(None, "integers are taken without an error")


def check(loss: Loss, kind: Kind, seed: int) -> tuple[Check, ...]:
    """All checks of a kind; the first alone where the shape or the dtype is wrong. Under x64."""
    rng = np.random.default_rng(seed)
    shape = check_shape(loss, kind, rng)
    if not shape.passed:
        return (shape,)
    rest = [check_extremes, check_gradients]
    rest += [check_mask] if kind.of_tokens else [check_independence]
    return (shape, *(one(loss, kind, rng) for one in (*rest, check_integers)))
