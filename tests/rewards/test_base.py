import decimal
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align_jax import main as command_line
from align_jax.errors import RewardError
from align_jax.rewards.base import (
    check_records,
    checked_probabilities,
    checked_scores,
    scores_and_components,
)

PROMPTS = [{"prompt": f"prompt {i}", "where": f"data.jsonl:{i + 1}"} for i in range(5)]
TEXTS = ["a", "bb", "ccc", "dddd", "eeeee"]


def returning(value):
    def my_reward(records, completions):
        return value

    return my_reward


@pytest.mark.parametrize(
    "values",
    [
        [0.73, -1, True, 0.0, 2],
        (1, 0, 1, 1, 0),
        [True, False, True, True, False],
        np.array([1, 2, 3, 4, 5]),
        np.array([0.25, 0.5, 1, 2, 3], np.float16),
        jnp.array([0.25, 0.5, 1, 2, 3], jnp.bfloat16),
        [jnp.float32(0.5), 1, 2, 3, 4],
        [decimal.Decimal("0.73"), 1, 2, 3, 10**30],
    ],
)
def test_every_kind_of_number_becomes_float32_and_stays_what_it_is(values):
    scores = checked_scores(returning(values), PROMPTS, TEXTS)
    assert scores.dtype == np.float32 and scores.shape == (5,)
    assert scores.tolist() == [np.float32(float(value)) for value in values]


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=8))
def test_fractions_survive(values):
    records = [{"prompt": "p"}] * len(values)
    scores = checked_scores(returning(values), records, [""] * len(values))
    assert scores.dtype == np.float32 and scores.tolist() == values


def test_the_reward_gets_its_record_with_each_completion():
    def length_of_answer(records, completions):
        return [len(c) / record["answer"] for record, c in zip(records, completions)]

    records = [{"prompt": "p", "answer": n} for n in (1, 4)]
    assert checked_scores(length_of_answer, records, ["abc", "abc"]).tolist() == [3.0, 0.75]


@pytest.mark.parametrize(
    ("values", "index", "message"),
    [
        ([0, 0, float("nan"), 0, 0], 2, "returned nan"),
        ([0, 0, 0, float("-inf"), 0], 3, "returned -inf"),
        (np.array([0, 1e39, 0, 0, 0]), 1, r"returned 1e\+39, which is no finite float32"),
        ([0, None, 0, 0, 0], 1, "returned None, which is no number"),
        ([0, 0, 0, 0, "1"], 4, "returned '1', which is no number"),
        ([0, 1 + 2j, 0, 0, 0], 1, "which is no number"),
        ([[1], [1, 2], 3, 4, 5], 0, r"returned \[1\], which is no number"),
        ([1, 2, 3], 0, "returned 3 values for 5 completions"),
        ([], 0, "returned 0 values for 5 completions"),
        (np.zeros((5, 1)), 0, r"an array of shape \(5, 1\); expected 5 numbers"),
        (1.0, 0, "returned 1.0; expected 5 numbers"),
        (None, 0, "returned None; expected 5 numbers"),
        ("12345", 0, "returned '12345'; expected 5 numbers"),
        ({"a": 1}, 0, "expected 5 numbers"),
    ],
)
def test_what_is_no_score_ends_with_prompt_and_completion_named(values, index, message):
    with pytest.raises(RewardError, match=message) as caught:
        checked_scores(returning(values), PROMPTS, TEXTS)
    text = str(caught.value)
    assert "my_reward" in text
    for named in (f"prompt {index}'", f"data.jsonl:{index + 1}", repr(TEXTS[index])):
        assert named in text


@pytest.mark.parametrize("bad", range(5))
def test_a_reward_that_raises_is_found_out_with_the_completion_it_raises_for(bad):
    calls = []

    def divides(records, completions):
        calls.append(len(completions))
        return [1 / (len(text) - 1 - bad) for text in completions]

    with pytest.raises(RewardError) as caught:
        checked_scores(divides, PROMPTS, TEXTS)
    text = str(caught.value)
    assert "divides raised ZeroDivisionError: division by zero (" in text
    assert "test_base.py:" in text and f"completion {TEXTS[bad]!r}" in text
    assert f"data.jsonl:{bad + 1}" in text
    assert len(calls) <= 4  # by halves, not one by one
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_long_prompt_of_messages_is_shown_by_its_ends():
    prompt = [{"role": "user", "content": "start" + "x" * 1000 + "end"}]
    with pytest.raises(RewardError) as caught:
        checked_scores(returning([float("nan")]), [{"prompt": prompt}], ["y" * 1000])
    text = str(caught.value)
    assert "User: start" in text and "end'" in text and len(text) < 600


def test_a_missing_package_is_told_as_it_is():
    def reward(records, completions):
        raise ImportError("pip install something")

    with pytest.raises(ImportError, match="^pip install something$"):
        checked_scores(reward, PROMPTS, TEXTS)


def test_no_completions_need_no_call():
    assert checked_scores(returning(None), [], []).shape == (0,)


def test_records_and_completions_of_different_numbers_are_refused():
    with pytest.raises(ValueError, match="5 records and 4 texts"):
        checked_scores(returning([1] * 5), PROMPTS, TEXTS[:4])


def test_probabilities_lie_between_0_and_1():
    ok = checked_probabilities(lambda r, a, b: [0, 0.25, 1, True, 0.5], PROMPTS, TEXTS, TEXTS)
    assert ok.dtype == np.float32 and ok.tolist() == [0, 0.25, 1, 1, 0.5]
    for wrong in (1.5, -0.1):
        values = [0.5, 0.5, wrong, 0.5, 0.5]
        with pytest.raises(RewardError, match="no probability.*data.jsonl:3.*first 'ccc'.*second"):
            checked_probabilities(lambda r, a, b, v=values: v, PROMPTS, TEXTS, TEXTS)


def test_components_come_with_the_scores_of_one_computation():
    calls = []

    class Sum:
        def components(self, records, completions):
            calls.append(1)
            return {"a": np.ones(5, np.float32), "b": np.arange(5, dtype=np.float32)}

        def combine(self, components, records):
            return components["a"] + components["b"]

    scores, components = scores_and_components(Sum(), PROMPTS, TEXTS)
    assert scores.tolist() == [1, 2, 3, 4, 5] and sorted(components) == ["a", "b"]
    assert calls == [1]
    assert scores_and_components(returning([1] * 5), PROMPTS, TEXTS)[1] == {}
    Sum.combine = lambda self, components, records: [1, 2, float("nan"), 4, 5]
    with pytest.raises(RewardError, match="Sum returned nan.*data.jsonl:3"):
        scores_and_components(Sum(), PROMPTS, TEXTS)


class Parts:
    """A reward of two parts, of which the tests break one thing at a time."""

    def components(self, records, completions):
        return {"a": [1] * len(completions), "length": [len(text) for text in completions]}

    def combine(self, components, records):
        return components["a"] + components["length"]


def test_components_are_arrays_of_float32_whatever_they_come_as():
    scores, components = scores_and_components(Parts(), tuple(PROMPTS), tuple(TEXTS))
    assert scores.tolist() == [2, 3, 4, 5, 6]
    assert {x.dtype for x in components.values()} == {np.dtype("float32")}
    assert components["length"].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("part", "index", "message"),
    [
        ([0, 0, float("nan"), 0, 0], 2, "component 'bad' of the reward Parts returned nan"),
        ([0, 0, 0, "x", 0], 3, "component 'bad' of the reward Parts returned 'x', which is no"),
        ([0, 0, 0], 0, "component 'bad' of the reward Parts returned 3 values for 5 completions"),
        (1.0, 0, "component 'bad' of the reward Parts returned 1.0; expected 5 numbers"),
    ],
)
def test_a_component_that_is_no_score_is_named_with_prompt_and_completion(part, index, message):
    reward = Parts()
    reward.components = lambda records, texts: {"good": [1] * len(texts), "bad": part}
    with pytest.raises(RewardError, match=message) as caught:
        scores_and_components(reward, PROMPTS, TEXTS)
    for named in (f"prompt {index}'", f"data.jsonl:{index + 1}", repr(TEXTS[index])):
        assert named in str(caught.value)


@pytest.mark.parametrize("bad", range(5))
@pytest.mark.parametrize("method", ["components", "combine"])
def test_the_completion_for_which_components_or_combine_raises_is_found(method, bad):
    reward = Parts()

    def divides(lengths):
        return [1 / (length - 1 - bad) for length in lengths]

    if method == "components":
        reward.components = lambda _, texts: {"a": divides([len(text) for text in texts])}
    else:
        reward.combine = lambda parts, _: divides(parts["length"].tolist())
    with pytest.raises(RewardError) as caught:
        scores_and_components(reward, PROMPTS, TEXTS)
    text = str(caught.value)
    assert f"the reward Parts ({method}) raised ZeroDivisionError: " in text
    assert "test_base.py:" in text and f"completion {TEXTS[bad]!r}" in text
    assert f"data.jsonl:{bad + 1}" in text


def test_what_combine_returns_is_checked_as_a_reward_is():
    reward = Parts()
    reward.combine = lambda parts, records: [1.0, 2.0]
    with pytest.raises(RewardError, match="the reward Parts returned 2 values for 5 completions"):
        scores_and_components(reward, PROMPTS, TEXTS)
    with pytest.raises(ValueError, match="5 records and 4 texts"):
        scores_and_components(reward, PROMPTS, TEXTS[:4])


@pytest.mark.parametrize("found", [None, [1.0] * 5, {"": [1.0] * 5}, {1: [1.0] * 5}])
def test_components_without_names_are_refused(found):
    reward = Parts()
    reward.components = lambda *_: found
    with pytest.raises(RewardError, match="the reward Parts has components .*under each comp"):
        scores_and_components(reward, PROMPTS, TEXTS)


def test_a_reward_whose_components_are_none_has_none():
    reward = returning([1] * 5)
    reward.components = None
    assert scores_and_components(reward, PROMPTS, TEXTS)[1] == {}


@pytest.mark.parametrize("bad", [0, 3])
def test_a_reward_that_leaves_the_program_ends_the_run_with_an_error(bad):
    """`sys.exit(0)` would say that the run is done."""

    def leaves(records, completions):
        if TEXTS[bad] in completions:
            sys.exit(0)
        return [1.0] * len(completions)

    message = r"the reward .*leaves raised SystemExit: 0 \(.*test_base.py:\d+\), which would have"
    with pytest.raises(RewardError, match=message) as caught:
        checked_scores(leaves, PROMPTS, TEXTS)
    assert f"data.jsonl:{bad + 1}" in str(caught.value)
    with pytest.raises(RewardError, match="the comparer .* raised SystemExit: 0"):
        checked_probabilities(lambda records, first, second: sys.exit(0), PROMPTS, TEXTS, TEXTS)
    reward = Parts()
    reward.combine = lambda parts, records: sys.exit("no")
    with pytest.raises(RewardError, match=r"Parts \(combine\) raised SystemExit: no"):
        scores_and_components(reward, PROMPTS, TEXTS)


@pytest.mark.parametrize("error", [SystemExit(0), KeyError("answer")])
def test_a_check_of_records_that_raises_names_the_reward(error):
    class Demanding:
        def check_records(self, records):
            raise error

    with pytest.raises(RewardError, match=r"reward Demanding \(check_records\) raised .*:\d+\)"):
        check_records(Demanding(), PROMPTS)


def test_an_interrupt_is_no_error_of_the_reward():
    def interrupted(records, completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checked_scores(interrupted, PROMPTS, TEXTS)


def test_a_reward_without_demands_accepts_every_record():
    check_records(returning([]), PROMPTS)


def test_the_command_line_says_it_in_one_message(monkeypatch, tmp_path, capsys):
    def run(arguments, overrides):
        raise RewardError("the reward f returned nan")

    monkeypatch.setattr(command_line, "_train", run)
    arguments = ["train", "--config=x", f"--workdir={tmp_path}"]
    assert command_line.main(arguments) == 2
    assert capsys.readouterr().err == "align-jax: error: the reward f returned nan\n"
