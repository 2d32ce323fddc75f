"""Rewards that a rule computes from the text alone: no model, no compute to speak of.

`RULES` holds functions texts -> scores; the classes are rewards, (records, completions) -> scores.
Constructors raise ValueError with a message that begins with the name of the argument.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from align_jax.errors import RewardError
from align_jax.models.tokenizers import encode_texts
from align_jax.rewards.base import Records, Reward


@functools.cache
def _polarity_scores() -> Callable[[str], dict[str, float]]:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError(
            "the reward vader_sentiment needs a package: pip install vaderSentiment"
        ) from error
    return SentimentIntensityAnalyzer().polarity_scores


def vader_sentiment(texts: Sequence[str]) -> np.ndarray:
    """Compound VADER sentiment of each text: [N] float32 in [-1, 1], 0 is neutral.

    Score the continuation alone, so that the prompt's own sentiment does not count.
    Raises ImportError if vaderSentiment is not installed, TypeError if an item is no string.
    Source: Hutto and Gilbert 2014, "VADER: a parsimonious rule-based model for sentiment analysis".
    """
    if isinstance(texts, str):
        raise TypeError("vader_sentiment takes a sequence of texts, not a single string")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{index}] is {type(text).__name__}, not a string")
    score = _polarity_scores()
    return np.array([score(text)["compound"] for text in texts], dtype=np.float32)


def text_length(texts: Sequence[str]) -> np.ndarray:
    """Number of characters of each text, `[N]` float32: a reward any model can be trained on."""
    return np.array([len(text) for text in texts], np.float32)


RULES = {"vader": vader_sentiment, "length": text_length}


def of_completions(rule: Callable[[Sequence[str]], np.ndarray]) -> Reward:
    """The reward of a rule that looks at the completions alone, such as those of `RULES`."""

    @functools.wraps(rule)
    def reward(records: Records, completions: Sequence[str]) -> np.ndarray:
        return rule(completions)

    return reward


class Regex:
    """1 where a completion matches a regular expression, else 0; `[N]` float32.

    Args:
      pattern: in Python's syntax; flags are written inside, `(?i)` for either case.
      match: "any" place in the completion, or the "full" completion.
    """

    name = "regex"

    def __init__(self, pattern: str, *, match: str = "any"):
        if match not in ("any", "full"):
            raise ValueError(f"match: {match!r} is not known; expected 'any' or 'full'.")
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"pattern: {pattern!r} is no regular expression; expected a string.")
        try:
            compiled = re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"pattern: {pattern!r} is no regular expression: {error}.") from error
        self._find = compiled.search if match == "any" else compiled.fullmatch

    def __call__(self, records: Records, completions: Sequence[str]) -> np.ndarray:
        return np.array([self._find(text) is not None for text in completions], np.float32)


# Digits that follow a letter or a caret are names and powers (CO2, m^2); a minus after a letter, a
# digit or a bracket is a hyphen or a subtraction.
_NUMBER = re.compile(
    r"((?<![\w)\]}%.])[-\u2212\u2013])?[$€£¥]?"
    r"(?<![A-Za-z_^\d])((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\.)\.\d+)",
    re.ASCII,
)
_MARKED = re.compile(r"####[ \t]*(?=[$€£¥.\d\u2212\u2013-])")


def last_number(text: str) -> Decimal | None:
    """The last number of a text, exactly; None if there is none.

    Understood are signs, thousands separators (1,234.50), decimals, currency signs on either side
    of the sign, and units: "-$1,234.50.", "42 clips", "5kg". A number right after `####`, where
    GSM8K's solutions state their answer, goes before any other. No expression is evaluated, and
    fractions, exponents and words are not read: "1/2" ends in 2.
    """
    for marker in reversed(list(_MARKED.finditer(text))):
        found = _NUMBER.match(text, marker.end())
        if found:
            return _decimal(found)
    found = None
    for found in _NUMBER.finditer(text):  # noqa: B007
        pass
    return found and _decimal(found)


def _decimal(found: re.Match) -> Decimal:
    # The sign as text: an operator would round to 28 digits.
    return Decimal(("-" if found[1] else "") + found[2].replace(",", ""))


def gold_answer(record: Any) -> Decimal:
    """The number in a record's `answer`: a number, "$1,250", "72 clips", or a GSM8K solution.

    Raises:
      RewardError: there is no answer, or it is neither one number nor one after `####`.
    """
    where, answer = record.get("where", "a record"), record.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer):
        return Decimal(str(answer))
    if not isinstance(answer, str):
        what = "there is none" if answer is None else f"found {answer!r}"
        raise RewardError(
            f"{where}: the reward 'answer' needs a number in the field 'answer'; {what}."
        )
    marked = _MARKED.search(answer)
    if marked or len(_NUMBER.findall(answer)) == 1:
        value = last_number(answer)
        if value is not None:
            return value
    raise RewardError(
        f"{where}: field 'answer': {answer[-80:]!r} is not one number; expected for example '72', "
        "'$1,250' or a solution that ends in '#### 72'."
    )


class Answer:
    """1 where the completion's `last_number` equals the record's `gold_answer`, else 0.

    Compared as decimals: 42 equals 42.00, 0.1 equals 0.1, and nothing else does.
    Source: Cobbe et al. 2021, arXiv:2110.14168 (GSM8K), as a verifiable reward.
    """

    name = "answer"

    def check_records(self, records: Records) -> None:
        """Raises RewardError for the first record without a usable answer."""
        for record in records:
            gold_answer(record)

    def __call__(self, records: Records, completions: Sequence[str]) -> np.ndarray:
        pairs = zip(records, completions)
        return np.array([last_number(text) == gold_answer(one) for one, text in pairs], np.float32)


# What a completion as a whole looks like.
_FORMATS = {
    # A solution that ends in its answer, as GSM8K's do, stated once.
    "gsm8k": re.compile(rf"(?s:(?:(?!####).)*\n)?####[ \t]*(?:{_NUMBER.pattern})\s*", re.ASCII),
    # DeepSeek-R1 (arXiv:2501.12948), table 1: each tag once, and nothing around them.
    "think": re.compile(
        r"(?s)\s*<think>(?:(?!</?(?:think|answer)>).)*</think>\s*"
        r"<answer>(?:(?!</?(?:think|answer)>).)*</answer>\s*"
    ),
}


class Format:
    """1 where a completion has the asked form, else 0; `[N]` float32.

    Args:
      style: "gsm8k" (the last line, and no other, is `#### number`) or "think"
        (`<think>...</think><answer>...</answer>`, each once, nothing around them).
    """

    name = "format"

    def __init__(self, style: str):
        if style not in _FORMATS:
            known = ", ".join(repr(name) for name in _FORMATS)
            raise ValueError(f"style: {style!r} is not known; expected one of {known}.")
        self._match = _FORMATS[style].fullmatch

    def __call__(self, records: Records, completions: Sequence[str]) -> np.ndarray:
        return np.array([self._match(text) is not None for text in completions], np.float32)


def _counter(unit: str, tokenizer: Any) -> Callable[[Sequence[str]], np.ndarray]:
    """A function from texts to their lengths `[N]` float64; tokens without the EOS."""
    if unit == "characters":
        return lambda texts: np.array([len(text) for text in texts], np.float64)
    if unit == "words":
        return lambda texts: np.array([len(text.split()) for text in texts], np.float64)
    if unit != "tokens":
        raise ValueError(
            f"unit: {unit!r} is not known; expected 'characters', 'words' or 'tokens'."
        )
    if tokenizer is None:
        raise ValueError("unit: 'tokens' needs a tokenizer; count 'words' or 'characters' instead.")

    def count(texts: Sequence[str]) -> np.ndarray:
        ids = encode_texts(tokenizer, texts, behind_text=True)
        return np.array([len(one) for one in ids], np.float64)

    return count


class LengthPenalty:
    """0 up to `limit - buffer`, then falling linearly to -1 at `limit` and beyond; `[N]` float32.

    With |y| the length: clip((limit - buffer - |y|) / buffer, -1, 0).

    Args:
      limit: the longest length without the full penalty.
      buffer: over how much of it the penalty sets in; more than 0, at most `limit`.
      unit: "characters", "words" or "tokens"; of `tokenizer`.

    Source: Yu et al. 2025, arXiv:2503.14476 (DAPO), eq. 13.
    """

    name = "length_penalty"

    def __init__(self, limit: float, buffer: float, *, unit: str = "tokens", tokenizer: Any = None):
        _require_number("limit", limit)
        _require_number("buffer", buffer)
        if not 0 < buffer <= limit:
            raise ValueError(f"buffer: {buffer} is not above 0 and at most the limit, {limit}.")
        self._limit, self._buffer = limit, buffer
        self._count = _counter(unit, tokenizer)

    def __call__(self, records: Records, completions: Sequence[str]) -> np.ndarray:
        room = self._limit - self._buffer - self._count(completions)
        return np.clip(room / self._buffer, -1.0, 0.0).astype(np.float32)


class LengthTarget:
    """Minus the distance to a target length, `-|length - target|`; `[N]` float32.

    A mixture weighs it: with correctness, alpha times this is LCPO's reward.

    Args:
      target: the length wanted; at least 0.
      unit: "characters", "words" or "tokens"; of `tokenizer`.

    Source: Aggarwal and Welleck 2025, arXiv:2503.04697 (L1), the reward of LCPO-Exact.
    """

    name = "length_target"

    def __init__(self, target: float, *, unit: str = "tokens", tokenizer: Any = None):
        _require_number("target", target)
        if target < 0:
            raise ValueError(f"target: {target} is negative.")
        self._target = target
        self._count = _counter(unit, tokenizer)

    def __call__(self, records: Records, completions: Sequence[str]) -> np.ndarray:
        return (-np.abs(self._count(completions) - self._target)).astype(np.float32)


def _require_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: {value!r} is no number.")
    if not math.isfinite(value):
        raise ValueError(f"{name}: {value} is not finite.")
