"""Tokenizers of a few hundred tokens that are made as those of the model families are."""

import json
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

WORDS = "the quick brown fox jumps over a lazy dog: find what answers it. (see p. 7) 北京 naïve café München:\n\n"

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")


def byte_level(pattern: str, bos: str | None, eos: str) -> Tokenizer:
    """As Llama 3's and Qwen 2's: bytes, after a split by a regular expression."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    tokenizer.add_special_tokens([token for token in (bos, eos) if token])
    if bos is not None:
        tokenizer.post_processor = template(tokenizer, bos)
    return tokenizer


def sentencepiece(metaspace: bool) -> Tokenizer:
    """As Llama 2's and Mistral's: spaces are `▁`, one more stands in front, what is unknown falls apart into bytes."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator([WORDS] * 4, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = template(tokenizer, "<s>")
    return tokenizer


def template(tokenizer: Tokenizer, bos: str, eos: str = "") -> processors.TemplateProcessing:
    tokens = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token]
    return processors.TemplateProcessing(single=f"{bos} $A {eos}".strip(), special_tokens=tokens)


FAMILIES = {
    "llama-2": ("llama", "LlamaTokenizer", lambda: sentencepiece(False), "<s>", "</s>"),
    "llama-2 as it stands": ("llama", "PreTrainedTokenizerFast", lambda: sentencepiece(False), "<s>", "</s>"),
    "mistral": ("mistral", "LlamaTokenizerFast", lambda: sentencepiece(True), "<s>", "</s>"),
    "llama-3": ("llama", "PreTrainedTokenizerFast", lambda: byte_level(LLAMA_3, "<s>", "</s>"), "<s>", "</s>"),
    "qwen-2": ("qwen2", "Qwen2Tokenizer", lambda: byte_level(QWEN_2, None, "<|endoftext|>"), None, "<|endoftext|>"),
    "qwen-3": ("qwen3", "Qwen2Tokenizer", lambda: byte_level(QWEN_2, None, "<|endoftext|>"), None, "<|endoftext|>"),
}


@pytest.fixture(scope="session")
def family_folder_in(make_checkpoint):
    """Makes a checkpoint with a family's tokenizer, and the chat template that instruction-tuned models have."""

    def make(folder: Path, family: str, *added: AddedToken) -> Path:
        architecture, tokenizer_class, make_tokenizer, bos, eos = FAMILIES[family]
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(list(added))
        if family.startswith("qwen"):
            tokenizer.normalizer = normalizers.NFC()
        make_checkpoint(folder, architecture, vocab_size=tokenizer.get_vocab_size())
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": tokenizer_class, "eos_token": eos, "chat_template": "{{ messages }} and more"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config | ({"bos_token": bos} if bos else {})))
        return folder

    return make


@pytest.fixture
def family_folder(family_folder_in, tmp_path):
    """As `family_folder_in`, in a folder of the test's own."""
    return lambda family, *added: family_folder_in(tmp_path / "model", family, *added)


@pytest.fixture(scope="session")
def make_tokenizer():
    """Makes the tokenizer of a family."""
    return lambda family: FAMILIES[family][2]()


@pytest.fixture(scope="session")
def bos_and_eos():
    """`bos_and_eos(tokenizer, bos, eos)`: what puts them around a text."""
    return template
