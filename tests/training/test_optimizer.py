"""The schedules against closed forms, and AdamW's parts against what they should do."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.errors import RunError
from align_jax.models.interchange import load_model
from align_jax.training.optimizer import Optimizer, make_optimizer, make_schedule
from align_jax.trees import flatten

PEAK, STEPS = 3e-4, 50

AFTER = {
    "constant": lambda progress: PEAK,
    "linear": lambda progress: PEAK * (1 - progress),
    "cosine": lambda progress: PEAK * (1 + math.cos(math.pi * progress)) / 2,
}


@pytest.mark.parametrize("warmup", [0, 1, 2, 10])
@pytest.mark.parametrize("name", AFTER)
def test_schedules_follow_their_closed_forms(name, warmup):
    config = Optimizer(learning_rate=PEAK, schedule=name, warmup_steps=warmup)
    schedule = make_schedule(config, STEPS)
    for step in (0, 1, warmup - 1, warmup, warmup + 7, STEPS - 1, STEPS):
        if step < 0:
            continue
        if step < warmup:
            expected = PEAK * (step + 1) / warmup
        else:
            expected = AFTER[name]((step - warmup) / (STEPS - warmup))
        np.testing.assert_allclose(schedule(step), expected, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_what_falls_ends_at_zero_and_no_step_of_the_run_is_wasted(name):
    schedule = make_schedule(Optimizer(schedule=name, warmup_steps=3), 20)
    assert abs(float(schedule(20))) < 1e-12
    assert all(float(schedule(step)) > 0 for step in range(20))


def test_a_run_shorter_than_its_warm_up_only_warms_up():
    schedule = make_schedule(Optimizer(learning_rate=PEAK, warmup_steps=150), 10)
    np.testing.assert_allclose(schedule(9), PEAK * 10 / 150, rtol=1e-5)


def test_a_warm_up_longer_than_the_run_is_refused():
    config = Optimizer(warmup_steps=10)
    config.check_steps(10)
    message = "config.optimizer.warmup_steps = 10 is more than the steps of the run, 9"
    with pytest.raises(RunError, match=message):
        config.check_steps(9)


def test_moments_that_never_move_are_refused():
    for name in ("b1", "b2"):
        with pytest.raises(RunError, match=f"config.optimizer.{name} is 1.0; expected less than 1"):
            Optimizer(**{name: 1.0})


def test_an_unknown_schedule_is_named_with_those_there_are():
    with pytest.raises(RunError, match="config.optimizer.schedule is 'cosin'.*linear, cosine"):
        Optimizer(schedule="cosin")


@pytest.mark.parametrize("name", ["tiny", "tiny:gpt2"])
def test_weight_decay_pulls_at_matrices_and_not_at_norms_and_biases(name):
    model = jax.tree.map(jnp.ones_like, load_model(name))
    config = Optimizer(learning_rate=0.5, weight_decay=0.1)
    optimizer = make_optimizer(config, 10)
    zeros = jax.tree.map(jnp.zeros_like, model)
    updates, _ = optimizer.update(zeros, optimizer.init(model), model)
    spared = set()
    for parameter, update in flatten(updates).items():
        if parameter.endswith(("scale", "bias")):
            spared.add(parameter.rsplit(".", 1)[-1])
            expected = 0.0
        else:
            expected = -0.5 * 0.1
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=parameter)
    assert spared >= ({"scale"} if name == "tiny" else {"scale", "bias", "up_bias", "query_bias"})


def test_gradients_are_clipped_by_their_global_norm_before_adam():
    model = load_model("tiny")
    small = jax.tree.map(lambda x: jnp.full_like(x, 1e-3), model)
    # Adam forgets the scale of a constant gradient; a second one of another scale tells.
    huge = jax.tree.map(lambda x: 1e6 * x, small)
    optimizer = make_optimizer(Optimizer(max_grad_norm=0.01), 10)
    norm = math.sqrt(sum(leaf.size for leaf in jax.tree.leaves(small))) * 1e-3
    assert norm > 0.01

    def second_moment(gradient):
        _, state = optimizer.update(gradient, optimizer.init(model), model)
        return flatten(state)["1.0.nu.blocks.mlp.up"]

    np.testing.assert_allclose(second_moment(huge), second_moment(small), rtol=1e-5)
    np.testing.assert_allclose(second_moment(small), 0.05 * (1e-3 * 0.01 / norm) ** 2, rtol=1e-4)


def first_update(config, gradient):
    """AdamW's first update of every parameter for a gradient of one value, `[parameters]`."""
    model = load_model("tiny")
    optimizer = make_optimizer(config, 10)
    gradients = jax.tree.map(lambda x: jnp.full_like(x, gradient), model)
    updates, state = optimizer.update(gradients, optimizer.init(model), model)
    return flatten(updates), jax.tree.structure(state)


def test_a_norm_of_0_clips_nothing():
    # With an eps this large the update is proportional to the gradient, so clipping would show.
    config = Optimizer(learning_rate=1.0, max_grad_norm=0.0, eps=1e6)
    for gradient in (1.0, 100.0):
        updates, structure = first_update(config, gradient)
        for name, update in updates.items():
            expected = -gradient / (gradient + 1e6)
            np.testing.assert_allclose(update, expected, rtol=1e-5, err_msg=name)
    clipped = Optimizer(learning_rate=1.0, max_grad_norm=1.0)
    assert structure == first_update(clipped, 1.0)[1]


@pytest.mark.parametrize("eps", [1e-8, 1e-3, 1.0])
def test_eps_damps_the_steps_of_small_gradients(eps):
    config = Optimizer(learning_rate=0.5, max_grad_norm=0.0, eps=eps)
    for name, update in first_update(config, 1e-3)[0].items():
        np.testing.assert_allclose(update, -0.5 * 1e-3 / (1e-3 + eps), rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.95), (0.5, 0.7), (0.0, 0.0)])
def test_moments_decay_as_b1_and_b2_say(b1, b2):
    """Two gradients of one value each, against Adam's equations."""
    model = load_model("tiny")
    config = Optimizer(learning_rate=0.5, max_grad_norm=0.0, b1=b1, b2=b2)
    optimizer = make_optimizer(config, 10)
    state = optimizer.init(model)
    m = v = 0.0
    for step, gradient in enumerate((1.0, -3.0), start=1):
        gradients = jax.tree.map(lambda x: jnp.full_like(x, gradient), model)  # noqa: B023
        updates, state = optimizer.update(gradients, state, model)
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        expected = -0.5 * (m / (1 - b1**step)) / math.sqrt(v / (1 - b2**step))
    for name, update in flatten(updates).items():
        np.testing.assert_allclose(update, expected, rtol=1e-5, err_msg=name)
