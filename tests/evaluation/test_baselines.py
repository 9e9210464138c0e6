"""Baselines: the token average against the model's embedding matrix, under the tokens that the model itself pools."""

import numpy as np
import pytest
import torch

from bivec import Encoder
from bivec.evaluation.baselines import token_averages


@pytest.fixture
def encoder(tiny_llama_folder):
    return Encoder.from_pretrained(tiny_llama_folder, dtype="float32", max_length=12)


def by_hand(encoder: Encoder, text: str, places: slice) -> np.ndarray:
    """Over places of the tokens that the tokenizer makes with its BOS."""
    ids = encoder.tokenizer(text)["input_ids"]
    return encoder.model.embed_tokens(torch.tensor(ids[places])).mean(dim=0).detach().numpy()


def test_the_token_average_is_of_the_models_tokens_without_the_special_ones(encoder):
    assert encoder.tokenizer("a")["input_ids"][0] in encoder.tokenizer.all_special_ids  # a BOS, which is left out
    texts = ["the cat sat on the mat", "a", "word " * 30]
    found = token_averages(encoder, texts)
    assert found.dtype == np.float32
    expected = [by_hand(encoder, text, slice(1, 12)) for text in texts]  # cut to max_length, of which BOS is one
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_prompt_that_the_model_gets_is_not_of_the_text(encoder):
    whole, prompt = (encoder.tokenizer(text)["input_ids"] for text in ("find: the cat", "find:"))
    assert whole[: len(prompt)] == prompt
    encoder.prompts, encoder.default_prompt_name = {"query": "find: "}, "query"
    expected = by_hand(encoder, "find: the cat", slice(len(prompt), None))
    np.testing.assert_allclose(token_averages(encoder, ["the cat"])[0], expected, atol=1e-6)


def test_a_text_without_tokens_has_zeros(encoder):
    first, empty = token_averages(encoder, ["the", ""])
    assert first.any()
    assert not empty.any()
