import sys

import numpy as np
import pytest

from align_jax.rewards import rules


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
