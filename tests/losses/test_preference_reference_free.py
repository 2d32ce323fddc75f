"""Preference losses without a reference, and LD-DPO's sums, against loops and each other."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_jax.losses import preference

rng = np.random.default_rng(0)
CHOSEN, REJECTED = -rng.gamma(2.0, size=(2, 4)).astype(np.float32)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


FORMULAS = {
    "slic_loss": ({"delta": 1.5}, lambda c, r: max(0, 1.5 - c + r)),
    "cpo_loss": ({"beta": 0.3}, lambda c, r: -log_sigmoid(0.3 * c - 0.3 * r)),
    "simpo_loss": (
        {"beta": 2.0, "gamma": 0.5},
        lambda c, r: -log_sigmoid(2.0 * c - 2.0 * r - 0.5),
    ),
    "orpo_loss": (
        {},
        lambda c, r: (
            -log_sigmoid(
                math.log(math.exp(c) / (1 - math.exp(c)) / (math.exp(r) / (1 - math.exp(r))))
            )
        ),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name):
    hyper, formula = FORMULAS[name]
    actual = getattr(preference, name)(CHOSEN, REJECTED, **hyper)
    expected = [formula(c, r) for c, r in zip(CHOSEN.tolist(), REJECTED.tolist())]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_cpo_is_dpo_with_a_uniform_reference_and_simpo_with_a_margin():
    uniform = np.full(4, -3.0, np.float32)
    cpo = preference.cpo_loss(CHOSEN, REJECTED, beta=0.3)
    dpo = preference.dpo_loss(CHOSEN, REJECTED, uniform, uniform, beta=0.3)
    np.testing.assert_allclose(cpo, dpo, rtol=1e-5)
    simpo = preference.simpo_loss(CHOSEN, REJECTED, beta=0.3, gamma=0.0)
    np.testing.assert_allclose(cpo, simpo, rtol=1e-6)
    # gamma is where the loss stands at ln 2.
    simpo = preference.simpo_loss(jnp.array([0.5 / 2.0]), jnp.zeros(1), beta=2.0, gamma=0.5)
    np.testing.assert_allclose(simpo, math.log(2), rtol=1e-6)


def test_orpo_of_likely_and_unlikely_responses():
    # Odds 1 against odds 3: p = 1/2 and p = 3/4.
    half, three_quarters = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.75]))
    np.testing.assert_allclose(preference.orpo_loss(half, half), math.log(2), rtol=1e-6)
    np.testing.assert_allclose(
        preference.orpo_loss(three_quarters, half), -math.log(3 / 4), rtol=1e-5
    )
    # log(1 - e^x) where e^x rounds to 1 in float32 (x = -1e-6) and where it is 0 (x = -200).
    loss = preference.orpo_loss(jnp.array([-200.0]), jnp.array([-1e-6]))
    np.testing.assert_allclose(loss, 200 - math.log(1e-6), rtol=1e-5)
    # A probability of exactly 1 has no odds; values and gradients stay finite.
    value, gradient = jax.value_and_grad(lambda c: preference.orpo_loss(c, jnp.array([-1.0]))[0])(
        jnp.array([0.0])
    )
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


def ld_loop(log_probs, mask, public_length, alpha):
    total, seen = 0.0, 0
    for x, counts in zip(log_probs, mask):
        if counts:
            total += x if seen < public_length else alpha * x
            seen += 1
    return total


@settings(max_examples=20, deadline=None)
@given(st.data(), st.floats(0, 1))
def test_ld_dpo_sums_are_their_loop(data, alpha):
    sizes = (5, 7)
    log_probs = [-rng.gamma(2.0, size=n).astype(np.float32) for n in sizes]
    masks = [data.draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)) for n in sizes]
    actual = preference.ld_dpo_log_probs(*log_probs, *map(jnp.array, masks), alpha=alpha)
    public_length = min(map(sum, masks))
    for value, x, mask in zip(actual, log_probs, masks):
        expected = ld_loop(x.tolist(), mask, public_length, alpha)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_ld_dpo_ends():
    log_probs = -rng.gamma(2.0, size=(2, 1, 6)).astype(np.float32)
    long, short = np.array([[1, 1, 1, 1, 0, 0]]), np.array([[1, 1, 0, 0, 0, 0]])

    def sums(alpha):
        return preference.ld_dpo_log_probs(*log_probs, long, short, alpha=alpha)

    whole = [x[0, :n].sum() for x, n in zip(log_probs, (4, 2))]
    np.testing.assert_allclose(np.ravel(sums(1.0)), whole, rtol=1e-6)
    np.testing.assert_allclose(np.ravel(sums(0.0)), log_probs[:, 0, :2].sum(-1), rtol=1e-6)


def test_ld_dpo_ignores_what_the_masks_hide():
    log_probs = jnp.full((1, 4), -2.0)
    mask = jnp.array([[1, 0, 1, 0]])
    spoiled = jnp.where(mask == 1, log_probs, jnp.nan)

    def total(x):
        return sum(preference.ld_dpo_log_probs(x, log_probs, mask, mask, alpha=0.5))[0]

    value, gradient = jax.value_and_grad(total)(spoiled)
    np.testing.assert_allclose(value, -8.0)
    np.testing.assert_array_equal(gradient, [[1, 0, 1, 0]])


def test_arguments_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="`chosen_avg_logps`"):
        preference.orpo_loss(jnp.zeros(3), jnp.zeros((3, 1)))
    x, mask = jnp.zeros((2, 3)), jnp.ones((2, 3))
    with pytest.raises(ValueError, match="`mask`"):
        preference.ld_dpo_log_probs(x, x, mask[:, :2], mask, alpha=0.5)
    for alpha in (-0.1, 1.1):
        with pytest.raises(ValueError, match="`alpha`"):
            preference.ld_dpo_log_probs(x, x, mask, mask, alpha=alpha)
