"""Models and tokenizers, through `load_model`, `load_tokenizer` and `GGUFFile`."""

import json
import math
import os
import pathlib
import pickle
import shutil
import struct

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from align_jax.models import loading
from align_jax.models.gguf import GGUFFile
from align_jax.models.loading import load_model
from align_jax.models.tokenizers import load_tokenizer
from align_jax.trees import flatten
from tests.hostile.rows import rows

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"


@pytest.fixture(autouse=True)
def no_placing(monkeypatch):
    """Parameters are read and checked, and put on no device."""

    def read(module, values, mesh):
        for name, leaf in flatten(module).items():
            values(name, leaf)

    monkeypatch.setattr(loading, "fill", read)


@pytest.fixture
def model(tmp_path):
    return pathlib.Path(shutil.copytree(GOLDENS / "llama_tiny", tmp_path / "model"))


@pytest.fixture
def gpt2(tmp_path):
    return pathlib.Path(shutil.copytree(GOLDENS / "gpt2_tiny", tmp_path / "gpt2"))


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


# Changes to Llama's config.json, what the message must name.
CONFIGS = [
    ({"rms_norm_eps": "x"}, ("'rms_norm_eps'", "'x'")),
    ({"rms_norm_eps": None}, ("'rms_norm_eps'",)),
    ({"rms_norm_eps": math.nan}, ("'rms_norm_eps'", "nan")),
    ({"rms_norm_eps": -1}, ("'rms_norm_eps'", "-1")),
    ({"rms_norm_eps": [1e-5]}, ("'rms_norm_eps'",)),
    ({"rms_norm_eps": 10**400}, ("'rms_norm_eps'",)),
    ({"num_hidden_layers": 10**9}, ("'num_hidden_layers'", "1000000000")),
    ({"num_hidden_layers": 10**400}, ("'num_hidden_layers'",)),
    ({"num_hidden_layers": -2}, ("'num_hidden_layers'", "-2")),
    ({"num_hidden_layers": 0}, ("'num_hidden_layers'", "0")),
    ({"num_hidden_layers": 2.0}, ("'num_hidden_layers'", "2.0")),
    ({"num_hidden_layers": True}, ("'num_hidden_layers'", "True")),
    ({"num_hidden_layers": "2"}, ("'num_hidden_layers'", "'2'")),
    ({"num_hidden_layers": 3}, ("model.layers.2", "missing")),
    ({"num_hidden_layers": 1}, ("model.layers.1", "no place")),
    ({"hidden_size": 2**40}, ("'hidden_size'",)),
    ({"hidden_size": -32}, ("'hidden_size'", "-32")),
    ({"hidden_size": None}, ("'hidden_size'", "None")),
    ({"hidden_size": 64}, ("shape",)),
    ({"vocab_size": 10**12}, ("'vocab_size'",)),
    ({"vocab_size": 1}, ("shape",)),
    ({"intermediate_size": {}}, ("'intermediate_size'",)),
    ({"max_position_embeddings": -1}, ("'max_position_embeddings'",)),
    ({"max_position_embeddings": 10**12}, ("'max_position_embeddings'",)),
    ({"num_attention_heads": 5, "head_dim": None}, ("5", "heads")),
    ({"num_attention_heads": 10**6, "head_dim": None}, ("1000000", "heads")),
    ({"num_key_value_heads": 3}, ("3", "key-value")),
    ({"num_key_value_heads": 0}, ("'num_key_value_heads'",)),
    ({"head_dim": 7}, ("'head_dim'", "7", "even")),
    ({"head_dim": -8}, ("'head_dim'",)),
    ({"tie_word_embeddings": "no"}, ("'tie_word_embeddings'", "'no'")),
    ({"hidden_act": "relu"}, ("hidden_act", "'relu'")),
    ({"attention_bias": "yes"}, ("attention_bias",)),
    ({"model_type": None}, ("model_type", "None")),
    ({"model_type": ["llama"]}, ("model_type",)),
    ({"model_type": "x" * 10**6}, ("model_type",)),
    ({"rope_scaling": "linear"}, ("rope_scaling", "'linear'")),
    ({"rope_parameters": [1]}, ("rope_parameters",)),
    ({"rope_parameters": {"rope_theta": "x"}}, ("rope_theta", "'x'")),
    ({"rope_parameters": {"rope_theta": 0}}, ("rope_theta", "0")),
    ({"rope_parameters": {"rope_theta": math.inf}}, ("rope_theta", "inf")),
    ({"rope_parameters": {"rope_type": 3}}, ("rope type", "3")),
    ({"rope_parameters": {"rope_type": "llama3"}}, ("llama3", "factor")),
    (
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": "8",
                "high_freq_factor": 4,
                "low_freq_factor": 1,
            }
        },
        ("factor", "'8'"),
    ),
    ({"model_type": "mistral", "sliding_window": -1}, ("'sliding_window'", "-1")),
    ({"model_type": "mistral", "sliding_window": "x"}, ("'sliding_window'", "'x'")),
    ({"quantization_config": {"bits": 4}}, ("quantization_config",)),
]


@rows("changes, names", CONFIGS)
def test_a_bad_config(refused, model, changes, names):
    change_config(model, **changes)
    refused(lambda: load_model(model), str(model), *names)


@rows(
    "changes, names",
    [
        ({"n_head": 5}, ("5", "heads")),
        ({"n_layer": 10**9}, ("'n_layer'",)),
        ({"layer_norm_epsilon": "x"}, ("'layer_norm_epsilon'",)),
        ({"n_inner": -1}, ("'n_inner'",)),
        ({"activation_function": ["gelu"]}, ("activation_function",)),
    ],
)
def test_a_bad_config_of_gpt2(refused, gpt2, changes, names):
    change_config(gpt2, **changes)
    refused(lambda: load_model(gpt2), str(gpt2), *names)


CONFIG_FILES = [
    (b"", ("config.json",)),
    (b"\x00" * 99, ("config.json",)),
    (b"\xff", ("config.json",)),
    (b"[]", ("config.json", "object")),
    (b"null", ("config.json", "object")),
    (b"[" * 100_000, ("config.json", "nested too deeply")),
    (b'{"vocab_size": ' + b"9" * 5000 + b"}", ("config.json", "digits")),
    (b'{"model_type": "llama", "model_type": "gpt2"}', ("config.json", "'model_type'", "twice")),
]


@rows("content, names", CONFIG_FILES)
def test_a_damaged_config_file(refused, model, content, names):
    (model / "config.json").write_bytes(content)
    refused(lambda: load_model(model), *names)


def test_special_files_in_a_model(refused, model):
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)
    refused(lambda: load_tokenizer(model), "config.json", "a pipe")
    refused(lambda: load_model(model), "config.json", "a pipe")
    shutil.copy(GOLDENS / "llama_tiny" / "config.json", tmp := model / "new")
    os.replace(tmp, model / "config.json")
    refused(lambda: load_tokenizer(model), "tokenizer.json", "a pipe")
    refused(lambda: load_model(model), "model.safetensors", "a pipe")
    os.mkfifo(model / "model.safetensors.index.json")
    refused(lambda: load_model(model), "model.safetensors.index.json", "a pipe")


def special(folder, kind):
    path = folder / "model.gguf"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = pathlib.Path("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "pickle":
        path = folder / "pytorch_model.bin"
        path.write_bytes(pickle.dumps({"a": 1}))
    elif kind == "numpy":
        path = folder / "weights.npz"
        np.savez(path, a=np.ones(3))
    elif kind == "safetensors":
        path = folder / "model.safetensors"
        save_file({"a": np.ones(3, np.float32)}, path)
    elif kind == "empty folder":
        path.mkdir()
    return path


@rows(
    "kind, names",
    [
        ("fifo", ("a pipe",)),
        ("device", ("a device",)),
        ("loop", ("a link",)),
        ("pickle", ("pytorch_model.bin", "Pickles")),
        ("numpy", ("weights.npz", "not a GGUF file")),
        ("safetensors", ("the directory with config.json",)),
        ("empty folder", ("no config.json",)),
        ("missing", ("no model",)),
    ],
)
def test_what_is_no_model(refused, tmp_path, kind, names):
    path = special(tmp_path, kind)
    for load in (load_model, load_tokenizer):
        refused(lambda load=load: load(path), *names)


@rows(
    "name, names",
    [
        ("", ("no model is named",)),
        ("a\x00b", ("no model",)),
        ("../nowhere", ("no model",)),
        ("tiny:gpt3", ("no model",)),
        ("a/b/c/d", ("no model",)),
        ("x" * 5000 + "/", ("no model",)),
    ],
)
def test_names_of_no_model(refused, name, names):
    refused(lambda: load_model(name), *names)


def test_a_model_that_may_not_be_read(refused, model, unprivileged):
    (model / "model.safetensors").chmod(0)
    with unprivileged():
        refused(lambda: load_model(model), "model.safetensors", "Permission denied")


# --- safetensors

NAME = "model.layers.0.mlp.up_proj.weight"


def with_tensor(change, *, name=NAME):
    def write(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = change(tensors[name].copy())
        save_file(tensors, folder / "model.safetensors")

    return write


def setting(value, dtype=np.float32):
    def change(tensor):
        tensor = tensor.astype(dtype)
        tensor[-1, -1] = value
        return tensor

    return with_tensor(change)


def header(change):
    """Rewrites the header, whose offsets are where the file says the tensors lie."""

    def write(folder):
        file = folder / "model.safetensors"
        content = file.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        described = change(json.loads(content[8 : 8 + size]))
        text = described if isinstance(described, bytes) else json.dumps(described).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    return write


def changed(described, **fields):
    return described | {NAME: described[NAME] | fields}


def index(content):
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps(content))


DAMAGED = "truncated or damaged"
WEIGHTS = [
    (setting(np.nan), (NAME, "NaN or infinite")),
    (setting(np.inf), (NAME, "NaN or infinite")),
    (setting(-np.inf, np.float16), (NAME, "NaN or infinite")),
    (setting(np.nan, ml_dtypes.bfloat16), (NAME, "NaN or infinite")),
    (with_tensor(lambda x: x * np.nan), (NAME, "1,536 values of 1,536")),
    (
        with_tensor(lambda x: np.full_like(x, np.nan), name="model.norm.weight"),
        ("model.norm.weight", "NaN or infinite"),
    ),
    (with_tensor(lambda x: x.astype(np.float64)), (NAME, "F64")),
    (with_tensor(lambda x: x.astype(np.int8)), (NAME, "I8")),
    (with_tensor(lambda x: x.astype(bool)), (NAME, "BOOL")),
    (with_tensor(lambda x: x.T.copy()), (NAME, "shape")),
    (with_tensor(lambda x: x[None]), (NAME, "shape")),
    (with_tensor(lambda x: x[:0]), (NAME, "shape")),
    (lambda folder: save_file({}, folder / "model.safetensors"), ("missing",)),
    (lambda folder: (folder / "model.safetensors").write_bytes(b""), (DAMAGED,)),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"\x00" * 8), (DAMAGED,)),
    (
        lambda folder: (folder / "model.safetensors").write_bytes(pickle.dumps({"a": 1})),
        (DAMAGED,),
    ),
    (header(lambda h: b"{"), (DAMAGED,)),
    (header(lambda h: b"[]"), (DAMAGED,)),
    (header(lambda h: b"[" * 50_000), (DAMAGED,)),
    (header(lambda h: changed(h, dtype="F13")), (DAMAGED,)),
    (header(lambda h: changed(h, dtype="F16")), (DAMAGED,)),
    (header(lambda h: changed(h, shape=[-1, 64])), (DAMAGED,)),
    (header(lambda h: changed(h, shape=[2**62, 4])), (DAMAGED,)),
    (header(lambda h: changed(h, data_offsets=[0, 8192])), (DAMAGED,)),
    (header(lambda h: changed(h, data_offsets=[2**63, 2**63 + 8192])), (DAMAGED,)),
    (header(lambda h: changed(h, data_offsets=[8192, 0])), (DAMAGED,)),
    (header(lambda h: changed(h, data_offsets=None)), (DAMAGED,)),
    (index({"weight_map": {NAME: None}}), ("index.json", NAME, "None")),
    (index({"weight_map": {NAME: 3}}), ("index.json", NAME, "3")),
    (index({"weight_map": {NAME: ""}}), ("index.json", NAME, "''")),
    (index({"weight_map": {NAME: "."}}), ("index.json", NAME, "'.'")),
    (index({"weight_map": {NAME: ".."}}), ("index.json", NAME, "'..'")),
    (index({"weight_map": {NAME: "a\x00"}}), ("index.json", NAME)),
    (index({"weight_map": {NAME: "model.bin"}}), ("no model.bin", "pickle")),
    (index({"weight_map": {}}), ("index.json", "weight_map")),
    (index({"weight_map": None}), ("index.json", "weight_map")),
    (index({"weight_map": [NAME]}), ("index.json", "weight_map")),
    (index([]), ("index.json", "object")),
    (index({"weight_map": {NAME: "../../etc/passwd"}}), ("no passwd",)),
]


@rows("write, names", WEIGHTS)
def test_bad_weights(refused, model, write, names):
    write(model)
    refused(lambda: load_model(model), str(model), *names)


def test_a_tensor_in_two_files(refused, model):
    shutil.copy(model / "model.safetensors", model / "again.safetensors")
    index({"weight_map": {NAME: "model.safetensors", "b": "again.safetensors"}})(model)
    refused(lambda: load_model(model), "again.safetensors", "model.safetensors", "both")


def test_values_too_large_for_the_dtype_asked_for(refused, model):
    setting(1e30)(model)
    refused(lambda: load_model(model, dtype="float16"), NAME, "float16")


# --- tokenizers

TOKENIZERS = [
    ("{}", ("tokenizer.json", "'model'")),
    ("[]", ("tokenizer.json", "object")),
    ("null", ("tokenizer.json", "object")),
    ("", ("tokenizer.json",)),
    ('{"version": "1.0"', ("tokenizer.json",)),
    ('{"model": null}', ("tokenizer.json", "'model'")),
    ('{"model": {}}', ("tokenizer.json",)),
    ('{"model": {"type": "BPE"}}', ("tokenizer.json",)),
    ('{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}', ("tokenizer.json",)),
    ('{"model": {"type": "XYZ", "vocab": {}}}', ("tokenizer.json",)),
    ('{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', ("tokenizer.json",)),
    ('{"model": {"type": "BPE", "vocab": {"a": 1, "a": 2}, "merges": []}}', ("'a'", "twice")),
    ("[" * 100_000, ("tokenizer.json", "nested too deeply")),
    ('{"a": ' + "1" * 5000 + "}", ("tokenizer.json", "digits")),
]


@rows("content, names", TOKENIZERS)
def test_a_bad_tokenizer(refused, model, content, names):
    (model / "tokenizer.json").write_text(content)
    refused(lambda: load_tokenizer(model), str(model), *names)


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
)
@rows(
    "content, names",
    [
        (b"[]", ("object",)),
        (b"null", ("object",)),
        (b"{", ("cannot be read",)),
        (b"\xff\xfe", ("cannot be read",)),
        (b'{"a":' * 100_000, ("nested too deeply",)),
        (b'{"eos_token": "a", "eos_token": "b"}', ("'eos_token'", "twice")),
        (None, ("a pipe",)),
    ],
)
def test_a_bad_file_beside_the_tokenizer(refused, model, name, content, names):
    (model / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name) if content is None else (model / name).write_bytes(content)
    refused(lambda: load_tokenizer(model), str(model / name), *names)


def test_a_bad_chat_template(refused, model):
    (model / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    (model / "chat_template.jinja").write_bytes(b"\xff")
    refused(lambda: load_tokenizer(model), str(model), "utf-8")
    (model / "chat_template.jinja").unlink()
    os.mkfifo(model / "chat_template.jinja")
    refused(lambda: load_tokenizer(model), str(model / "chat_template.jinja"), "a pipe")


# --- GGUF


def kv(key, kind, value):
    """One entry of the metadata; `value` is packed by hand."""
    name = key.encode()
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def string(text):
    return struct.pack("<Q", len(text)) + text


def u32(value):
    return struct.pack("<I", value)


def u64(value):
    return struct.pack("<Q", value)


ARCHITECTURE = kv("general.architecture", 8, string(b"llama"))


def tensor(name=b"a", shape=(4,), kind=0, offset=0, rank=None):
    rank = len(shape) if rank is None else rank
    dims = b"".join(u64(size) for size in shape)
    return string(name) + u32(rank) + dims + u32(kind) + u64(offset)


def file(*entries, tensors=(), version=3, counts=None, data=bytes(64)):
    entries = (ARCHITECTURE, *entries)
    counts = counts or (len(tensors), len(entries))
    head = b"GGUF" + u32(version) + u64(counts[0]) + u64(counts[1])
    return head + b"".join(entries) + b"".join(tensors) + data


ARRAY = 9
SIZES = {
    "llama.attention.head_count": 4,
    "llama.embedding_length": 32,
    "llama.block_count": 2,
    "llama.feed_forward_length": 64,
    "llama.context_length": 512,
    "llama.vocab_size": 264,
}


def sizes(**changes):
    values = SIZES | {f"llama.{key}": value for key, value in changes.items()}
    return [
        kv(key, 4, u32(value)) if isinstance(value, int) else kv(key, *value)
        for key, value in values.items()
    ]


NESTED = kv("x", ARRAY, (u32(ARRAY) + u64(1)) * 50_000 + u32(0) + u64(0))
GGUFS = [
    (b"", ("not a GGUF file",)),
    (b"GGML", ("not a GGUF file",)),
    (b"GGUF", ("truncated",)),
    (file(version=0), ("version 0",)),
    (file(version=2**31), ("version",)),
    (file(kv("general.alignment", 4, u32(0)), tensors=[tensor()]), ("alignment", "0")),
    (file(kv("general.alignment", 5, u32(2**32 - 8)), tensors=[tensor()]), ("alignment", "-8")),
    (file(kv("general.alignment", 8, string(b"32")), tensors=[tensor()]), ("alignment", "'32'")),
    (file(kv("general.alignment", 7, b"\x01"), tensors=[tensor()]), ("alignment", "True")),
    (file(kv("general.alignment", 10, u64(2**63)), tensors=[tensor()]), ("alignment",)),
    (file(counts=(2**62, 1)), ("truncated",)),
    (file(counts=(0, 2**62)), ("truncated",)),
    (file(counts=(2**64 - 1, 2**64 - 1)), ("truncated",)),
    (file(kv("x", ARRAY, u32(0) + u64(2**62))), ("truncated",)),
    (file(kv("x", ARRAY, u32(10) + u64(2**64 - 1))), ("damaged", "array")),
    (file(kv("x", ARRAY, u32(8) + u64(2**62))), ("truncated",)),
    (file(kv("x", ARRAY, u32(99) + u64(3))), ("damaged", "99")),
    (file(NESTED), ("damaged", "nested")),
    (file(kv("x", 8, u64(2**63))), ("truncated",)),
    (file(kv("x", 77, u32(0))), ("damaged", "77")),
    (file(kv("general.architecture", 8, string(b"llama"))), ("general.architecture", "twice")),
    (file(tensors=[tensor(rank=0, shape=())]), ("damaged", "0 dimensions")),
    (file(tensors=[tensor(rank=2**31, shape=(1,))]), ("damaged", "dimensions")),
    (file(tensors=[tensor(shape=(2**63, 2**63))]), ("truncated",)),
    (file(tensors=[tensor(offset=2**63)]), ("truncated",)),
    (file(tensors=[tensor(kind=255)]), ("tensor a", "255")),
    (file(tensors=[tensor(shape=(4,), kind=8)]), ("tensor a", "block")),
    (file(tensors=[tensor(), tensor()]), ("tensor a", "twice")),
    (file(tensors=[tensor(b"\xff")]), ("damaged",)),
    (file(), ("'num_attention_heads'", "None")),
    (file(*sizes(block_count=10**9)), ("'num_hidden_layers'",)),
    (file(*sizes(block_count=(8, string(b"two")))), ("'num_hidden_layers'", "'two'")),
    (file(*sizes(embedding_length=0)), ("'hidden_size'", "0")),
    (file(*sizes(**{"rope.freq_base": (6, struct.pack("<f", math.nan))})), ("rope_theta", "nan")),
    (
        file(*sizes(**{"attention.layer_norm_rms_epsilon": (8, string(b"x"))})),
        ("'rms_norm_eps'", "'x'"),
    ),
    (file(kv("tokenizer.ggml.tokens", 4, u32(3))), ("tokenizer.ggml.tokens",)),
    (file(*sizes()), ("missing",)),
]


@rows("content, names", GGUFS)
def test_a_bad_gguf(refused, tmp_path, content, names):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    refused(lambda: load_model(path), str(path), *names)


def test_a_gguf_that_is_a_pipe(refused, tmp_path):
    os.mkfifo(tmp_path / "x.gguf")
    refused(lambda: GGUFFile(tmp_path / "x.gguf"), "x.gguf", "a pipe")


def strings(*texts):
    return u32(8) + u64(len(texts)) + b"".join(string(text) for text in texts)


def tokenizer(**changes):
    entries = {
        "model": (8, string(b"gpt2")),
        "pre": (8, string(b"smollm")),
        "tokens": (ARRAY, strings(b"a", b"b", b"ab")),
        "token_type": (ARRAY, u32(5) + u64(3) + u32(1) * 3),
        "merges": (ARRAY, strings(b"a b")),
    } | changes
    return file(*(kv(f"tokenizer.ggml.{name}", *value) for name, value in entries.items() if value))


GGUF_TOKENIZERS = [
    (tokenizer(model=(8, string(b"bert"))), ("'bert'",)),
    (tokenizer(model=None), ("None",)),
    (tokenizer(tokens=None), ("damaged", "tokens")),
    (tokenizer(tokens=(4, u32(3))), ("damaged",)),
    (tokenizer(tokens=(ARRAY, u32(4) + u64(3) + u32(1) * 3)), ("damaged",)),
    (tokenizer(merges=(ARRAY, strings(b"ab"))), ("damaged",)),
    (tokenizer(merges=(ARRAY, strings(b"a b c"))), ("damaged",)),
    (tokenizer(merges=(ARRAY, strings(b"x y"))), ("damaged",)),
    (tokenizer(token_type=(ARRAY, u32(5) + u64(1) + u32(1))), ("damaged",)),
    (tokenizer(token_type=(4, u32(3))), ("damaged",)),
    (tokenizer(eos_token_id=(4, u32(99))), ("eos", "99")),
    (tokenizer(eos_token_id=(8, string(b"</s>"))), ("eos", "'</s>'")),
    (tokenizer(bos_token_id=(5, u32(2**32 - 1))), ("bos", "-1")),
]


@rows("content, names", GGUF_TOKENIZERS)
def test_a_bad_tokenizer_of_a_gguf(refused, tmp_path, content, names):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    refused(lambda: load_tokenizer(path), str(path), *names)


def test_nan_in_a_gguf(refused, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for key, value in SIZES.items():
        writer.add_uint32(key, value)
    shapes = {
        "token_embd": (264, 32),
        "output_norm": (32,),
        **{
            f"blk.{layer}.{name}": shape
            for layer in range(2)
            for name, shape in {
                "attn_norm": (32,),
                "ffn_norm": (32,),
                "ffn_gate": (64, 32),
                "ffn_up": (64, 32),
                "ffn_down": (32, 64),
                **{f"attn_{name}": (32, 32) for name in ("q", "k", "v", "output")},
            }.items()
        },
    }
    for name, shape in shapes.items():
        values = np.ones(shape, np.float32)
        values.flat[-1] = np.nan if name == "blk.1.ffn_up" else 1.0
        writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(
        lambda: load_model(tmp_path / "x.gguf"), "model.layers.1.mlp.up_proj", "NaN or infinite"
    )
