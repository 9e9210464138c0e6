"""Text to token ids: prompt and text are joined as given and tokenised once; the text's first token is found by offset.

Special-token strings inside a text (`</s>`, `<|eot_id|>`) are plain text. Texts are cut to `max_length` tokens, special
tokens included, by the tokenizer's own truncation, as transformers and sentence-transformers do.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
import transformers


class Tokenized(NamedTuple):
    """One text: its token ids and the place of the first token that is pooled."""

    ids: list[int]
    pool_start: int


class Rejected(NamedTuple):
    """A text that has no embedding, and why."""

    reason: str


class TextTokenizer:
    """Tokenises texts for one encoder; `hugging_face` is the unchanged transformers tokenizer."""

    def __init__(self, hugging_face: transformers.PreTrainedTokenizerBase, max_length: int):
        backend = getattr(hugging_face, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"the tokenizer must have a fast form (tokenizer.json), got {type(hugging_face).__name__}")
        self.hugging_face = hugging_face
        self.max_length = max_length
        self._backend = tokenizers.Tokenizer.from_str(backend.to_str())  # a copy: ours to configure
        self._backend.no_padding()
        self._backend.enable_truncation(max_length)
        self._backend.encode_special_tokens = True

    def __call__(self, texts: Sequence[str], prompts: Sequence[str]) -> list[Tokenized | Rejected]:
        """Tokenise `prompt + text` for each pair; a text that leaves nothing to pool is `Rejected`, never guessed."""
        results: list[Tokenized | Rejected | None] = [_reject(text, p) for text, p in zip(texts, prompts, strict=True)]
        good = [i for i, result in enumerate(results) if result is None]
        encodings = self._backend.encode_batch([prompts[i] + texts[i] for i in good])
        for i, encoding in zip(good, encodings, strict=True):
            results[i] = self._locate(encoding, prompts[i])
        return [result for result in results if result is not None]

    def _locate(self, encoding: tokenizers.Encoding, prompt: str) -> Tokenized | Rejected:
        ids = encoding.ids
        if not prompt:
            return (
                Tokenized(ids, 0) if ids else Rejected("the text is empty and the tokenizer adds no token of its own")
            )
        prompt_end = len(prompt)
        for place, (_, end) in enumerate(encoding.offsets):
            if end > prompt_end:
                return Tokenized(ids, place)
        return Rejected(
            f"no token of the text is left after the prompt ({len(ids)} tokens, max_length {self.max_length})"
        )


def as_prompt(instruction: str) -> str:
    """What stands before a text: the instruction and, as in LLM2Vec, a space unless it ends with white space."""
    return instruction + " " if instruction and not instruction[-1].isspace() else instruction


def load_tokenizer(folder: str | Path, vocab_size: int) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a local checkpoint folder.

    Raises:
        ValueError: there is none, or it has more tokens than the model has embeddings.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no tokenizer that transformers can read: {error}") from error
    # a special token that nothing produces (a padding token added later) may lie beyond the embeddings
    unused = set(tokenizer.all_special_ids) - set(tokenizer("")["input_ids"])
    largest = max(set(tokenizer.get_vocab().values()) - unused, default=-1)
    if largest >= vocab_size:
        raise ValueError(f"{folder}: the tokenizer has token id {largest}, but the model has {vocab_size} embeddings")
    return tokenizer


def _reject(text: str, prompt: str) -> Rejected | None:
    for name, value in (("text", text), ("prompt", prompt)):
        if not isinstance(value, str):
            return Rejected(f"the {name} must be a string, got {type(value).__name__}")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            return Rejected(f"the {name} holds a lone surrogate (U+{ord(value[error.start]):04X}) at {error.start}")
    return None
