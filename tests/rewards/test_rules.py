import math
import sys
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align_jax.data.sources import load_records
from align_jax.errors import RewardError
from align_jax.models.interchange import load_tokenizer
from align_jax.rewards import rules
from align_jax.rewards.base import check_records


def test_vader_sentiment_scores_the_examples_of_its_authors():
    # Compound scores printed in VADER's own documentation.
    published = {
        "VADER is smart, handsome, and funny.": 0.8316,
        "VADER is VERY SMART, handsome, and FUNNY!!!": 0.9342,
        "The book was good.": 0.4404,
        "Today SUX!": -0.5461,
        "": 0.0,
    }
    scores = rules.vader_sentiment(list(published))
    assert scores.dtype == np.float32 and scores.shape == (5,)
    np.testing.assert_allclose(scores, list(published.values()), atol=5e-5)


def test_vader_sentiment_of_no_texts_is_empty():
    scores = rules.vader_sentiment([])
    assert scores.shape == (0,) and scores.dtype == np.float32


def test_the_lexicon_is_read_once(monkeypatch):
    from vaderSentiment import vaderSentiment

    built = []
    original = vaderSentiment.SentimentIntensityAnalyzer.__init__
    monkeypatch.setattr(
        vaderSentiment.SentimentIntensityAnalyzer,
        "__init__",
        lambda self: (built.append(self), original(self))[1],
    )
    rules._polarity_scores.cache_clear()
    rules.vader_sentiment(["good"])
    rules.vader_sentiment(["bad"])
    assert len(built) == 1


def test_a_missing_package_is_named_with_the_command_that_brings_it(monkeypatch):
    rules._polarity_scores.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ImportError, match="pip install vaderSentiment"):
        rules.vader_sentiment(["good"])


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="single string"):
        rules.vader_sentiment("good")
    with pytest.raises(TypeError, match=r"texts\[1\] is int"):
        rules.vader_sentiment(["good", 3])


def score(reward, completions, records=None):
    scores = reward(records or [{"prompt": "p"}] * len(completions), completions)
    assert scores.dtype == np.float32 and scores.shape == (len(completions),)
    return scores.tolist()


def test_regular_expressions_match_anywhere_or_in_full():
    texts = ["thank you", "Thanks", "no", "", "a\nthank"]
    assert score(rules.Regex("thank"), texts) == [1, 0, 0, 0, 1]
    assert score(rules.Regex("(?i)thanks?"), texts) == [1, 1, 0, 0, 1]
    assert score(rules.Regex("(?i)thanks?", match="full"), texts) == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a(",), r"^pattern: 'a\(' is no regular expression: missing \)"),
        (("*",), "^pattern: .* nothing to repeat"),
        (("a{99999999999999999999}",), "^pattern: "),
        (("(" * 5000 + ")" * 5000,), "^pattern: "),
        (("",), "^pattern: '' is no regular expression; expected a string"),
        ((3,), "^pattern: 3 is no regular expression"),
    ],
)
def test_a_bad_pattern_is_refused_when_the_reward_is_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        rules.Regex(*arguments)
    with pytest.raises(ValueError, match="^match: 'whole' is not known"):
        rules.Regex("a", match="whole")


NUMBERS = {
    "The answer is 42.": "42",
    "He has 3 boxes of 14, so 3*14=42 apples": "42",
    "It costs $1,234.50.": "1234.50",
    "1,000,000 dollars": "1000000",
    "-5": "-5",
    "the total is -$5": "-5",
    "the total is $-5.25": "-5.25",
    "it is \u22125 degrees": "-5",
    "10-5=5": "5",
    "5 = 15-10": "10",
    "f(3)-2": "2",
    "3 of 10-20": "20",
    "**-7**": "-7",
    "x is .5": "0.5",
    "50%": "50",
    "42kg": "42",
    "3:30": "30",
    "costs Rs.42": "42",
    "one of 1, 2, 3": "3",
    "1,23": "23",
    "12 g of CO2": "12",
    "42 cm^2": "42",
    "<answer>7</answer>": "7",
    "\\boxed{42}": "42",
    "2 of them\n#### 42": "42",
    "#### $1,000\nthat took 3 steps": "1000",
    "####-3": "-3",
    "#### 5, no: #### 6": "6",
    "#### Conclusion\nSo it is 42": "42",
    "\u0664\u0662": None,
    "forty-two": None,
    "#### ": None,
    "": None,
}


@pytest.mark.parametrize(("text", "number"), NUMBERS.items())
def test_the_last_number_of_a_text(text, number):
    assert rules.last_number(text) == (None if number is None else Decimal(number))


AROUND = st.text(alphabet="abc $€(),:;!?\n", max_size=10)


@given(
    st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12),
    st.sampled_from(["", ","]),
    st.sampled_from(["", "$", "€"]),
    AROUND,
    AROUND,
)
def test_python_writes_a_number_and_it_is_read_back_exactly(number, separator, unit, before, after):
    digits = f"{number.copy_abs():{separator}f}"
    sign = "-" if number < 0 else ""
    text = f"{before} {sign}{unit}{digits} {after}"
    assert rules.last_number("17 " + text) == number
    assert rules.last_number(f"#### {sign}{unit}{digits}\n3 {after}") == number


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (72, "72"),
        (0.1, "0.1"),
        (-3, "-3"),
        (1e-07, "0.0000001"),
        ("72", "72"),
        ("$1,250.00", "1250"),
        ("72 clips", "72"),
        ("48/2 = <<48/2=24>>24 clips.\n#### 72", "72"),
        ("So 3.\n#### -1,000", "-1000"),
    ],
)
def test_gold_answers(answer, gold):
    assert rules.gold_answer({"answer": answer}) == Decimal(gold)


@pytest.mark.parametrize(
    "answer", [None, True, float("nan"), "Paris", "", "1/2", "2 or 3", [72], "#### none"]
)
def test_a_gold_answer_that_is_no_number_names_its_record(answer):
    record = {"prompt": "p", "answer": answer, "where": "gsm8k.jsonl:17"}
    with pytest.raises(RewardError, match="gsm8k.jsonl:17: .*'answer'"):
        rules.gold_answer(record)
    good = {"prompt": "p", "answer": 1}
    with pytest.raises(RewardError, match="gsm8k.jsonl:17"):
        check_records(rules.Answer(), [good, record])
    check_records(rules.Answer(), [good])


def test_answers_are_equal_as_decimals_or_not_at_all():
    completions = ["42", "42.00", "$42.", "-42", "42.0000001", "420", "none", "0.1 + 41.9", "1e3"]
    records = [{"prompt": "p", "answer": "so\n#### 42"}] * len(completions)
    assert score(rules.Answer(), completions, records) == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    # In floating point 0.1 + 0.2 is not 0.3, and neighbours above 2^53 are equal.
    assert score(rules.Answer(), ["0.30"], [{"prompt": "p", "answer": 0.3}]) == [1]
    big = [{"prompt": "p", "answer": 2**53}]
    assert score(rules.Answer(), [f"{2**53 + 1}"], big) == [0]


def test_the_built_in_sums_are_right_by_their_answers():
    records = load_records("builtin:arithmetic", kind="prompt")
    sums = [sum(map(int, record["prompt"].rstrip("=").split("+"))) for record in records]
    assert score(rules.Answer(), [f" {one}" for one in sums], records) == [1] * len(records)
    assert score(rules.Answer(), [f" {one + 1}" for one in sums], records) == [0] * len(records)


def test_the_format_of_gsm8k_is_one_marked_number_on_the_last_line():
    right = ["#### 4", "so 2+2=4\n#### 4", "a\n####   $4,000.50 \n", "a\n\nb\n#### -4"]
    wrong = ["", "4", "#### four", "so #### 4", "#### 4\n#### 4", "#### 4\nno", "#### 4 apples"]
    reward = rules.Format("gsm8k")
    assert score(reward, right + wrong) == [1] * len(right) + [0] * len(wrong)


def test_the_format_of_thinking_has_each_tag_once():
    right = ["<think>a\nb</think> <answer>4</answer>", "\n<think></think><answer></answer>\n"]
    wrong = [
        "",
        "<answer>4</answer>",
        "well <think>a</think><answer>4</answer>",
        "<think>a</think><answer>4</answer> so",
        "<think>a<think>b</think><answer>4</answer>",
        "<think>a</think><answer>4</answer><answer>5</answer>",
        "<think>a</think> well <answer>4</answer>",
    ]
    reward = rules.Format("think")
    assert score(reward, right + wrong) == [1] * len(right) + [0] * len(wrong)
    with pytest.raises(
        ValueError, match="^style: 'thinking' is not known; expected one of 'gsm8k'"
    ):
        rules.Format("thinking")


def test_the_length_penalty_sets_in_before_the_limit():
    # DAPO's own example has 16,384 tokens and 4,096 of them as the buffer; here 16 and 4.
    lengths = [0, 11, 12, 13, 14, 15, 16, 17, 100]
    expected = [0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1]
    reward = rules.LengthPenalty(16, 4, unit="words")
    assert score(reward, ["w " * n for n in lengths]) == expected
    for wrong in (0, -1, 17):
        with pytest.raises(ValueError, match="^buffer: .* is not above 0"):
            rules.LengthPenalty(16, wrong, unit="words")
    with pytest.raises(ValueError, match="^limit: '16' is no number"):
        rules.LengthPenalty("16", 4, unit="words")
    for limit in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"^limit: {limit} is not finite"):
            rules.LengthPenalty(limit, 4, unit="words")
        with pytest.raises(ValueError, match=f"^target: {limit} is not finite"):
            rules.LengthTarget(limit, unit="words")


def test_the_length_target_is_a_distance_in_its_unit():
    texts = ["", "ab cd", "ab cd ef"]
    assert score(rules.LengthTarget(2, unit="words"), texts) == [-2, 0, -1]
    assert score(rules.LengthTarget(2, unit="characters"), texts) == [-2, -3, -6]
    # The tiny tokenizer has bytes for tokens.
    tokens = rules.LengthTarget(2, unit="tokens", tokenizer=load_tokenizer("tiny"))
    assert score(tokens, [*texts, "\u00e9"]) == [-2, -3, -6, 0]
    with pytest.raises(ValueError, match="^unit: 'tokens' needs a tokenizer"):
        rules.LengthTarget(2)
    with pytest.raises(ValueError, match="^unit: 'wrods' is not known"):
        rules.LengthTarget(2, unit="wrods")
    with pytest.raises(ValueError, match="^target: -1 is negative"):
        rules.LengthTarget(-1, unit="words")
