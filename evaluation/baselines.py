"""The sceptic's baselines: TF-IDF of words and of characters, which know nothing but the training split's texts."""

from collections.abc import Sequence
from typing import Any

from .extras import needed

# arguments of scikit-learn's TfidfVectorizer, whose defaults are words of two letters or more
BASELINES: dict[str, dict[str, Any]] = {
    "tfidf-words": {},
    "tfidf-characters": {"analyzer": "char_wb", "ngram_range": (2, 4)},
}


def tfidf(baseline: str, fit_on: Sequence[str]) -> Any:
    """A fitted vectoriser, whose `transform` gives sparse rows of length 1; one of `BASELINES`.

    Raises:
        ValueError: scikit-learn is absent.
    """
    text = needed("sklearn.feature_extraction.text", "scikit-learn", "a TF-IDF baseline")
    return text.TfidfVectorizer(**BASELINES[baseline]).fit(fit_on)
