"""What every loss must keep, in one table: a public function without a row fails a test.

Each row is run against: central differences in float64, stop-gradients, log-probabilities of +-1e4,
bfloat16 and integer inputs, junk behind the mask, `jit`, `vmap`, and arrays sharded over 4 devices.
"""

import dataclasses
import functools
import inspect
import os
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.losses import distillation, policy_gradient, preference, ranking

MODULES = (distillation, policy_gradient, preference, ranking)
B, T, K, V = 4, 5, 4, 6


@dataclasses.dataclass(frozen=True)
class Arg:
    """An array argument: how to draw it, and what gradient it must get."""

    name: str
    draw: Callable[[np.random.Generator], np.ndarray]
    # "yes", "stopped" (exactly 0 although the value depends on it) or "none" (not a float input).
    gradient: str = "yes"
    masked: bool = False
    extremes: tuple[float, float] = (-1e4, 1e4)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A row: a function, its arguments and hyperparameters."""

    function: Callable
    args: tuple[Arg, ...]
    hyper: dict = dataclasses.field(default_factory=dict)
    # For losses with a stop-gradient inside: (value, *args at which it is frozen, *args) -> value.
    surrogate: Callable | None = None

    def __call__(self, *values):
        return self.function(*values, **self.hyper)

    def draw(self, seed=0):
        rng = np.random.default_rng(seed)
        return [arg.draw(rng) for arg in self.args]

    def __str__(self):
        variant = ",".join(
            f"{k}={v}" for k, v in self.hyper.items() if not isinstance(v, np.ndarray)
        )
        return f"{self.function.__name__}({variant})"


def normal(*shape, scale=1.0):
    return lambda rng: scale * rng.normal(size=shape)


def log_p(*shape):
    return lambda rng: -rng.gamma(2.0, size=shape)


def uniform(*shape):
    return lambda rng: rng.uniform(0.1, 0.9, size=shape)


def mask_bt(rng):
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 1], [0, 0, 0, 0, 1]])
    return mask.astype(np.int32)


def top_log_probs(rng):
    logits = rng.normal(size=(B, T, V))
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.sort(-log_probs, axis=-1)[..., :3]


def top_ids(rng):
    return np.argsort(rng.normal(size=(B, T, V)), axis=-1)[..., :3].astype(np.int32)


LOGPS = (
    Arg("chosen_logps", log_p(B)),
    Arg("rejected_logps", log_p(B)),
    Arg("ref_chosen_logps", log_p(B), "stopped"),
    Arg("ref_rejected_logps", log_p(B), "stopped"),
)
SINGLE = (
    Arg("logps", log_p(B)),
    Arg("ref_logps", log_p(B), "stopped"),
    Arg("desirable", lambda rng: np.array([True, False, True, False]), "none"),
)
LENGTHS = tuple(
    Arg(f"{side}_lengths", lambda rng: rng.integers(1, 9, size=B), "none")
    for side in ("chosen", "rejected")
)
MASK = Arg("mask", mask_bt, "none")
RANKS = Arg("ranks", lambda rng: np.argsort(rng.normal(size=(B, K)), axis=-1), "none")
TIED = Arg("ranks", lambda rng: rng.integers(0, 3, size=(B, K)), "none")
TOKENS = (
    Arg("log_probs", log_p(B, T)),
    Arg("old_log_probs", log_p(B, T), "stopped"),
    Arg("advantages", normal(B, T), "stopped"),
)


def masked(*args):
    return tuple(dataclasses.replace(arg, masked=True) for arg in args)


def cispo_surrogate(at, log_probs, old_log_probs, advantages):
    ratio = jnp.clip(jnp.exp(at[0] - old_log_probs), 0.0, 5.0)
    return -ratio * advantages * log_probs


def gspo_surrogate(at, log_probs, old_log_probs, advantages, mask):
    lengths = jnp.maximum(mask.sum(-1, keepdims=True), 1)
    ratio = jnp.exp(((at[0] - old_log_probs) * mask).sum(-1, keepdims=True) / lengths)
    ratio = ratio * jnp.exp(log_probs - at[0])
    clipped = jnp.clip(ratio, 1 - 0.1, 1 + 0.3)
    return -jnp.minimum(ratio * advantages, clipped * advantages) * mask


CASES = [
    # ranking
    *(
        Case(
            ranking.bradley_terry_loss,
            (Arg("chosen_rewards", normal(B)), Arg("rejected_rewards", normal(B))),
            hyper,
        )
        for hyper in (
            {},
            {"margin": 0.7, "label_smoothing": 0.1, "center_coefficient": 0.01},
        )
    ),
    Case(
        ranking.best_of_k_loss,
        (
            Arg("rewards", normal(B, K)),
            Arg("best", lambda rng: rng.integers(0, K, size=B).astype(np.int32), "none"),
        ),
    ),
    *(
        Case(function, (Arg("rewards", normal(B, K)), ranks))
        for function in (ranking.all_pairs_loss, ranking.plackett_luce_loss)
        for ranks in (RANKS, TIED)
    ),
    Case(
        ranking.process_reward_loss,
        (
            *masked(
                Arg("rewards", normal(B, T)),
                Arg("labels", uniform(B, T), extremes=(0.0, 1.0)),
            ),
            MASK,
        ),
    ),
    Case(
        ranking.minimax_winner,
        (Arg("preferences", uniform(B, 3, 3), "stopped", extremes=(0.0, 1.0)),),
    ),
    # preference
    *(
        Case(getattr(preference, f"{name}_loss"), LOGPS, {"beta": 0.3, **hyper})
        for name, hyper in [
            ("dpo", {}),
            ("dpo", {"label_smoothing": 0.2, "margin": 0.5}),
            ("ipo", {}),
            ("robust_dpo", {"label_smoothing": 0.2}),
            ("exo", {"label_smoothing": 0.05}),
            ("nca", {}),
            ("bco", {"delta": 0.4}),
            ("sppo", {}),
            ("sppo", {"win_probability": 0.8}),
            ("apo_zero", {}),
            ("apo_down", {}),
            ("discopop", {}),
            ("discopop", {"tau": 2.0}),
            ("aot", {}),
            ("aot_unpaired", {}),
            ("rso_hinge", {}),
            ("f_dpo", {"divergence": "reverse_kl"}),
            ("f_dpo", {"divergence": "forward_kl"}),
            ("f_dpo", {"divergence": "jensen_shannon"}),
            ("f_dpo", {"divergence": "alpha", "alpha": 0.3}),
        ]
    ),
    Case(preference.length_normalized_dpo_loss, LOGPS + LENGTHS),
    Case(
        preference.wpo_loss,
        (
            *LOGPS,
            Arg("chosen_weights", uniform(B), "stopped"),
            Arg("rejected_weights", uniform(B), "stopped"),
        ),
    ),
    Case(
        preference.wpo_weights,
        (
            *masked(
                Arg("token_log_probs", log_p(B, T), "stopped"),
                Arg("log_sum_squared_probs", log_p(B, T), "stopped"),
            ),
            MASK,
        ),
    ),
    Case(preference.bco_unpaired_loss, SINGLE, {"beta": 0.3, "delta": 0.4}),
    Case(
        preference.kto_loss,
        (*SINGLE, Arg("kl", uniform(B), "stopped")),
        {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.8},
    ),
    *(
        Case(function, LOGPS[:2], hyper)
        for function, hyper in [
            (preference.slic_loss, {"delta": 1.0}),
            (preference.cpo_loss, {"beta": 0.3}),
            (preference.simpo_loss, {"beta": 2.0, "gamma": 0.5}),
        ]
    ),
    Case(
        preference.orpo_loss,
        (Arg("chosen_avg_logps", log_p(B)), Arg("rejected_avg_logps", log_p(B))),
    ),
    Case(
        preference.ld_dpo_log_probs,
        (
            Arg("chosen_token_log_probs", log_p(B, T)),
            Arg("rejected_token_log_probs", log_p(B, T + 2)),
            Arg("chosen_mask", mask_bt, "none"),
            Arg("rejected_mask", lambda rng: np.tile([0, 1, 1, 1, 0, 0, 0], (B, 1)), "none"),
        ),
        {"alpha": 0.4},
    ),
    # policy_gradient
    Case(policy_gradient.reinforce_loss, (TOKENS[0], TOKENS[2])),
    Case(
        policy_gradient.reinforce_loss,
        (TOKENS[0], dataclasses.replace(TOKENS[2], draw=normal(B, 1))),
    ),
    *(
        Case(policy_gradient.ppo_clip_loss, TOKENS, hyper)
        for hyper in ({}, {"clip_range_high": 0.5, "dual_clip": 3.0})
    ),
    Case(policy_gradient.gspo_ratio, (*masked(*TOKENS[:2]), MASK)),
    Case(
        policy_gradient.gspo_loss,
        (*masked(*TOKENS), MASK),
        {"clip_range": 0.1, "clip_range_high": 0.3},
        gspo_surrogate,
    ),
    Case(policy_gradient.cispo_loss, TOKENS, {}, cispo_surrogate),
    Case(
        policy_gradient.truncated_importance_weights,
        (
            Arg("log_probs", log_p(B, T), "stopped"),
            Arg("sampler_log_probs", log_p(B, T), "stopped"),
        ),
    ),
    Case(
        policy_gradient.clipped_value_loss,
        (
            Arg("values", normal(B, T)),
            Arg("old_values", normal(B, T), "stopped"),
            Arg("returns", normal(B, T), "stopped"),
        ),
    ),
    Case(policy_gradient.ptx_loss, (*masked(TOKENS[0]), MASK)),
    Case(
        policy_gradient.entropy_bonus,
        (*masked(Arg("logits", normal(B, T, V))), MASK),
        {"coefficient": 0.5},
    ),
    *(
        Case(
            policy_gradient.aggregate_token_losses,
            (*masked(Arg("token_losses", normal(B, T))), MASK),
            hyper,
        )
        for hyper in (
            {"method": "grpo"},
            {"method": "dr_grpo", "max_length": 7},
            {"method": "dapo"},
        )
    ),
    *(
        Case(
            policy_gradient.kl_estimate,
            (Arg("log_probs", log_p(B, T)), Arg("ref_log_probs", log_p(B, T), "stopped")),
            {"estimator": estimator},
        )
        for estimator in ("k1", "k2", "k3")
    ),
    Case(
        policy_gradient.kl_shaped_rewards,
        (
            Arg("scores", normal(B)),
            *masked(Arg("log_probs", log_p(B, T)), Arg("ref_log_probs", log_p(B, T))),
            MASK,
        ),
        {"kl_coefficient": 0.2},
    ),
    Case(
        policy_gradient.gae,
        (*masked(Arg("rewards", normal(B, T)), Arg("values", normal(B, T))), MASK),
        {"discount": 0.9, "lambda_": 0.8},
    ),
    Case(policy_gradient.rloo_advantages, (Arg("rewards", normal(B, K)),)),
    *(
        Case(policy_gradient.grpo_advantages, (Arg("rewards", normal(B, K)),), {"scale": scale})
        for scale in (True, False)
    ),
    Case(
        policy_gradient.spo_rewards,
        (Arg("preferences", uniform(B, K, K), extremes=(0.0, 1.0)),),
    ),
    *(
        Case(
            policy_gradient.whiten,
            (*masked(Arg("x", normal(B, T))), MASK),
            {"shift_mean": shift_mean},
        )
        for shift_mean in (True, False)
    ),
    Case(
        policy_gradient.adaptive_kl_update,
        (
            Arg("coefficient", uniform(B)),
            Arg("kl", lambda rng: np.array([5.4, 6.1, 6.9, 20.0])),
        ),
        {"target": 6.0, "horizon": 100, "batch_size": 16},
    ),
    # distillation
    Case(
        distillation.top_k_kl_loss,
        (
            Arg("student_logits", normal(B, T, V)),
            Arg("teacher_top_log_probs", top_log_probs, "stopped", extremes=(-1e4, 0.0)),
            Arg("teacher_top_ids", top_ids, "none"),
        ),
    ),
    *(
        Case(
            distillation.generalized_jsd_loss,
            (
                Arg("student_logits", normal(B, T, V)),
                Arg("teacher_logits", normal(B, T, V), "stopped"),
            ),
            {"beta": beta},
        )
        for beta in (0.0, 0.3, 1.0)
    ),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def test_the_table_covers_every_public_function():
    public = set()
    for module in MODULES:
        functions = {
            name: function
            for name, function in inspect.getmembers(module, inspect.isfunction)
            if function.__module__.startswith("align_jax.losses.")
            and not name.startswith("_")
            and function.__module__ != "align_jax.losses._inputs"
        }
        assert set(module.__all__) == set(functions), module.__name__
        public |= set(functions.values())
    assert public == {case.function for case in CASES}


def floats_as(values, dtype):
    return [jnp.asarray(x, dtype) if np.issubdtype(x.dtype, np.floating) else x for x in values]


def float_positions(case):
    return tuple(i for i, arg in enumerate(case.args) if arg.gradient != "none")


# For what is evaluated once: optimising the code costs more than it saves.
QUICKLY = {"xla_backend_optimization_level": 0}


def for_all(transform, **compiler_options):
    """One compiled function for all rows: compiling them one by one takes most of a minute more."""
    transformed = [transform(case) for case in CASES]
    return jax.jit(
        lambda rows: [f(*row) for f, row in zip(transformed, rows)],
        compiler_options=compiler_options,
    )


@functools.cache
def values_of_all():
    return for_all(lambda case: case)


def scalar(case):
    """A fixed random combination of all outputs, so that one gradient tests each of them."""

    def f(*values):
        outputs = case(*values)
        leaves = jax.tree.leaves(outputs)
        weights = [np.random.default_rng(i).uniform(0.5, 2, x.shape) for i, x in enumerate(leaves)]
        return sum(jnp.sum(w.astype(x.dtype) * x) for w, x in zip(weights, leaves)), outputs

    return f


def gradient(case):
    return jax.value_and_grad(scalar(case), argnums=float_positions(case), has_aux=True)


@functools.cache
def gradients_of_all():
    return for_all(gradient)


def assert_close(actual, expected, rtol, atol):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol, atol=atol
        ),
        actual,
        expected,
    )


def central_differences(case, eps=1e-6):
    """The numeric gradient with respect to all float arguments, one entry at a time."""
    positions = float_positions(case)

    def f(*values):
        if case.surrogate is None:
            moving = case
        else:
            # With a stop-gradient inside, the gradient is that of another function, written in this
            # file, in which what is stopped is frozen at the test point.
            surrogate = functools.partial(case.surrogate, values)
            moving = dataclasses.replace(case, function=surrogate, hyper={})
        flat, unflatten = jax.flatten_util.ravel_pytree([values[i] for i in positions])

        def moved(step):
            moved_values = list(values)
            for i, x in zip(positions, unflatten(flat + step)):
                moved_values[i] = x
            return scalar(moving)(*moved_values)[0]

        steps = eps * jnp.eye(flat.size)
        differences = jax.vmap(moved)(steps) - jax.vmap(moved)(-steps)
        return unflatten(differences / (2 * eps)), moving(*values)

    return f


@functools.cache
def analytic_and_numeric():
    with jax.enable_x64(True):
        rows = [[jnp.asarray(x) for x in case.draw()] for case in CASES]
        compiled = for_all(gradient, **QUICKLY), for_all(central_differences, **QUICKLY)
        return jax.device_get([f(rows) for f in compiled])


@every_case
def test_gradient_is_the_central_difference(case):
    analytic, numeric = (results[CASES.index(case)] for results in analytic_and_numeric())
    (_, outputs), grads = analytic
    differences, outputs_again = numeric
    assert_close(outputs, outputs_again, rtol=1e-12, atol=1e-12)
    for i, grad, difference in zip(float_positions(case), grads, differences):
        name = case.args[i].name
        assert grad.dtype == np.float64
        assert np.any(difference != 0), f"flat in {name}: this row tests nothing"
        if case.args[i].gradient == "stopped":
            assert not np.any(grad), name
        else:
            np.testing.assert_allclose(grad, difference, rtol=1e-6, atol=2e-8, err_msg=name)


def extreme_row(case, number):
    """Float arguments at their extremes: all low, all high, all but one low, then random."""
    positions, rng = float_positions(case), np.random.default_rng(number)
    row = case.draw()
    for order, i in enumerate(positions):
        if number < 2 + len(positions):
            choice = np.full(row[i].shape, number == 1 or number == 2 + order, int)
        else:
            choice = rng.integers(0, 2, size=row[i].shape)
        row[i] = np.asarray(case.args[i].extremes)[choice]
    return floats_as(row, jnp.float32)


@functools.cache
def at_extremes():
    numbers = range(2 + max(len(case.args) for case in CASES) + 2)
    return [gradients_of_all()([extreme_row(case, number) for case in CASES]) for number in numbers]


@every_case
def test_values_and_gradients_are_finite_at_1e4(case):
    for number, results in enumerate(at_extremes()):
        (_, outputs), grads = results[CASES.index(case)]
        for leaf in jax.tree.leaves((outputs, grads)):
            assert np.all(np.isfinite(leaf)), extreme_row(case, number)


@functools.cache
def in_bfloat16_and_upcast():
    rounded = [floats_as(case.draw(), jnp.bfloat16) for case in CASES]
    upcast = [
        [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in row] for row in rounded
    ]
    return for_all(lambda case: case, **QUICKLY)(rounded), values_of_all()(upcast)


@every_case
def test_bfloat16_inputs_are_computed_in_float32(case):
    outputs, upcast = (results[CASES.index(case)] for results in in_bfloat16_and_upcast())
    for leaf in jax.tree.leaves(outputs):
        assert leaf.dtype == jnp.float32
    assert_close(outputs, upcast, rtol=1e-5, atol=1e-6)


@every_case
def test_float32_stays_float32_in_a_program_that_also_uses_float64(case):
    with jax.enable_x64(True):
        outputs = jax.eval_shape(case, *floats_as(case.draw(), jnp.float32))
    for leaf in jax.tree.leaves(outputs):
        assert leaf.dtype == jnp.float32


@every_case
def test_integer_inputs_raise_a_type_error_that_names_the_argument(case):
    values = case.draw()
    for i in float_positions(case):
        wrong = [np.ones(x.shape, np.int32) if j == i else x for j, x in enumerate(values)]
        with pytest.raises(TypeError, match=f"`{case.args[i].name}`.*int32"):
            case(*wrong)


def float32_rows(seed):
    return [floats_as(case.draw(seed), jnp.float32) for case in CASES]


@functools.cache
def jitted_and_vmapped():
    rows = [float32_rows(seed) for seed in (1, 2)]
    stacked = [[jnp.stack(xs) for xs in zip(*pair)] for pair in zip(*rows)]
    return [values_of_all()(r) for r in rows], for_all(jax.vmap)(stacked)


@every_case
def test_jit_and_vmap_change_nothing(case):
    index = CASES.index(case)
    jitted, vmapped = jitted_and_vmapped()
    eager = case(*float32_rows(1)[index])
    assert_close(jitted[0][index], eager, rtol=1e-5, atol=1e-6)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *(results[index] for results in jitted))
    assert_close(vmapped[index], stacked, rtol=1e-5, atol=1e-6)


def counted(case, like):
    """The row's mask as bool, broadcast over the trailing axes of an array it masks."""
    mask = np.asarray(case.draw()[[arg.name for arg in case.args].index("mask")]).astype(bool)
    return np.broadcast_to(mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim)), like.shape)


def rows_with_junk_behind_masks(junk):
    rows = float32_rows(0)
    for case, row in zip(CASES, rows):
        for i, arg in enumerate(case.args):
            if arg.masked and junk is not None:
                row[i] = jnp.where(counted(case, row[i]), row[i], junk)
    return rows


@functools.cache
def with_junk_behind_masks(junk):
    return gradients_of_all()(rows_with_junk_behind_masks(junk))


MASKED = [case for case in CASES if any(arg.masked for arg in case.args)]


@pytest.mark.parametrize("junk", [np.inf, -np.inf, 1e30, "nan"])
@pytest.mark.parametrize("case", MASKED, ids=str)
def test_what_the_mask_hides_has_no_influence(case, junk):
    index = CASES.index(case)
    (_, clean), clean_grads = with_junk_behind_masks(None)[index]
    (_, outputs), grads = with_junk_behind_masks(float(junk))[index]
    assert_close(outputs, clean, rtol=0, atol=0)
    assert_close(grads, clean_grads, rtol=0, atol=0)
    for leaf in jax.tree.leaves(outputs):
        if leaf.shape == (B, T):
            assert not np.any(np.asarray(leaf)[~counted(case, leaf)])
    for i, grad in zip(float_positions(case), grads):
        if case.args[i].masked:
            assert not np.any(np.asarray(grad)[~counted(case, grad)])


@pytest.mark.parametrize("case", MASKED, ids=str)
def test_what_the_mask_hides_has_no_influence_without_jit(case):
    # XLA turns mask * x into a select, which would hide a product with nan from the test above.
    index = CASES.index(case)
    (_, clean), _ = with_junk_behind_masks(None)[index]
    outputs = case(*rows_with_junk_behind_masks(np.nan)[index])
    assert_close(outputs, clean, rtol=1e-5, atol=1e-6)


def check_sharded(expected_file):
    """Run in a process with 4 devices: every case on arrays sharded over their first axis."""
    assert jax.device_count() == 4
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    rows = [[jax.device_put(x, sharding) for x in row] for row in float32_rows(1)]
    leaves = jax.tree.leaves(for_all(lambda case: case, **QUICKLY)(rows))
    with np.load(expected_file) as expected:
        assert len(expected.files) == len(leaves)
        for actual, name in zip(leaves, expected.files):
            np.testing.assert_allclose(actual, expected[name], rtol=1e-5, atol=1e-6)
    print(f"{len(CASES)} cases agree")


def test_sharded_inputs_change_nothing(tmp_path):
    on_one_device = jax.tree.leaves(jitted_and_vmapped()[0][0])
    np.savez(tmp_path / "expected.npz", *on_one_device)
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    run = subprocess.run(
        [sys.executable, __file__, tmp_path / "expected.npz"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == f"{len(CASES)} cases agree"


if __name__ == "__main__":
    check_sharded(sys.argv[1])
