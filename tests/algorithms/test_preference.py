"""DPO: where it starts, that it learns, and what it refuses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.algorithms import preference, sft
from align_jax.algorithms.preference import attach_reference, make_loss
from align_jax.data import batching, dataset
from align_jax.data.tokenise import Example
from align_jax.distributed.mesh import make_mesh
from align_jax.errors import DataError, RunError
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
    data = dataset.default_data_config(batch_size=8, limit=8)
    examples = dataset.load_examples(
        data, "builtin:tiny_preferences", load_tokenizer("tiny"), kind="preference"
    )
    reference = compute_log_probs(model, make_mesh(), examples, data)
    batch = batching.make_collate(data, attach_reference(examples, reference))(examples)
    return jax.tree.map(jnp.asarray, batch)


def test_the_loss_is_log_2_before_the_first_update(tiny_config, model, pairs):
    sums = make_loss(tiny_config("dpo", {}))(model, pairs)
    assert float(sums.weight) == 8
    assert abs(float(sums.loss) / 8 - math.log(2)) < 1e-6
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert abs(float(sums.metrics[name])) < 1e-4, name


def test_sums_are_those_of_the_formula(tiny_config, model, pairs):
    rng = np.random.default_rng(0)
    reference = np.asarray(pairs["reference_log_probs"]) + rng.normal(0, 4, 16).astype(np.float32)
    batch = pairs | {"reference_log_probs": jnp.asarray(reference)}
    sums = make_loss(tiny_config("dpo", {"beta": 0.3}))(model, batch)
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
    examples = preference.load_pairs(config, source, load_tokenizer("tiny"))
    model, mesh = pretrained.open_model(config)
    for start, same in ((model, True), (load_model("tiny", mesh=mesh), False)):
        log_probs = compute_log_probs(start, mesh, examples, config.data)
        means = preference.evaluate(config, workdir)["eval"]
        assert (abs(log_probs[:, 0].mean() - means["logps/chosen"]) < 1e-3) == same


def test_an_unknown_loss_is_refused_before_anything_is_read(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "load_pretrained_tokenizer", pytest.fail)
    config = tiny_config("dpo", {"loss": "dpoo"})
    with pytest.raises(RunError, match="config.loss is 'dpoo'; expected one of .*'dpo'"):
        preference.run(config, Workdir(tmp_path, config))


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
    config = tiny_config("dpo", overrides)
    with pytest.raises((RunError, DataError), match=message):
        preference.run(config, Workdir(tmp_path, config))


def test_references_travel_by_example_and_not_by_place():
    examples = [Example(id, None, (), (), {}) for id in (7, 3)]
    attach = attach_reference(examples, np.array([[-1.0, -2.0], [-3.0, -4.0]]))
    np.testing.assert_array_equal(attach(examples[1])["reference_log_probs"], [-3.0, -4.0])
