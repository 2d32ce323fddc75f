"""What every loss must keep, for one table of them: a public function without a row fails a test.

Each row is run against: central differences in float64, stop-gradients, log-probabilities of +-1e4,
bfloat16 and integer inputs, junk behind the mask, `jit`, `vmap`, and arrays sharded over 4 devices.
"""

import dataclasses
import functools
import inspect
import pathlib
import sys

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.losses import distillation, policy_gradient, preference, ranking
from tests.devices import run_on_devices
from tests.losses.cases import CASES, B, T

MODULES = (distillation, policy_gradient, preference, ranking)
# Public names that are no functions; tested in `test_loss_objects.py`.
OBJECTS = {
    preference: {"LOSSES", "Option", "PreferenceLoss", "Running"},
    ranking: {"LOSSES", "RankingLoss"},
}
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
        listed = {name for name in module.__all__ if inspect.isfunction(getattr(module, name))}
        assert listed == set(functions), module.__name__
        assert set(module.__all__) - listed == OBJECTS.get(module, set()), module.__name__
        public |= set(functions.values())
    assert public == {case.function for case in CASES}


def floats_as(values, dtype):
    return [jnp.asarray(x, dtype) if np.issubdtype(x.dtype, np.floating) else x for x in values]


def float_positions(case):
    return tuple(i for i, arg in enumerate(case.args) if arg.gradient != "none")


def for_all(transform):
    """One compiled function for all rows: compiling them one by one takes most of a minute more.

    XLA still rewrites the graph; only LLVM is told to hurry, since
    each function runs but a few times.
    """
    transformed = [transform(case) for case in CASES]
    return jax.jit(
        lambda rows: [f(*row) for f, row in zip(transformed, rows)],
        compiler_options={"xla_backend_optimization_level": 0},
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
        compiled = for_all(gradient), for_all(central_differences)
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
    return values_of_all()(rounded), values_of_all()(upcast)


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
    leaves = jax.tree.leaves(values_of_all()(rows))
    with np.load(expected_file) as expected:
        assert len(expected.files) == len(leaves)
        for actual, name in zip(leaves, expected.files):
            np.testing.assert_allclose(actual, expected[name], rtol=1e-5, atol=1e-6)
    print(f"{len(CASES)} cases agree")


def test_sharded_inputs_change_nothing(tmp_path):
    on_one_device = jax.tree.leaves(jitted_and_vmapped()[0][0])
    np.savez(tmp_path / "expected.npz", *on_one_device)
    printed = run_on_devices(4, pathlib.Path(__file__), tmp_path / "expected.npz")
    assert printed.strip() == f"{len(CASES)} cases agree"


if __name__ == "__main__":
    check_sharded(sys.argv[1])
