"""The objects in `LOSSES`: values, ranges of options, and the running state of BCO."""

import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.losses import preference
from align_jax.losses.preference import LOSSES, Option, PreferenceLoss, Running

rng = np.random.default_rng(0)
VALUES = {
    name: jnp.asarray(-rng.gamma(2.0, size=4), jnp.float32)
    for name in (
        *("chosen", "rejected", "ref_chosen", "ref_rejected"),
        *("chosen_average", "rejected_average", "response", "ref_response"),
        *("chosen_desensitized", "rejected_desensitized"),
        *("ref_chosen_desensitized", "ref_rejected_desensitized"),
    )
} | {
    "chosen_length": jnp.array([3, 1, 7, 2]),
    "rejected_length": jnp.array([1, 4, 2, 8]),
    "chosen_weight": jnp.array([0.5, 0.9, 1.2, 0.3]),
    "rejected_weight": jnp.array([0.7, 1.5, 0.2, 0.4]),
    "desirable": jnp.array([1.0, 0.0, 0.0, 1.0]),
    "kl": jnp.float32(0.3),
}
BETA = 0.3
PAIRS = ("chosen", "rejected", "ref_chosen", "ref_rejected")
LABELLED = ("response", "ref_response", "desirable")

# What each object must compute: other options than the defaults where there are any, and the
# public function on the values that its paper compares.
EXPECTED = {
    "dpo": ({"label_smoothing": 0.2, "margin": 0.5}, "dpo_loss", PAIRS),
    "length_normalized_dpo": (
        {},
        "length_normalized_dpo_loss",
        (*PAIRS, "chosen_length", "rejected_length"),
    ),
    "wpo": ({}, "wpo_loss", (*PAIRS, "chosen_weight", "rejected_weight")),
    "f_dpo": ({"divergence": "alpha", "alpha": 0.3}, "f_dpo_loss", PAIRS),
    "ipo": ({}, "ipo_loss", PAIRS),
    "robust_dpo": ({"label_smoothing": 0.2}, "robust_dpo_loss", PAIRS),
    "exo": ({"label_smoothing": 0.2}, "exo_loss", PAIRS),
    "discopop": ({"tau": 0.5}, "discopop_loss", PAIRS),
    "aot": ({}, "aot_loss", PAIRS),
    "aot_unpaired": ({}, "aot_unpaired_loss", PAIRS),
    "rso_hinge": ({}, "rso_hinge_loss", PAIRS),
    "nca": ({}, "nca_loss", PAIRS),
    "sppo": ({"win_probability": 0.8}, "sppo_loss", PAIRS),
    "apo_zero": ({}, "apo_zero_loss", PAIRS),
    "apo_down": ({}, "apo_down_loss", PAIRS),
    "bco": ({}, "bco_loss", PAIRS),
    "bco_unpaired": ({}, "bco_unpaired_loss", LABELLED),
    "kto": (
        {"desirable_weight": 1.3, "undesirable_weight": 0.8},
        "kto_loss",
        (*LABELLED, "kl"),
    ),
    "cpo": ({}, "cpo_loss", ("chosen", "rejected")),
    "simpo": ({"gamma": 0.5}, "simpo_loss", ("chosen_average", "rejected_average")),
}
# The others change more than the names of their values.
OTHERS = {
    "ld_dpo": (
        {"alpha": 0.4},
        lambda v: preference.dpo_loss(*(v[f"{name}_desensitized"] for name in PAIRS), beta=BETA),
    ),
    "orpo": (
        {},
        lambda v: BETA * preference.orpo_loss(v["chosen_average"], v["rejected_average"]),
    ),
    "slic": (
        {},
        lambda v: np.maximum(0, 1 - BETA * (v["chosen"] - v["rejected"])),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_an_object_gives_the_values_of_its_function(name):
    loss = LOSSES[name]
    if name in OTHERS:
        options, formula = OTHERS[name]
        expected = formula(VALUES)
    else:
        options, function, names = EXPECTED[name]
        function = getattr(preference, function)
        expected = function(*(VALUES[one] for one in names), beta=BETA, **options)
    assert {option.name for option in loss.options} == set(options)
    # Only what it reads, so that nothing else can be needed.
    values = {one: VALUES[one] for one in loss.reads}
    loss.check(BETA, options)
    if loss.sft_weight is None:
        actual = loss(values, beta=BETA, **options)
    else:
        loss.check(BETA, options | {"sft_weight": 0.0})
        actual = loss(values, beta=BETA, sft_weight=0.0, **options)
        nll = -VALUES["chosen_average"]
        for given, weight in (({}, loss.sft_weight), ({"sft_weight": 2.5}, 2.5)):
            whole = loss(VALUES, beta=BETA, **options, **given)
            np.testing.assert_allclose(whole, expected + weight * nll, rtol=1e-6)
    assert actual.shape == (4,)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_every_loss_has_an_object():
    functions = {
        name.removesuffix("_loss")
        for name in preference.__all__
        if name.endswith("_loss") and inspect.isfunction(getattr(preference, name))
    }
    # LD-DPO is DPO on other sums.
    assert functions | {"ld_dpo"} == set(LOSSES) == {*EXPECTED, *OTHERS}
    objects = [x for x in vars(preference).values() if isinstance(x, PreferenceLoss)]
    assert len(objects) == len(LOSSES)
    assert all(loss.name == name for name, loss in LOSSES.items())


def test_options_are_keywords_of_their_function():
    for loss in LOSSES.values():
        keywords = {
            parameter.name
            for parameter in inspect.signature(loss.function).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY
        }
        taken = {option.name for option in loss.options if not option.in_values} | {"beta"}
        if loss.running is not None:
            taken |= set(loss.running.keywords)
        assert taken <= keywords, loss.name
        # LD-DPO alone leaves out what its function has.
        assert loss.name == "ld_dpo" or taken == keywords, loss.name


def test_what_a_loss_needs():
    without = {name for name, loss in LOSSES.items() if not loss.needs_reference}
    assert without == {"cpo", "simpo", "orpo", "slic"}
    assert {name for name, loss in LOSSES.items() if loss.labelled} == {"kto", "bco_unpaired"}
    weights = {name: loss.sft_weight for name, loss in LOSSES.items() if loss.sft_weight != 0.0}
    assert weights == {"orpo": 1.0, "cpo": 1.0, "slic": 1.0, "kto": None, "bco_unpaired": None}
    with pytest.raises(ValueError, match="'mine' has no chosen response"):
        PreferenceLoss("mine", preference.kto_loss, LOSSES["kto"].reads)


def test_rewards_are_beta_times_what_is_compared():
    def rewards(name):
        return LOSSES[name].rewards(VALUES, beta=BETA)

    for name, suffix in [("dpo", ""), ("wpo", ""), ("ld_dpo", "_desensitized")]:
        for side, actual in zip(("chosen", "rejected"), rewards(name), strict=True):
            ratio = VALUES[f"{side}{suffix}"] - VALUES[f"ref_{side}{suffix}"]
            np.testing.assert_allclose(actual, BETA * ratio, rtol=1e-6, atol=1e-7)
    for name, suffix in [("cpo", ""), ("simpo", "_average")]:
        for side, actual in zip(("chosen", "rejected"), rewards(name), strict=True):
            np.testing.assert_allclose(actual, BETA * VALUES[side + suffix], rtol=1e-6)
    (actual,) = rewards("kto")
    ratio = VALUES["response"] - VALUES["ref_response"]
    np.testing.assert_allclose(actual, BETA * ratio, rtol=1e-6, atol=1e-7)


# The ends of every range: values that are allowed, and values just beyond.
RANGES = {
    ("dpo", "label_smoothing"): ([0, 0.499], [-1e-6, 0.5]),
    ("robust_dpo", "label_smoothing"): ([0.0, 0.499], [-1e-6, 0.5]),
    ("exo", "label_smoothing"): ([1e-6, 0.499], [0.0, 0.5]),
    ("dpo", "margin"): ([-1e6, 1e6], []),
    ("ld_dpo", "alpha"): ([0.0, 1], [-1e-6, 1 + 1e-6]),
    ("f_dpo", "alpha"): ([1e-6, 1.0], [0.0, 1 + 1e-6]),
    ("f_dpo", "divergence"): (["forward_kl", "reverse_kl"], ["kl", "", None, 1.0]),
    ("discopop", "tau"): ([1e-6, 1e6], [0.0, -1.0]),
    ("sppo", "win_probability"): ([0.0, 1.0], [-1e-6, 1 + 1e-6]),
    ("kto", "desirable_weight"): ([0.0, 1e6], [-1e-6]),
    ("kto", "undesirable_weight"): ([0.0, 1e6], [-1e-6]),
    ("simpo", "gamma"): ([0.0, 1e6], [-1e-6]),
    ("orpo", "sft_weight"): ([0.0, 1e6], [-1e-6]),
}
NO_NUMBERS = [math.nan, math.inf, -math.inf, None, "0.5", True]


def beside(name, key):
    """Options that the loss needs beside `key`."""
    if name == "f_dpo" and key == "alpha":
        return {"divergence": "alpha"}
    return {option: {"f_dpo": "forward_kl"}.get(name, 0.5) for option in needed(name) - {key}}


def needed(name):
    return {option.name for option in LOSSES[name].options if option.required}


def test_every_option_has_its_range_here():
    options = {(name, one.name) for name, loss in LOSSES.items() for one in loss.options}
    assert options == set(RANGES) - {("orpo", "sft_weight")}


@pytest.mark.parametrize(("name", "key"), RANGES)
def test_a_range_refuses_what_lies_beyond_either_end(name, key):
    allowed, refused = RANGES[name, key]
    for value in allowed:
        LOSSES[name].check(BETA, beside(name, key) | {key: value})
    for value in refused + ([] if key == "divergence" else NO_NUMBERS):
        message = re.escape(f"`{key}` is {value!r}; expected ")
        with pytest.raises(ValueError, match=f"^{message}"):
            LOSSES[name].check(BETA, beside(name, key) | {key: value})


def test_ranges_in_words():
    words = {
        "from 0 to 1": Option("x", least=0.0, most=1.0),
        "at least 0 and below 0.5": Option("x", least=0.0, below=0.5),
        "above 0 and below 0.5": Option("x", above=0.0, below=0.5),
        "above 0 and at most 1": Option("x", above=0.0, most=1.0),
        "a finite number above 0": Option("x", above=0.0),
        "a finite number at least 0": Option("x", least=0.0),
        "a finite number": Option("x"),
        "one of 'a', 'b'": Option("x", str, choices=("a", "b")),
    }
    for expected, option in words.items():
        assert option.expected == expected


@pytest.mark.parametrize("beta", [0.0, -1.0, *NO_NUMBERS])
@pytest.mark.parametrize("name", ["dpo", "bco_unpaired"])
def test_beta_is_a_finite_number_above_0(name, beta):
    with pytest.raises(ValueError, match="^`beta` is .*; expected a finite number above 0"):
        LOSSES[name].check(beta, {})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "dpo",
            {"label_smoothin": 0.1},
            r"^`label_smoothin` is no option of the loss 'dpo'; it has label_smoothing, margin, "
            r"sft_weight. Did you mean `label_smoothing`\?$",
        ),
        ("dpo", {"tau": 0.1}, "'dpo'; it has label_smoothing, margin, sft_weight$"),
        ("ipo", {"label_smoothing": 0.1}, "'ipo'; it has sft_weight$"),
        ("bco_unpaired", {"sft_weight": 1.0}, "'bco_unpaired'; it has none$"),
        ("bco", {"delta": 0.1}, "`delta` is no option of the loss 'bco'"),
        ("ld_dpo", {"alpha": 0.5, "margin": 1.0}, "`margin` is no option of the loss 'ld_dpo'"),
        ("f_dpo", {}, "^`divergence` is missing: the loss 'f_dpo' needs it$"),
        ("ld_dpo", {}, "^`alpha` is missing: the loss 'ld_dpo' needs it$"),
    ],
)
def test_unknown_and_missing_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        LOSSES[name].check(BETA, options)
    with pytest.raises(ValueError, match=message):
        LOSSES[name](VALUES, beta=BETA, **options)


def test_an_option_of_another_choice_is_refused():
    with pytest.raises(ValueError, match="^`alpha` acts only if `divergence` is 'alpha', but"):
        LOSSES["f_dpo"].check(BETA, {"divergence": "forward_kl", "alpha": 0.3})
    # The function keeps its own checks.
    with pytest.raises(ValueError, match="`alpha` must be in"):
        LOSSES["f_dpo"](VALUES, beta=BETA, divergence="alpha", alpha=1.5)


# BCO's threshold.


def micro_batches(sizes):
    """Values and example weights of uneven micro-batches."""
    data = np.random.default_rng(1)
    batches = []
    for size in sizes:
        values = {name: data.normal(-5, 3, size) for name in (*PAIRS, *LABELLED[:2])}
        values["desirable"] = data.random(size) < 0.3
        batches.append((values, data.uniform(0.1, 2, size)))
    return batches


def take_step(loss, state, batches):
    """What a trainer does in an optimizer step: sums over the micro-batches, then the update."""
    totals, weight = {}, 0.0
    for values, weights in batches:
        values = {name: jnp.asarray(x, jnp.float32) for name, x in values.items()}
        for name, x in loss.running.statistics(values, BETA).items():
            assert x.shape == weights.shape
            totals[name] = totals.get(name, 0.0) + (jnp.asarray(weights, jnp.float32) * x).sum()
        weight += jnp.float32(weights.sum())
    return jax.jit(loss.running.update)(state, totals, weight)


STEPS = [(3, 1, 5), (2,), (7, 1)]


def test_bco_keeps_the_mean_reward_of_all_responses():
    loss = LOSSES["bco"]
    state, total, count = loss.running.start(), 0.0, 0.0
    for step in STEPS:
        batches = micro_batches(step)
        state = take_step(loss, state, batches)
        for values, weights in batches:
            for i, weight in enumerate(weights):
                for side in ("chosen", "rejected"):
                    total += weight * BETA * (values[side][i] - values[f"ref_{side}"][i])
                    count += weight
        assert state["delta"] == pytest.approx(total / count, rel=1e-5)
    assert state["count"] == pytest.approx(count / 2, rel=1e-6)
    # The loss takes it from the state, and starts at 0.
    values = {name: VALUES[name] for name in PAIRS}
    for given, delta in ((state, state["delta"]), (None, 0.0)):
        np.testing.assert_allclose(
            loss(values, beta=BETA, running=given),
            preference.bco_loss(*values.values(), beta=BETA, delta=delta),
            rtol=1e-6,
        )


def test_bco_unpaired_is_halfway_between_the_labels():
    loss = LOSSES["bco_unpaired"]
    state = loss.running.start()
    totals, counts = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}
    for step in STEPS:
        batches = micro_batches(step)
        state = take_step(loss, state, batches)
        for values, weights in batches:
            for i, weight in enumerate(weights):
                label = bool(values["desirable"][i])
                totals[label] += weight * BETA * (values["response"][i] - values["ref_response"][i])
                counts[label] += weight
        means = [totals[label] / counts[label] for label in counts if counts[label]]
        assert state["delta"] == pytest.approx(sum(means) / len(means), rel=1e-5)
    assert len(means) == 2
    values = {name: VALUES[name] for name in LABELLED}
    np.testing.assert_allclose(
        loss(values, beta=BETA, running=state),
        preference.bco_unpaired_loss(*values.values(), beta=BETA, delta=state["delta"]),
        rtol=1e-6,
    )


def test_bco_unpaired_with_one_label_has_its_mean():
    loss = LOSSES["bco_unpaired"]
    for label in (True, False):
        batches = micro_batches((4,))
        values, weights = batches[0]
        values["desirable"][:] = label
        rewards = BETA * (values["response"] - values["ref_response"])
        state = take_step(loss, loss.running.start(), batches)
        assert state["delta"] == pytest.approx(np.average(rewards, weights=weights), rel=1e-5)


@pytest.mark.parametrize("name", ["bco", "bco_unpaired"])
def test_how_a_batch_is_cut_does_not_matter_and_no_batch_changes_nothing(name):
    loss = LOSSES[name]
    parts = micro_batches((3, 1, 5))
    whole = {key: np.concatenate([values[key] for values, _ in parts]) for key in parts[0][0]}
    weights = np.concatenate([weights for _, weights in parts])
    first = take_step(loss, loss.running.start(), parts)
    second = take_step(loss, loss.running.start(), [(whole, weights)])
    assert set(first) == set(second) == set(loss.running.initial)
    for key, value in first.items():
        assert value.dtype == jnp.float32 and value.shape == ()
        np.testing.assert_allclose(value, second[key], rtol=1e-5)
    for state in (loss.running.start(), first):
        again = take_step(loss, state, [(whole, 0 * weights)])
        for key, value in state.items():
            assert again[key] == value


@pytest.mark.parametrize("name", ["bco", "bco_unpaired"])
def test_the_threshold_gets_no_gradient(name):
    loss = LOSSES[name]
    values = {key: VALUES[key] for key in loss.reads}

    def new_threshold(values):
        statistics = loss.running.statistics(values, BETA)
        sums = jax.tree.map(jnp.sum, statistics)
        return loss.running.update(loss.running.start(), sums, 4.0)["delta"]

    def value(delta):
        state = loss.running.start() | {"delta": delta}
        return loss(values, beta=BETA, running=state).sum()

    assert abs(value(0.3) - value(0.6)) > 1e-3
    assert jax.grad(value)(0.3) == 0
    assert abs(new_threshold(values)) > 1e-3
    for gradient in jax.grad(new_threshold)(values).values():
        assert not np.any(gradient)


def test_a_loss_of_ones_own_needs_only_its_object():
    def margin_loss(chosen, rejected, *, beta, seen):
        return jax.nn.relu(seen - beta * (chosen - rejected))

    def update(state, sums, weight):
        return {"seen": state["seen"] + weight}

    running = Running({"seen": 0.0}, ("seen",), lambda values, beta: {}, update)
    loss = PreferenceLoss("mine", margin_loss, ("chosen", "rejected"), running=running)
    state = running.update(running.start(), {}, 4.0)
    loss.check(BETA, {"sft_weight": 1.0})
    assert not loss.needs_reference and not loss.labelled
    expected = np.maximum(0, 4 - BETA * (VALUES["chosen"] - VALUES["rejected"]))
    np.testing.assert_allclose(loss(VALUES, beta=BETA, running=state), expected, rtol=1e-6)
