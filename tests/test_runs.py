"""A run opened from Python, at every stage of its life."""

import json

import numpy as np
import pytest

import align_jax
from align_jax.algorithms import sample, sft
from align_jax.data.dataset import Data
from align_jax.errors import RunError
from align_jax.generation.rollout import Sampling
from align_jax.models.transformer import Transformer
from align_jax.training.pretrained import Lora
from align_jax.training.workdir import Workdir

RECORDS = [{"prompt": f"{i}:", "completion": f" {i * i}"} for i in range(8)]


def train(directory, **settings):
    model, tokenizer = align_jax.load_model("tiny"), align_jax.load_tokenizer("tiny")
    config = sft.Config(
        num_steps=2, model="tiny", data=Data(batch_size=4, max_length=64), **settings
    )
    return config, sft.train(model, tokenizer, RECORDS, config, workdir=directory)


def test_a_run_has_its_settings_metrics_and_model(tmp_path):
    config, result = train(tmp_path)
    run = align_jax.open_run(tmp_path)
    assert run.config == config and run.path == tmp_path
    assert run.metrics() == result.metrics
    np.testing.assert_array_equal(run.load_model().embedding[...], result.model.embedding[...])
    assert run.load_tokenizer().eos_token_id is not None
    assert run.summary is None and "running or stopped" in repr(run)
    Workdir(tmp_path, config).finish({"eval": {"loss": 1.0}})
    assert run.summary == {"eval": {"loss": 1.0}} and "finished" in repr(run)


def test_adapters_are_merged(tmp_path):
    train(tmp_path, lora=Lora(rank=2))
    model = align_jax.open_run(tmp_path).load_model()
    assert isinstance(model, Transformer) and model.adapters is None


def test_a_run_that_has_not_got_far_says_so(tmp_path):
    config = sft.Config(model="tiny")
    Workdir(tmp_path, config)
    run = align_jax.open_run(tmp_path)
    assert run.metrics() == [] and run.summary is None
    with pytest.raises(RunError, match="no checkpoint yet"):
        run.load_model()
    with pytest.raises(RunError, match="has no samples"):
        run.samples()


def test_samples_by_name_and_all(tmp_path):
    config = sample.Config(
        model="tiny",
        data=Data(source="builtin:review_openings", limit=2),
        sampling=Sampling(prompts=0, samples=2, max_new_tokens=4),
    )
    sample.run(config, Workdir(tmp_path, config))
    run = align_jax.open_run(tmp_path)
    assert [line["sample"] for line in run.samples("samples")] == [0, 1, 0, 1]
    (tmp_path / "samples" / "again.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    assert len(run.samples()) == 5 and run.samples()[0] == {"text": "x"}
    with pytest.raises(RunError, match="no samples 'sampels'. Did you mean 'samples'"):
        run.samples("sampels")
    with pytest.raises(RunError, match="trained no model; it sampled from tiny"):
        run.load_model()


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="not the workdir of a run: it has no config.json"):
        align_jax.open_run(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(RunError, match="not the workdir of a run: it holds a model"):
        align_jax.open_run(tmp_path)


def test_a_run_from_before_a_field_existed_goes_on(tmp_path):
    config, _ = train(tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    del content["evaluators"], content["data"]["score"]
    file.write_text(json.dumps(content))
    assert align_jax.open_run(tmp_path).config == config
    assert Workdir(tmp_path, config).path == tmp_path
    # What differs is still refused.
    with pytest.raises(RunError, match="config.num_steps is 2 there and 3 here"):
        Workdir(tmp_path, sft.Config.from_dict(config.to_dict() | {"num_steps": 3}))
