"""The sceptic's baselines: TF-IDF of words and of characters, and the mean of the model's own token embeddings.

TF-IDF knows nothing but the texts that it is fitted on; the token average knows the model's vocabulary and no context:
what a model does not have beyond it, its layers have not added.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..engine.encoder import Encoder
from ..engine.tokens import Tokenized
from .extras import needed

# arguments of scikit-learn's TfidfVectorizer, whose defaults are words of two letters or more
TFIDF: dict[str, dict[str, Any]] = {
    "tfidf-words": {},
    "tfidf-characters": {"analyzer": "char_wb", "ngram_range": (2, 4)},
}
TOKEN_AVERAGE = "token average"
BASELINES = (*TFIDF, TOKEN_AVERAGE)


def tfidf(baseline: str, fit_on: Sequence[str]) -> Any:
    """A fitted vectoriser, whose `transform` gives sparse rows of length 1; one of `TFIDF`.

    Raises:
        ValueError: scikit-learn is absent.
    """
    text = needed("sklearn.feature_extraction.text", "scikit-learn", "a TF-IDF baseline")
    return text.TfidfVectorizer(**TFIDF[baseline]).fit(fit_on)


@torch.no_grad()
def token_averages(encoder: Encoder, texts: Sequence[str]) -> np.ndarray:
    """Mean of the input embeddings of each text's tokens, float32 `(n, E)`; zeros for a text without any.

    They are the tokens that `encode` pools, under the model's own prompt and cut to `max_length`, but special ones.
    """
    name = encoder.default_prompt_name
    special = set(encoder.tokenizer.all_special_ids)
    embeddings = encoder.model.embed_tokens.weight
    averages = np.zeros((len(texts), embeddings.shape[1]), dtype=np.float32)
    tokenized = encoder.tokenize_rows(texts, prompt="" if name is None else encoder.prompts[name])
    for row, text in enumerate(tokenized):
        if isinstance(text, Tokenized):
            ids = [token for token in text.ids[text.pool_start :] if token not in special]
            if ids:
                averages[row] = embeddings[ids].float().mean(dim=0).cpu()
    return averages
