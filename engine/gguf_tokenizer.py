"""A tokenizer as GGUF's keys, for llama.cpp, which has its own code for it: what that would do otherwise is refused.

llama.cpp knows byte-level BPE by a name of its regular expression. SentencePiece's BPE it does without merges, by
joining the neighbours whose union is the token of the best score. That is the same only where all pairs that make a
token are merges, and those of one token have neighbouring ranks, as in files that were converted from SentencePiece.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

if TYPE_CHECKING:
    import transformers

Keys = dict[str, Any]

# llama.cpp's kinds of tokens
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's names of what splits words; they also say whether a word that is a token is taken whole
_PRE_TOKENIZERS = {
    (_WORDS % r"\p{N}{1,3}", True): "llama-bpe",
    (_WORDS % r"\p{N}{1,3}", False): "smaug-bpe",
    (_WORDS % r"\p{N}", False): "qwen2",
    ("ByteLevel", False): "gpt-2",
    ("Digits", False): "smollm",
}


def tokenizer_keys(tokenizer: "transformers.PreTrainedTokenizerBase", vocab_size: int) -> tuple[Keys, list[str]]:
    """GGUF's keys of a tokenizer, and which texts llama.cpp will give other tokens.

    Texts that spell a special token (`</s>`) are each program's own affair: llama-server takes it for the token.

    Args:
        vocab_size: rows of the embedding; ids that the tokenizer lacks become unused tokens.
    Raises:
        ValueError: saying what the tokenizer does that llama.cpp does not.
    """
    keys, caveats = _token_keys(tokenizer.backend_tokenizer, vocab_size)
    keys |= _special_tokens(tokenizer, vocab_size)
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}, caveats


def caveats_of(path: Path, vocab_size: int) -> list[str]:
    """Which texts llama.cpp will give other tokens than a `tokenizer.json`; raises ValueError as `tokenizer_keys`."""
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split()):.300}") from error
    return _token_keys(backend, vocab_size)[1]


def _token_keys(backend: tokenizers.Tokenizer, vocab_size: int) -> tuple[Keys, list[str]]:
    """All keys but those of what stands before and after a text."""
    described = json.loads(backend.to_str())
    model, added = described["model"], [token for token in described["added_tokens"] if token["id"] < vocab_size]
    if model["type"] != "BPE":
        raise ValueError(f"its model must be BPE, got {model['type']}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"{key} is not supported, got {model[key]!r}")
    for token in added:
        if not token["special"] and (token["single_word"] or token["lstrip"] or token["rstrip"]):
            raise ValueError(f"the added token {token['content']!r} must not depend on what stands beside it")
    texts = {number: text for text, number in model["vocab"].items()}
    texts |= {token["id"]: token["content"] for token in added}
    tokens = [texts.get(number, f"[PAD{number}]") for number in range(vocab_size)]
    if len(set(tokens)) < vocab_size:
        raise ValueError("two of its tokens have the same text")
    kinds = {token["content"]: _CONTROL if token["special"] else _USER_DEFINED for token in added}
    if model.get("byte_fallback"):
        keys, caveats = _sentencepiece(described)
        kinds |= dict.fromkeys(_BYTE_TOKENS, _BYTE) | {model["unk_token"]: _UNKNOWN}
        scores = _scores(model, kinds)
        keys["scores"] = [scores.get(token, -float(len(scores))) for token in tokens]
    else:
        keys, caveats = _byte_level(described)
        keys["merges"] = [" ".join(pair) for pair in _merges(model)]
    keys["tokens"] = tokens
    keys["token_type"] = [kinds.get(token, _NORMAL) if i in texts else _UNUSED for i, token in enumerate(tokens)]
    return keys, caveats


def _byte_level(described: Mapping[str, Any]) -> tuple[Keys, list[str]]:
    """Byte-level BPE, as of Llama 3, Qwen and SmolLM."""
    model, normalizer = described["model"], described["normalizer"]
    if set(ByteLevel.alphabet()) - model["vocab"].keys():
        raise ValueError("its byte-level BPE lacks tokens of single bytes")
    if normalizer not in (None, {"type": "NFC"}):
        raise ValueError(f"llama.cpp does not do its normalizer {normalizer!r:.200}")
    steps = _steps(described["pre_tokenizer"])
    match steps:
        case [{"type": "ByteLevel", "use_regex": True}]:
            rule = "ByteLevel"
        case [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}]:
            rule = "Digits"
        case [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "use_regex": False},
        ]:
            rule = regex
        case _:
            rule = ""
    name = _PRE_TOKENIZERS.get((rule, bool(model.get("ignore_merges"))))
    if name is None or steps[-1]["add_prefix_space"]:
        raise ValueError(
            f"llama.cpp's name of its pre_tokenizer is not known: {steps!r:.400}, "
            f"ignore_merges {model.get('ignore_merges')}"
        )
    return {"model": "gpt2", "pre": name}, [] if normalizer is None else ["are not in Unicode's form NFC"]


def _sentencepiece(described: Mapping[str, Any]) -> tuple[Keys, list[str]]:
    """SentencePiece's BPE, as of Llama 2 and Mistral: spaces are `▁`, and unknown characters bytes."""
    if _BYTE_TOKENS - described["model"]["vocab"].keys():
        raise ValueError("its BPE with byte_fallback lacks tokens of single bytes")
    prefix, spaces, caveats = False, False, []
    for step in [*_steps(described["normalizer"]), *_steps(described["pre_tokenizer"])]:
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                spaces = True
            case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}:
                prefix, spaces = scheme != "never", True
                caveats += ["begin with a space"] if prefix else []
                if prefix and not all(token["special"] for token in described["added_tokens"]):
                    caveats.append("hold an added token")
            case {"type": "Replace", "pattern": {"Regex": "^ +| +$"}, "content": ""}:
                caveats.append("have a line that begins or ends with a space")
            case {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}:
                caveats.append("hold several spaces in a row")
            case _:
                raise ValueError(f"llama.cpp does not do {step!r:.200}")
    if not spaces:
        raise ValueError("its BPE with byte_fallback must write a space as ▁")
    return {"model": "llama", "pre": "default", "add_space_prefix": prefix}, caveats


def _scores(model: Mapping[str, Any], kinds: Mapping[str, int]) -> dict[str, float]:
    """A score of each token that merges make, the best first; raises ValueError where scores cannot say the same."""
    merges, vocab = list(_merges(model)), model["vocab"]
    made = [left + right for left, right in merges]
    ranks = dict.fromkeys(made)
    if sum(one != other for one, other in pairwise(made)) >= len(ranks) > 0:
        raise ValueError("merges that make one token must have neighbouring ranks")
    pairs = set(merges)
    for token in vocab.keys() - kinds.keys():
        splits = {(token[:place], token[place:]) for place in range(1, len(token))} - pairs
        if any(left in vocab and right in vocab for left, right in splits) or (splits and {*token} - vocab.keys()):
            raise ValueError(f"llama.cpp would make the token {token!r} where no merge does")
    return {token: -float(rank) for rank, token in enumerate(ranks)}


def _merges(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _steps(described: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """What a normalizer or pre-tokenizer does, one after the other."""
    if described is None:
        return []
    parts = described.get("normalizers") or described.get("pretokenizers")
    return [described] if parts is None else [step for part in parts for step in _steps(part)]


def _special_tokens(tokenizer: "transformers.PreTrainedTokenizerBase", vocab_size: int) -> Keys:
    """Which tokens stand before and after every text."""
    bare, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    before = next((place for place in (0, 1) if whole[place : place + len(bare)] == bare), None)
    after = len(whole) - len(bare) - (before or 0)
    if before is None or after > 1:
        raise ValueError(f"one token at most may be added before a text and one after it, got {whole} of {bare}")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")}
    ids |= {"unknown_token_id": tokenizer.unk_token_id, "padding_token_id": tokenizer.pad_token_id}
    ids |= ({"bos_token_id": whole[0]} if before else {}) | ({"eos_token_id": whole[-1]} if after else {})
    known = {name: number for name, number in ids.items() if number is not None and number < vocab_size}
    return known | {"add_bos_token": bool(before), "add_eos_token": bool(after)}
