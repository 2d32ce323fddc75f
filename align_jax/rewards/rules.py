"""Rewards that a rule computes from the text alone: no model, no compute to speak of."""

import functools
from collections.abc import Callable, Sequence

import numpy as np


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
