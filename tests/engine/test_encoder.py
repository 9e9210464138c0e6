"""`Encoder.encode`: what each kind of text gives, prompts, precisions, and the names of sentence-transformers."""

import json
import pickle
import shutil
import threading
from copy import deepcopy

import numpy as np
import pytest
import torch
import transformers

from bivec import Encoder
from bivec.engine import encoder as encoder_module
from bivec.engine import ops
from bivec.engine.dtypes import ComputeDtype
from bivec.engine.packing import PackedBatch

TEXTS = ["the quick brown fox", "北京 and München", "emoji 😀!", "a packed batch holds many sequences side by side"]


@pytest.fixture(scope="module")
def encoder(tiny_llama_folder) -> Encoder:
    return Encoder.from_pretrained(tiny_llama_folder, dtype="float32", max_length=64)


@pytest.fixture(scope="module")
def reference(tiny_llama_folder):
    """Final hidden states of token ids by transformers, bidirectional."""
    model = transformers.AutoModel.from_pretrained(tiny_llama_folder, dtype=torch.float32).eval()
    model.config.is_causal = False

    @torch.inference_mode()
    def states(ids):
        return model(torch.tensor([ids])).last_hidden_state[0]

    return states


def assert_near(ours, theirs):
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), atol=1e-4, rtol=0)


def test_without_prompt_every_token_is_pooled_bos_included(encoder, reference):
    for text, vector in zip(TEXTS, encoder.encode(TEXTS), strict=True):
        ids = encoder.tokenizer(text)["input_ids"]
        assert ids[0] == encoder.tokenizer.bos_token_id
        assert_near(vector, reference(ids).mean(0))


@pytest.mark.parametrize("prompt", ["Represent this: ", "query:", "北京 "])
def test_prompt_attends_and_is_not_pooled(encoder, reference, prompt):
    for text, vector in zip(TEXTS, encoder.encode(TEXTS, prompt=prompt), strict=True):
        joined = encoder.tokenizer(prompt + text, return_offsets_mapping=True)
        first = next(i for i, (_, end) in enumerate(joined["offset_mapping"]) if end > len(prompt.rstrip(" ")))
        assert first > 1
        assert_near(vector, reference(joined["input_ids"])[first:].mean(0))


def test_prompt_and_text_are_tokenised_once_as_one_string(encoder, reference):
    """A token that spans the border belongs to the text; two tokenisations would split it."""
    ids = encoder.tokenizer("the fo" + "x")["input_ids"]
    assert ids == encoder.tokenizer("the fox")["input_ids"]
    assert_near(encoder.encode("x", prompt="the fo"), reference(ids)[-1:].mean(0))


def test_llm2vec_pairs_are_joined_by_a_space(encoder):
    pairs = encoder.encode([["Represent this:", TEXTS[0]], ["Represent this: ", TEXTS[0]], ["", TEXTS[0]]])
    expected = encoder.encode(TEXTS[0], prompt="Represent this: ")
    assert np.array_equal(pairs[0], expected)
    assert np.array_equal(pairs[1], expected)
    assert np.array_equal(pairs[2], encoder.encode(TEXTS[0]))


@pytest.mark.parametrize("special", ["</s>", "<s>"])
def test_special_token_strings_are_plain_text(encoder, reference, special):
    text = f"the {special} fox"
    special_id = encoder.tokenizer.convert_tokens_to_ids(special)
    assert encoder.tokenizer(text)["input_ids"].count(special_id) > (special == "<s>")
    states = encoder.encode(text, output_value="token_embeddings")
    plain = encoder.tokenizer(text, split_special_tokens=True)["input_ids"]
    assert special_id not in plain[1:]
    assert_near(states, reference(plain))


def test_empty_text_is_the_vector_of_bos(encoder, reference):
    assert_near(encoder.encode(""), reference([encoder.tokenizer.bos_token_id])[0])


@pytest.mark.parametrize(("pooling", "mode"), [("mean", "mean"), ("last", "lasttoken")])
def test_empty_text_under_a_prompt_is_as_in_sentence_transformers(tiny_llama_folder, pooling, mode):
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason="package sentence-transformers is absent"
    )
    modules = sentence_transformers.sentence_transformer.modules
    transformer = modules.Transformer(str(tiny_llama_folder))
    transformer.tokenizer.pad_token = "</s>"
    transformer.auto_model.config.is_causal = False
    pooled = modules.Pooling(64, mode, include_prompt=False)
    peer = sentence_transformers.SentenceTransformer(modules=[transformer, pooled], device="cpu")
    encoder = Encoder.from_pretrained(tiny_llama_folder, dtype="float32", pooling=pooling)
    texts = ["", " ", TEXTS[0]]
    for normalize in (False, True):
        arguments = {"prompt": "find:", "normalize_embeddings": normalize}
        ours = encoder.encode(texts, **arguments)
        assert ours.any(axis=1).tolist() == [False, True, True]
        assert_near(ours, peer.encode(texts, batch_size=1, **arguments))


def test_only_what_is_empty_is_zeros(encoder):
    """And in `encode` alone: rows are reported."""
    good = encoder.encode(TEXTS[:2], prompt="find: ")
    for sentences, prompt in (
        (["", TEXTS[0], "", TEXTS[1]], "find: "),
        ([["find:", ""], ["find:", TEXTS[0]], ["find: ", ""], ["find:", TEXTS[1]]], None),
    ):
        vectors = encoder.encode(sentences, prompt=prompt)
        assert np.array_equal(vectors, np.stack([np.zeros_like(good[0]), good[0], np.zeros_like(good[0]), good[1]]))
    for arguments in ({}, {"truncate_dim": 8, "normalize_embeddings": True}, {"precision": "int8"}):
        expected = encoder.encode(TEXTS[:1], prompt="find: ", **arguments)
        found = encoder.encode(["", TEXTS[0]], prompt="find: ", **arguments)
        assert found.dtype == expected.dtype
        assert np.array_equal(found, np.concatenate([np.zeros_like(expected), expected]))
    for encode in (encoder.encode, encoder.encode_query, encoder.encode_document):
        assert torch.equal(encode("", prompt="find: ", convert_to_tensor=True), torch.zeros(64))
    assert not encoder.similarity(vectors, vectors)[0].any()  # and not NaN
    _, reasons, _ = encoder.encode_rows(["", "fox"], prompt="find: ")
    assert "no token of the text is left after the prompt" in reasons[0]
    assert reasons[1] is None
    for text, reason in (("", "max_length 64"), ("a\ud800", "lone surrogate")):
        with pytest.raises(ValueError, match=rf"sentences\[1\] cannot be embedded: .*{reason}"):
            encoder.encode([["", "fine"], ["query " * 100, text]])


def test_empty_text_without_bos_is_zeros(make_checkpoint, tmp_path):
    encoder = Encoder.from_pretrained(make_checkpoint(tmp_path, "qwen2", bos=False), dtype="float32")
    fine, zeros = encoder.encode("fine"), np.zeros(64, np.float32)
    assert np.array_equal(encoder.encode(["", "fine", ""]), np.stack([zeros, fine, zeros]))
    assert np.array_equal(encoder.encode(""), zeros)
    vectors, reasons, _ = encoder.encode_rows(["fine", ""])
    assert reasons == [None, "the text is empty and the tokenizer adds no token of its own"]
    assert np.array_equal(vectors, np.stack([fine, zeros]))
    empty, states = encoder.encode(["", "fine"], output_value="token_embeddings")
    assert empty.shape == (0, 64)
    assert_near(states.mean(0), fine)


def test_states_of_an_empty_text_are_those_of_the_prompt(encoder, reference):
    ids = encoder.tokenizer("find: ")["input_ids"]
    fox, empty = encoder.encode(["fox", ""], prompt="find: ", output_value="token_embeddings")
    assert_near(empty, reference(ids))
    assert_near(fox, reference(encoder.tokenizer("find: fox")["input_ids"]))


def test_lone_surrogate_is_an_error_that_names_it(encoder):
    with pytest.raises(ValueError, match=r"sentences\[1\] .* lone surrogate \(U\+D83D\) at 2"):
        encoder.encode(["fine", "ab\ud83d"])


def test_long_text_is_cut_to_max_length(encoder, reference):
    text = "fox " * 500
    ids = encoder.tokenizer(text)["input_ids"][:64]
    assert_near(encoder.encode(text), reference(ids).mean(0))


def test_prompt_that_leaves_no_room_is_an_error(encoder):
    with pytest.raises(ValueError, match="max_length 64"):
        encoder.encode("text", prompt="query " * 100)


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "last", "first"])
def test_pooling_modes(tiny_llama_folder, reference, pooling):
    encoder = Encoder.from_pretrained(tiny_llama_folder, dtype="float32", pooling=pooling)
    states = reference(encoder.tokenizer(TEXTS[0])["input_ids"])
    weights = torch.arange(1.0, len(states) + 1)[:, None]
    expected = {
        "mean": states.mean(0),
        "weighted_mean": (states * weights).sum(0) / weights.sum(),
        "last": states[-1],
        "first": states[0],
    }
    assert_near(encoder.encode(TEXTS[0]), expected[pooling])


def test_truncation_comes_before_normalisation(encoder):
    full = encoder.encode(TEXTS)
    short = encoder.encode(TEXTS, truncate_dim=8, normalize_embeddings=True)
    expected = full[:, :8] / np.linalg.norm(full[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(short, expected, atol=1e-6)


def test_precisions(encoder):
    full = encoder.encode(TEXTS)
    half = encoder.encode(TEXTS, precision="float16")
    assert half.dtype == np.float16
    assert np.array_equal(half, full.astype(np.float16))
    small = encoder.encode(TEXTS, precision="int8")
    assert small.dtype == np.int8
    assert (np.abs(small.astype(int)).max(axis=1) == 127).all()
    cosines = torch.cosine_similarity(torch.from_numpy(small).float(), torch.from_numpy(full))
    assert (cosines > 0.999).all()
    assert np.array_equal(small[2], encoder.encode(TEXTS[2], precision="int8"))


def test_vectors_that_are_not_finite_are_reported(tiny_llama_folder):
    encoder = Encoder.from_pretrained(tiny_llama_folder, dtype="float32")
    encoder.model.norm.weight.data.fill_(float("inf"))
    for precision in ("float32", "int8"):
        vectors, reasons, _ = encoder.encode_rows(TEXTS, precision=precision)
        assert not vectors.any()
        assert all(reason == "the model gives a vector that is not finite" for reason in reasons)


def test_a_vector_beyond_float16_is_reported(tiny_llama_folder):
    encoder = Encoder.from_pretrained(tiny_llama_folder, dtype="float32")
    encoder.model.norm.weight.data.fill_(1e6)
    assert encoder.encode_rows(TEXTS)[1] == [None] * 4
    vectors, reasons, _ = encoder.encode_rows(TEXTS, precision="float16")
    assert not vectors.any()
    assert all(reasons)


def test_output_kinds(encoder):
    array = encoder.encode(TEXTS)
    assert array.shape == (4, encoder.get_embedding_dimension())
    assert array.dtype == np.float32
    assert np.array_equal(encoder.encode(TEXTS[1]), array[1])
    tensor = encoder.encode(TEXTS, convert_to_tensor=True)
    assert torch.equal(tensor, torch.from_numpy(array))
    listed = encoder.encode(TEXTS, convert_to_numpy=False)
    assert isinstance(listed, list)
    assert torch.equal(listed[3], tensor[3])
    assert encoder.encode([]).shape == (0, 64)
    single = encoder.encode(TEXTS[0], output_value="token_embeddings")
    assert_near(single.mean(0), array[0])


def test_texts_come_in_any_iterable(encoder):
    expected = encoder.encode(TEXTS)
    for texts in (
        tuple(TEXTS),
        iter(TEXTS),
        np.array(TEXTS),
        np.array(TEXTS, dtype=object),
        dict.fromkeys(TEXTS).keys(),
    ):
        assert np.array_equal(encoder.encode(texts), expected)
    pairs = [["query", text] for text in TEXTS]
    assert np.array_equal(encoder.encode(np.array(pairs)), encoder.encode(pairs))


class Table(list):
    """A data frame, as far as it matters here."""

    columns = ("text",)


@pytest.mark.parametrize(
    "sentences",
    [{"text": TEXTS}, Table(["text"]), b"bytes", 7, None, np.array("text"), 1.5],
    ids=lambda x: type(x).__name__,
)
def test_what_is_no_sequence_of_texts_is_refused(encoder, sentences):
    message = f"sentences must be a str or a sequence of str or .* got {type(sentences).__name__}"
    with pytest.raises(ValueError, match=message):
        encoder.encode(sentences)


@pytest.mark.parametrize("sentences", [[b"bytes"], [7], np.array([1.5]), [["a", "b", "c"]], [None]])
def test_what_is_no_text_is_refused_with_its_place(encoder, sentences):
    with pytest.raises(ValueError, match=r"sentences\[0\] must be a str or \[instruction, text\], got"):
        encoder.encode(sentences)


def test_the_device_is_the_encoders_own(encoder):
    expected = encoder.encode(TEXTS)
    for device in ("cpu", torch.device("cpu"), None):
        assert np.array_equal(encoder.encode(TEXTS, device=device), expected)
    for device in ("gpu", "cpu:-1", "mps"):
        with pytest.raises(ValueError, match="device must be auto, cpu or cuda"):
            encoder.encode(TEXTS, device=device)
    with pytest.raises(ValueError, match="device must be None or the encoder's own, cpu, got"):
        encoder.encode(TEXTS, device=["cpu", "cpu"])


@pytest.mark.parametrize("copy", [pickle.dumps, deepcopy])
def test_an_encoder_is_not_pickled(encoder, copy):
    with pytest.raises(TypeError, match=r"call Encoder.from_pretrained in each process"):
        copy(encoder)


def test_autocast_of_the_caller_changes_no_bit(encoder, tiny_llama_folder):
    vectors, states = encoder.encode(TEXTS), encoder.encode(TEXTS[3], output_value="token_embeddings")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(encoder.encode(TEXTS), vectors)
        assert np.array_equal(encoder.encode(TEXTS[3], output_value="token_embeddings"), states)
        loaded = Encoder.from_pretrained(tiny_llama_folder, dtype="float32", max_length=64)
    assert np.array_equal(loaded.encode(TEXTS), vectors)


def test_prompts_of_sentence_transformers(make_checkpoint, tmp_path):
    make_checkpoint(tmp_path)
    prompts = {"prompts": {"query": "query: ", "document": "", "passage": "p: "}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    encoder = Encoder.from_pretrained(tmp_path, dtype="float32")
    as_query = encoder.encode(TEXTS, prompt="query: ")
    assert np.array_equal(encoder.encode_query(TEXTS), as_query)
    assert np.array_equal(encoder.encode(TEXTS), as_query)
    assert np.array_equal(encoder.encode(TEXTS, prompt_name="passage"), encoder.encode(TEXTS, prompt="p: "))
    assert np.array_equal(encoder.encode_document(TEXTS), encoder.encode(TEXTS, prompt=""))
    with pytest.raises(ValueError, match="prompt_name must be one of"):
        encoder.encode(TEXTS, prompt_name="other")


def test_a_prompt_without_a_name_is_no_default(make_checkpoint, tmp_path):
    make_checkpoint(tmp_path)
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"": "x: "}}))
    encoder = Encoder.from_pretrained(tmp_path, dtype="float32")
    assert np.array_equal(encoder.encode(TEXTS), encoder.encode(TEXTS, prompt=""))
    assert np.array_equal(encoder.encode(TEXTS, prompt_name=""), encoder.encode(TEXTS, prompt="x: "))


def test_a_query_without_a_prompt_of_its_own_has_none(make_checkpoint, tmp_path):
    """The default prompt is that of `encode`, as in sentence-transformers."""
    make_checkpoint(tmp_path)
    prompts = {"prompts": {"classify": "sort: ", "passage": "p: "}, "default_prompt_name": "classify"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    encoder = Encoder.from_pretrained(tmp_path, dtype="float32")
    assert np.array_equal(encoder.encode(TEXTS), encoder.encode(TEXTS, prompt="sort: "))
    assert np.array_equal(encoder.encode_query(TEXTS), encoder.encode(TEXTS, prompt=""))
    assert np.array_equal(encoder.encode_document(TEXTS), encoder.encode(TEXTS, prompt="p: "))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config_sentence_transformers.json", {"prompts": ["a"]}, r"prompts must be strings by name, got \['a'\]"),
        ("config_sentence_transformers.json", {"prompts": {"a": 1}}, "prompts must be strings by name, got {'a': 1}"),
        ("config_sentence_transformers.json", {"default_prompt_name": ["a"]}, "default_prompt_name must be one of"),
        ("config_sentence_transformers.json", [], "must hold a JSON object"),
        ("sentence_bert_config.json", {"max_seq_length": "12"}, "max_seq_length must be a number of tokens, got '12'"),
        ("sentence_bert_config.json", 3, "must hold a JSON object"),
    ],
)
def test_a_malformed_description_is_named(fresh_llama_folder, name, content, message):
    (fresh_llama_folder / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        Encoder.from_pretrained(fresh_llama_folder)


def test_similarity_is_cosine(encoder):
    vectors = encoder.encode(TEXTS)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.similarity(vectors, vectors[:2]), unit @ unit[:2].T, atol=1e-6)


def test_forward_packed_has_gradients_that_equal_transformers(encoder, tiny_llama_folder):
    ids = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    model = transformers.AutoModel.from_pretrained(tiny_llama_folder, dtype=torch.float32).eval()
    model.config.is_causal = False
    upstream = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    torch.cat([model(torch.tensor([x])).last_hidden_state[0] for x in ids]).backward(upstream)
    ours = encoder.model.layers[1].self_attn.q_proj.weight.requires_grad_()
    encoder.forward_packed(PackedBatch.from_sequences(ids)).backward(upstream)
    theirs = model.layers[1].self_attn.q_proj.weight.grad
    torch.testing.assert_close(ours.grad, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-3)
    ours.grad = None
    ours.requires_grad_(False)


def test_what_trains_needs_a_float_dtype(encoder, monkeypatch):
    monkeypatch.setattr(encoder, "compute_dtype", ComputeDtype("int8", torch.bfloat16, "asked for"))
    with pytest.raises(ValueError, match=r"forward_packed needs a float dtype; .* in int8.*: load .*dtype='bfloat16'"):
        encoder.forward_packed(PackedBatch.from_sequences([[5, 6]]))
    assert encoder.language_model().lm_head.weight.dtype == torch.bfloat16


def test_describe_names_what_was_chosen(encoder):
    description = encoder.describe()
    assert description["encoding"]["mask"] == "bidirectional, window (-1, -1)"
    assert description["backend"]["dtype"] == "float32: asked for"
    assert all(line.startswith("passed") for line in description["self-test"].values())
    json.dumps(description)


def test_self_test_fails_on_a_causal_model(encoder):
    from bivec.engine import selftest

    class CausalRunner:
        device, eight_bits = encoder.device, ""

        def __call__(self, batch, windows):
            return encoder.runner(batch, encoder.config.causal_windows)

    with pytest.raises(RuntimeError, match="does not change an earlier state"):
        selftest.check_mask(CausalRunner(), encoder.config, encoder.config.bidirectional_windows)


def test_self_test_fails_on_a_bidirectional_model_that_should_be_causal(encoder):
    from bivec.engine import selftest

    class BidirectionalRunner:
        device = encoder.device

        def __call__(self, batch, windows):
            return encoder.runner(batch, encoder.config.bidirectional_windows)

    with pytest.raises(RuntimeError, match="under the causal window a future token changes"):
        selftest.check_mask(BidirectionalRunner(), encoder.config, encoder.config.causal_windows)


@pytest.mark.parametrize("window", [(-1, 0), (-1, 2), (3, 3)])
def test_a_window_is_what_the_encoder_runs_with(tiny_llama_folder, encoder, window):
    narrow = Encoder.from_pretrained(tiny_llama_folder, dtype="float32", device="cpu", window=window)
    assert narrow.windows == narrow.config.windows(window)
    assert set(narrow.self_test) == ({"causal", "neighbours"} if window[1] == 0 else set(encoder.self_test))
    assert (
        abs(
            narrow.encode(["a packed batch holds many sequences"])
            - encoder.encode(["a packed batch holds many sequences"])
        ).max()
        > 1e-4
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pooling": "max"}, "pooling must be one of"),
        ({"dtype": "int4"}, "dtype must be one of auto, float32, bfloat16, float16, int8, float8, .*, got 'int4'"),
        ({"dtype": "float8", "device": "cpu"}, "float8 needs a CUDA device"),
        ({"dtype": "float16", "device": "cpu"}, "float16 needs a CUDA device"),
        ({"device": "mps"}, "device must be auto, cpu or cuda"),
        ({"attention": "eager"}, "attention must be auto or one of"),
        ({"max_length": 0}, "max_length must be at least 2 tokens, 1 of which the tokenizer adds, got 0"),
        ({"max_length": 257}, "max_length must be at most the model's 256 positions, got 257"),
    ],
)
def test_arguments_that_cannot_be_met_are_errors(tiny_llama_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        Encoder.from_pretrained(tiny_llama_folder, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "int4"}, "precision must be one of"),
        ({"truncate_dim": 0}, "truncate_dim must be from 1 to 64"),
        ({"output_value": "words"}, "output_value must be"),
        ({"prompt": "a", "prompt_name": "b"}, "must not both be given"),
    ],
)
def test_encode_refuses_bad_arguments(encoder, arguments, message):
    with pytest.raises(ValueError, match=message):
        encoder.encode(TEXTS, **arguments)


def test_encode_refuses_what_is_no_text(encoder):
    with pytest.raises(ValueError, match=r"sentences\[1\] must be a str"):
        encoder.encode(["fine", 7])


def test_identity_is_of_contents_not_of_names(tmp_path, make_checkpoint):
    first = make_checkpoint(tmp_path / "first")
    shutil.copytree(first, tmp_path / "moved")
    found = Encoder.from_pretrained(first, dtype="float32").identity()
    assert json.loads(json.dumps(found)) == found
    assert Encoder.from_pretrained(tmp_path / "moved", dtype="float32").identity() == found

    def changed(folder=first, **arguments) -> set[str]:
        other = Encoder.from_pretrained(folder, **{"dtype": "float32", **arguments}).identity()
        assert other.keys() == found.keys()
        return {name for name in found if other[name] != found[name]} - {"sample"}

    assert changed(pooling="last") == {"pooling"}
    assert changed(max_length=16) == {"max_length"}
    assert changed(window=(-1, 0)) == {"window"}
    assert "dtype" in changed(dtype="bfloat16")
    assert changed(make_checkpoint(tmp_path / "second", seed=1)) == {"base"}
    tokenizer = tmp_path / "moved" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert changed(tmp_path / "moved") == {"tokenizer"}
    (first / "merges.txt").write_text("a b")
    assert changed(first) == {"tokenizer"}


def test_identity_is_also_of_what_the_machine_computes(tiny_llama_folder, encoder, monkeypatch):
    found = encoder.identity()
    attention = ops.scaled_dot_product_attention
    monkeypatch.setattr(ops, "scaled_dot_product_attention", lambda *arguments: attention(*arguments) * (1 + 1e-6))
    other = Encoder.from_pretrained(tiny_llama_folder, dtype="float32", max_length=64).identity()
    assert {name for name in found if other[name] != found[name]} == {"sample"}


def test_the_two_halves_of_encode_rows_are_the_whole(encoder):
    texts = ["one", "\ud800", "a longer text than the first"]
    tokenized = encoder.tokenize_rows(texts, prompt="find: ")
    vectors, reasons, num_tokens = encoder.encode_tokenized(tokenized, normalize_embeddings=True)
    expected = encoder.encode_rows(texts, prompt="find: ", normalize_embeddings=True)
    assert np.array_equal(vectors, expected[0])
    assert (reasons, num_tokens) == expected[1:]
    assert [reason is None for reason in reasons] == [True, False, True]


def test_windows_tokenised_ahead_give_the_same_vectors(encoder, monkeypatch):
    texts = [f"number {place} " + "fox " * (place % 9) for place in range(23)]
    texts[13] = "\ud800"
    vectors, reasons, num_tokens = encoder.encode_rows(texts)
    monkeypatch.setattr(encoder_module, "_WINDOW", 5)
    found, its_reasons, its_tokens = encoder.encode_rows(texts)
    assert np.array_equal(found, vectors)
    assert (its_reasons, its_tokens) == (reasons, num_tokens)
    assert [place for place, reason in enumerate(reasons) if reason] == [13]

    def fail(*_, **__):
        raise RuntimeError("a pass failed")

    monkeypatch.setattr(encoder, "encode_tokenized", fail)
    with pytest.raises(RuntimeError, match="a pass failed"):
        encoder.encode_rows(texts)
    assert not [thread for thread in threading.enumerate() if thread.name == "ahead"]
