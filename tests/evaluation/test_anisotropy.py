"""Anisotropy: states of every layer against transformers, cosines against sums over pairs, what theory fixes."""

import numpy as np
import pytest
import torch
import transformers

from bivec import Encoder
from bivec.engine.packing import PackedBatch
from bivec.evaluation import anisotropy
from bivec.evaluation.anisotropy import evaluate, mean_cosine
from bivec.evaluation.texts import HeldOutTexts, read_texts


@pytest.fixture
def encoder(tiny_llama_folder):
    return Encoder.from_pretrained(tiny_llama_folder, dtype="float32")


def differentiable_states(encoder, batch, windows):
    """Each layer's states out of the pass that training runs."""
    found = [encoder.model.embed_tokens(batch.input_ids)]
    hooks = [
        layer.register_forward_hook(lambda layer, given, output: found.append(output)) for layer in encoder.model.layers
    ]
    found[-1] = encoder.model.norm(encoder.model(batch, windows))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@torch.no_grad()
def test_states_of_every_layer_are_those_of_transformers(checkpoint_folders, architecture):
    encoder = Encoder.from_pretrained(checkpoint_folders[architecture], dtype="float32")
    reference = transformers.AutoModel.from_pretrained(checkpoint_folders[architecture], dtype=torch.float32)
    texts = [[5, 9, 200, 31], [7], list(range(40, 90))]
    expected = [reference(torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in texts]
    batch = PackedBatch.from_sequences(texts)
    found = list(encoder.runner.all_hidden_states(batch, encoder.config.causal_windows))
    assert len(found) == len(expected[0]) == encoder.config.num_hidden_layers + 1
    for layer, states in enumerate(found):
        torch.testing.assert_close(states, torch.cat([text[layer][0] for text in expected]), atol=2e-4, rtol=1e-4)
    differentiable = differentiable_states(encoder, batch, encoder.windows)
    for states, expected in zip(encoder.runner.all_hidden_states(batch), differentiable, strict=True):
        torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(states, encoder.model.norm(encoder.runner(batch)))


def test_mean_cosine_is_the_mean_over_pairs():
    vectors = np.random.default_rng(0).normal(size=(2, 9, 5)) + 0.5
    weights = np.stack([np.ones(9), [0, 2, 1, 0, 3, 1, 1, 0, 1]])
    directions = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    for row, found in zip(weights, mean_cosine(vectors)(weights), strict=True):
        items = np.repeat(np.arange(9), row.astype(int))
        pairs = [(i, j) for i in items for j in items if i != j]
        assert found == pytest.approx(np.mean([directions[d, i] @ directions[d, j] for d in (0, 1) for i, j in pairs]))


def test_random_directions_are_isotropic_and_equal_ones_are_not():
    random = np.random.default_rng(1).normal(size=(1, 400, 64))
    assert abs(mean_cosine(random)(np.ones((1, 400)))[0]) < 0.01
    assert mean_cosine(np.ones((1, 40, 8)))(np.ones((1, 40)))[0] == pytest.approx(1.0)
    assert np.isnan(mean_cosine(np.ones((1, 2, 8)))(np.array([[2.0, 0.0]]))[0])


@torch.no_grad()
def test_figures_against_plain_sums(encoder, text_file, monkeypatch):
    monkeypatch.setattr(anisotropy, "_SLAB_TOKENS", 0)  # slabs of max_length tokens: several
    held_out = read_texts(text_file, 30)
    scores = evaluate(encoder, held_out, [0, 1])
    found = {(score.metric, score.layer): score for score in scores}
    cosine = torch.nn.functional.cosine_similarity
    within, readiness, first_position = (np.zeros((4, len(held_out.texts))) for _ in range(3))
    for place, text in enumerate(held_out.texts):
        batch = PackedBatch.from_sequences([encoder.tokenizer(text)["input_ids"]])
        bidirectional, causal = (
            differentiable_states(encoder, batch, windows)
            for windows in (encoder.config.bidirectional_windows, encoder.config.causal_windows)
        )
        for layer, (ours, theirs) in enumerate(zip(bidirectional, causal, strict=True)):
            words = ours[1:]  # after BOS
            within[layer, place] = cosine(words, words.mean(0, keepdim=True)).mean()
            readiness[layer, place] = cosine(words, theirs[1:]).mean()
            first_position[layer, place] = cosine(ours[0], theirs[0], dim=0)
    for layer in range(4):
        assert found["within text", layer].value == pytest.approx(within[layer].mean(), abs=1e-5)
        assert found["readiness", layer].value == pytest.approx(readiness[layer].mean(), abs=1e-5)
        assert sorted(found["readiness", layer].items["share"]) == pytest.approx(sorted(readiness[layer]), abs=1e-5)
        by_position = found["readiness", layer].details["by position"]
        assert by_position[0] == pytest.approx(first_position[layer].mean(), abs=1e-5)
        assert found["anisotropy", layer].low < found["anisotropy", layer].value < found["anisotropy", layer].high
    assert found["readiness", 0].value == pytest.approx(1.0)  # the embeddings know no mask
    assert found["readiness", 3].value < 0.999


def test_the_last_token_of_the_first_layer_sees_the_same_under_both_masks(encoder):
    text = "fox dog"
    length = len(encoder.tokenizer(text)["input_ids"])
    scores = evaluate(encoder, HeldOutTexts("same", [text, text]), [0])
    by_position = {score.layer: score.details.get("by position") for score in scores if score.metric == "readiness"}
    assert len(by_position[1]) == length
    assert by_position[1][-1] == pytest.approx(1.0)
    assert max(by_position[1][:-1]) < 0.9999
    assert by_position[2][-1] < 0.9999


def test_a_causal_encoder_is_measured_under_its_own_mask(tiny_llama_folder, text_file):
    held_out = read_texts(text_file, 10)
    figures = []
    for window in ((-1, -1), (-1, 0)):
        scores = evaluate(Encoder.from_pretrained(tiny_llama_folder, dtype="float32", window=window), held_out, [0])
        figures.append({(score.metric, score.layer): score.value for score in scores})
    for (metric, layer), value in figures[0].items():
        is_same = figures[1][metric, layer] == pytest.approx(value, abs=1e-6)
        assert is_same == (metric == "readiness" or layer == 0)


def test_too_few_texts_are_refused(encoder):
    with pytest.raises(ValueError, match="two texts of two tokens or more are needed, one has 1"):
        evaluate(encoder, HeldOutTexts("one", ["fox dog"]), [0])
