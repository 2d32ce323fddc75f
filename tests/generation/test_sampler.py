"""The sampler against the trainer's forward pass, loops without a cache, and itself."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import pytest

from align_jax.generation import generate, sampler
from align_jax.losses.log_probs import token_log_probs
from align_jax.models.transformer import Transformer
from tests.devices import run_on_devices
from tests.generation.prompts import keys_of, model_of, prompts_of

HERE = pathlib.Path(__file__).parent
NEW = 12
WIDTH = 64  # of the rows that the forward pass without a cache runs on


MODELS = ("tiny", "tiny:gpt2", "window")


forward = jax.jit(lambda model, tokens: model.logits(model(tokens)))


def next_token_logits(model, prompts, completions):
    """`[N,NEW,V]`, of a plain forward pass over prompt + completion."""
    rows = np.zeros((len(prompts), WIDTH), np.int32)
    for row, prompt, completion in zip(rows, prompts, completions):
        row[: len(prompt) + len(completion)] = [*prompt, *completion]
    logits = np.asarray(forward(model, rows))
    return np.stack([row[len(p) - 1 : len(p) - 1 + NEW] for row, p in zip(logits, prompts)])


def filtered(logits, top_k, top_p):
    """Brute force over single distributions."""
    out = np.full_like(logits, -np.inf)
    for index in np.ndindex(logits.shape[:-1]):
        order = np.argsort(-logits[index], kind="stable")[: top_k or logits.shape[-1]]
        p = np.exp(logits[index][order].astype(np.float64))
        before = np.cumsum(p / p.sum()) - p / p.sum()
        order = order[before < top_p] if top_p is not None else order
        out[index][order] = logits[index][order]
    return out


def assert_same(a, b):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.mask, b.mask)
    np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)


def rows(generation, index):
    return jax.tree.map(lambda x: np.asarray(x)[index], generation)


def test_every_token_of_a_sample_is_a_draw_of_its_own():
    """Flat distributions, where a draw used twice would give the same token twice."""
    model = model_of("tiny")
    drawn = generate(
        model,
        [[9, 10, 11]],
        key=jax.random.key(0),
        max_new_tokens=4,
        temperature=1e6,
        samples_per_prompt=64,
    )
    tokens = np.asarray(drawn.tokens)
    # By chance one token in V is that of the step before.
    for step in range(1, 4):
        assert (tokens[:, step] == tokens[:, step - 1]).mean() < 0.1
        assert abs(np.corrcoef(tokens[:, step], tokens[:, step - 1])[0, 1]) < 0.4


# Against the trainer


@pytest.mark.parametrize(
    ("name", "temperature", "top_k", "top_p"),
    [("tiny", 0.7, 20, None), ("tiny", 1.0, None, 0.8)]
    + [
        (name, *settings)
        for name in MODELS
        for settings in ((1.0, None, None), (0.7, None, None), (0.7, 20, 0.9))
    ],
)
def test_log_probs_equal_the_trainers(name, temperature, top_k, top_p):
    model = model_of(name)
    prompts = prompts_of(1, 9, 16)
    out = generate(
        model,
        prompts,
        key=jax.random.key(0),
        max_new_tokens=NEW,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        samples_per_prompt=2,
    )
    assert out.tokens.shape == out.mask.shape == out.log_probs.shape == (6, NEW)
    assert (out.tokens.dtype, out.log_probs.dtype) == (np.int32, np.float32)
    assert (np.asarray(out.mask) == 1).all()
    logits = next_token_logits(model, [p for p in prompts for _ in range(2)], out.tokens)
    scaled = filtered(logits / np.float32(temperature), top_k, top_p)
    expected = token_log_probs(scaled, out.tokens)
    np.testing.assert_allclose(out.log_probs, expected, atol=1e-5)
    if top_k is None and top_p is None:
        at_temperature = token_log_probs(logits, out.tokens, temperature=temperature)
        np.testing.assert_allclose(out.log_probs, at_temperature, atol=1e-5)
        assert np.ptp(out.log_probs) > 1  # distributions far from uniform: the test has teeth
    else:
        assert (np.asarray(out.log_probs) > token_log_probs(logits / temperature, out.tokens)).all()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_a_loop_without_a_cache(name):
    model, prompts = model_of(name), prompts_of(1, 9, 16)
    decode = functools.partial(
        generate, model, prompts, max_new_tokens=NEW, temperature=0, samples_per_prompt=2
    )
    both = decode(key=jax.random.key(0))
    out = rows(both, slice(0, None, 2))
    completions = [[] for _ in prompts]
    for step in range(NEW):
        logits = next_token_logits(model, prompts, completions)[:, step]
        for completion, row in zip(completions, logits):
            completion.append(int(row.argmax()))
    np.testing.assert_array_equal(out.tokens, completions)
    expected = token_log_probs(next_token_logits(model, prompts, completions), out.tokens)
    np.testing.assert_allclose(out.log_probs, expected, atol=1e-5)
    assert_same(rows(both, slice(1, None, 2)), out)
    assert_same(decode(key=jax.random.key(1)), both)


def test_the_last_position_of_the_context_can_be_used():
    """Here the prompt's bucket (24) is longer than the context: padding beyond it must not show."""
    full = model_of("tiny:gpt2")
    short = Transformer(dataclasses.replace(full.config, context_length=20), key=jax.random.key(0))
    leaves = [
        x[..., : y.shape[-2], :] if x.shape != y.shape else x
        for x, y in zip(jax.tree.leaves(full), jax.tree.leaves(short))
    ]
    short = jax.tree.unflatten(jax.tree.structure(short), leaves)
    (prompt,) = prompts_of(17)
    out = generate(short, [prompt], key=jax.random.key(0), max_new_tokens=3)
    completion = np.asarray(out.tokens)
    logits = next_token_logits(full, [prompt], completion)[:, :3]
    np.testing.assert_allclose(out.log_probs, token_log_probs(logits, completion), atol=1e-5)
    with pytest.raises(ValueError, match="prompt of 17 tokens and 4 new .* context of 20 tokens"):
        generate(short, [prompt], key=jax.random.key(0), max_new_tokens=4)


# Buckets, batch composition, samples of one prompt

LENGTHS = (1, 15, 16, 17, 24, 25)


def test_buckets():
    buckets = [sampler.prompt_bucket(length) for length in range(1, 3000)]
    assert sorted(set(buckets)) == [
        *(16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072)
    ]
    for length, bucket in enumerate(buckets, start=1):
        smaller = [b for b in set(buckets) if b < bucket]
        assert bucket >= length > max(smaller, default=0)
    assert [sampler.prompt_bucket(n) for n in LENGTHS] == [16, 16, 16, 24, 24, 32]


@pytest.mark.parametrize(
    ("name", "lengths"), [("tiny", LENGTHS), ("tiny:gpt2", (16, 17)), ("window", (16, 17))]
)
def test_prompts_of_mixed_lengths_equal_each_alone(name, lengths):
    model, prompts, keys = model_of(name), prompts_of(*lengths), keys_of(len(lengths))
    together = generate(model, prompts, key=keys, max_new_tokens=NEW)
    for i, prompt in enumerate(prompts):
        alone = generate(model, [prompt], key=keys[i : i + 1], max_new_tokens=NEW)
        assert_same(alone, rows(together, slice(i, i + 1)))


def test_batch_composition_and_order_change_nothing():
    model, prompts, keys = model_of("tiny"), prompts_of(*LENGTHS), keys_of(len(LENGTHS))
    together = generate(model, prompts, key=keys, max_new_tokens=NEW)
    order = [3, 0, 5, 4, 1, 2]
    permuted = generate(
        model, [prompts[i] for i in order], key=keys[np.array(order)], max_new_tokens=NEW
    )
    assert_same(permuted, rows(together, order))
    others = prompts_of(30, 2, 3, 4, 5, seed=1)
    mixed = generate(
        model, [prompts[4], *others], key=keys[np.array([4, 0, 1, 2, 3, 5])], max_new_tokens=NEW
    )
    assert_same(rows(mixed, slice(0, 1)), rows(together, slice(4, 5)))


def test_samples_of_a_prompt_are_distinct_and_depend_on_nothing_else():
    model, keys = model_of("tiny"), keys_of(3)
    prompts = prompts_of(5, 16, 7)
    out = generate(model, prompts, key=keys, max_new_tokens=NEW, samples_per_prompt=3)
    for i in range(3):
        samples = np.asarray(out.tokens[3 * i : 3 * i + 3])
        assert len({tuple(sample) for sample in samples}) == 3
    others = generate(
        model,
        [prompts[1], *prompts_of(12, 3, seed=1)],
        key=keys[np.array([1, 0, 2])],
        max_new_tokens=NEW,
        samples_per_prompt=3,
    )
    assert_same(rows(others, slice(0, 3)), rows(out, slice(3, 6)))
    fewer = generate(model, prompts, key=keys, max_new_tokens=NEW, samples_per_prompt=2)
    assert_same(fewer, rows(out, [0, 1, 3, 4, 6, 7]))


def test_one_key_serves_all_prompts():
    model, (prompt,) = model_of("tiny"), prompts_of(9)
    draw = functools.partial(generate, model, [prompt, prompt, prompt], max_new_tokens=NEW)
    out = draw(key=jax.random.key(3))
    assert len({tuple(row) for row in np.asarray(out.tokens)}) == 3
    assert_same(out, draw(key=jax.random.key(3)))
    assert_same(out, draw(key=jax.random.PRNGKey(3)))
    assert (np.asarray(out.tokens) != np.asarray(draw(key=jax.random.key(4)).tokens)).any()


# Stopping


def test_stop_tokens_end_rows_and_change_nothing_before():
    model, prompts, keys = model_of("tiny"), prompts_of(1, 9, 16), keys_of(3)
    draw = functools.partial(
        generate, model, prompts, key=keys, max_new_tokens=NEW, samples_per_prompt=2
    )
    free = jax.tree.map(np.asarray, draw())
    # The first token of one row, one in the middle of another; the other rows go on to the end.
    stop_tokens = [int(free.tokens[0, 0]), int(free.tokens[3, 5])]
    expected = jax.tree.map(np.copy, free)
    ends = []
    for i, tokens in enumerate(free.tokens):
        hits = np.flatnonzero(np.isin(tokens, stop_tokens))
        ends.append(int(hits[0]) if len(hits) else NEW - 1)
        for array in expected:
            array[i, ends[-1] + 1 :] = 0
    assert ends[0] == 0 and 0 < ends[3] <= 5 and NEW - 1 in ends
    stopped = draw(stop_tokens=stop_tokens)
    assert_same(stopped, expected)
    after = np.arange(NEW) > np.array(ends)[:, None]
    for array in stopped:
        assert (np.asarray(array)[after] == 0).all()
    np.testing.assert_array_equal(stopped.mask, ~after)
    unused = np.setdiff1d(np.arange(264), free.tokens)[:2]
    assert_same(draw(stop_tokens=unused), free)


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": [[1], [], [2]]}, "prompt 1 is empty"),
        ({"temperature": -0.1}, "temperature must be at least 0, got -0.1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 509}, "a prompt of 4 tokens and 509 new ones exceed .* 512 tokens"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"samples_per_prompt": 0}, "samples_per_prompt must be at least 1"),
        ({"key": jax.random.split(jax.random.key(0), 3)}, r"2 prompt\(s\) need one key"),
    ],
)
def test_bad_arguments_are_errors_before_any_compilation(change, message):
    before = sampler._prefill._cache_size()
    arguments = {"prompts": [[1, 2], [3, 4, 5, 6]], "key": jax.random.key(0), "max_new_tokens": 4}
    with pytest.raises(ValueError, match=f"^generate: .*{message}"):
        generate(model_of("tiny"), **(arguments | change))
    assert sampler._prefill._cache_size() == before


# Meshes


def test_meshes_of_eight_devices_draw_what_one_draws():
    run_on_devices(8, HERE / "sharded_generate.py")
