"""Log-probabilities of targets: layout, packing and batch composition change no number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.algorithms import preference, sft
from align_jax.data.batching import build_batch, separate_responses
from align_jax.data.records import parse_record
from align_jax.data.tokenise import encode_records
from align_jax.losses.log_probs import token_log_probs
from align_jax.losses.preference import LOSSES
from align_jax.models.interchange import load_model, load_tokenizer
from align_jax.training.scoring import sum_by_response, target_log_probs
from align_jax.trees import flatten

LENGTHS = [(9, 5, 12), (2, 30, 3), (17, 1, 1), (5, 8, 8)]


@pytest.fixture(scope="module", params=["tiny", "tiny:gpt2"])
def model(request):
    return load_model(request.param)


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


def batch_of(examples, rows=None, lengths=(64, 192), targets=(80,)):
    batch = build_batch(
        examples, rows=rows or len(examples), length_buckets=lengths, target_buckets=targets
    )
    return jax.tree.map(jnp.asarray, batch)


def response_log_probs(model, batch, count):
    log_probs, _ = jax.jit(target_log_probs)(model, batch)
    return sum_by_response(log_probs, batch, count)


@jax.jit
def all_logits(model, tokens):
    return model.logits(model(tokens))


def alone(model, prompt, response):
    """Log-probabilities of a response, from full logits of a row of its own."""
    tokens = np.zeros((1, 64), np.int32)
    end = len(prompt) + len(response)
    tokens[0, :end] = np.concatenate([prompt, response])  # what follows is not seen
    logits = all_logits(model, tokens)[0, len(prompt) - 1 : end - 1]
    return np.asarray(token_log_probs(logits, response))


def test_shared_prompt_rows_give_the_log_probs_of_separate_rows(model, make_examples):
    examples = make_examples(LENGTHS)
    shared = response_log_probs(model, batch_of(examples), 8)
    separate = response_log_probs(model, batch_of(separate_responses(examples)), 8)
    np.testing.assert_allclose(shared, separate, rtol=1e-6, atol=1e-5)
    expected = [alone(model, e.prompt, r).sum() for e in examples for r in e.responses]
    np.testing.assert_allclose(shared, expected, rtol=1e-6, atol=1e-4)


def value_and_gradient(loss_function, model, batch):
    def mean(model):
        sums = loss_function(model, batch)
        return sums.loss / sums.weight

    value, gradient = jax.jit(jax.value_and_grad(mean))(model)
    return value, flatten(gradient)


def test_packing_buckets_and_order_change_neither_losses_nor_gradients(tiny, make_examples):
    examples = make_examples(LENGTHS)
    reference = -np.random.default_rng(1).uniform(5, 200, (4, 2)).astype(np.float32)
    layouts = [
        (range(4), {}),
        (range(4), {"rows": 1}),
        (range(4), {"lengths": (96,), "targets": (130,)}),
        ((2, 0, 3, 1), {"rows": 2}),
    ]
    loss, results = preference.preference_loss(LOSSES["dpo"], beta=0.5), []
    for order, settings in layouts:
        batch = batch_of([examples[i] for i in order], **settings)
        batch["reference_log_probs"] = jnp.asarray(reference[list(order)].ravel())
        results.append(value_and_gradient(loss, tiny, batch))
    (expected, gradient), *others = results
    assert 0.1 < expected < 100
    for value, other in others:
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        for name in gradient:
            np.testing.assert_allclose(other[name], gradient[name], atol=1e-5, err_msg=name)


def test_an_example_scores_the_same_in_any_company(tiny, make_examples):
    examples = make_examples(LENGTHS)
    together = response_log_probs(tiny, batch_of(examples, rows=1), 8)
    for index, example in enumerate(examples):
        single = response_log_probs(tiny, batch_of([example]), 2)
        np.testing.assert_allclose(
            together[2 * index : 2 * index + 2], single, rtol=1e-6, atol=1e-5
        )


def test_eos_is_learnt_though_it_is_the_padding_token_too(tiny):
    tokenizer = load_tokenizer("tiny")
    eos = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == eos
    raw = [("Say a:", " a"), ("Say bcd:", " bcd")]
    records = [
        parse_record({"prompt": p, "completion": c}, kind="sft", where="made") for p, c in raw
    ]
    examples = encode_records(records, tokenizer, kind="sft", max_length=32)
    assert all(example.responses[0][-1] == eos for example in examples)
    batch = batch_of(examples)
    sums = sft.loss_sums(tiny, batch)
    assert float(sums.weight) == sum(len(e.responses[0]) for e in examples) == 2 + 1 + 4 + 1

    # Without the targets that are EOS the loss is less by exactly theirs.
    is_eos = (batch["targets"] == eos) & (batch["target_mask"] > 0)
    assert int(is_eos.sum()) == 2
    without = batch | {"target_mask": jnp.where(is_eos, 0.0, batch["target_mask"])}
    eos_log_probs = [alone(tiny, e.prompt, e.responses[0])[-1] for e in examples]
    difference = sums.loss - sft.loss_sums(tiny, without).loss
    np.testing.assert_allclose(difference, -np.sum(eos_log_probs), rtol=1e-4)

    def eos_loss(hidden_shift):
        # A shift of the embedding of EOS alone moves its logit, and so its probability.
        shifted = jax.tree.map(lambda x: x, tiny)
        shifted.embedding.set_value(tiny.embedding[...].at[eos].add(hidden_shift))
        return sft.loss_sums(shifted, batch).loss - sft.loss_sums(shifted, without).loss

    gradient = jax.jit(jax.grad(eos_loss))(jnp.zeros(tiny.config.hidden_size))
    assert float(jnp.linalg.norm(gradient)) > 0.1


def test_prompt_tokens_and_masked_tokens_carry_no_loss(tiny, make_examples):
    (example,) = make_examples([(7, 5)])
    mask = example.response_masks[0]
    mask[1] = 0.0
    batch = batch_of([example])
    counted = [token for token, counts in zip(example.responses[0], mask) if counts]
    targets = batch["targets"][batch["target_mask"] > 0]
    np.testing.assert_array_equal(targets, counted)
    expected = -(alone(tiny, example.prompt, example.responses[0]) * mask).sum()
    np.testing.assert_allclose(sft.loss_sums(tiny, batch).loss, expected, rtol=1e-5)
