"""Preference losses against formulas in plain Python, loops, and each other."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_jax.losses import preference, ranking

rng = np.random.default_rng(0)
LOGPS = tuple(-rng.gamma(2.0, 2.0, size=(4, 4)).astype(np.float32))
AVERAGES = tuple(-rng.gamma(2.0, size=(2, 4)).astype(np.float32))
BETA = 0.3


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigmoid(x):
    return math.exp(log_sigmoid(x))


def f_dpo(f_prime):
    return lambda c, r: -log_sigmoid(BETA * f_prime(math.exp(c)) - BETA * f_prime(math.exp(r)))


def exo(c, r):
    q = sigmoid(BETA * (c - r))
    return q * math.log(q / 0.9) + (1 - q) * math.log((1 - q) / 0.1)


def discopop(c, r):
    z = BETA * (c - r)
    m = sigmoid(z / 0.5)
    return (1 - m) * math.log(1 + math.exp(-z)) + m * math.exp(-z)


# Each loss from the page of its paper, in terms of the log-ratios of one comparison.
FORMULAS = {
    "dpo": ({}, lambda c, r: -log_sigmoid(BETA * (c - r))),
    "dpo smoothed, margin": (
        {"label_smoothing": 0.2, "margin": 0.7},
        lambda c, r: (
            -0.8 * log_sigmoid(BETA * (c - r) - 0.7) - 0.2 * log_sigmoid(0.7 - BETA * (c - r))
        ),
    ),
    "ipo": ({}, lambda c, r: (c - r - 1 / (2 * BETA)) ** 2),
    "robust_dpo": (
        {"label_smoothing": 0.2},
        lambda c, r: (-0.8 * log_sigmoid(BETA * (c - r)) + 0.2 * log_sigmoid(BETA * (r - c))) / 0.6,
    ),
    "exo": ({"label_smoothing": 0.1}, exo),
    "nca": (
        {},
        lambda c, r: (
            -log_sigmoid(BETA * c) - 0.5 * (log_sigmoid(-BETA * c) + log_sigmoid(-BETA * r))
        ),
    ),
    "bco": (
        {"delta": 0.4},
        lambda c, r: -log_sigmoid(BETA * c - 0.4) - log_sigmoid(-(BETA * r - 0.4)),
    ),
    "sppo": ({}, lambda c, r: (c - 0.5 / BETA) ** 2 + (r + 0.5 / BETA) ** 2),
    "sppo soft": (
        {"win_probability": 0.7},
        lambda c, r: (c - (0.7 - 0.5) / BETA) ** 2 + (r - (0.3 - 0.5) / BETA) ** 2,
    ),
    "apo_zero": ({}, lambda c, r: 1 - sigmoid(BETA * c) + sigmoid(BETA * r)),
    "apo_down": ({}, lambda c, r: sigmoid(BETA * c) + 1 - sigmoid(BETA * (c - r))),
    "discopop": ({"tau": 0.5}, discopop),
    "rso_hinge": ({}, lambda c, r: max(0, 1 - BETA * (c - r))),
    "f_dpo": ({"divergence": "reverse_kl"}, f_dpo(lambda u: math.log(u) + 1)),
    "f_dpo forward_kl": ({"divergence": "forward_kl"}, f_dpo(lambda u: -1 / u)),
    "f_dpo jensen_shannon": (
        {"divergence": "jensen_shannon"},
        f_dpo(lambda u: math.log(2 * u / (1 + u))),
    ),
    "f_dpo alpha": (
        {"divergence": "alpha", "alpha": 0.3},
        f_dpo(lambda u: (1 - u**-0.3) / 0.3),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name):
    hyper, formula = FORMULAS[name]
    loss = getattr(preference, name.split()[0] + "_loss")(*LOGPS, beta=BETA, **hyper)
    assert loss.shape == (4,)
    chosen, rejected, ref_chosen, ref_rejected = (x.astype(np.float64) for x in LOGPS)
    expected = [formula(c, r) for c, r in zip(chosen - ref_chosen, rejected - ref_rejected)]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def at_equal_log_ratios(name, **hyper):
    """Value and derivative in the chosen log-probability where policy and reference agree."""
    f = jax.value_and_grad(
        lambda c: getattr(preference, name)(
            c, jnp.array([-7.0]), jnp.array([-3.0]), jnp.array([-7.0]), beta=BETA, **hyper
        )[0]
    )
    value, slope = f(jnp.array([-3.0]))
    return float(value), float(slope[0])


def test_values_and_slopes_at_equal_log_ratios():
    value, slope = at_equal_log_ratios("dpo_loss")
    assert abs(value - math.log(2)) < 1e-6
    assert slope == pytest.approx(-BETA / 2, rel=1e-6)
    # IPO is a parabola with its minimum at a gap of 1 / (2 beta).
    value, slope = at_equal_log_ratios("ipo_loss")
    assert value == pytest.approx(1 / (4 * BETA**2), rel=1e-6)
    assert slope == pytest.approx(-1 / BETA, rel=1e-6)
    value, slope = at_equal_log_ratios("rso_hinge_loss")
    assert (value, slope) == pytest.approx((1.0, -BETA), rel=1e-6)
    # IPO, DPO and the hinge pull in one direction there: slopes in ratio -1/beta : -beta/2 : -beta.
    for name, hyper in [
        ("robust_dpo_loss", {"label_smoothing": 0.2}),
        *(
            ("f_dpo_loss", {"divergence": d})
            for d in ("reverse_kl", "forward_kl", "jensen_shannon", "alpha")
        ),
    ]:
        value, slope = at_equal_log_ratios(name, **hyper)
        assert value == pytest.approx(math.log(2), rel=1e-6), name
        # f''(1) = 1 for each of these divergences but the Jensen-Shannon, which has 1/2.
        factor = {"robust_dpo_loss": 1 / 0.6}.get(name, 1.0)
        if hyper.get("divergence") == "jensen_shannon":
            factor = 0.5
        assert slope == pytest.approx(-BETA / 2 * factor, rel=1e-5), (name, hyper)


def test_slic_is_the_hinge_without_a_reference():
    chosen, rejected = LOGPS[:2]
    zeros = np.zeros_like(chosen)
    np.testing.assert_allclose(
        preference.rso_hinge_loss(chosen, rejected, zeros, zeros, beta=BETA),
        BETA * preference.slic_loss(chosen, rejected, delta=1 / BETA),
        rtol=1e-5,
    )


def test_dpo_is_bradley_terry_on_implicit_rewards():
    chosen, rejected, ref_chosen, ref_rejected = LOGPS
    np.testing.assert_allclose(
        preference.dpo_loss(*LOGPS, beta=BETA, margin=0.2, label_smoothing=0.1),
        ranking.bradley_terry_loss(
            BETA * (chosen - ref_chosen),
            BETA * (rejected - ref_rejected),
            margin=0.2,
            label_smoothing=0.1,
        ),
        rtol=1e-5,
    )


def test_robust_dpo_is_unbiased_under_flips():
    chosen, rejected, ref_chosen, ref_rejected = LOGPS
    flipped = (rejected, chosen, ref_rejected, ref_chosen)
    noisy = 0.8 * preference.robust_dpo_loss(*LOGPS, beta=BETA, label_smoothing=0.2)
    noisy += 0.2 * preference.robust_dpo_loss(*flipped, beta=BETA, label_smoothing=0.2)
    np.testing.assert_allclose(noisy, preference.dpo_loss(*LOGPS, beta=BETA), rtol=1e-5)
    # Conservative DPO is the other way round: its expectation over clean labels is the noisy DPO.
    smoothed = preference.dpo_loss(*LOGPS, beta=BETA, label_smoothing=0.2)
    mixture = 0.8 * preference.dpo_loss(*LOGPS, beta=BETA)
    mixture += 0.2 * preference.dpo_loss(*flipped, beta=BETA)
    np.testing.assert_allclose(smoothed, mixture, rtol=1e-5)


def test_exo_is_a_kl_with_its_zero_at_the_label():
    # sigmoid(beta h) = 1 - label_smoothing makes policy and label the same.
    gap = math.log(0.9 / 0.1) / BETA
    zeros = jnp.zeros(3)
    gaps = jnp.array([gap, gap - 2, gap + 2])
    loss = preference.exo_loss(gaps, zeros, zeros, zeros, beta=BETA, label_smoothing=0.1)
    np.testing.assert_allclose(loss[0], 0, atol=1e-6)
    assert np.all(loss[1:] > 1e-3)


def test_alpha_divergences_run_from_reverse_to_forward_kl():
    def f(divergence, alpha=0.5):
        return preference.f_dpo_loss(*LOGPS, beta=BETA, divergence=divergence, alpha=alpha)

    np.testing.assert_allclose(f("alpha", 1.0), f("forward_kl"), rtol=1e-5)
    np.testing.assert_allclose(f("alpha", 1e-3), f("reverse_kl"), rtol=2e-2)
    np.testing.assert_allclose(f("reverse_kl"), preference.dpo_loss(*LOGPS, beta=BETA), rtol=1e-6)


def test_discopop_limits():
    # A large tau mixes both losses evenly; a small one switches between them at z = 0.
    chosen, rejected, ref_chosen, ref_rejected = LOGPS
    z = BETA * (chosen - ref_chosen - rejected + ref_rejected)
    even = (np.log1p(np.exp(-z)) + np.exp(-z)) / 2
    np.testing.assert_allclose(
        preference.discopop_loss(*LOGPS, beta=BETA, tau=1e7), even, rtol=1e-5
    )
    switched = np.where(z < 0, np.log1p(np.exp(-z)), np.exp(-z))
    np.testing.assert_allclose(
        preference.discopop_loss(*LOGPS, beta=BETA, tau=1e-3), switched, rtol=1e-5
    )


def test_aot_sorts_before_it_compares():
    chosen, rejected, ref_chosen, ref_rejected = (x.tolist() for x in LOGPS)
    paired = zip(
        sorted(a - b for a, b in zip(chosen, rejected)),
        sorted(a - b for a, b in zip(ref_chosen, ref_rejected)),
    )
    np.testing.assert_allclose(
        preference.aot_loss(*LOGPS, beta=BETA),
        [-log_sigmoid(BETA * (a - b)) for a, b in paired],
        rtol=1e-5,
    )
    unpaired = zip(
        sorted(a - b for a, b in zip(chosen, ref_chosen)),
        sorted(a - b for a, b in zip(rejected, ref_rejected)),
    )
    np.testing.assert_allclose(
        preference.aot_unpaired_loss(*LOGPS, beta=BETA),
        [-log_sigmoid(BETA * (a - b)) for a, b in unpaired],
        rtol=1e-5,
    )
    # With one comparison there is nothing to sort.
    one = [x[:1] for x in LOGPS]
    for loss in (preference.aot_loss, preference.aot_unpaired_loss):
        np.testing.assert_allclose(loss(*one), preference.dpo_loss(*one), rtol=1e-6)


def test_aot_does_not_know_which_rejected_response_came_with_which_chosen():
    chosen, rejected, ref_chosen, ref_rejected = LOGPS
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(
        preference.aot_unpaired_loss(chosen, rejected[order], ref_chosen, ref_rejected[order]),
        preference.aot_unpaired_loss(*LOGPS),
        rtol=1e-6,
    )


def test_bco_pairs_are_two_single_responses():
    chosen, rejected, ref_chosen, ref_rejected = LOGPS
    accepted = preference.bco_unpaired_loss(
        chosen, ref_chosen, np.ones(4, bool), beta=BETA, delta=0.4
    )
    refused = preference.bco_unpaired_loss(
        rejected, ref_rejected, np.zeros(4, bool), beta=BETA, delta=0.4
    )
    np.testing.assert_allclose(
        preference.bco_loss(*LOGPS, beta=BETA, delta=0.4), accepted + refused, rtol=1e-5
    )


def test_hyperparameters_that_are_estimates_get_no_gradient():
    for loss, name in [
        (preference.bco_loss, "delta"),
        (preference.sppo_loss, "win_probability"),
    ]:
        values = [loss(*LOGPS, **{name: x}).sum() for x in (0.2, 0.4)]
        assert abs(values[0] - values[1]) > 1e-3
        gradient = jax.grad(lambda x, loss=loss, name=name: loss(*LOGPS, **{name: x}).sum())(0.4)
        assert gradient == 0


def test_kto_loop_and_its_reference_point():
    logps, ref_logps = LOGPS[:2]
    desirable = np.array([True, False, True, False])
    for kl in (0.6, -0.6):
        actual = preference.kto_loss(
            logps,
            ref_logps,
            desirable,
            jnp.array(kl),
            beta=BETA,
            desirable_weight=1.3,
            undesirable_weight=0.8,
        )
        expected = []
        for lp, ref, good in zip(logps.tolist(), ref_logps.tolist(), desirable):
            z = BETA * (lp - ref - max(kl, 0))
            value = 1.3 * sigmoid(z) if good else 0.8 * sigmoid(-z)
            expected.append((1.3 if good else 0.8) - value)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)
    integers = preference.kto_loss(logps, ref_logps, desirable.astype(int), jnp.array(0.6))
    booleans = preference.kto_loss(logps, ref_logps, desirable, jnp.array(0.6))
    np.testing.assert_array_equal(integers, booleans)


def test_kto_without_drift_is_apo_zero():
    chosen, rejected, ref_chosen, ref_rejected = LOGPS
    zero = jnp.array(0.0)
    good = preference.kto_loss(chosen, ref_chosen, np.ones(4, bool), zero, beta=BETA)
    bad = preference.kto_loss(rejected, ref_rejected, np.zeros(4, bool), zero, beta=BETA)
    np.testing.assert_allclose(good + bad, preference.apo_zero_loss(*LOGPS, beta=BETA), rtol=1e-5)


def test_length_normalized_dpo_is_dpo_on_averages():
    lengths = np.array([[3, 1, 7, 2], [1, 2, 4, 8]])
    actual = preference.length_normalized_dpo_loss(*LOGPS, *lengths, beta=2.0)
    averages = [x / n for x, n in zip(LOGPS, [lengths[0], lengths[1]] * 2)]
    np.testing.assert_allclose(actual, preference.dpo_loss(*averages, beta=2.0), rtol=1e-5)
    empty = preference.length_normalized_dpo_loss(
        *[x * 0 for x in LOGPS], np.zeros(4, int), lengths[1]
    )
    np.testing.assert_allclose(empty, math.log(2), rtol=1e-6)


def test_wpo_weights_loop():
    logits = rng.normal(size=(3, 5, 6))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    tokens = rng.integers(0, 6, size=(3, 5))
    mask = np.array([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    token_log_probs = np.take_along_axis(log_p, tokens[..., None], -1)[..., 0]
    log_sum_squared = np.log(np.exp(2 * log_p).sum(-1))
    actual = preference.wpo_weights(
        token_log_probs.astype(np.float32), log_sum_squared.astype(np.float32), mask
    )
    for row in range(3):
        count, total = mask[row].sum(), 0.0
        for t in range(5):
            if mask[row, t]:
                p = np.exp(log_p[row, t])
                total += math.log(p[tokens[row, t]] / (p * p).sum())
        np.testing.assert_allclose(actual[row], math.exp(total / max(count, 1)), rtol=1e-5)


def test_wpo_weighs_dpo_and_never_above_one():
    small, large = np.full(4, 0.5, np.float32), np.full(4, 1.5, np.float32)
    dpo = preference.dpo_loss(*LOGPS, beta=BETA)
    for weights, expected in [((small, small), 0.25), ((small, large), 0.75), ((large, large), 1)]:
        loss = preference.wpo_loss(*LOGPS, *weights, beta=BETA)
        np.testing.assert_allclose(loss, expected * dpo, rtol=1e-6)


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.floats(-100, 0, width=32), min_size=4, max_size=4),
    st.floats(-50, 50, width=32),
)
def test_only_log_ratios_matter(logps, shift):
    # Adding one constant to policy and reference changes no log-ratio, and so no loss.
    logps = [jnp.array([x]) for x in logps]
    moved = [x + shift for x in logps]
    for name in ("dpo_loss", "ipo_loss", "apo_zero_loss", "nca_loss", "exo_loss", "sppo_loss"):
        loss = getattr(preference, name)
        np.testing.assert_allclose(loss(*moved), loss(*logps), rtol=1e-3, atol=1e-4, err_msg=name)


def test_arguments_that_do_not_fit_raise():
    good = [jnp.zeros(3)] * 4
    with pytest.raises(ValueError, match=r"`chosen_logps` \(3,\).*`rejected_logps` \(3, 1\)"):
        preference.dpo_loss(good[0], jnp.zeros((3, 1)), *good[2:])
    for loss, bad in [
        (preference.dpo_loss, (-0.1, 0.5)),
        (preference.robust_dpo_loss, (-0.1, 0.5)),
        (preference.exo_loss, (0.0, 0.5)),
    ]:
        for label_smoothing in bad:
            with pytest.raises(ValueError, match="`label_smoothing`"):
                loss(*good, label_smoothing=label_smoothing)
    with pytest.raises(ValueError, match="`divergence`.*'chi_squared'"):
        preference.f_dpo_loss(*good, divergence="chi_squared")
    for alpha in (0.0, 1.5):
        with pytest.raises(ValueError, match="`alpha`"):
            preference.f_dpo_loss(*good, divergence="alpha", alpha=alpha)
    with pytest.raises(ValueError, match="`chosen_weights`"):
        preference.wpo_loss(*good, jnp.zeros(3), jnp.zeros((3, 1)))


# Losses without a reference, in terms of the two log-probabilities.
REFERENCE_FREE = {
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


@pytest.mark.parametrize("name", REFERENCE_FREE)
def test_formula_without_a_reference(name):
    hyper, formula = REFERENCE_FREE[name]
    actual = getattr(preference, name)(AVERAGES[0], AVERAGES[1], **hyper)
    expected = [formula(c, r) for c, r in zip(AVERAGES[0].tolist(), AVERAGES[1].tolist())]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_cpo_is_dpo_with_a_uniform_reference_and_simpo_with_a_margin():
    uniform = np.full(4, -3.0, np.float32)
    cpo = preference.cpo_loss(AVERAGES[0], AVERAGES[1], beta=0.3)
    dpo = preference.dpo_loss(AVERAGES[0], AVERAGES[1], uniform, uniform, beta=0.3)
    np.testing.assert_allclose(cpo, dpo, rtol=1e-5)
    simpo = preference.simpo_loss(AVERAGES[0], AVERAGES[1], beta=0.3, gamma=0.0)
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


def test_arguments_that_do_not_fit_a_loss_without_a_reference_raise():
    with pytest.raises(ValueError, match="`chosen_avg_logps`"):
        preference.orpo_loss(jnp.zeros(3), jnp.zeros((3, 1)))
    x, mask = jnp.zeros((2, 3)), jnp.ones((2, 3))
    with pytest.raises(ValueError, match="`mask`"):
        preference.ld_dpo_log_probs(x, x, mask[:, :2], mask, alpha=0.5)
    for alpha in (-0.1, 1.1):
        with pytest.raises(ValueError, match="`alpha`"):
            preference.ld_dpo_log_probs(x, x, mask, mask, alpha=alpha)
