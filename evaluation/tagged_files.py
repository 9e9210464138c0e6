"""Files of sentences in which every word has a tag, a word a line and a blank line (or white space) between sentences.

    word POS chunk          CoNLL-2000; or `word POS entity`, CoNLL-2002
    word POS chunk entity   CoNLL-2003, whose -DOCSTART- lines are left out
    word TAB tag            WNUT-17; also with a space; parts of speech, chunks or entities
    *.conllu                CoNLL-U: its words with their universal parts of speech; comments, multiword tokens (1-2)
                            and empty nodes (1.1) are left out

Columns stand apart by tabs where the first line has one, else by white space. How many there are says what they hold,
and the tags must be such: chunks and entities are `O` or `B-`, `I-`, `E-` or `S-` and a type. Where a column may hold
either of these, it holds chunks if its types are CoNLL-2000's. A word may be empty in a file with tabs. Files are in
UTF-8, and may be gzipped (.gz).
"""

import re
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from ..texts.rows import Fault
from .bad_rows import OnError
from .splits import find_splits
from .text_lines import text_lines

Tags = Literal["chunking", "pos", "ner"]
NAMES: dict[Tags, str] = {"chunking": "chunk tags", "pos": "POS tags", "ner": "entity tags"}

_CONLLU = (".conllu", ".conllu.gz")
EXTENSIONS = (*_CONLLU, *(f"{name}{end}" for name in (".conll", ".txt", ".tsv", "") for end in (".gz", "")))
_CHUNKS = frozenset(["ADJP", "ADVP", "CONJP", "INTJ", "LST", "NP", "PP", "PRT", "SBAR", "UCP", "VP"])
_UNIVERSAL = frozenset(  # https://universaldependencies.org/u/pos
    (
        *("ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM"),
        *("PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM", "VERB", "X"),
    )
)
_SPAN_TAG = re.compile(r"O|[BIES]-\S+")
_WORD_ID = re.compile(r"[1-9][0-9]*")
_OTHER_ID = re.compile(r"[1-9][0-9]*-[1-9][0-9]*|[0-9]+\.[1-9][0-9]*")

Line = tuple[int, str | Fault]  # its number from 1, and its text without the line's end
Word = tuple[str, str]  # with its tag


class Malformed(Exception):
    """Why a sentence is none, and in which line."""

    def __init__(self, line: int, reason: str):
        super().__init__(reason)
        self.line = line


class TaggedSentences(NamedTuple):
    """Sentences' words, a tag for each, and how many malformed sentences were left out."""

    words: list[list[str]]
    tags: list[list[str]]
    left_out: int = 0


def read_folder(
    folder: Path, wanted: Tags, splits: Collection[str], on_error: OnError = "fail"
) -> dict[str, dict[str, TaggedSentences]]:
    """Every data set in `folder` that has the wanted tags, as `{name: {split: sentences}}`.

    Args:
        splits: those that are read.
        on_error: whether a malformed sentence is an error, or left out and counted.
    Raises:
        FileNotFoundError: no data set is there; says which names were looked for.
        ValueError: none has these tags, a file holds no sentence, or one is malformed; with its file and line.
    """
    data_sets: dict[str, dict[str, TaggedSentences]] = {}
    others: list[str] = []
    for name, paths in find_splits(folder, EXTENSIONS).items():
        files = {split: _File(path) for split, path in paths.items() if split in splits}
        if any(file.has(wanted) for file in files.values()):
            data_sets[name] = {split: file.sentences(wanted, on_error) for split, file in files.items()}
        else:
            others += [f"{file.path} has {file.description}" for file in files.values()]
    if others and not data_sets:
        raise ValueError(f"no data set of {folder} has {NAMES[wanted]}: {others[0]}")
    if not data_sets:
        ends = ", ".join(end for end in EXTENSIONS if not end.endswith(".gz"))
        raise FileNotFoundError(
            f"no tagged sentences in {folder}: looked for train, dev (valid, testa) and test (testb), alone or as "
            f"NAME-test, NAME_test, NAME.test; behind it {ends}or nothing, then .gz or nothing"
        )
    return data_sets


def read_file(path: Path, wanted: Tags, on_error: OnError = "fail") -> TaggedSentences:
    """The sentences of one file; arguments and errors as of `read_folder`."""
    return _File(path).sentences(wanted, on_error)


class _File:
    """A file's lines in blocks, and how they are divided, as the first sound line has it."""

    def __init__(self, path: Path):
        self.path = path
        self._blocks = list(_blocks(path))
        self._is_conllu = path.name.endswith(_CONLLU)
        self._separator: str | None = None  # white space
        self._count = 10
        if not self._is_conllu:
            self._find_shape()

    def _find_shape(self) -> None:
        number, text = next(self._sound_lines(), (0, ""))
        if not text:
            raise ValueError(f"{self.path}: no sentence stands in it")
        self._separator = "\t" if "\t" in text else None
        self._count = len(text.split(self._separator))
        if self._count not in (2, 3, 4):
            raise ValueError(
                f"{self.path}:{number}: a line must be a word and 1 to 3 tags (a file of CoNLL-U must be named "
                f".conllu), got {text[:60]!r}"
            )

    def _sound_lines(self) -> Iterator[tuple[int, str]]:
        for block in self._blocks:
            for number, text in block:
                if not isinstance(text, Fault) and not _begins_document(text):
                    yield number, text

    def has(self, wanted: Tags) -> bool:
        return self._column(wanted) is not None

    def _column(self, wanted: Tags) -> int | None:
        """Which column holds the wanted tags, from 0."""
        if self._is_conllu:
            return 3 if wanted == "pos" else None
        if self._count == 4:
            return {"pos": 1, "chunking": 2, "ner": 3}[wanted]
        if self._count == 3 and wanted == "pos":
            return 1
        return self._count - 1 if wanted in self._last_column else None

    @cached_property
    def _last_column(self) -> tuple[Tags, ...]:
        """What the last of two or three may hold, by the first tag and the types of all spans."""
        tags = [text.split(self._separator)[-1].strip() for _, text in self._sound_lines()]
        if self._count == 2 and not _SPAN_TAG.fullmatch(tags[0]):
            return ("pos",)
        types = {tag[2:] for tag in set(tags) if _SPAN_TAG.fullmatch(tag)} - {""}
        if not types:
            return "chunking", "ner"
        return ("chunking",) if types <= _CHUNKS else ("ner",)

    @property
    def description(self) -> str:
        if self._is_conllu:
            return "those of CoNLL-U"
        kinds = [NAMES[kind] for kind in NAMES if self.has(kind)]
        return f"{self._count} columns with {' and '.join(kinds)}"

    def sentences(self, wanted: Tags, on_error: OnError) -> TaggedSentences:
        column = self._column(wanted)
        if column is None:
            raise ValueError(f"{self.path}: no {NAMES[wanted]}, which the data set's other files have")
        words, tags, left_out = [], [], 0
        for block in self._blocks:
            try:
                rows = _conllu_words(block) if self._is_conllu else self._words(block, wanted, column)
            except Malformed as error:
                if on_error == "fail":
                    raise ValueError(f"{self.path}:{error.line}: {error}") from error
                left_out += 1
                continue
            if rows:
                words.append([word for word, _ in rows])
                tags.append([tag for _, tag in rows])
        if not words:
            malformed = f", {left_out:,} are malformed" if left_out else ""
            raise ValueError(f"{self.path}: no sentence stands in it{malformed}")
        return TaggedSentences(words, tags, left_out)

    def _words(self, block: list[Line], wanted: Tags, column: int) -> list[Word]:
        words = []
        for number, text in block:
            if isinstance(text, Fault):
                raise Malformed(number, text)
            if _begins_document(text):
                continue
            fields = text.split(self._separator)
            if len(fields) != self._count:
                raise Malformed(number, f"{self._count} columns are needed, as above, got {text[:60]!r}")
            tag = fields[column].strip()
            is_span_tag = bool(_SPAN_TAG.fullmatch(tag))
            if wanted == "pos" and (not tag or (is_span_tag and tag != "O")):
                raise Malformed(number, f"column {column + 1} must be a POS tag, got {fields[column]!r}")
            if wanted != "pos" and not is_span_tag:
                raise Malformed(
                    number, f"column {column + 1} must be O or B-, I-, E- or S- and a type, got {fields[column]!r}"
                )
            words.append((fields[0].strip(), tag))
        return words


def _begins_document(text: str) -> bool:
    return text.startswith("-DOCSTART-")


def _conllu_words(block: list[Line]) -> list[Word]:
    """https://universaldependencies.org/format.html"""
    words: list[Word] = []
    for number, text in block:
        if isinstance(text, Fault):
            raise Malformed(number, text)
        if text.startswith("#"):
            continue
        fields = text.split("\t")
        if len(fields) != 10:
            raise Malformed(number, f"CoNLL-U has 10 columns with tabs between, got {len(fields)}: {text[:60]!r}")
        identity, form, _, tag = fields[:4]
        if _OTHER_ID.fullmatch(identity):
            continue
        if not _WORD_ID.fullmatch(identity) or int(identity) != len(words) + 1:
            raise Malformed(number, f"the word's ID must be {len(words) + 1}, got {identity!r}")
        if tag not in _UNIVERSAL:
            raise Malformed(number, f"UPOS must be a universal part of speech, got {tag!r}")
        words.append((form, tag))
    return words


def _blocks(path: Path) -> Iterator[list[Line]]:
    """Runs of lines that are not blank."""
    block: list[Line] = []
    for number, text in text_lines(path):
        if isinstance(text, Fault) or text.strip():
            block.append((number, text))
        elif block:
            yield block
            block = []
    if block:
        yield block
