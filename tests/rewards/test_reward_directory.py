"""Reward models in and out: what transformers would read, and what comes back from the disk."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from align_jax.errors import ModelError
from align_jax.models.heads import ScalarModel
from align_jax.models.interchange import load_model, load_tokenizer, save_model
from align_jax.rewards.model import RewardScale, load_reward_model, save_reward_model

TOKENS = np.random.default_rng(0).integers(0, 90, (2, 11)).astype(np.int32)


def scalar_model(name):
    model = ScalarModel(load_model(name), key=jax.random.key(1))
    model.head.head_bias[...] = jnp.float32(0.75)
    return model


def saved(path, name="tiny", scale=None, tokenizer=None):
    model = scalar_model(name)
    tokenizer = tokenizer or load_tokenizer("tiny")
    save_reward_model(model, tokenizer, path, scale=scale or RewardScale())
    return model


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("tiny", "LlamaForSequenceClassification"), ("tiny:gpt2", "GPT2ForSequenceClassification")],
)
def test_a_saved_directory_holds_what_transformers_wants(tmp_path, name, architecture):
    model = saved(tmp_path / "out", name, RewardScale(2.0, -1.0, 96, {"texts": 5}))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(tensors["score.weight"], model.head.head_kernel[...][None])
    assert "lm_head.weight" not in tensors and "score.bias" not in tensors
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [architecture]
    assert list(config["id2label"]) == ["0"]  # transformers counts labels by this
    # The head's bias has no place in that class: 2 x 0.75 - 1.
    stored = json.loads((tmp_path / "out" / "reward.json").read_text())
    scale = {"gain": 2.0, "bias": 0.5, "max_length": 96, "origin": {"texts": 5}}
    assert stored == scale | {"max_prompt_length": None, "min_prompt_length": 1}
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_padding_is_no_longer_eos_or_transformers_would_score_the_token_before_it(tmp_path):
    tokenizer = load_tokenizer("tiny")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    saved(tmp_path / "out", tokenizer=tokenizer)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pad_token_id"] not in (config["eos_token_id"], config["bos_token_id"], None)
    assert load_tokenizer(tmp_path / "out").pad_token_id == config["pad_token_id"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id, "the caller's own is left alone"


@pytest.mark.parametrize("name", ["tiny", "tiny:gpt2"])
def test_a_round_trip_changes_no_score(tmp_path, name):
    model = saved(tmp_path / "out", name, RewardScale(3.0, 1.0))
    back, scale = load_reward_model(tmp_path / "out")
    expected = 3 * model(TOKENS) + 1
    np.testing.assert_allclose(scale.gain * back(TOKENS) + scale.bias, expected, atol=1e-5)


def test_a_directory_of_transformers_own_needs_no_reward_json(tmp_path):
    """As `LlamaForSequenceClassification` writes an untied model: no lm_head, config untied."""
    saved(tmp_path / "out")
    (tmp_path / "out" / "reward.json").unlink()
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text()) | {"tie_word_embeddings": False}
    file.write_text(json.dumps(config))
    model, scale = load_reward_model(tmp_path / "out")
    assert scale == RewardScale() and float(model.head.head_bias[...]) == 0


def test_what_is_no_reward_model_is_named(tmp_path):
    save_model(load_model("tiny"), load_tokenizer("tiny"), tmp_path / "policy")
    with pytest.raises(ModelError, match="policy is not a reward model.*score.weight.*found none"):
        load_reward_model(tmp_path / "policy")
    with pytest.raises(ModelError, match="tiny is not a reward model"):
        load_reward_model("tiny")
    saved(tmp_path / "out")
    with pytest.raises(ModelError, match="score.weight has no place"):
        load_model(tmp_path / "out")

    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"score.weight": np.zeros((2, 32), np.float32)}, file)
    with pytest.raises(ModelError, match=r"shape \(1, 32\), found \(2, 32\)"):
        load_reward_model(tmp_path / "out")
    save_file(tensors, file)
    stored = json.loads((tmp_path / "out" / "reward.json").read_text())
    for gain in (None, "1", float("nan")):
        (tmp_path / "out" / "reward.json").write_text(json.dumps(stored | {"gain": gain}))
        with pytest.raises(ModelError, match="reward.json: 'gain' must be a finite number"):
            load_reward_model(tmp_path / "out")


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    from align_jax.models import export

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(export, "write_json", full)
    with pytest.raises(ModelError, match="no space left"):
        saved(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
