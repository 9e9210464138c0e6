"""What a GGUF file says of a tokenizer, and which tokenizers llama.cpp's own code would not do the same as."""

import re
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import Regex, normalizers, pre_tokenizers

from bivec.engine.gguf_tokenizer import tokenizer_keys

LLAMA3 = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def byte_level(pre_tokenizer=None, normalizer=None, added=(), single="<s> $A", drop=(), **model):
    """A tokenizer of bytes and two merges."""
    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "hel"]
    vocab = {piece: place for place, piece in enumerate(pieces) if piece not in drop}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("h", "e"), ("he", "l")], **model))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(list(added))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def split(pattern):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


@pytest.mark.parametrize(
    ("pre_tokenizer", "ignore_merges", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), False, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]), False, "smollm"),
        (split(LLAMA3), True, "llama-bpe"),
        (split(LLAMA3), False, "smaug-bpe"),
        (split(QWEN2), False, "qwen2"),
    ],
)
def test_known_regular_expressions(pre_tokenizer, ignore_merges, name):
    keys, caveats = tokenizer_keys(byte_level(pre_tokenizer, ignore_merges=ignore_merges), 260)
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"], caveats) == ("gpt2", name, [])
    assert keys["tokenizer.ggml.merges"] == ["h e", "he l"]


@pytest.mark.parametrize(
    ("single", "before", "after"), [("$A", False, False), ("<s> $A", True, False), ("<s> $A </s>", True, True)]
)
def test_special_and_added_tokens(single, before, after):
    keys, _ = tokenizer_keys(byte_level(single=single, added=["<tool>"]), 263)
    assert keys["tokenizer.ggml.add_bos_token"] is before
    assert keys["tokenizer.ggml.add_eos_token"] is after
    assert keys["tokenizer.ggml.tokens"][-4:] == ["hel", "<tool>", "[PAD261]", "[PAD262]"]
    assert keys["tokenizer.ggml.token_type"] == [3, 3, *[1] * 258, 4, 5, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre_tokenizer": split(r"\w+|\s+")}, "name of its pre_tokenizer is not known"),
        ({"pre_tokenizer": split(QWEN2), "ignore_merges": True}, "ignore_merges True"),
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "'add_prefix_space': True"),
        ({"normalizer": normalizers.Lowercase()}, "does not do its normalizer {'type': 'Lowercase'"),
        ({"added": [tokenizers.AddedToken("<a>", lstrip=True)]}, "added token '<a>' must not depend"),
        ({"drop": ["Ā"]}, "its byte-level BPE lacks tokens of single bytes"),
        ({"dropout": 0.5}, "dropout is not supported, got 0.5"),
        ({"added": ["[PAD190]"], "drop": ["Ā"]}, "two of its tokens have the same text"),
        ({"single": "<s> <s> $A"}, "one token at most may be added before a text"),
    ],
)
def test_what_llama_cpp_would_tokenise_otherwise_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tokenizer_keys(byte_level(**changes), 261)


def sentencepiece(merges, normalizer=None, pre_tokenizer=None, tokens=(), drop=(), added=()):
    """A tokenizer as those that are converted from SentencePiece: single characters, bytes, and what is merged."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abc", *tokens]
    pieces += dict.fromkeys(left + right for left, right in merges)
    vocab = {piece: place for place, piece in enumerate(pieces) if piece not in drop}
    model = tokenizers.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    if normalizer is None and pre_tokenizer is None:
        normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens(list(added))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names), len(pieces) + len(added)


PAIRS = ("b c", "a b", "▁ a", "▁a b", "▁ ab", "c c", "bc c", "b cc")
MERGES = [tuple(pair.split()) for pair in PAIRS]


def join_by_score(text, keys):
    """What llama.cpp does with a SentencePiece vocabulary: the neighbours of the best union are joined, and again."""
    keys = {name.removeprefix("tokenizer.ggml."): value for name, value in keys.items()}
    ids = {token: place for place, token in enumerate(keys["tokens"])}
    symbols = [*(" " * (keys["add_space_prefix"] and text != "") + text).replace(" ", "▁")]
    while True:
        unions = [(ids.get(one + other), place) for place, (one, other) in enumerate(pairwise(symbols))]
        scored = [(-keys["scores"][number], place) for number, place in unions if number is not None]
        if not scored:
            break
        _, place = min(scored)
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    found = [keys["bos_token_id"]] if keys["add_bos_token"] else []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


@pytest.mark.parametrize("scheme", [None, "always", "first", "never"])
def test_scores_join_what_merges_do(scheme):
    metaspace = scheme and pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer, size = sentencepiece(MERGES, pre_tokenizer=metaspace)
    keys, caveats = tokenizer_keys(tokenizer, size)
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.add_space_prefix"]) == ("llama", scheme != "never")
    assert keys["tokenizer.ggml.token_type"] == [2, 3, 3, *[6] * 256, *[1] * (size - 259)]
    assert caveats == (["begin with a space"] if scheme in ("always", "first") else [])
    chance = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(chance.choice([*"aabbcc é"], chance.integers(1, 12))).lstrip()
        assert join_by_score(text, keys) == tokenizer(text)["input_ids"], text


def test_texts_that_llama_cpp_gives_other_tokens_are_named():
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    _, caveats = tokenizer_keys(*sentencepiece(MERGES, pre_tokenizer=metaspace, added=["<tool>"]))
    assert caveats == ["begin with a space", "hold an added token"]
    assert tokenizer_keys(*sentencepiece(MERGES, added=["<tool>"]))[1] == []
    assert tokenizer_keys(byte_level(normalizer=normalizers.NFC()), 260)[1] == ["are not in Unicode's form NFC"]


def test_a_token_beyond_the_embedding_is_left_out():
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    keys, _ = tokenizer_keys(tokenizer, 260)
    assert "tokenizer.ggml.padding_token_id" not in keys
    assert "<pad>" not in keys["tokenizer.ggml.tokens"]
    keys, _ = tokenizer_keys(tokenizer, 261)
    assert keys["tokenizer.ggml.padding_token_id"] == keys["tokenizer.ggml.tokens"].index("<pad>") == 260


def test_only_bpe_is_written():
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    with pytest.raises(ValueError, match="its model must be BPE, got Unigram"):
        tokenizer_keys(transformers.PreTrainedTokenizerFast(tokenizer_object=unigram), 2)


def test_scores_of_a_real_tokenizer(shared_data):
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data / "stories260K" / "hf")
    keys, caveats = tokenizer_keys(tokenizer, 512)
    assert caveats == ["have a line that begins or ends with a space", "hold several spaces in a row"]
    for text in ["Once upon a time, Lily's cat ran.", "München, naïve café, 北京 😀!? 12345", "a\n\nb\tc", "x"]:
        assert join_by_score(text, keys) == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merges": MERGES[:-1]}, "would make the token 'bcc' where no merge does"),
        ({"merges": MERGES, "tokens": ["xy"]}, "would make the token 'xy' where no merge does"),
        ({"merges": [MERGES[4], *MERGES[:4], *MERGES[5:]]}, "must have neighbouring ranks"),
        ({"merges": MERGES, "drop": ["<0x41>"]}, "lacks tokens of single bytes"),
        ({"merges": MERGES, "normalizer": normalizers.Prepend("▁")}, "must write a space as ▁"),
        ({"merges": MERGES, "normalizer": normalizers.NFKC()}, "does not do {'type': 'NFKC'}"),
        ({"merges": MERGES, "pre_tokenizer": pre_tokenizers.Metaspace(split=True)}, "does not do {'type': 'Metaspace'"),
    ],
)
def test_what_scores_cannot_say_is_refused(changes, message):
    tokenizer, size = sentencepiece(**changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        tokenizer_keys(tokenizer, size)
