"""Rollouts: where completions end, what is kept of them, how they become batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.data.batching import build_batch
from align_jax.data.dataset import Data
from align_jax.distributed.mesh import make_mesh
from align_jax.errors import RunError
from align_jax.generation import rollout as rollouts
from align_jax.generation.rollout import Rollout, Sampling
from align_jax.generation.sampler import Generation
from align_jax.models.interchange import load_model, load_tokenizer
from align_jax.training.scoring import by_response, sum_by_response, target_log_probs
from align_jax.training.step import place_batch
from tests.generation.rollouts import made_rollout
from tests.llama_tokenizer import llama_tokenizer


@pytest.fixture(scope="module")
def mesh():
    return make_mesh()


@pytest.fixture(scope="module")
def model():
    return load_model("tiny")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


PROMPTS = [np.array(tokens, np.int32) for tokens in ([9, 10, 11], [40], [7, 8, 9, 10, 11, 12])]


def keys(count, seed=0):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.arange(count))


def drawn(monkeypatch, tokens, mask):
    """Makes the sampler return these tokens."""

    def generate(model, prompts, **settings):
        return tuple(jnp.asarray(x) for x in (tokens, mask, -np.ones(np.shape(tokens)) * mask))

    monkeypatch.setattr(rollouts, "generate", generate)


def test_a_completion_ends_with_its_first_stop_token_which_counts(monkeypatch, tokenizer, mesh):
    eos = tokenizer.eos_token_id
    tokens = np.array([[20, eos, 0, 0], [20, 21, 22, 23], [eos, 0, 0, 0], [20, 21, 22, eos]])
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]], np.float32)
    drawn(monkeypatch, tokens, mask)
    sampling = Sampling(samples=2, max_new_tokens=4)
    rollout = rollouts.roll_out(None, mesh, tokenizer, PROMPTS[:2], sampling, keys=keys(2))
    np.testing.assert_array_equal(rollout.mask, mask)
    np.testing.assert_array_equal(rollout.tokens, tokens)
    # The last one stopped with its last token: not cut short, although it is as long as can be.
    assert rollout.ended.tolist() == [True, False, True, True]
    assert rollout.texts[0] == tokenizer.decode([20]) and rollout.texts[2] == ""


@pytest.mark.parametrize("after", [0, 3])
def test_the_sampler_goes_on_past_a_truncation_token_that_ends_nothing_yet(
    monkeypatch, tokenizer, mesh, after
):
    (stop,) = tokenizer("7", add_special_tokens=False).input_ids
    asked = []

    def generate(model, prompts, *, stop_tokens, **settings):
        asked.append(tuple(stop_tokens))
        return np.full((1, 5), 20), np.ones((1, 5), np.float32), np.zeros((1, 5))

    monkeypatch.setattr(rollouts, "generate", generate)
    sampling = Sampling(max_new_tokens=5, truncate_token="7", truncate_after=after)
    rollouts.roll_out(None, mesh, tokenizer, PROMPTS[:1], sampling, keys=keys(1))
    eos = tokenizer.eos_token_id
    assert asked == [(eos,) if after else (eos, stop)]


@pytest.mark.parametrize("after, kept", [(0, 2), (1, 2), (2, 4), (4, 5)])
def test_a_truncation_token_ends_a_completion_from_its_place_on(
    monkeypatch, tokenizer, mesh, after, kept
):
    (stop,) = tokenizer("7", add_special_tokens=False).input_ids
    tokens = np.array([[20, stop, 21, stop, 22]])
    drawn(monkeypatch, tokens, np.ones((1, 5), np.float32))
    sampling = Sampling(max_new_tokens=5, truncate_token="7", truncate_after=after)
    rollout = rollouts.roll_out(None, mesh, tokenizer, PROMPTS[:1], sampling, keys=keys(1))
    assert rollout.mask[0].tolist() == [1.0] * kept + [0.0] * (5 - kept)
    assert rollout.tokens[0].tolist() == tokens[0, :kept].tolist() + [0] * (5 - kept)
    assert rollout.log_probs[0].sum() == -kept
    assert rollout.ended[0] == (kept < 5)


def test_a_truncation_token_must_be_one_token(tokenizer):
    sampling = Sampling(truncate_token="12 34")
    with pytest.raises(RunError, match="config.sampling.truncate_token is '12 34', which is"):
        rollouts.stop_tokens(tokenizer, sampling)


def test_a_completion_does_not_depend_on_what_is_sampled_with_it(model, tokenizer, mesh):
    sampling = Sampling(samples=2, max_new_tokens=5, temperature=0.8)
    together = rollouts.roll_out(model, mesh, tokenizer, PROMPTS, sampling, keys=keys(3))
    sampling = dataclasses.replace(sampling, batch_prompts=1)
    alone = rollouts.roll_out(model, mesh, tokenizer, PROMPTS, sampling, keys=keys(3))
    np.testing.assert_array_equal(together.tokens, alone.tokens)
    np.testing.assert_allclose(together.log_probs, alone.log_probs, atol=1e-5)
    assert together.texts == alone.texts and together.samples == 2


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_samplers_log_probs_are_the_trainers(model, tokenizer, mesh, temperature):
    sampling = Sampling(samples=3, max_new_tokens=6, temperature=temperature)
    rollout = rollouts.roll_out(model, mesh, tokenizer, PROMPTS, sampling, keys=keys(3))
    layout = rollouts.layout_of(rollout, Data(), longest_prompt=9)
    batch = place_batch(rollouts.rollout_batch(rollout, range(3), layout), mesh, accumulated=False)
    values, _ = target_log_probs(model, batch, temperature=temperature)
    ours = by_response(values, batch, rollout.mask.shape)
    np.testing.assert_allclose(ours, rollout.log_probs, atol=2e-5)
    np.testing.assert_allclose(
        sum_by_response(values, batch, 9), rollout.log_probs.sum(1), atol=1e-4
    )


@pytest.mark.parametrize("rows", [3, 2, 1])
def test_values_come_back_in_the_order_of_the_tokens(rows):
    """Against a loop over the responses, in rows of one prompt and packed rows, ends padded."""
    rollout = made_rollout([1, 6, 3, 2, 5, 4], samples=2)
    batch = build_batch(
        [rollout.group(g) for g in range(3)],
        rows=rows,
        length_buckets=(64,),
        target_buckets=(32,),
    )
    out = by_response(jnp.asarray(batch["targets"], jnp.float32), batch, rollout.mask.shape)
    np.testing.assert_array_equal(out, rollout.tokens)


def test_parts_of_a_rollout_and_their_whole():
    rollout = made_rollout([1, 6, 3, 2, 5, 4], samples=2)
    parts = [rollout.select([2]), rollout.select([0, 1])]
    assert [part.samples for part in parts] == [2, 2]
    assert parts[0].texts == ["text 4", "text 5"]
    again = Rollout.concatenate(parts).select([1, 2, 0])
    for a, b in zip(again[1:5], rollout[1:5]):
        np.testing.assert_array_equal(a, b)
    assert again.texts == rollout.texts


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([1, 1, 1, 1], (16, 4)),
        ([6, 6, 5, 6], (24, 12)),  # buckets alone would be 32 and 16
    ],
)
def test_a_layout_has_room_for_every_group_and_none_beyond_the_token_budget(lengths, expected):
    rollout = made_rollout(lengths, samples=2)
    rollout = rollout._replace(prompts=[np.arange(7), np.arange(3)])
    data = Data(length_buckets=(16, 32), target_buckets=(4, 16))
    layout = rollouts.layout_of(rollout, data, longest_prompt=7)
    assert layout == expected
    batch = rollouts.rollout_batch(rollout, [0, 1], layout)
    # Buckets that are too small end no run: what can be sampled has room.
    data = Data(length_buckets=(4,), target_buckets=(1,))
    assert rollouts.layout_of(rollout, data, longest_prompt=7) == (24, 12)
    assert batch["tokens"].shape == (2, layout.length)
    assert batch["target_mask"].shape == (2, layout.targets)
    assert batch["target_mask"].sum() == sum(lengths)


def test_a_completion_keeps_the_space_it_begins_with(monkeypatch):
    tokenizer = llama_tokenizer()
    yes, end = tokenizer.convert_tokens_to_ids("\u2581yes"), tokenizer.eos_token_id

    def generate(model, prompts, **_):
        rows = np.array([[yes, end]] * len(prompts), np.int32)
        return Generation(rows, np.ones((len(prompts), 2)), np.zeros((len(prompts), 2)))

    monkeypatch.setattr(rollouts, "generate", generate)
    texts = ("A:", "A:<|sep|>")
    prompts = [np.array(tokenizer(t, add_special_tokens=False).input_ids) for t in texts]
    mesh, keys = jax.make_mesh((1,), ("data",)), jax.random.split(jax.random.key(0), 2)
    drawn = rollouts.roll_out(None, mesh, tokenizer, prompts, Sampling(max_new_tokens=2), keys=keys)
    assert drawn.texts == [" yes", "yes"]


def test_a_token_that_ends_completions_is_one_behind_text():
    tokenizer = llama_tokenizer()
    stops = rollouts.stop_tokens(tokenizer, Sampling(truncate_token="."))
    assert stops[1] == tokenizer.convert_tokens_to_ids(".")
