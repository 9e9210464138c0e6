"""A tokenizer written for all readers, and shown to give them the tokens of texts and prompts that it gives here.

sentence-transformers pools what follows the tokens that a prompt has *alone*, less one where the last of them is a
special token. A space at a prompt's end is a token of its own only there and before a digit and the like, so here it is
the text's (`tokens.py`); the exported configuration calls that token special, and the two agree. They cannot where a
prompt ends otherwise and its last token grows with the text: such a prompt is refused.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers

from .tokens import Rejected, TextTokenizer

# how texts begin: words, digits, other scripts, punctuation that joins with what stands before it, white space
_SAMPLES = (
    *("fox", "Fox jumps", "7 foxes", "2026-11-26", "naïve café", "北京", "Ġorġ", "😀", "e\u0301", "▁x", "x\n\ny  z "),
    *("(see p. 3)", "'s", '"quoted"', "-1", "//", ":", "...", "_a", "</s> fox", "<s>", " two", "\nline", "\n\n", "\t"),
)


def write_tokenizer(
    tokenizer: transformers.PreTrainedTokenizerBase,
    folder: Path,
    *,
    prompts: Iterable[str] | None,
    max_length: int,
    vocab_size: int,
) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`: the tokenizer as it was loaded, of whatever files.

    It gets a padding token, without which peers refuse it, and no chat template, of which an encoder has no use.
    Special-token strings in a text are plain text, as here, and so it changes nothing else to call a space special.

    Args:
        prompts: those whose last spaces are the text's; None where sentence-transformers' own count holds, of any.
        max_length: tokens that a text is cut to.
        vocab_size: of the model.
    """
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    # a token beyond the embeddings is one that nothing produces
    description["added_tokens"] = [token for token in description["added_tokens"] if token["id"] < vocab_size]
    write_json(folder / "tokenizer.json", description | {"truncation": None, "padding": None})
    known = {
        token for token in tokenizer.all_special_tokens if (tokenizer.convert_tokens_to_ids(token) or 0) < vocab_size
    }
    named = {
        name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str) and token in known
    }
    spaces = set() if prompts is None else set(_last_spaces(tokenizer, [*prompts, "a reader's own: "]))
    padding = named.get("pad_token") or named.get("eos_token") or named.get("bos_token")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "extra_special_tokens": sorted((known - set(named.values())) | spaces),
        **named,
    }
    write_json(folder / "tokenizer_config.json", config | ({} if padding is None else {"pad_token": padding}))


def _last_spaces(tokenizer: transformers.PreTrainedTokenizerBase, prompts: Iterable[str]) -> Iterable[str]:
    """The tokens that prompts' last spaces are, of prompts alone."""
    for prompt in prompts:
        if prompt.endswith(" "):
            encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
            start, end = encoded["offset_mapping"][-1] if encoded["input_ids"] else (0, 0)
            if (start, end) == (len(prompt) - 1, len(prompt)):
                yield tokenizer.convert_ids_to_tokens(encoded["input_ids"][-1])


def check_tokenizer(
    source: TextTokenizer,
    written: transformers.PreTrainedTokenizerBase,
    prompts: Mapping[str, str],
    *,
    counted: bool,
) -> None:
    """That what was written gives sample texts the tokens that `source` gives, here and in sentence-transformers.

    Args:
        written: the tokenizer, loaded again.
        prompts: by name.
        counted: whether it matters which token is the first that is pooled, and so must be the same one there.
    Raises:
        ValueError: naming the prompt, and what would differ.
    """
    again = TextTokenizer(
        written,
        source.max_length,
        pools_special_tokens=source.pools_special_tokens,
        pools_prompt=source.pools_prompt,
        counts_prompt_alone=source.counts_prompt_alone,
    )
    added = source.hugging_face.added_tokens_decoder.values()
    samples = [*_SAMPLES, *(f"a {token.content} b" for token in added if not token.special)]
    cut: dict[str, Any] = {"truncation": True, "max_length": source.max_length}
    for name, prompt in {"": "", **prompts}.items():
        repeated = [prompt] * len(samples)
        expected, reread = source(samples, repeated), again(samples, repeated)
        theirs = written([prompt + text for text in samples], **cut)["input_ids"]
        count = _count_alone(written, prompt, cut) if prompt and not source.pools_prompt else 0
        for text, result, ours, ids in zip(samples, expected, reread, theirs, strict=True):
            if isinstance(result, Rejected):
                # by its count alone, a prompt may leave nothing of a short text
                if prompt and text.strip() and not source.counts_prompt_alone:
                    raise ValueError(f"the prompt {name!r} ({prompt!r}) cannot be exported: {result.reason}")
                continue
            if result != ours or result.ids != ids:
                raise ValueError(f"the tokenizer cannot be exported: written, it gives {prompt + text!r} other tokens")
            if counted and result.pool_start != count and not prompt:
                raise ValueError(
                    "the model cannot be exported: it never pools what its tokenizer puts before a text, and "
                    "sentence-transformers does where there is no prompt; use it as it is, export its adapters with "
                    "--adapter-only, or export it with pooling 'last'"
                )
            if counted and result.pool_start != count:
                raise ValueError(
                    f"the prompt {name!r} ({prompt!r}) cannot be exported: sentence-transformers would leave {count} "
                    f"tokens out of pooling, and before {text!r} it has {result.pool_start}; it can be where it ends "
                    "with a space and no special token ends a text, or with pooling 'last'"
                )


def _count_alone(tokenizer: transformers.PreTrainedTokenizerBase, prompt: str, cut: Mapping[str, Any]) -> int:
    """The number of tokens of a prompt, as sentence-transformers counts them."""
    ids = tokenizer(prompt, **cut)["input_ids"]
    return len(ids) - (bool(ids) and ids[-1] in tokenizer.all_special_ids)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
