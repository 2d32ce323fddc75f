"""Runs a loss of the user's own on the enumerable language, and says what it converges to.

    report = verify_loss(my_loss, kind="pair", beta=0.1)
    print(report)
    assert report.passed

Everything is exact: expectations are sums over all that can be sampled or compared, in float64, and
the policy (or the reward) is a table of free numbers. `docs/verify.md` has examples.
"""

import dataclasses
import functools
import inspect
import traceback
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from align_jax.errors import RunError
from align_jax.exact.checks import GROUP, KINDS, PROMPTS, Check, Kind, Loss, check
from align_jax.exact.fixed_points import pair_minimizer, reward_minimizer
from align_jax.exact.language import (
    Array,
    Language,
    World,
    expectation,
    kl,
    normalized,
    random_reward,
    token_policy,
)
from align_jax.exact.recognition import NEAR, is_near, recognise
from align_jax.exact.table import (
    descend,
    expected_kl,
    expected_loss,
    expected_reward,
    policy_of,
    rescaled,
)
from align_jax.text import one_line
from align_jax.user_code import OF_USERS_CODE, load_callable

# Where a policy's gradient is compared: policies that are neither reference nor optimum.
POINTS = 3
# Comparisons are over 40 responses. Batches of 2 prompts with 3 samples each are all of 4,096 where
# a prompt has 4 responses, of one to three symbols.
COMPARED = Language(num_symbols=3, max_length=3)
SAMPLED = Language(num_symbols=1, max_length=3, prompts=((1,), (1, 1)))
# A bias below this is rounding.
UNBIASED = 1e-6


@dataclasses.dataclass(frozen=True)
class Report:
    """What `verify_loss` found; `str(report)` is what the command line prints.

    Attributes:
      name: what the loss is called.
      kind: "pair", "token" or "reward".
      beta: the price of a nat of KL in the optimum.
      checks: the properties that any loss of the kind should have.
      measured: what was measured on the way to the verdict, a line each.
      distance: KL(optimum || limit) of the worst prompt, nats; nan where no limit was computed.
      converges: whether the limit is the optimum.
      verdict: one sentence that names the optimum.
    """

    name: str
    kind: str
    beta: float
    checks: tuple[Check, ...]
    measured: tuple[str, ...]
    distance: float
    converges: bool
    verdict: str

    @property
    def passed(self) -> bool:
        """Whether the limit is the optimum and no check failed."""
        return self.converges and all(one.passed is not False for one in self.checks)

    def __str__(self) -> str:
        lines = [f"{self.name}, kind {self.kind}, beta {self.beta:g}", *map(str, self.checks)]
        lines += [f"        {line}" for line in self.measured]
        return "\n".join([*lines, f"verdict: {self.verdict}"])


def verify_loss(
    f: Loss, *, kind: str, beta: float = 0.1, seed: int = 0, name: str | None = None
) -> Report:
    """Checks a loss and finds what it converges to. Takes seconds.

    Args:
      f: a pure jax function, to be minimised. By kind, all arrays float:
        pair    f(chosen, rejected, ref_chosen, ref_rejected) -> [B]
        token   f(log_probs, old, ref, rewards, mask) -> scalar; rewards [P,K], the others [P,K,T]
        reward  f(chosen, rejected) -> [B]
        Hyperparameters are bound by the caller, for example with `functools.partial`.
      beta: the price of a nat of KL in the optimum, E[r] - beta KL(pi || ref). The loss must have
        the same.
      seed: of the language's reference and rewards, and of the inputs of the checks.
      name: what the report calls `f`; its own name by default.

    Raises:
      RunError: an unknown kind, a beta or seed out of range, another number of arguments, or an
        exception in `f`.
    """
    if kind not in KINDS:
        raise RunError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}.")
    if not 1e-4 <= beta <= 100:
        raise RunError(f"beta is {beta:g}; expected a number from 1e-4 to 100.")
    if seed < 0:
        raise RunError(f"seed is {seed}; expected 0 or more.")
    name = name or _name_of(f)
    loss = _guarded(f, KINDS[kind], name)
    with jax.enable_x64(True):
        checks = check(loss, KINDS[kind], seed)
    if not checks[0].passed:
        verdict = f"{name} {checks[0].found} No limit can be computed."
        return Report(name, kind, beta, checks, (), float("nan"), False, verdict)
    world = make_world(SAMPLED if KINDS[kind].of_tokens else COMPARED, beta, seed)
    find = {"pair": _pair_limit, "token": _token_limit, "reward": _reward_limit}[kind]
    found = find(loss, world, seed)
    parts = [f"{name} {found.verdict}"]
    if failed := sum(one.passed is False for one in checks):
        parts.append(f"but {failed} {'checks fail' if failed > 1 else 'check fails'}")
    verdict = "; ".join(parts) + "."
    return Report(
        name, kind, beta, checks, found.measured, found.distance, found.converges, verdict
    )


def verify_named(spec: str, *, kind: str, beta: float, seed: int) -> Report:
    """`verify_loss` of `package.module:name`."""
    if ":" not in spec:
        raise RunError(f"the loss is {spec!r}; expected package.module:name.")
    f = load_callable(spec, "the loss", error=RunError)
    return verify_loss(f, kind=kind, beta=beta, seed=seed, name=spec.partition(":")[2])


def make_world(language: Language, beta: float, seed: int) -> World:
    """Random reference and rewards; those have a standard deviation of 2 beta, at most 1.

    Then the optimum is far from the reference, and has more than one response, whatever beta is.
    """
    reference = normalized(random_reward(language, 2 * seed))
    reward = random_reward(language, 2 * seed + 1, scale=min(2 * beta, 1.0))
    return World(language, reference, reward, beta)


@dataclasses.dataclass(frozen=True)
class _Limit:
    """What a loss ends with; the fields are those of `Report`, the verdict without its subject."""

    distance: float
    converges: bool
    measured: tuple[str, ...]
    verdict: str


def nats(x: float) -> str:
    return f"{max(x, 0.0):.1g} nats" if x < 1e-3 else f"{x:.3g} nats"


def _described(world: World, policy: Array) -> str:
    rows = {"limit": policy, "optimum": world.optimum, "reference": world.reference}
    return "E[r] and KL to the reference: " + ", ".join(
        f"{name} {expectation(p, world.reward).mean():.3g} and "
        f"{kl(p, world.reference).mean():.3g} nats"
        for name, p in rows.items()
    )


def _optimum(beta: float) -> str:
    return f"the optimum of E[r] - {beta:g} KL"


def _limit_of(world: World, policy: Array, how: str, remarks: tuple[str, ...] = ()) -> _Limit:
    """The limit of a loss that trains a policy, and the verdict on it."""
    optimum = _optimum(world.beta)
    if not np.isfinite(policy).all():
        parts = f"does not converge to {optimum}: it ends in nan", *remarks
        return _Limit(float("nan"), False, (how,), "; ".join(parts))
    distance = world.distance(policy)
    converges = is_near(world, distance)
    if converges:
        parts = [f"converges to {optimum} (distance {nats(distance)})"]
    else:
        law = recognise(world, policy)
        parts = [f"does not converge to {optimum}: its limit is {nats(distance)} from it"]
        parts.append(f"the limit is {law}" if law else "the limit is no law known here")
    return _Limit(
        distance, converges, (how, _described(world, policy)), "; ".join((*parts, *remarks))
    )


def _pair_limit(loss: Loss, world: World, seed: int) -> _Limit:
    policy = pair_minimizer(world, lambda *arrays: loss(*arrays[:4]))
    pairs = world.reward.size * (world.reward.shape[1] - 1)
    how = f"limit: L-BFGS on all {pairs:,} pairs, labelled by Bradley-Terry"
    return _limit_of(world, policy, how)


def _reward_limit(loss: Loss, world: World, seed: int) -> _Limit:
    fitted = reward_minimizer(world, loss)
    if not np.isfinite(fitted).all():
        verdict = "does not recover the reward: the fitted one is inf or nan"
        return _Limit(float("nan"), False, (), verdict)
    fitted = fitted - fitted.mean(-1, keepdims=True)
    reward = world.reward - world.reward.mean(-1, keepdims=True)
    error, spread = np.abs(fitted - reward).max(), reward.std()
    slope = (fitted * reward).sum() / (reward**2).sum()
    rest = np.abs(fitted - slope * reward).max()
    measured = (
        f"limit: L-BFGS; fitted rewards, a constant per prompt taken off, are {slope:.3g} r (whose "
        f"standard deviation is {spread:.2g}) and a rest of at most {rest:.1g}",
    )
    distance = world.distance(normalized(world.reference + fitted / world.beta))
    converges = is_near(world, distance)
    if converges:
        verdict = (
            f"recovers the reward up to a constant per prompt (largest error {error:.1g}), hence "
            f"{_optimum(world.beta)} (distance {nats(distance)})"
        )
        return _Limit(distance, converges, measured, verdict)
    kind_of = f"is {slope:.3g} r"
    if rest > 1e-3 * abs(slope) * spread:
        kind_of = f"is no multiple of r, the nearest is {slope:.3g} r"
    flipped = " (the sign of r is flipped)" if slope < 0 else ""
    verdict = (
        f"does not recover the reward: the fitted one {kind_of}{flipped}, its largest error "
        f"{error:.2g}; its optimum is {nats(distance)} from {_optimum(world.beta)}"
    )
    return _Limit(distance, converges, measured, verdict)


def _token_limit(loss: Loss, world: World, seed: int) -> _Limit:
    language, start = world.language, token_policy(world.language, world.reference)
    gradient = jax.grad(expected_loss(world, loss, GROUP))
    measured, remarks = _gradient(gradient, world, seed)
    end = descend(gradient, start)
    with jax.enable_x64(True):
        ends = np.asarray(jax.lax.map(gradient, jnp.stack([start, end])))
    first, last = np.linalg.norm(ends.reshape(2, -1), axis=1)
    how = (
        f"limit: Adam on the exact expectation over all batches of {PROMPTS} x {GROUP} samples; "
        f"{last / first if first else 0.0:.0e} of the first gradient is left"
    )
    policy = policy_of(language, end)
    limit = _limit_of(world, policy, how, remarks)
    return dataclasses.replace(limit, measured=(*measured, *limit.measured))


def _gradient(
    gradient: Callable[[jax.Array], jax.Array], world: World, seed: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Compares an expected gradient with the exact one at a few policies: measured, remarks."""
    language = world.language
    shape = token_policy(language, world.reference).shape
    with jax.enable_x64(True):
        points = jnp.asarray(np.random.default_rng(seed).normal(size=(POINTS, *shape)))
        estimate = np.asarray(jax.lax.map(gradient, points)).ravel()

        def everywhere(function, values):
            one = jax.grad(lambda x: function(language, x, values))
            return np.asarray(jax.vmap(one)(points)).ravel()

        of_reward = -everywhere(expected_reward, world.reward)
        of_kl = everywhere(expected_kl, world.reference)
    if not np.isfinite(estimate).all():
        return (), ("its expected gradient is inf or nan",)
    if not estimate.any():
        return (), ("its expected gradient is 0",)
    exact = of_reward + world.beta * of_kl
    bias = rescaled(estimate, exact)
    # The part that is the gradient of E[-r], the part that is the gradient of KL, and the rest.
    parts = np.stack([of_reward, of_kl], 1)
    factors, *_ = np.linalg.lstsq(parts, estimate)
    rest = np.linalg.norm(estimate - parts @ factors) / np.linalg.norm(estimate)
    reward_part, kl_part = np.where(abs(factors) < UNBIASED * abs(factors).max(), 0.0, factors)
    measured = (
        f"expected gradient: {reward_part:.3g} x that of E[-r], {kl_part:.3g} x that of KL, and a "
        f"rest of {rest:.1%} of its length",
        f"its bias against the gradient of E[-r] + {world.beta:g} KL, after the best rescaling: "
        f"{bias:.1%}",
    )
    if estimate.dot(exact) < 0:
        remarks = ["its gradient points away from the optimum"]
    elif bias < UNBIASED:
        remarks = ["its gradient is unbiased"]
    else:
        remarks = [f"its gradient is biased by {bias:.0%}"]
    if abs(kl_part) < NEAR * abs(reward_part) * world.beta:
        remarks.append("the KL is not held: no gradient of a KL is in the expected gradient")
    return measured, tuple(remarks)


def _guarded(f: Loss, kind: Kind, name: str) -> Loss:
    """`f`, whose wrong signature and exceptions become errors for people."""
    call = f"{name}({', '.join(kind.arguments)})"
    try:
        signature = inspect.signature(f)
        signature.bind(*kind.arguments)
    except ValueError:
        pass  # a builtin that does not say what it takes
    except TypeError as error:
        raise RunError(
            f"{name}({', '.join(signature.parameters)}) cannot be called as {call}, which kind "
            f"{kind.name} does: {error}. Bind other arguments with functools.partial."
        ) from error
    inner = inspect.unwrap(f.func if isinstance(f, functools.partial) else f)
    file = getattr(getattr(inner, "__code__", None), "co_filename", None)

    def guarded(*arrays):
        try:
            return f(*arrays)
        except OF_USERS_CODE as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [x for x in frames if x.filename == file] or frames[-1:]
            shapes = sorted({f"{jnp.shape(x)} {jnp.result_type(x)}" for x in arrays})
            hint = ""
            if isinstance(error, jax.errors.JAXTypeError):
                hint = " Use jax.numpy, and no Python `if` on values: the loss is compiled."
            raise RunError(
                f"{call} raises {type(error).__name__}: {one_line(str(error))} "
                f"({own[-1].filename}:{own[-1].lineno}), for arrays of {', '.join(shapes)}.{hint}"
            ) from error

    return guarded


def _name_of(f: Callable) -> str:
    if isinstance(f, functools.partial):
        f = f.func
    return getattr(f, "__name__", type(f).__name__)
