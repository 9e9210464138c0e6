"""Words' states beside transformers' own, with a pooling written anew; texts without BOS, cut and dropped words."""

import threading

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from bivec import Encoder
from bivec.evaluation import states as module
from bivec.evaluation.states import Words, chosen_layers, split_word_states, word_states

SENTENCES = [
    ["the", "quick", "brown", "fox", "jumps", "unquestionably"],
    ["München,", "naïve", "北京", "emoji 😀"],
    ["dog"],
    [],
    ["antidisestablishmentarianism", "holds", "", "many", "sequences"],
]


@pytest.fixture(scope="module", params=["with BOS", "without"])
def folder(request, make_checkpoint, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("states"), bos=request.param == "with BOS")


@pytest.fixture(scope="module")
def encoder(folder):
    return Encoder.from_pretrained(folder, dtype="float32")


@pytest.fixture(scope="module")
def hidden_states(folder):
    """hidden_states(ids): `(L + 1, tokens, E)` of transformers, bidirectional."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

    def run(ids):
        mask = torch.zeros(1, 1, len(ids), len(ids))  # nothing is hidden
        with torch.no_grad():
            found = model(torch.tensor([ids]), attention_mask=mask, output_hidden_states=True)
        return torch.stack(found.hidden_states)[:, 0]

    return run


def expected(found, tokens, sub_tokens):
    """One word's `(L + 1, 2, E)` from all states of its text, at `tokens` and before them."""
    if not tokens:
        return torch.zeros(len(found), 2, found.shape[-1])
    chosen = {"mean": tokens, "first": tokens[:1], "last": tokens[-1:]}[sub_tokens]
    before = [token - 1 for token in chosen if token > 0]
    shifted = found[:, before].mean(dim=1) if before else torch.zeros_like(found[:, 0])
    return torch.stack([found[:, chosen].mean(dim=1), shifted], dim=1)


@pytest.mark.parametrize("sub_tokens", ["mean", "first", "last"])
def test_words_are_transformers_states(encoder, folder, hidden_states, sub_tokens):
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    truth = []
    for words in SENTENCES:
        text = " ".join(words)
        encoding = tokenizer.encode(text)
        found = hidden_states(encoding.ids) if encoding.ids else torch.zeros(4, 0, 64)
        place = 0
        for word in words:
            characters = {index for index in range(place, place + len(word)) if not text[index].isspace()}
            tokens = [
                token for token, (begin, end) in enumerate(encoding.offsets) if characters & set(range(begin, end))
            ]
            whole = list(range(tokens[0], tokens[-1] + 1)) if tokens else []
            truth.append(expected(found, whole, sub_tokens))
            place += len(word) + 1
    found = word_states(encoder, Words.of_sentences(SENTENCES), chosen_layers(encoder, "all"), sub_tokens)
    assert found.layers == (0, 1, 2, 3)
    assert len(found) == len(truth) == sum(map(len, SENTENCES))
    for layer in found.layers:
        each = torch.stack([word[layer] for word in truth])
        for read_out, wanted in (("token", each[:, 0]), ("previous", each[:, 1]), ("both", each.flatten(1))):
            torch.testing.assert_close(found.vectors(layer, read_out), wanted, rtol=1e-4, atol=2e-4)
    assert found.is_read.tolist() == [bool(word) for words in SENTENCES for word in words]


def test_words_tokenised_one_by_one_are_transformers_states(encoder, folder, hidden_states):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    truth, lost = [], []
    for words in SENTENCES:
        encoding = tokenizer(words, is_split_into_words=True, truncation=True, max_length=9)
        found = hidden_states(encoding["input_ids"]) if encoding["input_ids"] else torch.zeros(4, 0, 64)
        for word in range(len(words)):
            tokens = [token for token, owner in enumerate(encoding.word_ids()) if owner == word]
            truth.append(expected(found, tokens, "mean"))
            lost.append(not tokens)
    found = split_word_states(encoder, SENTENCES, (1, 3), max_length=9)
    assert found.is_read.tolist() == [not word for word in lost]
    assert any(lost[:-5])  # the limit cuts words off
    for layer in (1, 3):
        wanted = torch.stack([word[layer] for word in truth]).flatten(1)
        torch.testing.assert_close(found.vectors(layer, "both"), wanted, rtol=1e-4, atol=2e-4)


def test_what_stands_before_a_texts_first_token(encoder, folder):
    adds_bos = bool(transformers.AutoTokenizer.from_pretrained(folder)("")["input_ids"])
    found = word_states(encoder, Words.of_sentences([["dog", "fox"]]), (3,), "first")
    assert found.has_previous.tolist() == [adds_bos, True]
    assert found.vectors(3, "previous").any(dim=1).tolist() == [adds_bos, True]


def test_words_that_are_cut_off_have_zeros(folder):
    encoder = Encoder.from_pretrained(folder, dtype="float32", max_length=6)
    found = word_states(encoder, Words.of_sentences([["dog"] * 40, ["fox"]]), (0, 3))
    num_read = int(found.is_read.sum()) - 1
    assert 0 < num_read < 6
    assert found.is_read.tolist() == [True] * num_read + [False] * (40 - num_read) + [True]
    for read_out in ("token", "previous", "both"):
        assert not found.vectors(3, read_out)[~found.is_read].any()
    assert found.vectors(3, "token")[found.is_read].any(dim=1).all()


def test_last_has_the_embeddings_beside_it(encoder):
    assert chosen_layers(encoder, "last") == (0, 3)


def test_states_in_a_file_are_the_same(encoder, monkeypatch, tmp_path):
    words = Words.of_sentences(SENTENCES)
    in_memory = word_states(encoder, words, (0, 3)).vectors(3, "both")
    monkeypatch.setattr(module, "free_memory", lambda: 0)
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    made = []
    from_file = torch.from_file
    monkeypatch.setattr(
        torch, "from_file", lambda *given, **options: made.append(given) or from_file(*given, **options)
    )
    assert torch.equal(word_states(encoder, words, (0, 3)).vectors(3, "both"), in_memory)
    assert len(made) == 1
    assert not list(tmp_path.iterdir())  # nothing to clean up


def test_no_room_at_all_is_said_beforehand(encoder, monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda: 0)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 99}))
    with pytest.raises(ValueError, match=r"the states of 16 words in 2 layers need 0\.0 GiB, more than .*TMPDIR"):
        word_states(encoder, Words.of_sentences(SENTENCES), (0, 3))


def test_several_threads_give_the_same(encoder, monkeypatch, cores):
    words = Words.of_sentences([["dog", "fox", "holds"] * 5] * 40)
    alone = word_states(encoder, words, (0, 3)).vectors(3, "both").clone()
    cores(2)
    monkeypatch.setattr(encoder.slabs, "_at_once", 2)
    monkeypatch.setattr(encoder.slabs, "_tile", 32)
    threads = set()
    run = encoder.runner.all_hidden_states

    def noting(*given, **options):
        threads.add(threading.get_ident())
        return run(*given, **options)

    monkeypatch.setattr(encoder.runner, "all_hidden_states", noting)
    found = word_states(encoder, words, (0, 3)).vectors(3, "both")
    assert len(threads) > 1
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.any(dim=1).numpy(), True)
