"""Generation: losses and greedy continuations against transformers, repetition by hand, an untouched base."""

import math

import numpy as np
import pytest
import torch
import transformers

from bivec import Encoder
from bivec.evaluation import generation
from bivec.evaluation.generation import adapters_leave_the_base, continuations, distinct, token_losses, tokenize
from bivec.evaluation.texts import HeldOutTexts, read_texts


@pytest.fixture
def encoder(adapted):
    return Encoder.from_pretrained(adapted[0], dtype="float32", max_length=100)


def sequences(vocab_size: int, lengths) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def transformers_loss(model, ids: list[int]) -> float:
    tokens = torch.tensor([ids])
    return model(tokens, labels=tokens).loss.item() * (len(ids) - 1)


def test_losses_of_base_and_model_are_those_of_transformers(encoder, adapted, tiny_llama_folder, monkeypatch):
    monkeypatch.setattr(generation, "_LOGITS", 100 * encoder.config.vocab_size)  # several passes
    texts = sequences(encoder.config.vocab_size, [2, 40, 99, 3, 40])
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)
    for reference, ours in ((base, encoder.language_model()), (adapted[1], encoder.language_model(adapters=True))):
        expected = [transformers_loss(reference, ids) for ids in texts]
        np.testing.assert_allclose(token_losses(ours, texts, "sdpa"), expected, rtol=1e-4)


def test_greedy_continuations_are_those_of_transformers(encoder, adapted):
    prompts = sequences(encoder.config.vocab_size, [8, 8, 8])
    found = continuations(encoder.language_model(adapters=True), prompts, "sdpa")
    for prompt, continuation in zip(prompts, found, strict=True):
        length = generation.NEW_TOKENS
        ids = adapted[1].generate(
            torch.tensor([prompt]), max_new_tokens=length, min_new_tokens=length, do_sample=False, eos_token_id=None
        )
        assert continuation == ids[0, 8:].tolist()


def test_sampled_continuations_follow_their_seed(encoder):
    model, prompts = encoder.language_model(), sequences(encoder.config.vocab_size, [8] * 4)
    first, again, other = (continuations(model, prompts, "sdpa", seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first != continuations(model, prompts, "sdpa")


def test_repetition_by_hand():
    assert distinct([1, 2, 3, 4, 5], 4) == 1.0
    assert distinct([7] * 9, 4) == pytest.approx(1 / 6)
    assert distinct([1, 2, 1, 2, 1, 2], 2) == pytest.approx(2 / 5)
    assert distinct([1, 2, 1], 1) == pytest.approx(2 / 3)
    assert math.isnan(distinct([1, 2, 3], 4))


def test_adapters_that_are_off_leave_the_base(encoder, text_file):
    texts = tokenize(encoder, read_texts(text_file, 20))
    base = encoder.language_model()
    assert adapters_leave_the_base(encoder, base, texts)
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    assert not adapters_leave_the_base(encoder, base, texts)


def test_texts_that_are_cut_are_left_out(encoder):
    tokenized = tokenize(encoder, HeldOutTexts("texts", ["short one", "word " * 200, ""]))
    assert tokenized.characters == [9]
    assert encoder.tokenizer("short one")["input_ids"] == tokenized.sequences[0]
    assert tokenized.notes == ["texts: 2 of 3 texts are left out: 1 reach max_length, 100 tokens, 1 are too short"]
    assert tokenize(encoder, HeldOutTexts("texts", ["short one"])).notes == []
    with pytest.raises(ValueError, match="no text of texts has from 2 to 99 tokens"):
        tokenize(encoder, HeldOutTexts("texts", ["word " * 200]))


def test_scores_of_a_run(encoder, text_file):
    held_out = read_texts(text_file, 20)
    scores, checks, notes = generation.evaluate(encoder, held_out, [0, 1])
    assert notes == []
    assert {score.n for score in scores if score.metric == "perplexity"} == {20}
    found = {(score.system, score.metric): score for score in scores}
    repetition = ["seq-rep-4", "distinct-1", "distinct-2"]
    metrics = [prefix + metric for prefix in ("greedy ", "sampled ") for metric in repetition]
    systems = {(system, metric) for system in ("base", "model") for metric in [*metrics, "perplexity"]}
    systems |= {("base", "bits per character"), ("model", "bits per character")}
    assert set(found) == systems | {("text", metric) for metric in repetition}
    assert list(checks.values()) == [True]
    texts = tokenize(encoder, held_out)
    losses = token_losses(encoder.language_model(adapters=True), texts.sequences, "sdpa").sum()
    assert found["model", "perplexity"].value == pytest.approx(
        math.exp(losses / sum(len(ids) - 1 for ids in texts.sequences))
    )
    characters = sum(map(len, held_out.texts))
    assert found["model", "bits per character"].value == pytest.approx(losses / math.log(2) / characters)
    assert found["model", "perplexity"].value != found["base", "perplexity"].value


def test_a_base_is_scored_once(tiny_llama_folder, text_file):
    encoder = Encoder.from_pretrained(tiny_llama_folder, dtype="float32", max_length=100)
    scores, checks, _ = generation.evaluate(encoder, read_texts(text_file, 5), [0])
    assert {score.system for score in scores} == {"base", "text"}
    assert checks == {}


def test_stories260k_tells_stories_better_than_it_knows_wikipedia(shared_data):
    """Its own kind of text has a perplexity of about 3.5."""
    encoder = Encoder.from_pretrained(shared_data / "stories260K" / "hf", dtype="float32")
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    article = "The quantitative thermodynamics of phosphorus compounds were catalogued in Heidelberg by chemists."
    texts = tokenize(encoder, HeldOutTexts("texts", [story, article]))
    losses = token_losses(encoder.language_model(), texts.sequences, "sdpa")
    per_token = losses / [len(ids) - 1 for ids in texts.sequences]
    assert math.exp(per_token[0]) < 4
    assert math.exp(per_token[1]) > 50
