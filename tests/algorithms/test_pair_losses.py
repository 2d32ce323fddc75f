"""Every `config.loss`: what it reads of a pair, its options, and that it learns."""

import dataclasses
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import losses
from align_jax.algorithms import preference
from align_jax.algorithms.preference import (
    Config,
    LossOptions,
    attach_reference,
    options_of,
    preference_loss,
)
from align_jax.data import batching
from align_jax.data.batching import separate_responses
from align_jax.data.dataset import Data, examples_of
from align_jax.data.tokenise import Example
from align_jax.errors import DataError, RunError
from align_jax.losses.log_probs import token_log_probs
from align_jax.losses.preference import LOSSES
from align_jax.models.interchange import load_model, load_tokenizer
from align_jax.training.metrics import read_metrics
from align_jax.training.workdir import Workdir
from align_jax.trees import flatten

NEEDED = {"f_dpo": {"divergence": "jensen_shannon"}, "ld_dpo": {"alpha": 0.5}}


def config_of(loss, beta=0.1, **options):
    return Config(loss=loss, beta=beta, loss_options=LossOptions(**NEEDED.get(loss, {}) | options))


@pytest.fixture(scope="module")
def model():
    return jax.tree.map(lambda x: 3 * x, load_model("tiny"))


@pytest.fixture(scope="module")
def examples():
    """Pairs whose responses differ in length."""
    found = examples_of(
        "builtin:tiny_preferences", load_tokenizer("tiny"), Data(limit=6), kind="preference"
    )
    cut = []
    for i, one in enumerate(found):
        parts = (one.responses, one.response_masks)
        shorter = [(a[: len(a) - i], b) if i % 2 else (a, b[: len(b) - i]) for a, b in parts]
        cut.append(
            dataclasses.replace(
                one,
                responses=shorter[0],
                response_masks=shorter[1],
                extras=one.extras | {"label": i % 3 > 0},
            )
        )
    return cut


@pytest.fixture(scope="module")
def logits(model, examples):
    """For every response, the logits `[L,V]` that predict it, from a row of its own."""
    rows = np.zeros((12, 64), np.int32)
    alone = separate_responses(examples)
    for row, one in zip(rows, alone):
        tokens = np.concatenate([one.prompt, *one.responses])
        row[: len(tokens)] = tokens
    found = np.asarray(jax.jit(lambda m, t: m.logits(m(t)))(model, rows), np.float64)
    starts = [len(one.prompt) - 1 for one in alone]
    return [x[s : s + len(one.responses[0])] for x, s, one in zip(found, starts, alone)]


@pytest.fixture(scope="module")
def tokens(logits, examples):
    """The log-probabilities `[L]` of every response's tokens: chosen and rejected in turn."""
    responses = [one.responses[0] for one in separate_responses(examples)]
    return [
        np.asarray(token_log_probs(jnp.asarray(x, jnp.float32), jnp.asarray(r)))
        for x, r in zip(logits, responses)
    ]


def batch_of(examples, reference):
    attach = attach_reference(examples, np.asarray(reference, np.float32).reshape(6, -1))
    return jax.tree.map(jnp.asarray, batching.make_collate(Data(batch_size=6), attach)(examples))


def singles(examples):
    """The chosen responses alone."""
    return [
        dataclasses.replace(one, responses=one.responses[:1], response_masks=one.response_masks[:1])
        for one in examples
    ]


@pytest.fixture(scope="module")
def reference(tokens):
    noise = np.random.default_rng(0).normal(0, 3, 12)
    return np.array([x.sum() for x in tokens]) + noise


@pytest.fixture(scope="module")
def batch(examples, reference):
    return batch_of(examples, reference)


def loss_of(config):
    return preference_loss(LOSSES[config.loss], beta=config.beta, **options_of(config))


def value(config, model, batch):
    sums = jax.jit(loss_of(config))(model, batch)
    assert float(sums.weight) == 6
    return float(sums.loss), sums.metrics


def log_sigmoid(x):
    return -np.logaddexp(0, -np.asarray(x, np.float64))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_takes_a_step_that_lowers_it(model, batch, examples, reference, name):
    loss = loss_of(config_of(name))
    if name == "bco_unpaired":  # the others' second response is the rejected or an unrelated one
        batch = batch_of(singles(examples), reference[::2])

    def mean(model):
        sums = loss(model, batch)
        return sums.loss / sums.weight

    before, gradient = jax.jit(jax.value_and_grad(mean))(model)
    size = math.sqrt(sum(float(jnp.square(g).sum()) for g in flatten(gradient).values()))
    assert size > 1e-4
    moved = jax.tree.map(lambda p, g: p - 1e-3 / size * g, model, gradient)
    after = jax.jit(mean)(moved)
    assert np.isfinite(after) and after < before


def test_losses_of_sums_and_of_averages_read_what_their_papers_say(model, batch, tokens, reference):
    total = np.array([x.sum() for x in tokens])
    average = np.array([x.mean() for x in tokens])
    length = np.array([len(x) for x in tokens])
    assert (length[::2] != length[1::2]).sum() >= 4
    nll = -average[::2]
    odds = average - np.log(-np.expm1(average))
    ratio = (total - reference) / length

    def gap(x):
        return x[::2] - x[1::2]

    h = gap(total - reference)
    expected = {
        "cpo": -log_sigmoid(0.1 * gap(total)) + nll,
        "simpo": -log_sigmoid(2.0 * gap(average) - 0.7),
        "orpo": 0.1 * -log_sigmoid(gap(odds)) + nll,
        "slic": np.maximum(0, 1 - 0.1 * gap(total)) + nll,
        "length_normalized_dpo": -log_sigmoid(5.0 * gap(ratio)),
        "dpo": -0.8 * log_sigmoid(0.1 * h) - 0.2 * log_sigmoid(-0.1 * h) + 2.5 * nll,
        "robust_dpo": (-0.8 * log_sigmoid(0.1 * h) + 0.2 * log_sigmoid(-0.1 * h)) / 0.6,
        "f_dpo": -log_sigmoid(0.1 * gap(1 - np.exp(-0.3 * (total - reference))) / 0.3),
    }
    configs = {
        "simpo": config_of("simpo", 2.0, gamma=0.7),
        "length_normalized_dpo": config_of("length_normalized_dpo", 5.0),
        "dpo": config_of("dpo", label_smoothing=0.2, sft_weight=2.5),
        "robust_dpo": config_of("robust_dpo", label_smoothing=0.2),
        "f_dpo": config_of("f_dpo", divergence="alpha", alpha=0.3),
    }
    for name, values in expected.items():
        found, metrics = value(configs.get(name, config_of(name)), model, batch)
        np.testing.assert_allclose(found, values.sum(), rtol=2e-5, err_msg=name)
        rewards = {"simpo": 2.0 * average, "orpo": 0.1 * average}.get(name, 0.1 * total)
        if not LOSSES[name].needs_reference:
            np.testing.assert_allclose(
                metrics["rewards/margins"], gap(rewards).sum(), rtol=1e-4, atol=1e-5, err_msg=name
            )
        np.testing.assert_allclose(metrics["logps/chosen"], total[::2].sum(), rtol=1e-5)


def test_wpo_weighs_pairs_by_the_whole_distribution(model, batch, tokens, logits, reference):
    weights = []
    for x, chosen in zip(logits, tokens):
        log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
        weights.append(np.exp(np.mean(chosen - np.log((np.exp(log_p) ** 2).sum(-1)))))
    weights = np.array(weights)
    pair_weights = np.minimum(weights[::2] * weights[1::2], 1)
    assert 0.01 < np.ptp(pair_weights)
    h = np.array([x.sum() for x in tokens]) - reference
    expected = (pair_weights * -log_sigmoid(0.1 * (h[::2] - h[1::2]))).sum()
    np.testing.assert_allclose(value(config_of("wpo"), model, batch)[0], expected, rtol=2e-5)


def test_ld_dpo_weighs_what_the_longer_response_has_beyond_the_shorter(
    model, examples, tokens, reference
):
    config = config_of("ld_dpo", alpha=0.3)
    weighted = preference.prepared(examples, LOSSES["ld_dpo"], config)
    width = max(map(len, tokens))
    padded = np.stack([np.pad(x, (0, width - len(x))) for x in tokens])
    mask = np.stack([np.arange(width) < len(x) for x in tokens])
    chosen, rejected = losses.preference.ld_dpo_log_probs(
        padded[::2], padded[1::2], mask[::2], mask[1::2], alpha=0.3
    )
    _, metrics = value(config, model, batch_of(weighted, reference))
    np.testing.assert_allclose(metrics["logps/chosen"], chosen.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["logps/rejected"], rejected.sum(), rtol=1e-5)
    plain = preference.prepared(examples, LOSSES["ld_dpo"], config_of("ld_dpo", alpha=1.0))
    plain = batch_of(plain, reference)
    for name, array in batch_of(examples, reference).items():
        np.testing.assert_array_equal(plain[name], array)


def test_an_example_counts_as_often_as_its_weight_says(model, batch):
    """In the loss, in the metrics, and in what they are divided by."""
    run = jax.jit(preference_loss(LOSSES["dpo"], beta=0.1))

    def sums(*weight):
        found = run(model, batch | {"weight": jnp.array(weight, jnp.float32)})
        return np.array([found.loss, found.weight, *found.metrics.values()])

    first, fourth = sums(1, 0, 0, 0, 0, 0), sums(0, 0, 0, 1, 0, 0)
    assert abs(first[0] - fourth[0]) > 1e-3 and first[1] == 1
    np.testing.assert_allclose(sums(2, 0, 0, 0.5, 0, 0), 2 * first + 0.5 * fourth, rtol=1e-4)
    plain = run(model, batch)
    plain = np.array([plain.loss, plain.weight, *plain.metrics.values()])
    np.testing.assert_allclose(sums(1, 1, 1, 1, 1, 1), plain, rtol=1e-5)


def test_kto_takes_its_kl_from_the_unrelated_responses(model, examples, tokens, reference):
    desirable = np.array([one.extras["label"] for one in examples])
    total = np.array([x.sum() for x in tokens])
    ratio = (total - reference)[::2]
    for shift in (0.0, 40.0):
        moved = reference.copy()
        moved[1::2] -= shift
        kl = max((total - moved)[1::2].mean(), 0.0)
        z = 0.1 * (ratio - kl)
        expected = np.where(desirable, 2.0 / (1 + np.exp(z)), 1.0 / (1 + np.exp(-z))).sum()
        config = config_of("kto", desirable_weight=2.0)
        found, metrics = value(config, model, batch_of(examples, moved))
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        np.testing.assert_allclose(metrics["objective/kl"] / 6, (total - moved)[1::2].mean(), 1e-4)
        margins = 0.1 * np.where(desirable, ratio, -ratio)
        np.testing.assert_allclose(metrics["rewards/margins"], margins.sum(), rtol=1e-4, atol=1e-4)


def test_an_unrelated_response_is_another_prompts_and_fits(examples):
    limit = len(examples[0].prompt) + 4
    config = Config(loss="kto", data=Data(max_length=limit))
    given = [
        dataclasses.replace(one, token_extras={"token": one.responses}) for one in singles(examples)
    ]
    places = []
    for i, one in enumerate(preference.prepared(given, LOSSES["kto"], config)):
        [place] = [
            place
            for place, other in enumerate(examples)
            if other.responses[0][: len(one.responses[1])].tolist() == one.responses[1].tolist()
        ]
        places.append(place)
        other = examples[place].responses[0]
        assert one.responses[0] is examples[i].responses[0]
        for own, tokens in zip(one.token_extras["token"], one.responses, strict=True):
            np.testing.assert_array_equal(own, tokens)
        kept = len(one.responses[1])
        assert kept == min(len(other), limit - len(one.prompt)) == len(one.response_masks[1])
    assert all(place != i for i, place in enumerate(places))


def labelled(prompts):
    """One example of one response for each of these prompts; the response is its own number."""
    return [Example.of_samples(i, prompt, [[i]]) for i, prompt in enumerate(prompts)]


def drawn(examples, seed=0):
    """The numbers of the unrelated responses."""
    found = preference.with_unrelated(examples, Config(loss="kto", seed=seed))
    return [int(one.responses[1][0]) for one in found]


def test_no_unrelated_response_answers_the_same_prompt():
    """A good and a bad answer of each prompt, one after the other, as most sets have them."""
    examples = labelled([[number // 2] for number in range(400)])
    places = drawn(examples)
    assert all(place // 2 != number // 2 for number, place in enumerate(places))
    assert drawn(examples) == places != drawn(examples, seed=1)
    # Any other record may be drawn, near or far.
    distances = [(place - number) % 400 for number, place in enumerate(places)]
    assert len(set(distances)) > 200 and len(set(places)) > 200


def test_unrelated_responses_come_alike_from_all_other_prompts():
    examples = labelled([[min(number, 3)] for number in range(8)])  # the last five have one prompt
    counts = np.zeros((8, 8))
    for seed in range(2000):
        counts[np.arange(8), drawn(examples, seed)] += 1
    own = np.minimum(np.arange(8), 3)
    other = own[:, None] != own[None]
    np.testing.assert_allclose(counts / 2000, other / other.sum(1, keepdims=True), atol=0.05)


def test_unrelated_responses_need_a_second_prompt():
    with pytest.raises(DataError, match="config.loss = 'kto' .* one prompt only in 3 records"):
        drawn(labelled([[1], [1], [1]]))


def test_unrelated_responses_of_a_hundred_thousand_records_take_no_time():
    examples = labelled([[number // 2] for number in range(100_000)])
    begin = time.monotonic()
    drawn(examples)
    assert time.monotonic() - begin < 10


def test_pairs_that_say_nothing_are_counted_and_the_first_is_named(tiny_config, tmp_path, caplog):
    """Two of twelve differ only past the cut; what is written alike is refused when it is read."""
    records = [{"prompt": f"{n}:", "chosen": " up", "rejected": " down"} for n in range(12)]
    for place in (4, 7):
        records[place] |= {"chosen": " a" * 40 + "b", "rejected": " a" * 40 + "c"}
    overrides = write(tmp_path / "pairs.jsonl", records) | {
        "data.eval_source": "",
        "data.max_length": 24,
        "data.overlong": "truncate",
        "num_steps": 1,
    }
    config = tiny_config("dpo", overrides)
    preference.run(config, Workdir(tmp_path / "run", config))
    said = [record.getMessage() for record in caplog.records if "teaches nothing" in record.message]
    assert len(said) == 1 and said[0].startswith("2 of 12 comparisons")
    assert said[0].endswith(f"the first is {tmp_path / 'pairs.jsonl'}:5")


def write(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {
        "num_steps": 20,
        "data.source": str(file),
        "data.eval_source": str(file),
        "optimizer.learning_rate": 3e-3,
    }


@pytest.mark.parametrize("name", ["orpo", "simpo"])
def test_a_run_without_a_reference_computes_none_and_learns(
    tiny_config, tmp_path, monkeypatch, name
):
    monkeypatch.setattr(preference, "reference_log_probs", lambda *_: pytest.fail("computed"))
    records = [{"prompt": f"{n}:", "chosen": " up", "rejected": " down"} for n in range(40)]
    overrides = write(tmp_path / "pairs.jsonl", records) | {"loss": name, "beta": 2.0}
    config = tiny_config("dpo", overrides)
    summary = preference.run(config, Workdir(tmp_path / "run", config))
    assert summary["eval"]["rewards/accuracies"] > 0.9
    rows = read_metrics(tmp_path / "run")
    assert summary["eval"]["loss"] < 0.7 * rows[0]["loss"]


def test_a_run_of_kto_learns_from_labels(tiny_config, tmp_path):
    records = [
        {"prompt": f"Count {n}:", "completion": " up" if n % 2 else " down", "label": n % 2 == 1}
        for n in range(40)
    ]
    overrides = write(tmp_path / "labelled.jsonl", records) | {"loss": "kto"}
    config = tiny_config("dpo", overrides)
    workdir = Workdir(tmp_path / "run", config)
    summary = preference.run(config, workdir)
    rows = read_metrics(workdir.path)
    # Policy and reference are the same: z = 0 and the value is a half of every weight.
    assert rows[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert abs(rows[0]["objective/kl"]) < 1e-4
    assert summary["eval"]["rewards/accuracies"] > 0.9 and summary["eval"]["loss"] < 0.45
    assert preference.evaluate(config, workdir)["eval"] == pytest.approx(summary["eval"], rel=1e-4)


def test_only_what_reads_unrelated_responses_gets_them(examples):
    given = singles(examples)
    for name in LOSSES:
        config = config_of(name)
        prepared = preference.prepared(given, LOSSES[name], config)
        assert all(len(one.responses) == 1 + (name == "kto") for one in prepared), name
        changed = [a is not b for a, b in zip(prepared, given)]
        assert all(changed) if name in ("kto", "ld_dpo") else not any(changed)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ("dpoo", {}, r"config.loss is 'dpoo'; expected one of .*'dpo'"),
        ("dpo", {"tau": 0.1}, r"loss_options.tau is no option of the loss 'dpo'; it has label_smo"),
        ("ipo", {"label_smoothing": 0.1}, "no option of the loss 'ipo'; it has sft_weight"),
        ("kto", {"sft_weight": 1.0}, "sft_weight is no option of the loss 'kto'"),
        (
            "f_dpo",
            {"divergence": None},
            "loss_options.divergence is missing: the loss 'f_dpo' needs it",
        ),
        ("ld_dpo", {"alpha": None}, "loss_options.alpha is missing: the loss 'ld_dpo' needs it"),
        ("f_dpo", {"divergence": "kl"}, "divergence is 'kl'; expected one of 'reverse_kl'"),
        (
            "robust_dpo",
            {"label_smoothing": 0.5},
            "label_smoothing is 0.5; expected at least 0 and b",
        ),
        ("exo", {"label_smoothing": 0.0}, "label_smoothing is 0.0; expected above 0 and below 0.5"),
        ("ld_dpo", {"alpha": 1.5}, "config.loss_options.alpha is 1.5; expected from 0 to 1"),
        ("discopop", {"tau": 0.0}, "loss_options.tau is 0.0; expected a number above 0"),
        ("sppo", {"win_probability": 2.0}, "win_probability is 2.0; expected from 0 to 1"),
        ("simpo", {"gamma": math.nan}, "loss_options.gamma is nan; expected a finite number"),
        ("cpo", {"sft_weight": -1.0}, "sft_weight is -1.0; expected a number at least 0"),
    ],
)
def test_a_wrong_loss_or_option_is_named(loss, options, message):
    with pytest.raises(RunError, match=message):
        config_of(loss, **options)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
def test_beta_is_above_0(beta):
    expected = "a number above 0" if math.isfinite(beta) else "a finite number"
    with pytest.raises(RunError, match=f"config.beta is {beta}; expected {expected}"):
        config_of("dpo", beta)


def test_options_are_set_from_the_command_line(tiny_config):
    config = tiny_config(
        "dpo", {"loss": "f_dpo", "loss_options.divergence": "alpha", "loss_options.alpha": 0.25}
    )
    assert options_of(config) == {"divergence": "alpha", "alpha": 0.25}
    with pytest.raises(RunError, match="no field 'loss_options.label_smoothin'. Did you mean"):
        tiny_config("dpo", {"loss_options.label_smoothin": 0.1})


def test_a_config_without_options_has_the_losses_own(model, batch):
    without = Config.from_dict({"loss": "exo", "beta": 0.1})
    assert options_of(without) == {} and without.loss_options == LossOptions()
    with_it = value(config_of("exo", label_smoothing=1e-3), model, batch)[0]
    assert value(without, model, batch)[0] == pytest.approx(with_it, rel=1e-6)


def test_the_options_are_those_of_all_losses():
    names = {option.name for loss in LOSSES.values() for option in loss.all_options}
    assert set(LossOptions().to_dict()) == names
    config = Config().to_config_dict()
    for loss in LOSSES.values():
        for option in loss.all_options:
            assert config.loss_options.get_type(option.name) is option.value_type
            assert config.loss_options[option.name] is None
