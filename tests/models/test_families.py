"""Families against transformers' torch models (goldens/make_models.py), and their configs."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.errors import ModelError
from align_jax.models.families import FAMILIES, config_from_hf, config_to_hf, family_of
from align_jax.models.interchange import load_model

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
NAMES = ["llama_tiny", "llama_untied", "llama3_rope", "mistral_tiny", "gpt2_tiny"]
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    folder = GOLDENS / request.param
    model = load_model(folder)
    logits = jax.jit(lambda tokens, **kwargs: model.logits(model(tokens, **kwargs)))
    return logits, dict(np.load(folder / "logits.npz"))


def test_logits_equal_torch_at_several_lengths(golden, record_property):
    logits, arrays = golden
    for length in (1, 7, 40, 150):  # 150: more than one query block, many sliding windows
        error = np.abs(logits(arrays[f"tokens_{length}"]) - arrays[f"logits_{length}"]).max()
        record_property(f"max_difference_{length}", float(error))
        assert error < TOLERANCE, length


def test_left_padding_equals_torch(golden):
    logits, arrays = golden
    tokens, mask = arrays["tokens_padded"], arrays["mask_padded"]
    error = np.abs(logits(tokens, segment_ids=mask) - arrays["logits_padded"]) * mask[..., None]
    assert error.max() < TOLERANCE


def test_right_padding_equals_torch(golden):
    logits, arrays = golden
    shifted = [np.roll(arrays[f"{name}_padded"], 0, 1) for name in ("tokens", "mask", "logits")]
    for row, length in enumerate(arrays["mask_padded"].sum(1)):
        for array in shifted:
            array[row] = np.roll(array[row], length, axis=0)
    tokens, mask, expected = shifted
    error = np.abs(logits(tokens, segment_ids=mask) - expected) * mask[..., None]
    assert error.max() < TOLERANCE


def test_packing_equals_torch(golden):
    logits, arrays = golden
    lengths = (40, 1, 7, 150)
    tokens = np.concatenate([arrays[f"tokens_{n}"] for n in lengths] + [np.zeros((1, 5), int)], 1)
    segments = np.repeat([1, 2, 3, 4, 0], (*lengths, 5))[None]
    packed = np.split(np.asarray(logits(tokens, segment_ids=segments))[0], np.cumsum(lengths))
    for part, length in zip(packed, lengths, strict=False):
        assert np.abs(part - arrays[f"logits_{length}"][0]).max() < TOLERANCE


def test_rope_scaling_and_window_matter():
    """Otherwise the goldens above could not tell a model without them."""
    for name, change in (("llama3_rope", "rope_scaling"), ("mistral_tiny", "sliding_window")):
        arrays = np.load(GOLDENS / name / "logits.npz")
        model = load_model(GOLDENS / name)
        plain = type(model)(
            dataclasses.replace(model.config, **{change: None}), key=jax.random.key(0)
        )
        plain = jax.tree.unflatten(jax.tree.structure(plain), jax.tree.leaves(model))
        tokens = jnp.asarray(arrays["tokens_150"])
        assert np.abs(plain.logits(plain(tokens)) - arrays["logits_150"]).max() > 0.1


LLAMA = json.loads((GOLDENS / "llama_tiny" / "config.json").read_text())
GPT2 = json.loads((GOLDENS / "gpt2_tiny" / "config.json").read_text())
LLAMA3 = json.loads((GOLDENS / "llama3_rope" / "config.json").read_text())


def test_rope_spellings_of_transformers_4_and_5_agree():
    new = config_from_hf(LLAMA3)
    parameters = dict(LLAMA3["rope_parameters"])
    old = {k: v for k, v in LLAMA3.items() if k != "rope_parameters"}
    old |= {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters}
    assert config_from_hf(old) == new
    older = {**parameters, "type": parameters["rope_type"]}
    del older["rope_type"]
    assert config_from_hf({**old, "rope_scaling": older}) == new
    assert dict(new.rope_scaling)["factor"] == 8.0


def test_absent_keys_mean_what_transformers_defaults_to():
    llama = config_from_hf(
        {
            "model_type": "llama",
            "vocab_size": 10,
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 4,
        }
    )
    assert (llama.num_kv_heads, llama.head_dim, llama.norm_epsilon) == (2, 4, 1e-6)
    assert (llama.rope_theta, llama.context_length, llama.tie_embeddings) == (1e4, 2048, False)
    gpt2 = config_from_hf(GPT2)
    assert (gpt2.mlp_size, gpt2.norm_epsilon, gpt2.tie_embeddings) == (128, 1e-5, True)


@pytest.mark.parametrize("name", NAMES)
def test_config_survives_the_way_out_and_back(name):
    own = json.loads((GOLDENS / name / "config.json").read_text())
    config = config_from_hf(own)
    ids = {f"{token}_token_id": own[f"{token}_token_id"] for token in ("bos", "eos", "pad")}
    out = config_to_hf(config, dtype="float32", **ids)
    assert config_from_hf(out) == config
    shared = {key: value for key, value in out.items() if key in own}
    assert {k: v for k, v in shared.items() if v != own[k]} in ({}, {"n_inner": 128})
    assert {"architectures", "model_type", "vocab_size", "dtype"} <= shared.keys()


MISTRAL = json.loads((GOLDENS / "mistral_tiny" / "config.json").read_text())
IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_a_family_reads_what_it_writes_and_is_found_by_its_name(family):
    config = config_from_hf({"llama": LLAMA, "mistral": MISTRAL, "gpt2": GPT2}[family.name])
    assert family_of(config) is family
    assert family.name in family.model_types
    model_types = [kind for one in FAMILIES.values() for kind in one.model_types]
    assert len(set(model_types)) == len(model_types)


def test_a_sliding_window_is_never_lost():
    """null is no window, an absent key is transformers' default; Llama has none to write."""
    whole = config_from_hf(MISTRAL | {"sliding_window": None})
    assert whole.sliding_window is None
    out = config_to_hf(whole, dtype="float32", **IDS)
    assert out["model_type"] == "mistral" and config_from_hf(out) == whole
    absent = {key: value for key, value in MISTRAL.items() if key != "sliding_window"}
    assert config_from_hf(absent).sliding_window == 4096
    windowed = dataclasses.replace(config_from_hf(LLAMA), sliding_window=6)
    with pytest.raises(ModelError, match="'llama' has no sliding window"):
        config_to_hf(windowed, dtype="float32", **IDS)


def test_the_error_names_every_family():
    with pytest.raises(ModelError) as error:
        config_from_hf({"model_type": "t5"})
    assert str(error.value) == (
        "config.json: model_type 't5' is not supported; supported are 'llama' (Llama 2 and 3, "
        "SmolLM2), 'mistral' and 'gpt2'."
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "bert"}, "'bert' is not supported"),
        ({}, "model_type None"),
        (LLAMA | {"attention_bias": True}, "attention_bias=True"),
        (LLAMA | {"mlp_bias": True}, "mlp_bias=True"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (LLAMA | {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        (
            LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
            "lin",
        ),
        (LLAMA | {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA | {"num_key_value_heads": 3}, "3 key-value heads"),
        (LLAMA | {"hidden_size": "32"}, "'hidden_size'"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config"),
        (GPT2 | {"activation_function": "relu"}, "'relu'"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2 | {"n_head": None}, "'n_head'"),
    ],
)
def test_unsupported_configurations_are_named(config, said):
    with pytest.raises(ModelError, match=said):
        config_from_hf(config)
