"""Supervised fine-tuning: its loss by brute force, and that it learns all there is to learn."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.algorithms import sft
from align_jax.data import batching, dataset
from align_jax.data.builtin import load_builtin
from align_jax.data.dataset import Data
from align_jax.errors import DataError, RunError
from align_jax.losses.log_probs import token_log_probs
from align_jax.models.interchange import load_model, load_tokenizer
from align_jax.training import pretrained
from align_jax.training.metrics import read_metrics
from align_jax.training.workdir import Workdir


def test_the_loss_is_the_mean_over_all_response_tokens(tiny_config):
    config = tiny_config("sft", {"data.limit": 6})
    tokenizer = load_tokenizer("tiny")
    examples = dataset.examples_of(config.data.source, tokenizer, config.data, kind="sft")
    batch = batching.make_collate(config.data)(examples)
    model = load_model("tiny")
    sums = sft.loss_sums(model, {name: jnp.asarray(x) for name, x in batch.items()})

    losses, entropies = [], []
    for record in load_builtin("tiny_sft")[:6]:
        prompt = tokenizer(record["prompt"]).input_ids
        response = [*tokenizer(record["completion"]).input_ids, tokenizer.eos_token_id]
        tokens = np.array([[*prompt, *response]])
        logits = model.logits(model(tokens))[0, len(prompt) - 1 : -1]
        losses += (-token_log_probs(logits, np.array(response))).tolist()
        log_p = np.asarray(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
        entropies += (-(np.exp(log_p) * log_p).sum(-1)).tolist()
    assert float(sums.weight) == len(losses)
    np.testing.assert_allclose(sums.loss / sums.weight, np.mean(losses), rtol=1e-5)
    entropy = sums.metrics["policy/entropy_avg"] / sums.weight
    np.testing.assert_allclose(entropy, np.mean(entropies), rtol=1e-5)
    # An untrained model knows nothing: 264 tokens, equally likely.
    assert abs(np.mean(losses) - math.log(264)) < 0.2


def test_it_learns_what_there_is_to_learn_and_evaluates(tiny_config, tmp_path):
    config = tiny_config(
        "sft",
        {
            "num_steps": 250,
            "data.limit": 8,
            "data.eval_source": "builtin:tiny_sft",
            "optimizer.learning_rate": 1e-2,
        },
    )
    workdir = Workdir(tmp_path / "run", config)
    summary = sft.run(config, workdir)
    rows = read_metrics(workdir.path)
    assert rows[0]["loss"] > 5
    # Eight responses, each with its own prompt: nothing is left to learn at 0.
    assert summary["eval"]["loss"] < 0.05
    assert summary["eval"]["perplexity"] == pytest.approx(math.exp(summary["eval"]["loss"]))
    assert sft.evaluate(config, workdir)["eval"] == pytest.approx(summary["eval"], rel=1e-5)


def test_a_wrong_held_out_source_is_found_before_training(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "load_pretrained", pytest.fail)
    config = tiny_config("sft", {"data.eval_source": "nowhere.jsonl"})
    with pytest.raises(DataError, match="nowhere.jsonl: no such file"):
        sft.run(config, Workdir(tmp_path, config))


RECORDS = [{"prompt": f"{i}:", "completion": f" {i * i}"} for i in range(8)]


def test_it_trains_from_python_and_leaves_the_model_as_it_was():
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    before = np.asarray(model.embedding[...])
    config = sft.Config(num_steps=3, data=Data(batch_size=4, max_length=64))
    result = sft.train(model, tokenizer, RECORDS, config, held_out=RECORDS[:2])
    np.testing.assert_array_equal(before, model.embedding[...])
    assert np.abs(before - np.asarray(result.model.embedding[...])).max() > 0
    assert [row["step"] for row in result.metrics] == [1, 2, 3]
    assert result.summary["eval"]["loss"] > 0 and result.workdir is None


def test_a_run_from_python_in_a_directory_goes_on_and_can_be_opened(tmp_path):
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    config = sft.Config(num_steps=3, model="tiny", data=Data(batch_size=4, max_length=64))
    first = sft.train(model, tokenizer, RECORDS, config, workdir=tmp_path / "run")
    again = sft.train(model, tokenizer, RECORDS, config, workdir=tmp_path / "run")
    assert first.metrics == again.metrics
    np.testing.assert_array_equal(first.model.embedding[...], again.model.embedding[...])


def test_a_wrong_record_from_python_is_named():
    with pytest.raises(DataError, match=r"records\[1\]: field 'completion' is missing"):
        sft.train(
            load_model("tiny"), load_tokenizer("tiny"), [RECORDS[0], {"prompt": "x"}], sft.Config()
        )


def test_a_workdir_whose_config_names_another_model_is_refused(tmp_path):
    config = sft.Config(model="tiny:gpt2", num_steps=1, data=Data(batch_size=4, max_length=64))
    with pytest.raises(RunError, match="config.model = 'tiny:gpt2' names another model than"):
        sft.train(
            load_model("tiny"), load_tokenizer("tiny"), RECORDS, config, workdir=tmp_path / "run"
        )
