"""DPO: where it starts, that it learns, and what it refuses."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.algorithms import preference, sft
from align_jax.algorithms.preference import attach_reference, preference_loss
from align_jax.data import batching
from align_jax.data.builtin import load_builtin
from align_jax.data.dataset import Data, examples_of
from align_jax.data.tokenise import Example
from align_jax.distributed.mesh import make_mesh
from align_jax.errors import DataError, RunError
from align_jax.losses.preference import LOSSES, PreferenceLoss
from align_jax.models.interchange import load_model, load_tokenizer
from align_jax.training import pretrained
from align_jax.training.metrics import read_metrics
from align_jax.training.reference import compute_log_probs
from align_jax.training.workdir import Workdir


@pytest.fixture(scope="module")
def model():
    return load_model("tiny")


@pytest.fixture(scope="module")
def pairs(model):
    """Eight pairs of builtin:tiny_preferences, with the model's own log-probabilities."""
    data = Data(batch_size=8, limit=8)
    examples = examples_of(
        "builtin:tiny_preferences", load_tokenizer("tiny"), data, kind="preference"
    )
    reference = compute_log_probs(model, make_mesh(), examples, data)
    batch = batching.make_collate(data, attach_reference(examples, reference))(examples)
    return jax.tree.map(jnp.asarray, batch)


def test_the_loss_is_log_2_before_the_first_update(model, pairs):
    sums = preference_loss(LOSSES["dpo"], beta=0.1)(model, pairs)
    assert float(sums.weight) == 8
    assert abs(float(sums.loss) / 8 - math.log(2)) < 1e-6
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert abs(float(sums.metrics[name])) < 1e-4, name


def test_sums_are_those_of_the_formula(model, pairs):
    rng = np.random.default_rng(0)
    reference = np.asarray(pairs["reference_log_probs"]) + rng.normal(0, 4, 16).astype(np.float32)
    batch = pairs | {"reference_log_probs": jnp.asarray(reference)}
    sums = preference_loss(LOSSES["dpo"], beta=0.3)(model, batch)
    log_probs = np.asarray(pairs["reference_log_probs"], np.float64)
    rewards = (0.3 * (log_probs - reference)).reshape(8, 2)
    margins = rewards[:, 0] - rewards[:, 1]
    np.testing.assert_allclose(sums.loss, np.log1p(np.exp(-margins)).sum(), rtol=1e-4)
    expected = {
        "rewards/chosen": rewards[:, 0].sum(),
        "rewards/rejected": rewards[:, 1].sum(),
        "rewards/margins": margins.sum(),
        "rewards/accuracies": (margins > 0).sum(),
        "logps/chosen": log_probs[0::2].sum(),
        "logps/rejected": log_probs[1::2].sum(),
    }
    assert sums.metrics.keys() == expected.keys() and 0 < expected["rewards/accuracies"] < 8
    for name, value in expected.items():
        np.testing.assert_allclose(sums.metrics[name], value, rtol=1e-4, atol=1e-3, err_msg=name)


def test_a_run_starts_at_log_2_learns_and_evaluates(tiny_config, tmp_path):
    config = tiny_config(
        "dpo",
        {
            "num_steps": 60,
            "data.batch_size": 16,
            "data.eval_source": "builtin:tiny_preferences",
            "optimizer.learning_rate": 3e-3,
        },
    )
    workdir = Workdir(tmp_path / "run", config)
    summary = preference.run(config, workdir)
    rows = read_metrics(workdir.path)
    assert len(rows) == 60
    assert abs(rows[0]["loss"] - math.log(2)) < 1e-6
    assert rows[0]["rewards/accuracies"] <= 0.5
    last = {name: np.mean([row[name] for row in rows[-8:]]) for name in rows[0]}
    assert last["rewards/accuracies"] > 0.9
    assert last["rewards/margins"] > 0.5
    assert last["loss"] < 0.5
    assert summary["eval"]["rewards/accuracies"] > 0.9
    # The command `evaluate` gives the same numbers from what was saved.
    again = preference.evaluate(config, workdir)
    assert again["eval"] == pytest.approx(summary["eval"], rel=1e-5)


def test_it_starts_from_a_run_which_is_then_the_reference(tiny_config, tmp_path):
    tuned = Workdir(tmp_path / "sft", config := tiny_config("sft", {"num_steps": 4}))
    sft.run(config, tuned)
    source = "builtin:tiny_preferences"
    overrides = {"model": str(tuned.path), "num_steps": 1, "data.eval_source": source}
    config = tiny_config("dpo", overrides | {"optimizer.learning_rate": 0.0})
    workdir = Workdir(tmp_path / "dpo", config)
    preference.run(config, workdir)
    [row] = read_metrics(workdir.path)
    assert abs(row["loss"] - math.log(2)) < 1e-6
    # Whose log-probabilities are the tuned model's and not the untouched one's.
    examples = examples_of(source, load_tokenizer("tiny"), config.data, kind="preference")
    model, mesh = pretrained.open_model(config)
    for start, same in ((model, True), (load_model("tiny", mesh=mesh), False)):
        log_probs = compute_log_probs(start, mesh, examples, config.data)
        means = preference.evaluate(config, workdir)["eval"]
        assert (abs(log_probs[:, 0].mean() - means["logps/chosen"]) < 1e-3) == same


def test_an_unknown_loss_is_refused_before_anything_is_read(tiny_config):
    with pytest.raises(RunError, match="config.loss is 'dpoo'; expected one of .*'dpo'"):
        tiny_config("dpo", {"loss": "dpoo"})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.accumulation": 3}, "batch_size = 8 is no multiple of config.data.accumulation = 3"),
        ({"data.accumulation": 0}, "config.data.accumulation is 0; expected at least 1"),
        ({"data.batch_size": 500}, "batch_size = 500 is more than there are examples: 128"),
        ({"data.max_length": 600}, "max_length = 600 is more than the model's context of 512"),
        ({"num_epochs": 0.01}, "config.num_epochs = 0.01 of 128 examples is less than half"),
        ({"log_every": 0}, "config.log_every is 0"),
        ({"checkpoint_every": 0}, "config.checkpoint_every is 0"),
        ({"optimizer.schedule": "cosin"}, "config.optimizer.schedule is 'cosin'"),
        ({"remat": "some"}, "config.remat is 'some'; expected one of none, linear, full"),
        ({"compute_dtype": "fp8"}, "config.compute_dtype is 'fp8'; expected one of float32"),
        ({"mesh.tensor": 7}, "mesh.* does not fit"),
        ({"data.eval_source": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"data.length_buckets": (16,)}, "fits in none of the buckets .* of data.length_buckets"),
        ({"data.target_buckets": (8,)}, "fits in none of the buckets .* of data.target_buckets"),
    ],
)
def test_what_would_stop_the_run_later_stops_it_before_any_compute(
    tiny_config, tmp_path, monkeypatch, overrides, message
):
    monkeypatch.setattr(preference, "reference_log_probs", pytest.fail)
    with pytest.raises((RunError, DataError), match=message):
        config = tiny_config("dpo", overrides)
        preference.run(config, Workdir(tmp_path, config))


def test_references_travel_by_example_and_not_by_place():
    examples = [Example(id, None, (), (), {}) for id in (7, 3)]
    attach = attach_reference(examples, np.array([[-1.0, -2.0], [-3.0, -4.0]]))
    np.testing.assert_array_equal(attach(examples[1])["reference_log_probs"], [-3.0, -4.0])


# --- from Python

RECORDS = load_builtin("tiny_preferences")[:8]
CONFIG = preference.Config(num_steps=3, model="tiny", data=Data(batch_size=4, max_length=64))


def margin_loss(chosen, rejected, ref_chosen, ref_rejected, *, beta):
    return (beta * (chosen - rejected - ref_chosen + ref_rejected) - 1) ** 2


MINE = PreferenceLoss("mine", margin_loss, LOSSES["dpo"].reads)


def test_it_trains_from_python_and_leaves_the_model_as_it_was(tmp_path):
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    before = np.asarray(model.embedding[...])
    result = preference.train(model, tokenizer, RECORDS, CONFIG, held_out=RECORDS[:2])
    np.testing.assert_array_equal(before, model.embedding[...])
    assert np.abs(before - np.asarray(result.model.embedding[...])).max() > 0
    assert [row["step"] for row in result.metrics] == [1, 2, 3]
    assert result.metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert result.summary["eval"]["loss"] > 0 and result.workdir is None
    again = preference.train(model, tokenizer, RECORDS, CONFIG, workdir=tmp_path / "run")
    assert [row["loss"] for row in again.metrics] == [row["loss"] for row in result.metrics]


def test_a_known_reference_is_not_computed(monkeypatch):
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    expected = preference.train(model, tokenizer, RECORDS, CONFIG)
    examples = examples_of(RECORDS, tokenizer, CONFIG.data, kind="preference")
    known = compute_log_probs(model, make_mesh(), examples, CONFIG.data)
    monkeypatch.setattr(preference, "reference_log_probs", lambda *_: pytest.fail("computed"))
    found = preference.train(model, tokenizer, examples, CONFIG, reference=known)
    assert [row["loss"] for row in found.metrics] == [row["loss"] for row in expected.metrics]


def test_a_loss_of_ones_own_trains():
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    result = preference.train(model, tokenizer, RECORDS, CONFIG, loss=MINE)
    assert result.metrics[0]["loss"] == pytest.approx(1, abs=1e-4)
    assert result.metrics[-1]["loss"] < 1


def test_a_loss_of_ones_own_that_cannot_be_fed_is_refused():
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    options = preference.LossOptions(gamma=0.5)
    config = dataclasses.replace(CONFIG, loss="simpo", loss_options=options)
    with pytest.raises(RunError, match="config.loss_options.gamma is no option of the loss 'mine'"):
        preference.train(model, tokenizer, RECORDS, config, loss=MINE)
    strange = PreferenceLoss("mine", margin_loss, ("chosen", "surprise"))
    with pytest.raises(RunError, match="the loss 'mine' reads 'surprise'; expected some of"):
        preference.train(model, tokenizer, RECORDS, CONFIG, loss=strange)
