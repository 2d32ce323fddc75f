"""Checkpoints in and out: bitwise round trips, sharded files, GGUF, the hub's files."""

import json
import pathlib
import shutil

import gguf
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from align_jax.distributed.mesh import make_mesh
from align_jax.errors import ModelError
from align_jax.models import export
from align_jax.models.interchange import abstract_model, load_model, load_tokenizer, save_model

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
NAMES = ["llama_tiny", "llama_untied", "llama3_rope", "mistral_tiny", "gpt2_tiny"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


def assert_bitwise_equal(a, b):
    assert a.config == b.config
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def tensors(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("name", ["tiny", "tiny:gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bitwise(name, dtype, tokenizer, tmp_path):
    model = load_model(name, dtype=dtype)
    save_model(model, tokenizer, tmp_path / "out")
    assert_bitwise_equal(load_model(tmp_path / "out", dtype=dtype), model)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("name", ["tiny:gpt2", *NAMES])
def test_an_abstract_model_has_the_shapes_of_the_loaded_one_and_reads_no_weights(name, tmp_path):
    path = name
    if name in NAMES:
        path = tmp_path / name
        path.mkdir()
        shutil.copy(GOLDENS / name / "config.json", path)
    mesh = make_mesh()
    abstract = abstract_model(path, mesh=mesh, compute_dtype="bfloat16", remat="full")
    loaded = load_model(
        GOLDENS / name if name in NAMES else name, mesh=mesh, compute_dtype="bfloat16", remat="full"
    )
    assert abstract.config == loaded.config
    assert jax.tree.structure(abstract) == jax.tree.structure(loaded)
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(loaded), strict=True):
        assert isinstance(a, jax.ShapeDtypeStruct)
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)


@pytest.mark.parametrize("name", NAMES)
def test_what_goes_out_is_what_transformers_wrote(name, tmp_path, monkeypatch):
    # These models have 96 tokens only.
    monkeypatch.setattr(export, "_check_destination", lambda *_: None)
    save_model(load_model(GOLDENS / name), load_tokenizer("tiny"), tmp_path / "out")
    ours, theirs = tensors(tmp_path / "out"), tensors(GOLDENS / name)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].shape == value.shape
        assert ours[key].tobytes() == value.tobytes(), key


def test_large_models_are_written_in_several_files(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_SHARD_BYTES", 70_000)
    model = load_model("tiny:gpt2")
    save_model(model, tokenizer, tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((tmp_path / "out" / file).stat().st_size < 73_000 for file in files)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(model))
    assert_bitwise_equal(load_model(tmp_path / "out"), model)


def test_the_directory_holds_all_that_transformers_looks_for(tokenizer, tmp_path):
    save_model(load_model("tiny"), tokenizer, str(tmp_path / "deep" / "out"))
    out = tmp_path / "deep" / "out"
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert json.loads((out / "generation_config.json").read_text()) == ids
    assert json.loads((out / "config.json").read_text()).items() >= ids.items()
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1


def test_saving_never_harms_what_is_there(tokenizer, tmp_path, monkeypatch):
    model = load_model("tiny")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(ModelError, match="exists already"):
        save_model(model, tokenizer, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    save_model(model, tokenizer, tmp_path / "empty")

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_write_configs", full_disk)
    with pytest.raises(ModelError, match="cannot save to .*new.*No space left"):
        save_model(model, tokenizer, tmp_path / "new")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(ModelError, match="the disk has 0"):
        save_model(model, tokenizer, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]
    assert (tmp_path / "full" / "thesis.txt").read_text() == "x"


def test_a_tokenizer_of_another_model_is_refused(tokenizer, tmp_path):
    with pytest.raises(ModelError, match="264 tokens and the model 96"):
        save_model(load_model(GOLDENS / "llama_tiny"), tokenizer, tmp_path / "out")


@pytest.mark.parametrize("name", ["llama_tiny", "gpt2_tiny"])
def test_base_model_names_and_constants_are_understood(name, tmp_path):
    """The original GPT-2 on the hub has no `transformer.` prefix, and its causal masks inside."""
    prefix = "transformer." if name == "gpt2_tiny" else "model."
    stored = {key.removeprefix(prefix): value for key, value in tensors(GOLDENS / name).items()}
    constants = {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}
    constants |= {"lm_head.weight": np.zeros((96, 32), np.float32)}
    save_file({**stored, **constants}, tmp_path / "model.safetensors")
    shutil.copy(GOLDENS / name / "config.json", tmp_path)
    assert_bitwise_equal(load_model(tmp_path), load_model(GOLDENS / name))


def test_parameter_and_compute_dtypes():
    model = load_model(GOLDENS / "llama_tiny", dtype=jnp.bfloat16, compute_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("bfloat16")}
    assert model(jnp.zeros((1, 3), int)).dtype == jnp.bfloat16
    exact = load_model(GOLDENS / "llama_tiny", remat="full")
    assert exact.config.remat == "full"
    np.testing.assert_array_equal(model.embedding[...], exact.embedding[...].astype(jnp.bfloat16))


def test_half_precision_files_become_float32(tmp_path):
    stored = tensors(GOLDENS / "llama_tiny")
    for dtype in (np.float16, jnp.bfloat16):
        folder = tmp_path / jnp.dtype(dtype).name
        folder.mkdir()
        cast = {key: value.astype(dtype) for key, value in stored.items()}
        save_file(cast, folder / "model.safetensors")
        shutil.copy(GOLDENS / "llama_tiny" / "config.json", folder)
        got = load_model(folder).embedding[...]
        assert got.dtype == jnp.float32
        expected = cast["model.embed_tokens.weight"].astype(np.float32)
        np.testing.assert_array_equal(got, expected)


def test_tiny_models_are_the_same_every_time():
    assert_bitwise_equal(load_model("tiny"), load_model("tiny"))
    assert load_model("tiny:gpt2").config.family == "gpt2"


def write_gguf(path, folder, *, quantize=None):
    """A Llama directory as llama.cpp's converter writes it, by the gguf package's own writer."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    name_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in tensors(folder).items():
        for letter, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
            if f"{letter}_proj" in name:
                halves = tensor.reshape(config[heads], 2, config["head_dim"] // 2, -1)
                tensor = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
        kind = None
        if quantize is not None and tensor.ndim == 2 and tensor.shape[-1] % 32 == 0:
            kind, tensor = quantize, gguf.quantize(tensor, quantize)
        target = name_map.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(target, tensor, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["llama_tiny", "llama_untied"])
def test_gguf_gives_the_model_it_was_written_from(name, tmp_path):
    write_gguf(tmp_path / "model.gguf", GOLDENS / name)
    assert_bitwise_equal(load_model(tmp_path / "model.gguf"), load_model(GOLDENS / name))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_gguf_is_dequantised(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    write_gguf(tmp_path / "model.gguf", GOLDENS / "llama_tiny", quantize=kind)
    got = load_model(tmp_path / "model.gguf").embedding[...]
    original = tensors(GOLDENS / "llama_tiny")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(got, gguf.dequantize(gguf.quantize(original, kind), kind))


def test_a_hub_id_brings_safetensors_and_never_pickles(monkeypatch):
    asked = {}

    def snapshot_download(name, **kwargs):
        asked.update(kwargs, name=name)
        return str(GOLDENS / "llama_tiny")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_bitwise_equal(load_model("someone/model"), load_model(GOLDENS / "llama_tiny"))
    assert asked["name"] == "someone/model"
    patterns = asked["allow_patterns"]
    kept = [*map(pathlib.PurePath, ("model.safetensors", "config.json", "tokenizer.json"))]
    assert all(any(file.match(pattern) for pattern in patterns) for file in kept)
    pickles = [*map(pathlib.PurePath, ("pytorch_model.bin", "model.pt", "modeling_x.py"))]
    assert not any(file.match(pattern) for pattern in patterns for file in pickles)
