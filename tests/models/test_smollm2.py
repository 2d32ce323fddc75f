"""The packaged real model against numbers measured with another implementation beforehand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.generation import generate
from align_jax.models.interchange import load_model, save_model

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def log_probs(smollm2, smollm2_tokenizer):
    @jax.jit
    def score(model, tokens):
        logits = model.logits(model(tokens[None]))[0, :-1]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[1:, None], 1)[:, 0]

    return lambda ids: np.asarray(score(smollm2, jnp.asarray(ids)))


def chat(tokenizer):
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def test_size(smollm2):
    assert sum(leaf.size for leaf in jax.tree.leaves(smollm2)) == 134_515_008
    assert smollm2.config.norm_epsilon == 1e-5 and smollm2.config.rope_theta == 100_000.0


def test_special_tokens(smollm2_tokenizer):
    t = smollm2_tokenizer
    assert (t.bos_token_id, t.eos_token_id, t.pad_token_id, t.unk_token_id) == (1, 2, 2, 0)
    assert (t.bos_token, t.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert len(t) == 49_152


def test_token_ids(smollm2_tokenizer):
    ids = smollm2_tokenizer("The quick brown fox jumps over the lazy dog.").input_ids
    assert ids == [504, 2365, 6354, 16438, 27003, 690, 260, 23790, 2767, 30]
    assert len(smollm2_tokenizer("In 2024").input_ids) == 6  # one token a digit
    text = "  Naïve\tcafé — 12,345.67 ½\n\n<|im_start|>user\n日本 🙂<|im_end|> "
    assert smollm2_tokenizer.decode(smollm2_tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The quick brown fox jumps over the lazy dog.", -36.1049),
        ("Question: What is 2 + 2?\nAnswer: 4", -32.4279),
    ],
)
def test_sum_of_log_probs(text, expected, smollm2_tokenizer, log_probs):
    assert log_probs(smollm2_tokenizer(text).input_ids).sum() == pytest.approx(expected, abs=2e-4)


def test_chat_prompt(smollm2_tokenizer, log_probs):
    ids = chat(smollm2_tokenizer)
    assert len(ids) == 37
    assert -log_probs(ids).mean() == pytest.approx(4.3224, abs=1e-4)


def test_greedy_answer(smollm2, smollm2_tokenizer):
    """Proves the rotary layout: with query and key permuted the model ends its turn at once."""
    sampled = generate(
        smollm2,
        [chat(smollm2_tokenizer)],
        key=jax.random.key(0),
        max_new_tokens=16,
        temperature=0.0,
        stop_tokens=[smollm2_tokenizer.eos_token_id],
    )
    answer = np.asarray(sampled.tokens[0])[np.asarray(sampled.mask[0]) == 1]
    assert smollm2_tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_round_trip_is_bitwise(smollm2, smollm2_tokenizer, tmp_path):
    save_model(smollm2, smollm2_tokenizer, tmp_path / "out")
    again = load_model(tmp_path / "out")
    assert again.config == smollm2.config
    for a, b in zip(jax.tree.leaves(smollm2), jax.tree.leaves(again), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
