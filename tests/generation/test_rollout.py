"""Rollouts: the text of a completion is that of its tokens behind their prompt."""

import jax
import numpy as np

from align_jax.generation import rollout
from align_jax.generation.rollout import Sampling, roll_out, stop_tokens
from align_jax.generation.sampler import Generation
from tests.llama_tokenizer import llama_tokenizer


def test_a_completion_keeps_the_space_it_begins_with(monkeypatch):
    tokenizer = llama_tokenizer()
    yes, end = tokenizer.convert_tokens_to_ids("\u2581yes"), tokenizer.eos_token_id

    def generate(model, prompts, **_):
        rows = np.array([[yes, end]] * len(prompts), np.int32)
        return Generation(rows, np.ones((len(prompts), 2)), np.zeros((len(prompts), 2)))

    monkeypatch.setattr(rollout, "generate", generate)
    texts = ("A:", "A:<|sep|>")
    prompts = [np.array(tokenizer(t, add_special_tokens=False).input_ids) for t in texts]
    mesh, keys = jax.make_mesh((1,), ("data",)), jax.random.split(jax.random.key(0), 2)
    drawn = roll_out(None, mesh, tokenizer, prompts, Sampling(max_new_tokens=2), keys=keys)
    assert drawn.texts == [" yes", "yes"]


def test_a_token_that_ends_completions_is_one_behind_text():
    tokenizer = llama_tokenizer()
    stops = stop_tokens(tokenizer, Sampling(truncate_token="."))
    assert stops[1] == tokenizer.convert_tokens_to_ids(".")
