"""Text to token ids: prompt and text are joined as given and tokenised once; the text's first token is found by offset.

A space that ends a prompt counts as the text's: most tokenizers make one token of it and a word, some of it alone
before a digit, and so a prompt has the same number of tokens before every text (as in sentence-transformers).

Special-token strings inside a text (`</s>`, `<|eot_id|>`) are plain text. Texts are cut to `max_length` tokens, special
tokens included, by the tokenizer's own truncation, as transformers and sentence-transformers do, and always at their
end. A long text is cut before it is tokenised, where that cannot change its first tokens.

A chat template stands around prompt and text. What of it special tokens enclose is added as the tokenizer's own BOS is;
the characters next to the text are tokenised with it, as if template and text were one string.
"""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import tokenizers
import transformers

from .config import LLAMA_BIDIREC
from .json_files import read_object
from .run_folder import RunDescription

# what the tokenizers of Llama, Mistral and Qwen are made of, those of before tokenizer.json too
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "tekken.json"),
)


# a prefix of so many characters a token gives enough tokens for all but the oddest text; those get four times as many
_PREFIX_CHARACTERS = 8
# a space after another character in a token: as it is, as in SentencePiece, as in byte-level BPE; these also begin
# byte-level white space (Ċ is a line feed, ĉ a tab, č a carriage return) and are no other characters
_SPACE_INSIDE = re.compile("[^ ▁Ġ\\sĊĉč][ ▁Ġ]")

# an encoding of the tokenizers library takes kilobytes, 200 bytes a character: strings and offsets of each token
_TEXTS_AT_ONCE = 256
_CHARACTERS_AT_ONCE = 2**22  # of several texts; of one text more are tokenised only where max_length asks for them


class Tokenized(NamedTuple):
    """One text: its token ids, the place of the first token that is pooled, and whether it has more than `ids`."""

    ids: list[int]
    pool_start: int
    cut: bool = False


class Rejected(NamedTuple):
    """A text that has no embedding, and why; `ids` are its tokens where merely none is left to pool, else None."""

    reason: str
    ids: list[int] | None = None

    @property
    def cut(self) -> bool:
        """Whether tokens were left out of an embedding: there is none."""
        return False


class TextTokenizer:
    """Tokenises texts for one encoder; `hugging_face` is the unchanged transformers tokenizer.

    Args:
        pools_special_tokens: whether pooling begins with BOS where there is no prompt, or with the text.
        pools_prompt: whether it begins with BOS where there is a prompt, too.
        template: strings before the prompt and after the text, whose trailing white space is then left out; what stands
            after the text is pooled with it.
        counts_prompt_alone: whether it leaves out as many tokens as the prompt has alone, not those before the text's
            first.
    Raises:
        ValueError: it has no fast form, or `max_length` leaves no room for a token of a text beside the special ones.
    """

    def __init__(
        self,
        hugging_face: transformers.PreTrainedTokenizerBase,
        max_length: int,
        *,
        pools_special_tokens: bool = True,
        pools_prompt: bool = False,
        template: tuple[str, str] = ("", ""),
        counts_prompt_alone: bool = False,
    ):
        backend = getattr(hugging_face, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"the tokenizer must have a fast form (tokenizer.json), got {type(hugging_face).__name__}")
        with _one_line(hugging_face.name_or_path):
            self._backend = tokenizers.Tokenizer.from_str(backend.to_str())  # a copy: ours to configure
        self._backend.no_padding()
        self._backend.no_truncation()
        self.template = template
        self._before, self._after = _put_around(self._backend, template) if any(template) else template
        num_special = self._backend.num_special_tokens_to_add(False)
        if max_length <= num_special:
            adds = "the tokenizer and the template add" if any(template) else "the tokenizer adds"
            added = f", {num_special} of which {adds}" if num_special else ""
            raise ValueError(f"max_length must be at least {num_special + 1} tokens{added}, got {max_length}")
        self.hugging_face = hugging_face
        self.max_length = max_length
        self.pools_special_tokens, self.pools_prompt = pools_special_tokens, pools_prompt
        self.counts_prompt_alone = counts_prompt_alone
        self._backend.enable_truncation(max_length)
        self._backend.encode_special_tokens = True
        self._cuts_before_spaces = _cuts_before_spaces(self._backend)
        self._most_characters = max(_CHARACTERS_AT_ONCE, 2 * _PREFIX_CHARACTERS * max_length)

    @classmethod
    def described(
        cls, hugging_face: transformers.PreTrainedTokenizerBase, max_length: int, run: RunDescription
    ) -> "TextTokenizer":
        """One that pools what a model's description says."""
        return cls(
            hugging_face,
            max_length,
            pools_special_tokens=run.pools_special_tokens,
            pools_prompt=run.pools_prompt,
            template=run.template,
            counts_prompt_alone=run.counts_prompt_alone,
        )

    def __call__(self, texts: Sequence[str], prompts: Sequence[str]) -> list[Tokenized | Rejected]:
        """Tokenise `prompt + text` for each pair; a text that leaves nothing to pool is `Rejected`, never guessed."""
        found: list[Tokenized | Rejected] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            part = slice(start, start + _TEXTS_AT_ONCE)
            found += self._tokenize(texts[part], prompts[part])
        return found

    def with_offsets(self, texts: Sequence[str]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """Each text's tokens without prompt and template, and the characters `(begin, end)` that each stands for.

        Special tokens stand for none, `(0, 0)`.

        Raises:
            ValueError: a text cannot be tokenised, with its place and the reason.
        """
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            part = texts[start : start + _TEXTS_AT_ONCE]
            for place, text in enumerate(part, start=start):
                if rejected := _reject(text, ""):
                    raise ValueError(f"texts[{place}] cannot be tokenised: {rejected.reason}")
            for encoding in self._backend.encode_batch(list(part)):
                yield encoding.ids, encoding.offsets

    def of_words(self, sentences: Sequence[Sequence[str]]) -> Iterator[tuple[list[int], list[int | None]]]:
        """Each sentence's tokens, every word tokenised by itself, and the place of the word that each is of.

        It is what `is_split_into_words` gives in transformers; special tokens are of no word.

        Raises:
            ValueError: a word cannot be tokenised, with its place and the reason.
        """
        for start in range(0, len(sentences), _TEXTS_AT_ONCE):
            part = [list(words) for words in sentences[start : start + _TEXTS_AT_ONCE]]
            for place, words in enumerate(part, start=start):
                if rejected := next(filter(None, (_reject(word, "") for word in words)), None):
                    raise ValueError(f"sentences[{place}] cannot be tokenised: {rejected.reason}")
            for encoding in self._backend.encode_batch(part, is_pretokenized=True):
                yield encoding.ids, encoding.word_ids

    def _tokenize(self, texts: Sequence[str], prompts: Sequence[str]) -> list[Tokenized | Rejected]:
        results: list[Tokenized | Rejected | None] = [_reject(text, p) for text, p in zip(texts, prompts, strict=True)]
        good = [i for i, result in enumerate(results) if result is None]
        asked = {prompts[i] for i in good} if self.counts_prompt_alone else set()
        lengths = {prompt: self._count_alone(prompt) for prompt in asked}
        num_characters = _PREFIX_CHARACTERS * self.max_length
        while good:
            whole = [self._before + prompts[i] + self._stripped(texts[i]) + self._after for i in good]
            ends = [self._prefix_end(text, num_characters) for text in whole]
            again = []
            for part in _parts(ends):
                if ends[part.start] > self._most_characters:  # and so the only one
                    results[good[part.start]] = Rejected(
                        f"{ends[part.start]:,} characters without a space to cut at must be tokenised at once, "
                        f"at most {self._most_characters:,} can be"
                    )
                    continue
                cut = [text[:end] for text, end in zip(whole[part], ends[part], strict=True)]
                encodings = self._backend.encode_batch(cut)
                for i, text, end, encoding in zip(good[part], whole[part], ends[part], encodings, strict=True):
                    ids = encoding.ids
                    # what the tokenizer left out is copied to be looked at, so of full texts alone
                    exceeds = len(ids) == self.max_length and bool(encoding.overflowing)
                    if end < len(text) and not exceeds:  # what follows may be white space that gives no token
                        again.append(i)
                    else:
                        found = self._locate(encoding, ids, texts[i], prompts[i], lengths.get(prompts[i], 0))
                        results[i] = found._replace(cut=True) if exceeds and isinstance(found, Tokenized) else found
            good = again
            num_characters *= 4
        return [result for result in results if result is not None]

    def _stripped(self, text: str) -> str:
        return text.rstrip() if any(self.template) else text

    def _prefix_end(self, text: str, num_characters: int) -> int:
        """Where to cut: the last place before `num_characters` at which a space follows a character that is none."""
        while self._cuts_before_spaces and 2 * num_characters < len(text):
            end = text.rfind(" ", 0, num_characters)
            while end > 0 and (text[end - 1].isspace() or text[end - 1] == "▁"):  # which SentencePiece takes for one
                end = text.rfind(" ", 0, end)
            if end > 0:
                return end
            num_characters *= 4
        return len(text)

    def _locate(
        self, encoding: tokenizers.Encoding, ids: list[int], text: str, prompt: str, prompt_length: int
    ) -> Tokenized | Rejected:
        # where there was no room for a token of its own, a text is not merely empty
        has_room = len(ids) < self.max_length
        around = ids if has_room and not text.strip() else None
        if self.pools_prompt or (self.pools_special_tokens and not prompt):
            if ids:
                return Tokenized(ids, 0)
            return Rejected("the text is empty and the tokenizer adds no token of its own", around)
        if self.counts_prompt_alone and prompt:
            if prompt_length < len(ids):
                return Tokenized(ids, prompt_length)
            reason = f"no token of {len(ids)} is left after the prompt's {prompt_length} (max_length {self.max_length})"
            return Rejected(reason, ids if has_room else None)  # to sentence-transformers such a text is empty
        ends = [end for _, end in encoding.offsets]  # 0 for special tokens, also those after the text
        before = self._before + prompt
        if self._stripped(text) and max(ends, default=0) > len(before):
            return Tokenized(ids, next(i for i, end in enumerate(ends) if end > len(before.removesuffix(" "))))
        left = "prompt" if prompt else "special ones"
        return Rejected(
            f"no token of the text is left after the {left} ({len(ids)} tokens, max_length {self.max_length})", around
        )

    def _count_alone(self, prompt: str) -> int:
        """Tokens of a prompt, as sentence-transformers counts them: all but a special one at the end."""
        ids = self._backend.encode(prompt).ids
        return len(ids) - (bool(ids) and ids[-1] in self.hugging_face.all_special_ids)


def _put_around(backend: tokenizers.Tokenizer, template: tuple[str, str]) -> tuple[str, str]:
    """Add a template's ends, up to its innermost special tokens, to what `backend` adds to a text; returns the rest.

    Raises:
        ValueError: tokens would differ from those of template and text as one string.
    """
    special = {place for place, token in backend.get_added_tokens_decoder().items() if token.special}
    whole = backend.encode("".join((template[0], "a", template[1])))
    head, tail = (backend.encode(part, add_special_tokens=False) for part in template)
    own = backend.encode("a")
    begin = own.special_tokens_mask.index(0)
    end = len(own) - own.special_tokens_mask[::-1].index(0)
    num_head = max((place + 1 for place, token in enumerate(head.ids) if token in special), default=0)
    first = min((place for place, token in enumerate(tail.ids) if token in special), default=len(tail.ids))
    added = {
        "before": own.ids[:begin] + head.ids[:num_head],
        "after": tail.ids[first:] + own.ids[end:],
    }
    pieces = [*(["before"] if added["before"] else []), "$A", *(["after"] if added["after"] else [])]
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=pieces,
        special_tokens=[
            {"id": name, "ids": ids, "tokens": [backend.id_to_token(token) for token in ids]}
            for name, ids in added.items()
            if ids
        ],
    )
    before = template[0][head.offsets[num_head - 1][1] if num_head else 0 :]
    after = template[1][: tail.offsets[first][0] if first < len(tail.ids) else None]
    found = backend.encode(before + "a" + after)
    if found.ids != whole.ids:
        raise ValueError(
            f"template {template!r} cannot be put around a text with this tokenizer: it would give the tokens "
            f"{found.tokens}, not {whole.tokens}"
        )
    return before, after


def _parts(sizes: Sequence[int]) -> Iterator[slice]:
    """Neighbours that are `_CHARACTERS_AT_ONCE` together, or a single one that is more by itself."""
    begin, total = 0, 0
    for place, size in enumerate(sizes):
        if place > begin and total + size > _CHARACTERS_AT_ONCE:
            yield slice(begin, place)
            begin, total = place, 0
        total += size
    if sizes:
        yield slice(begin, len(sizes))


def _cuts_before_spaces(backend: tokenizers.Tokenizer) -> bool:
    """Whether a space after another character always begins a token, so that what follows it changes nothing before.

    It does in BPE when no token of the vocabulary holds a space after another character: every merge gives a token.
    What the pre-tokenizer looks ahead for is white space at the end of a run of it, and a cut leaves none there.
    """
    description = json.loads(backend.to_str())
    if description["model"]["type"] != "BPE" or description["model"].get("dropout"):
        return False
    stripping = any(token["lstrip"] or token["rstrip"] for token in description["added_tokens"] if not token["special"])
    return not stripping and not any(map(_SPACE_INSIDE.search, backend.get_vocab()))


def load_tokenizer(folder: str | Path, vocab_size: int) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a local checkpoint folder.

    Raises:
        ValueError: there is none, it has more tokens than the model has embeddings, it tells no texts apart, or draws
            tokens at random.
    """
    with _one_line(folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), config=_known_kind(Path(folder)), trust_remote_code=False, local_files_only=True
        )
        around, first, second = tokenizer(["", "a", "b"])["input_ids"]
    if first == second:  # transformers makes an empty one where tokenizer.json is not there
        raise ValueError(
            f"{folder}: the tokenizer gives the texts 'a' and 'b' the same tokens, {first}; copy or download its files "
            "again, tokenizer.json among them"
        )
    dropout = getattr(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None), "dropout", None)
    if dropout:
        raise ValueError(
            f"{folder}: the tokenizer must give a text the same tokens each time, got dropout {dropout}; set it to "
            "null in tokenizer.json"
        )
    # a special token that nothing produces (a padding token added later) may lie beyond the embeddings
    unused = set(tokenizer.all_special_ids) - set(around)
    largest = max(set(around).union(tokenizer.get_vocab().values()) - unused, default=-1)
    if largest >= vocab_size:
        raise ValueError(f"{folder}: the tokenizer has token id {largest}, but the model has {vocab_size} embeddings")
    return tokenizer


@contextmanager
def _one_line(folder: str | Path) -> Iterator[None]:
    """Make a ValueError of whatever the libraries raise for a tokenizer's files."""
    try:
        yield
    except BaseException as error:  # the tokenizers library raises nothing narrower, and its panics are no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} holds no tokenizer that transformers can read: {reason:.300}") from error


def _known_kind(folder: Path) -> transformers.LlamaConfig | None:
    """A Llama's where `config.json` names one that transformers does not know, which would warn of it."""
    path = folder / "config.json"
    is_unknown = path.is_file() and read_object(path).get("model_type") == LLAMA_BIDIREC
    return transformers.LlamaConfig() if is_unknown else None


def _reject(text: str, prompt: str) -> Rejected | None:
    for name, value in (("text", text), ("prompt", prompt)):
        if not isinstance(value, str):
            return Rejected(f"the {name} must be a string, got {type(value).__name__}")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            return Rejected(f"the {name} holds a lone surrogate (U+{ord(value[error.start]):04X}) at {error.start}")
    return None


def tokenizer_files(folder: Path) -> list[Path]:
    """The files in `folder` that a tokenizer is made of."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files from one folder to another."""
    for path in tokenizer_files(source):
        shutil.copyfile(path, target / path.name)
