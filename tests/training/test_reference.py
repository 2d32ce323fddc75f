"""The cache of reference log-probabilities: computed once, and never met by anything else."""

import dataclasses

import jax
import numpy as np
import pytest

from align_jax.data.dataset import Data
from align_jax.losses.log_probs import token_log_probs
from align_jax.models.interchange import load_model
from align_jax.training import reference
from align_jax.training.reference import cache_directory, reference_log_probs


@pytest.fixture
def data():
    return Data(batch_size=2, length_buckets=(32,), target_buckets=(16,))


@pytest.fixture
def examples(make_examples):
    return make_examples([(5, 4, 6), (2, 7, 3), (4, 1, 2)])


@pytest.fixture
def computed(monkeypatch, tmp_path):
    """Calls of compute_log_probs, which is replaced by something quick; the cache is empty."""
    monkeypatch.setenv("ALIGN_JAX_CACHE", str(tmp_path / "cache"))
    calls = []

    def compute(model, mesh, examples, data):
        calls.append(examples)
        return np.full((len(examples), 2), -len(calls), np.float32)

    monkeypatch.setattr(reference, "compute_log_probs", compute)
    return calls


def files():
    return sorted((cache_directory() / "reference").iterdir())


def brute_force(model, prompt, response):
    """Sum of a response's log-probabilities, alone in a row."""
    tokens = np.zeros((1, 32), np.int32)
    end = len(prompt) + len(response)
    tokens[0, :end] = np.concatenate([prompt, response])  # what follows is not seen
    logits = jax.jit(lambda m, t: m.logits(m(t)))(model, tokens)[0, len(prompt) - 1 : end - 1]
    return float(token_log_probs(logits, response).sum())


def test_values_are_those_of_each_response_alone_in_the_order_of_the_examples(mesh, data, examples):
    model = load_model("tiny")
    found = reference_log_probs(model, mesh, examples, data)
    expected = [[brute_force(model, e.prompt, r) for r in e.responses] for e in examples]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert found.dtype == np.float32


def test_they_are_computed_once(mesh, data, examples, computed):
    model = load_model("tiny")
    first = reference_log_probs(model, mesh, examples, data)
    # Another load of the same model, batches of another size, more memory or less: the same values.
    again = load_model("tiny", remat="full")
    data = dataclasses.replace(data, batch_size=3, rows=1)
    np.testing.assert_array_equal(reference_log_probs(again, mesh, examples, data), first)
    assert len(computed) == 1
    assert [file.suffix for file in files()] == [".npz"]


def test_every_change_that_matters_computes_anew(mesh, data, examples, computed):
    model = load_model("tiny")
    reference_log_probs(model, mesh, examples, data)

    other = jax.tree.map(lambda x: x, model)
    scale = np.array(other.final_norm.scale[...])
    scale[3] = np.nextafter(scale[3], np.float32(2))
    other.final_norm.scale.set_value(jax.numpy.asarray(scale))
    swapped = jax.tree.map(lambda x: x, model)
    up = np.array(swapped.blocks.mlp.up[...])
    up[0, 0, :2] = up[0, 0, 1::-1]
    swapped.blocks.mlp.up.set_value(jax.numpy.asarray(up))
    faster = load_model("tiny")
    config = dataclasses.replace(faster.config, rope_theta=123.0)
    faster.config = config
    half = load_model("tiny", compute_dtype="bfloat16")
    for changed in (other, swapped, faster, half):
        reference_log_probs(changed, mesh, examples, data)
    assert len(computed) == 5

    first = examples[0]
    token = first.responses[0].copy()
    token[1] += 1
    mask = first.response_masks[1].copy()
    mask[0] = 0
    boundary = (np.append(first.prompt, first.responses[0][:1]), first.responses[0][1:])
    changes = [
        {"responses": (token, first.responses[1])},
        {"response_masks": (first.response_masks[0], mask)},
        {"prompt": first.prompt[1:]},
        {"prompt": boundary[0], "responses": (boundary[1], first.responses[1])},
    ]
    for change in changes:
        changed = [dataclasses.replace(first, **change), *examples[1:]]
        reference_log_probs(model, mesh, changed, data)
    reference_log_probs(model, mesh, examples[:2], data)
    reference_log_probs(model, mesh, examples[::-1], data)
    assert len(computed) == 5 + len(changes) + 2
    assert len(files()) == len(computed)


def poisoned(file):
    with np.load(file) as content:
        values, checksum = content["values"].copy(), content["checksum"]
    values[0, 0] += 1
    np.savez(file, values=values, checksum=checksum)


def reshaped(file):
    with np.load(file) as content:
        np.savez(file, values=content["values"][:2], checksum=content["checksum"])


def cut(file):
    file.write_bytes(file.read_bytes()[:100])


def another_keys(file):
    values = np.zeros((3, 2), np.float32)
    np.savez(file, values=values, checksum=np.array(reference._checksum("of another", values)))


@pytest.mark.parametrize("damage", [poisoned, reshaped, cut, another_keys])
def test_a_file_that_does_not_fit_is_named_and_made_anew(
    mesh, data, examples, computed, capsys, damage
):
    model = load_model("tiny")
    reference_log_probs(model, mesh, examples, data)
    (file,) = files()
    damage(file)
    assert (reference_log_probs(model, mesh, examples, data) == -2).all()
    assert f"warning: the cached reference log-probabilities in {file}" in capsys.readouterr().err
    assert (reference_log_probs(model, mesh, examples, data) == -2).all()
    assert capsys.readouterr().err == "" and len(computed) == 2


def test_an_encoder_of_another_version_computes_anew(mesh, data, examples, computed, monkeypatch):
    model = load_model("tiny")
    reference_log_probs(model, mesh, examples, data)
    monkeypatch.setattr(reference, "ENCODER_VERSION", reference.ENCODER_VERSION + 1)
    reference_log_probs(model, mesh, examples, data)
    assert len(computed) == 2


def test_a_write_that_fails_leaves_no_file(mesh, data, examples, computed, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    model = load_model("tiny")
    with monkeypatch.context() as patch:
        patch.setattr("align_jax.files.os.replace", full)
        with pytest.raises(OSError, match="No space"):
            reference_log_probs(model, mesh, examples, data)
    assert files() == []
    assert reference_log_probs(model, mesh, examples, data)[0, 0] == -2


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("ALIGN_JAX_CACHE", str(tmp_path / "here"))
    assert cache_directory() == tmp_path / "here"
    monkeypatch.delenv("ALIGN_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "align_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "align_jax"
