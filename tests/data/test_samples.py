"""Samples as training data: their tokens and masks, never their text."""

import json

import numpy as np
import pytest

from align_jax.data import dataset
from align_jax.data.dataset import Data, examples_of
from align_jax.data.samples import (
    demonstrations_from_samples,
    pairs_from_samples,
    read_samples,
    score_of,
    write_samples,
)
from align_jax.errors import DataError, RunError


def sample(prompt_id, number, score, *, tokens=(5, 6), mask=None, log_prob=-1.0, **more):
    return {
        "prompt_id": prompt_id,
        "sample": number,
        "prompt": "p",
        "prompt_tokens": [1, 2, prompt_id],
        "text": "text that has other tokens",
        "tokens": list(tokens),
        "mask": [1] * len(tokens) if mask is None else mask,
        "log_probs": [-0.5] * len(tokens),
        "log_prob": log_prob,
        "ended": True,
        "scores": {} if score is None else {"reward": score},
    } | more


SAMPLES = [
    sample(4, 0, 0.1, tokens=(10,)),
    sample(4, 1, 0.9, tokens=(11, 12), log_prob=-3.5),
    sample(4, 2, -0.4, tokens=(13, 14, 15), mask=[1, 0, 1], log_prob=-2.0),
    *(sample(6, n, 0.5) for n in range(3)),
    sample(9, 0, 0.0, tokens=(20,), log_prob=-4.0),
    sample(9, 1, 0.2, tokens=(22,), log_prob=-5.0),
]


@pytest.fixture
def source(tmp_path):
    write_samples(tmp_path / "samples.jsonl", SAMPLES)
    return f"samples:{tmp_path / 'samples.jsonl'}"


def test_pairs_are_best_and_worst_of_each_prompt_token_for_token_and_ties_are_left_out():
    examples, log_probs = pairs_from_samples(SAMPLES)
    assert [example.id for example in examples] == [4, 9]
    assert examples[0].prompt.tolist() == [1, 2, 4]
    assert [response.tolist() for response in examples[0].responses] == [[11, 12], [13, 14, 15]]
    # What the policy was given, and did not draw, is not trained on.
    assert [mask.tolist() for mask in examples[0].response_masks] == [[1, 1], [1, 0, 1]]
    np.testing.assert_array_equal(log_probs, np.float32([[-3.5, -2.0], [-5.0, -4.0]]))
    assert log_probs.dtype == np.float32 and examples[0].prompt.dtype == np.int32


def test_only_ties_is_an_error_that_says_what_to_raise():
    with pytest.raises(RunError, match="config.sampling.samples"):
        pairs_from_samples([sample(0, n, 1.0) for n in range(4)])


def test_demonstrations_are_the_best_of_the_first_n():
    best = demonstrations_from_samples(SAMPLES)
    assert [example.responses[0].tolist() for example in best] == [[11, 12], [5, 6], [22]]
    first = demonstrations_from_samples(SAMPLES, best_of=1)
    assert [example.responses[0].tolist() for example in first] == [[10], [5, 6], [20]]


def test_which_score_is_meant():
    both = sample(0, 0, 0.5, scores={"reward": 0.5, "length": 3.0})
    assert score_of(both) == 0.5 and score_of(both, "length") == 3.0
    assert score_of(sample(0, 0, None, scores={"wins": 0.25})) == 0.25
    with pytest.raises(RunError, match="config.data.score is 'lenght'.*'reward', 'length'"):
        score_of(both, "lenght")
    with pytest.raises(RunError, match="'a', 'b': name one of them in config.data.score"):
        score_of(sample(0, 0, None, scores={"a": 1.0, "b": 2.0}))
    with pytest.raises(RunError, match="no scores: sample with a reward or a comparer"):
        score_of(sample(0, 0, None))


def test_a_source_of_samples_gives_their_tokens(source):
    # No tokenizer is asked: there is nothing left to tokenise.
    pairs = examples_of(source, None, Data(source=source), kind="preference")
    assert [example.id for example in pairs] == [4, 9]
    best = examples_of(source, None, Data(source=source), kind="sft")
    assert [example.responses[0].tolist() for example in best] == [[11, 12], [5, 6], [22]]
    limited = examples_of(source, None, Data(source=source, limit=1), kind="sft")
    assert [example.id for example in limited] == [4]
    assert dataset.load_source(Data(source=source), source, kind="sft")[0].id == 4


def test_a_sample_is_never_cut(source):
    data = Data(source=source, max_length=5)
    with pytest.raises(DataError, match=r"prompt 4 .* 6 tokens, and data.max_length is 5"):
        examples_of(source, None, data, kind="preference")
    data = Data(source=source, max_length=5, overlong="drop")
    assert [one.id for one in examples_of(source, None, data, kind="preference")] == [9]


def test_wrong_samples_are_named(tmp_path, source):
    with pytest.raises(DataError, match="kinds preference and sft, not 'ranked'"):
        examples_of(source, None, Data(source=source), kind="ranked")
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(SAMPLES[0]) + "\n" + json.dumps({"prompt": "p"}) + "\n")
    with pytest.raises(DataError, match=r"bad.jsonl:2: no sample: its field 'prompt_id' is None"):
        read_samples(path)
    path.write_text(json.dumps(SAMPLES[0] | {"mask": []}) + "\n")
    with pytest.raises(DataError, match=r"bad.jsonl:1: .* 1 tokens and a mask of 0"):
        read_samples(path)
    with pytest.raises(DataError, match="no such file"):
        read_samples(tmp_path / "none.jsonl")


def test_a_score_is_for_samples_only():
    with pytest.raises(RunError, match="config.data.score is 'wins', but .* leave it at ''"):
        Data(source="builtin:tiny_sft", score="wins")
    assert Data(source="samples:x.jsonl", score="wins").score == "wins"
    assert Data(score="wins").score == "wins"  # from Python, where the call names the samples
