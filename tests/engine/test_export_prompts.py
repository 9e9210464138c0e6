"""An exported folder gives the same vectors in sentence-transformers: every family of tokenizers, with prompts too."""

import gzip
import json
import shutil

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from bivec import Encoder
from bivec.engine.export import export
from bivec.engine.export_tokenizer import check_tokenizer, write_tokenizer
from bivec.engine.run_folder import RunDescription
from bivec.engine.tokens import TextTokenizer, load_tokenizer

TEXTS = [
    *("dog", "the quick brown fox", "7", "7 foxes in 2026", "北京", "München, naïve café", "😀", "(see p. 3)", ": so"),
    *(" two", "  three", "\nline", "Ġorġ", "▁x", "</s> fox", "a<s>b", "find: ", "many sequences side by side " * 9),
]
PROMPTS = {"query": "Instruct: find what answers it.\nQuery: ", "document": "passage: ", "one": "x ", "none": ""}


def assert_near(theirs: np.ndarray, ours: np.ndarray) -> None:
    """Each vector differs by at most a hundred thousandth of its length."""
    assert (np.linalg.norm(theirs - ours, axis=-1) / np.linalg.norm(ours, axis=-1)).max() < 1e-5


FAMILIES = ["llama-2", "llama-2 as it stands", "mistral", "llama-3", "qwen-2", "qwen-3"]


@pytest.fixture
def peer():
    """`SentenceTransformer` of a folder, on the CPU, in float32."""
    library = pytest.importorskip("sentence_transformers", reason="package sentence-transformers is not installed")
    return lambda folder: library.SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_masked_as_here(family_folder, peer, tmp_path, family, pooling):
    folder = family_folder(family)
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": PROMPTS, "default_prompt_name": "document"})
    )
    source = Encoder.from_pretrained(folder, dtype="float32", pooling=pooling, max_length=64)
    export(folder, tmp_path / "out", pooling=pooling, max_length=64, dtype="float32")
    exported, theirs = Encoder.from_pretrained(tmp_path / "out", dtype="float32"), peer(tmp_path / "out")
    assert exported.max_length == theirs.max_seq_length == 64
    assert (exported.prompts, exported.default_prompt_name) == (PROMPTS, "document")
    for name in PROMPTS:
        expected = source.encode(TEXTS, prompt_name=name)
        assert np.array_equal(exported.encode(TEXTS, prompt_name=name), expected)
        assert_near(theirs.encode(TEXTS, prompt_name=name), expected)
    for method in ("encode", "encode_query", "encode_document"):
        assert_near(getattr(theirs, method)(TEXTS), getattr(source, method)(TEXTS))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_prompts_every_pooling_is_the_same(family_folder, peer, tmp_path, family):
    folder = family_folder(family)
    export(folder, tmp_path / "out", pooling="weighted_mean", max_length=12, dtype="float32")
    exported = Encoder.from_pretrained(tmp_path / "out", dtype="float32")
    assert_near(peer(tmp_path / "out").encode(TEXTS), exported.encode(TEXTS))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_the_readers_own_is_masked_too(family_folder, peer, tmp_path, family):
    folder = family_folder(family)
    export(folder, tmp_path / "out", dtype="float32")
    expected = Encoder.from_pretrained(folder, dtype="float32").encode(TEXTS, prompt="find: ")
    assert_near(peer(tmp_path / "out").encode(TEXTS, prompt="find: "), expected)


def test_tokens_that_were_added_are_exported(family_folder, peer, tmp_path):
    """Those that are found in texts too, as Qwen's `<tool_call>`."""
    folder = family_folder("qwen-2", AddedToken("<tool_call>", normalized=False))
    texts = ["x <tool_call> y", "<tool_call>", "tool call"]
    export(folder, tmp_path / "out", dtype="float32")
    source, exported = (Encoder.from_pretrained(path, dtype="float32") for path in (folder, tmp_path / "out"))
    assert len(source.encode(texts[1], output_value="token_embeddings")) == 1
    assert np.array_equal(exported.encode(texts), source.encode(texts))
    assert_near(peer(tmp_path / "out").encode(texts), source.encode(texts))


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_runs_instruction_is_the_peers_prompt(family_folder, peer, tmp_path, symmetric):
    folder = family_folder("llama-3")
    RunDescription("supervised", None, instruction="find:", symmetric_instruction=symmetric).write(folder)
    source = Encoder.from_pretrained(folder, dtype="float32")
    export(folder, tmp_path / "out", dtype="float32")
    exported, theirs = Encoder.from_pretrained(tmp_path / "out", dtype="float32"), peer(tmp_path / "out")
    for method in ("encode", "encode_query", "encode_document"):
        expected = getattr(source, method)(TEXTS)
        assert np.array_equal(getattr(exported, method)(TEXTS), expected)
        assert_near(getattr(theirs, method)(TEXTS), expected)


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "first", "last"])
@pytest.mark.parametrize("family", ["llama-2", "llama-3", "qwen-3"])
def test_a_model_that_pools_its_prompts_is_exported_as_one(family_folder, peer, tmp_path, family, pooling):
    """Weights of a weighted mean begin at the prompt's first token then, there and here."""
    folder = family_folder(family)
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": PROMPTS | {"line": "find:\n"}}))
    RunDescription("published", None, pooling=pooling, pools_prompt=True).write(folder)
    source = Encoder.from_pretrained(folder, dtype="float32", max_length=32)
    export(folder, tmp_path / "out", max_length=32, dtype="float32")
    exported, theirs = Encoder.from_pretrained(tmp_path / "out", dtype="float32"), peer(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())["include_prompt"] is True
    assert (exported.checkpoint.run.pools_prompt, exported.pooling) == (True, pooling)
    for name in (None, *source.prompts):
        expected = source.encode(TEXTS, prompt_name=name)
        assert np.array_equal(exported.encode(TEXTS, prompt_name=name), expected)
        assert_near(theirs.encode(TEXTS, prompt_name=name), expected)
    if pooling != "last":
        RunDescription("published", None, pooling=pooling).write(folder)
        left_out = Encoder.from_pretrained(folder, dtype="float32", max_length=32)
        queries = left_out.encode(TEXTS, prompt_name="query"), source.encode(TEXTS, prompt_name="query")
        assert np.abs(queries[0] - queries[1]).max() > 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("asked", [False, True])
def test_vectors_of_length_one(family_folder, peer, tmp_path, asked, dtype):
    """Because it was asked for, or because the model's own vectors are such; weights are rounded, not vectors."""
    folder = family_folder("llama-3")
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": PROMPTS}))
    RunDescription("published", None, normalize=not asked).write(folder)
    export(folder, tmp_path / "out", normalize=asked, dtype=dtype)
    export(tmp_path / "out", tmp_path / "again", dtype="float32")
    RunDescription("published", None).write(folder)
    export(folder, tmp_path / "plain", dtype=dtype)
    plain = Encoder.from_pretrained(tmp_path / "plain", dtype="float32")
    unrounded = Encoder.from_pretrained(folder, dtype="float32").encode(TEXTS)
    assert (np.abs(plain.encode(TEXTS) - unrounded).max() > 1e-3) == (dtype == "bfloat16")
    assert [module["path"] for module in json.loads((tmp_path / "plain" / "modules.json").read_text())] == [
        "",
        "1_Pooling",
    ]
    for name in (None, "query"):
        expected = plain.encode(TEXTS, prompt_name=name)
        assert_near(peer(tmp_path / "plain").encode(TEXTS, prompt_name=name), expected)
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        for out in (tmp_path / "out", tmp_path / "again"):
            assert_near(Encoder.from_pretrained(out, dtype="float32").encode(TEXTS, prompt_name=name), expected)
            assert_near(peer(out).encode(TEXTS, prompt_name=name), expected)


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "first", "last"])
@pytest.mark.parametrize("family", ["llama-2", "llama-3", "qwen-3"])
def test_a_bos_that_is_never_pooled(family_folder, peer, tmp_path, family, pooling):
    """As in LLM2Vec: sentence-transformers cannot, but it need not where there is none, or for the last token."""
    folder = family_folder(family)
    RunDescription("published", None, pooling=pooling, pools_special_tokens=False).write(folder)
    if family != "qwen-3" and pooling != "last":
        with pytest.raises(ValueError, match=r"never pools what its tokenizer puts before a text.*--adapter-only"):
            export(folder, tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        return
    export(folder, tmp_path / "out", dtype="float32")
    expected = Encoder.from_pretrained(folder, dtype="float32").encode(TEXTS)
    assert np.array_equal(Encoder.from_pretrained(tmp_path / "out", dtype="float32").encode(TEXTS), expected)
    assert_near(peer(tmp_path / "out").encode(TEXTS), expected)


@pytest.mark.parametrize("family", ["llama-2", "llama-3", "qwen-3"])
def test_a_model_of_sentence_transformers_own(family_folder, peer, tmp_path, family):
    """It leaves out as many tokens as a prompt has alone, its last space too: the peer does before and after."""
    folder = family_folder(family)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"is_causal": False}))
    modules = {"": "base.modules.transformer.Transformer", "1_P": "sentence_transformer.modules.pooling.Pooling"}
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {"name": path or "0", "path": path, "type": f"sentence_transformers.{kind}"}
                for path, kind in modules.items()
            ]
        )
    )
    (folder / "1_P").mkdir()
    pooling = {"embedding_dimension": 64, "pooling_mode": "mean", "include_prompt": False}
    (folder / "1_P" / "config.json").write_text(json.dumps(pooling))
    prompts = PROMPTS | {"line": "find:\n"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    del tokenizer["chat_template"]
    tokenizer |= {"pad_token": tokenizer["eos_token"], "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    export(folder, tmp_path / "out", dtype="float32")
    source, exported = (Encoder.from_pretrained(path, dtype="float32") for path in (folder, tmp_path / "out"))
    before, after = peer(folder), peer(tmp_path / "out")
    texts = [text for text in TEXTS if len(text) > 8 and "<" not in text]
    for name in (None, *prompts):
        expected = source.encode(texts, prompt_name=name)
        assert np.array_equal(exported.encode(texts, prompt_name=name), expected)
        assert_near(before.encode(texts, prompt_name=name), expected)
        assert_near(after.encode(texts, prompt_name=name), expected)


def test_a_chat_template_is_refused(family_folder, tmp_path):
    """sentence-transformers would pool it, and has none without messages; for the last token it is no other matter."""
    folder = family_folder("llama-3")
    RunDescription("published", None, pooling="last", template=("<s>user\n\n", "</s>")).write(folder)
    with pytest.raises(ValueError, match=r"puts texts into the chat template \('<s>user.*--adapter-only"):
        export(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(("prompt", "end"), [("find:\n", ""), ("find: ", "</s>")])
def test_a_prompt_that_would_be_masked_otherwise_is_refused(family_folder, bos_and_eos, peer, tmp_path, prompt, end):
    """Its last token grows with a text that begins with a line feed; or a token after the text hides its last space."""
    folder = family_folder("llama-3")
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"it": prompt}}))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = bos_and_eos(tokenizer, "<s>", end)
    tokenizer.save(str(folder / "tokenizer.json"))
    message = r"the prompt 'it' .* cannot be exported: sentence-transformers would leave \d+ tokens out of pooling"
    with pytest.raises(ValueError, match=message):
        export(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    export(folder, tmp_path / "out", pooling="last", dtype="float32")  # which leaves nothing out
    texts = [*TEXTS, "\n"]  # whose only token begins in the first prompt
    expected = Encoder.from_pretrained(folder, pooling="last", dtype="float32").encode(texts, prompt=prompt)
    assert_near(peer(tmp_path / "out").encode(texts, prompt_name="it"), expected)


def test_a_passage_prompt_is_the_peers_for_documents(family_folder, peer, tmp_path):
    folder = family_folder("llama-3")
    prompts = {"prompts": {"query": "query: ", "passage": "passage: "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    export(folder, tmp_path / "out", dtype="float32")
    expected = Encoder.from_pretrained(folder, dtype="float32").encode_document(TEXTS)
    assert_near(peer(tmp_path / "out").encode_document(TEXTS), expected)


def test_vocabulary_and_merges_are_a_tokenizer_too(family_folder, peer, tmp_path):
    """As GPT-2 and the first Qwen have them, without tokenizer.json, special tokens named in a file of their own."""
    folder = family_folder("qwen-2")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in model["merges"]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (folder / "tokenizer.json").unlink()
    source = Encoder.from_pretrained(folder, dtype="float32")
    export(folder, tmp_path / "out", dtype="float32")
    expected = source.encode(TEXTS, prompt="query: ")
    assert len(np.unique(expected, axis=0)) > len(TEXTS) // 2
    exported = Encoder.from_pretrained(tmp_path / "out", dtype="float32")
    assert np.array_equal(exported.encode(TEXTS, prompt="query: "), expected)
    assert_near(peer(tmp_path / "out").encode(TEXTS), source.encode(TEXTS))


def test_special_tokens_may_stand_in_their_own_file_alone(fresh_llama_folder, peer, tmp_path):
    path = fresh_llama_folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    named = {name: values.pop(name) for name in ("bos_token", "eos_token")}
    path.write_text(json.dumps(values))
    (fresh_llama_folder / "special_tokens_map.json").write_text(json.dumps(named))
    export(fresh_llama_folder, tmp_path / "out", dtype="float32")
    expected = Encoder.from_pretrained(fresh_llama_folder, dtype="float32").encode(TEXTS)
    assert_near(peer(tmp_path / "out").encode(TEXTS), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_model(shared_data, peer, tmp_path, dtype):
    shutil.copytree(shared_data / "stories260K" / "hf", tmp_path / "model")
    (tmp_path / "model" / "config_sentence_transformers.json").write_text(json.dumps({"prompts": PROMPTS}))
    export(tmp_path / "model", tmp_path / "out", dtype=dtype, normalize=dtype == "bfloat16")
    ours = Encoder.from_pretrained(tmp_path / ("model" if dtype == "float32" else "out"), dtype="float32")
    theirs = peer(tmp_path / "out")
    for name in (None, *PROMPTS):
        assert_near(theirs.encode(TEXTS, prompt_name=name), ours.encode(TEXTS, prompt_name=name))


@pytest.mark.parametrize("name", ["mistral-7b-v1", "open_llama_3b"])
def test_real_vocabularies(shared_data, tmp_path, name):
    with gzip.open(shared_data / "tokenizers" / f"{name}.tokenizer.json.gz", "rt", encoding="utf-8") as stream:
        backend = Tokenizer.from_str(stream.read())
    real = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    size = backend.get_vocab_size()
    write_tokenizer(real, tmp_path, prompts=PROMPTS.values(), max_length=512, vocab_size=size)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    check_tokenizer(TextTokenizer(real, 512), load_tokenizer(tmp_path, size), PROMPTS, counted=True)
