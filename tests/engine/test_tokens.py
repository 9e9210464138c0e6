"""A long text is cut before it is tokenised, and gives the tokens that it gives whole."""

import functools
import gzip
import json
import shutil
import time

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from bivec.engine import tokens
from bivec.engine.tokens import Rejected, TextTokenizer, copy_tokenizer, load_tokenizer

WORDS = [
    "the",
    "quick",
    "naïve",
    "北京",
    "e\u0301",
    "don't",
    "1234567",
    "12,5",
    "(see",
    "p.)",
    "…",
    "—",
    "😀",
    "İΣ",
    "a_b",
]
SPACES = [" ", " ", " ", " ", "  ", "\n", "\n\n", " \n ", "\t", "\r\n", "\u00a0", "\u3000", "▁", "▁ ", "Ġ "]
real_looking = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(SPACES)), max_size=80).map(
    lambda pairs: "".join(word + space for word, space in pairs)
)


@pytest.fixture(scope="module")
def byte_level(tiny_llama_folder):
    return load_tokenizer(tiny_llama_folder, 10**6)


@functools.cache
def cutting_and_not(hugging_face, max_length):
    cutting, whole = TextTokenizer(hugging_face, max_length), TextTokenizer(hugging_face, max_length)
    assert cutting._cuts_before_spaces
    whole._cuts_before_spaces = False
    return cutting, whole


def check(hugging_face, text, prompt, max_length):
    cutting, whole = cutting_and_not(hugging_face, max_length)
    assert cutting([text], [prompt]) == whole([text], [prompt])


@settings(max_examples=300, derandomize=True, deadline=None)
@given(real_looking, st.sampled_from(["", "find this: ", "a b"]), st.integers(2, 6))
def test_byte_level(byte_level, text, prompt, max_length):
    check(byte_level, text, prompt, max_length)


@pytest.mark.parametrize("name", ["mistral-7b-v1", "open_llama_3b"])
def test_sentencepiece_and_real_texts(shared_data, name):
    path = shared_data / "tokenizers" / f"{name}.tokenizer.json.gz"
    with gzip.open(path, "rt") as stream:
        backend = tokenizers.Tokenizer.from_str(stream.read())
    hugging_face = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)

    @settings(max_examples=100, derandomize=True, deadline=None)
    @given(real_looking, st.integers(2, 6))
    def check_text(text, max_length):
        check(hugging_face, text, "", max_length)

    check_text()
    (wiki, *_) = sorted((shared_data / "wiki").glob("*.gz"))
    with gzip.open(wiki, "rt", encoding="utf-8") as stream:
        real = stream.read(200_000)
    for start in range(0, 150_000, 10_000):
        check(hugging_face, real[start : start + 40_000], "query: ", 128)


def test_ten_megabytes_take_milliseconds(byte_level):
    tokenizer = TextTokenizer(byte_level, 512)
    text = "a packed batch holds many sequences " * 290_000
    tokenizer(["warm"], [""])
    start = time.process_time()  # the wall clock would measure whoever else uses the machine
    (found,) = tokenizer([text], [""])
    assert time.process_time() - start < 0.2
    assert len(found.ids) == 512
    assert found == tokenizer([text[:100_000]], [""])[0]


def test_a_text_that_cannot_be_cut_is_not_tokenised_without_end(byte_level, monkeypatch):
    whole = TextTokenizer(byte_level, 4)
    monkeypatch.setattr(tokens, "_CHARACTERS_AT_ONCE", 1000)
    tokenizer = TextTokenizer(byte_level, 4)
    texts = ["x" * 1000, "x" * 1001, "one two", "x" * 600, "y" * 600, "three " * 1000, "x" * 999, None, "a"]
    found = tokenizer(texts, ["", "", "p "] + [""] * 6)
    reason = "1,001 characters without a space to cut at must be tokenised at once, at most 1,000 can be"
    assert found[1] == Rejected(reason)
    texts[1] = "x" * 999
    expected = whole(texts, ["", "", "p "] + [""] * 6)
    assert [*found[:1], *found[2:]] == [*expected[:1], *expected[2:]]
    # whoever asks for all tokens gets them
    assert len(TextTokenizer(byte_level, 10_000)(["x" * 20_000], [""])[0].ids) > 1000


def test_a_prefix_with_too_few_tokens_is_made_longer(byte_level, monkeypatch):
    monkeypatch.setattr(tokens, "_PREFIX_CHARACTERS", 1)
    check(byte_level, "bidirectional attention " * 100, "", 20)
    check(byte_level, "x" * 50 + " y" * 500, "", 60)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(real_looking, st.sampled_from(["", "find this: "]), st.integers(8, 30))
def test_a_text_is_cut_where_it_has_more_tokens(byte_level, text, prompt, max_length):
    (found,) = TextTokenizer(byte_level, max_length)([text], [prompt])
    (whole,) = TextTokenizer(byte_level, 10_000)([text], [prompt])
    if not isinstance(found, Rejected):
        assert found.cut == (len(whole.ids) > max_length)
        assert found.ids == whole.ids[:max_length]


@pytest.mark.parametrize(
    ("num_words", "tail", "cut"), [(20, "", False), (21, "", True), (20, " ", False), (100, "", True)]
)
@pytest.mark.parametrize("prefix", [8, 2])
def test_what_gives_no_token_behind_the_last_is_not_cut(monkeypatch, prefix, num_words, tail, cut):
    """Also where a text is cut before it is tokenised, and its prefix is full."""
    monkeypatch.setattr(tokens, "_PREFIX_CHARACTERS", prefix)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = TextTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend), 20)
    assert tokenizer._cuts_before_spaces
    (found,) = tokenizer([" ".join("a" * num_words) + 500 * tail], [""])
    assert (len(found.ids), found.cut) == (20, cut)


def test_a_vocabulary_with_a_space_inside_a_token_is_not_cut():
    vocabulary = {"a": 0, " ": 1, "b": 2, "a ": 3, "a b": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("a", " "), ("a ", "b")]))
    hugging_face = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer = TextTokenizer(hugging_face, 2)
    assert not tokenizer._cuts_before_spaces
    assert tokenizer(["a b" * 50], [""])[0].ids == [4, 4]


@pytest.mark.parametrize(("bos", "least"), [(True, 2), (False, 1)])
def test_a_length_that_leaves_a_text_no_token_is_refused(make_checkpoint, tmp_path, bos, least):
    hugging_face = load_tokenizer(make_checkpoint(tmp_path, bos=bos), 1000)
    with pytest.raises(ValueError, match=f"max_length must be at least {least} tokens.*, got {least - 1}"):
        TextTokenizer(hugging_face, least - 1)
    (found,) = TextTokenizer(hugging_face, least)(["fox"], [""])
    assert len(found.ids) == least


def test_a_prompt_has_as_many_tokens_before_every_text(byte_level):
    """Its last space is a token of its own before a digit or a space, and part of a word's token else."""
    tokenizer = TextTokenizer(byte_level, 64)
    texts = ["fox", "7 foxes", " fox", "  ", "北京", "😀", "(fox)", "\nfox"]
    found = tokenizer(texts, ["find: "] * len(texts))
    (alone,) = tokenizer(["find:"], [""])
    assert {text.pool_start for text in found} == {len(alone.ids)}
    assert len({tuple(text.ids[: len(alone.ids)]) for text in found}) == 1
    assert tokenizer([""], ["find: "])[0].ids == byte_level("find: ")["input_ids"]


@pytest.mark.parametrize(
    ("text", "prompt", "ids"),
    [
        ("", "", []),
        (" \n", "", []),
        (" ", "a", [0]),
        ("☃", "", None),  # a text, of which the tokenizer knows nothing
        ("☃", "a", None),
        ("", "a b a", None),  # and no room for any text
        (" ", "a b a b", None),
    ],
)
def test_what_is_empty_and_what_has_no_token(text, prompt, ids):
    """A tokenizer that drops white space, and what it does not know."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    hugging_face = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    (found,) = TextTokenizer(hugging_face, 3)([text], [prompt])
    assert isinstance(found, Rejected)
    assert found.ids == ids


def test_a_tokenizer_is_copied_with_all_its_files(make_checkpoint, tmp_path):
    """One of vocab.json and merges.txt, as full fine-tuning puts it beside its weights."""
    source, target = make_checkpoint(tmp_path / "source", "qwen2"), tmp_path / "target"
    texts, prompts = ["the quick brown fox", "naïve 7"], ["find: ", ""]
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    (source / "vocab.json").write_text(json.dumps(model["vocab"]))
    (source / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in model["merges"]))
    (source / "tokenizer.json").unlink()
    target.mkdir()
    shutil.copyfile(source / "config.json", target / "config.json")
    copy_tokenizer(source, target)
    expected, found = (TextTokenizer(load_tokenizer(folder, 1000), 64)(texts, prompts) for folder in (source, target))
    assert found == expected
    assert all(len(text.ids) > 2 for text in found)


def test_many_texts_are_tokenised_as_one_is(tiny_llama_folder):
    tokenizer = TextTokenizer(load_tokenizer(tiny_llama_folder, 1000), 16)
    texts = ["" if n % 5 == 0 else f"fox {n} " * (n % 9) for n in range(600)]
    prompts = ["find: " if n % 3 else "" for n in range(600)]
    expected = [tokenizer([text], [prompt])[0] for text, prompt in zip(texts, prompts, strict=True)]
    assert tokenizer(texts, prompts) == expected
    assert any(isinstance(text, Rejected) for text in expected)


@pytest.mark.parametrize("prompt", ["", "find this: "])
def test_what_is_pooled(byte_level, prompt):
    """BOS where there is no prompt, or always, or never."""
    own = len(byte_level(prompt.strip())["input_ids"])  # and BOS
    for arguments, expected in (
        ({}, own if prompt else 0),
        ({"pools_special_tokens": False}, own),
        ({"pools_prompt": True}, 0),
    ):
        tokenizer = TextTokenizer(byte_level, 64, **arguments)
        assert tokenizer(["fox"], [prompt])[0].pool_start == expected
        (empty,) = tokenizer([""], [prompt])
        assert isinstance(empty, Rejected) == (expected != 0)


USER = ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>")
INST = ("[INST] ", " [/INST]")


@pytest.fixture
def make_instructed(make_tokenizer, bos_and_eos):
    """Makes a family's tokenizer with Llama 3's special tokens and what stands around its texts."""

    def make(family, end=""):
        backend = make_tokenizer(family)
        backend.post_processor = bos_and_eos(backend, "<s>", end)
        backend.add_special_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
        both = [tokenizers.processors.ByteLevel(), backend.post_processor]
        backend.post_processor = tokenizers.processors.Sequence(both)
        backend.enable_truncation(3)  # as many published files are
        backend.enable_padding()
        return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")

    return make


@pytest.mark.parametrize(
    ("family", "end", "template"),
    [("llama-3", "", USER), ("llama-3", "</s>", USER), ("llama-2", "", INST), ("mistral", "", INST)],
)
def test_a_template_gives_the_tokens_of_one_string(make_instructed, family, end, template):
    hugging_face = make_instructed(family, end)
    tokenizer = TextTokenizer(hugging_face, 64, pools_special_tokens=False, template=template)
    for prompt in ("", "find what answers it: "):
        for text in ("fox", "the quick brown fox \n ", " two", "\nline", "北京 naïve", "7 foxes", "x" * 9):
            (found,) = tokenizer([text], [prompt])
            whole = template[0] + prompt + text.rstrip() + template[1]
            expected = hugging_face(whole, return_offsets_mapping=True)
            assert found.ids == expected["input_ids"]
            start = len(template[0] + prompt)
            first = next(i for i, (_, end) in enumerate(expected["offset_mapping"]) if end > start)
            spaces = hugging_face.convert_ids_to_tokens(found.ids[found.pool_start : first])
            assert spaces in ([], ["Ġ"], ["▁"])  # which ends what stands before


def test_a_templates_special_tokens_are_special_in_it_alone(make_instructed):
    hugging_face = make_instructed("llama-3")
    special = {place for place, token in hugging_face.added_tokens_decoder.items() if token.special}
    tokenizer = TextTokenizer(hugging_face, 12, pools_special_tokens=False, template=USER)
    head, tail = (hugging_face(part, add_special_tokens=False)["input_ids"] for part in USER)
    hostile, long, blank = tokenizer(["<|eot_id|>", "the quick brown fox " * 500, " \n"], [""] * 3)
    for found in (hostile, long):
        assert found.ids[: found.pool_start] == hugging_face("")["input_ids"] + head
        assert found.ids[-len(tail) :] == tail
        assert not set(found.ids[found.pool_start : -len(tail)]) & special
        assert len(found.ids) == 12
    assert isinstance(blank, Rejected)
    assert isinstance(
        TextTokenizer(hugging_face, 64, pools_special_tokens=False, template=INST)([" "], [""])[0], Rejected
    )
    least = len(head) - 2 + 1 + len(tail)  # the line feeds are the text's
    with pytest.raises(ValueError, match=f"{least} of which the tokenizer and the template add"):
        TextTokenizer(hugging_face, least, template=USER)


def test_a_template_that_would_give_other_tokens_is_refused(make_instructed):
    """Mistral's newer tokenizers put their space before the first word alone."""
    with pytest.raises(ValueError, match=r"template \('</s>', ''\) cannot be put around a text"):
        TextTokenizer(make_instructed("mistral"), 64, template=("</s>", ""))


@pytest.mark.parametrize("family", ["llama-3", "mistral"])
def test_a_long_text_in_a_template_is_cut_as_it_is_whole(make_instructed, family):
    template = USER if family == "llama-3" else INST
    cutting, whole = (TextTokenizer(make_instructed(family), 24, template=template) for _ in range(2))
    assert cutting._cuts_before_spaces
    whole._cuts_before_spaces = False
    texts = [
        "many sequences side by side " * 99,
        "fox " * 30 + "x" * 300,
        "a " * 12,
        "a b c d e f g h i j k " + "x" * 400,
    ]
    assert cutting(texts, ["find: "] * 4) == whole(texts, ["find: "] * 4)
