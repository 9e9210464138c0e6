"""Rows of files to train on, as token ids: texts (`TextData`), and queries with positives and negatives (`PairData`).

All rows are read and checked when the data is made, so that a bad one ends the run before it starts, with its file and
line. Texts stay in memory as strings and are tokenised when a batch asks for them.
"""

import hashlib
import json
import re
import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ..engine.prompts import as_prompt
from ..engine.tokens import Rejected, TextTokenizer, Tokenized
from ..texts.files import find_files
from ..texts.formats import column_names, read_file
from ..texts.rows import BadRow, Column, FileRow, InputFile, RowError, text_fault

_TOKENIZED_TOGETHER = 8192  # texts
_NEVER_CUT = 2**31 - 1

# columns of the query, of the positive and, alone or with a number behind it, of a negative
_PAIR_COLUMNS = (
    ("query", "positive", "negative"),
    ("anchor", "positive", "negative"),
    ("sent0", "sent1", "hard_neg"),
)


class TextData:
    """Texts for language modelling, MNTP and SimCSE.

    Each text is a row, cut to the tokenizer's `max_length`. With `block_size`, as in LLM2Vec's MNTP, the texts are
    tokenised when rows are first asked for, each with the special tokens that the tokenizer adds, joined in file order
    and cut into rows of `block_size` tokens, whatever `max_length` is; what remains at the end is dropped.

    Blank lines of a .txt file are left out, and with `block_size` the blank texts of any file are: in LLM2Vec's blocks
    each leaves a lone BOS.

    Args:
        files: files, folders and patterns, as `find_files` takes them.
        text_column: column of the text, or its key in JSONL.
    Attributes:
        fingerprint: SHA-256 over the files' names, sizes and contents, in order, and the settings that shape the rows.
        names: the files, as one data set.
    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: an argument, a file or a row is bad (a `RowError`, which names file and line), or there is no row;
            where rows are asked for, the texts are less than a block.
    """

    def __init__(
        self,
        files: Sequence[str],
        tokenizer: TextTokenizer,
        *,
        text_column: str = "text",
        block_size: int | None = None,
    ):
        if block_size is not None and block_size < 2:
            raise ValueError(f"block_size must be at least 2, got {block_size}")
        found = _find(files)
        self._texts: list[str] = []
        self._places = _Places()
        for file in found:
            for line, text in _texts(file, text_column, leave_out_blank=block_size is not None or file.format == "txt"):
                self._texts.append(text)
                self._places.append(str(file.path), line)
        self.names = (", ".join(files),)
        self._contents = _contents(found)
        self._text_column, self._block_size = text_column, block_size
        whole = tokenizer if block_size is None else TextTokenizer(tokenizer.hugging_face, _NEVER_CUT)
        self._tokenizer, self._max_length = _RowTokenizer(whole), tokenizer.max_length

    @property
    def sizes(self) -> tuple[int]:
        """Rows, as one data set."""
        return (len(self),)

    @cached_property
    def fingerprint(self) -> str:
        settings: dict[str, Any] = {"text_column": self._text_column}
        if self._blocks is None:
            settings["max_length"] = self._max_length
        else:
            settings["blocks"] = [self._block_size, hashlib.sha256(self._blocks.data).hexdigest()]
        return _fingerprint(self._contents, settings)

    @cached_property
    def _blocks(self) -> np.ndarray | None:
        """Int32 (rows, block_size), instead of the texts."""
        if self._block_size is None:
            return None
        blocks = self._cut_blocks(self._block_size)
        self._texts.clear()
        return blocks

    def __len__(self) -> int:
        """Rows: texts, or blocks."""
        return len(self._texts) if self._blocks is None else len(self._blocks)

    def tokens(self, rows: Sequence[int]) -> list[Tokenized]:
        """Token ids of each row; a text that leaves no token is a `RowError`."""
        if self._blocks is not None:
            return [Tokenized(ids, 0) for ids in self._blocks[list(rows)].tolist()]
        return self._tokenize(rows)

    def groups(self, rows: Sequence[int]) -> list[int]:
        """An id of each row's text, from 0 to 2**63 - 1, the same for equal texts."""
        if self._blocks is not None:
            return [_hash(self._blocks[row].tobytes()) for row in rows]
        return [_hash(self._texts[row].encode()) for row in rows]

    def _tokenize(self, rows: Sequence[int]) -> list[Tokenized]:
        texts = [self._texts[row] for row in rows]
        return self._tokenizer(texts, [""] * len(texts), lambda index: self._places[rows[index]])

    def _cut_blocks(self, block_size: int) -> np.ndarray:
        """The tokens of all texts, joined, in rows of `block_size`: int32 (rows, block_size)."""
        pieces = []
        num_texts = len(self._texts)
        with tqdm(total=num_texts, desc="tokenizing", unit=" texts", disable=not sys.stderr.isatty()) as bar:
            for start in range(0, num_texts, _TOKENIZED_TOGETHER):
                tokenized = self._tokenize(range(start, min(start + _TOKENIZED_TOGETHER, num_texts)))
                pieces.append(np.array([token for text in tokenized for token in text.ids], dtype=np.int32))
                bar.update(len(tokenized))
        tokens = np.concatenate(pieces)
        num_rows = len(tokens) // block_size
        if num_rows == 0:
            raise ValueError(f"block_size must be at most the {len(tokens):,} tokens of all texts, got {block_size}")
        return tokens[: num_rows * block_size].reshape(num_rows, block_size)


class PairRow(NamedTuple):
    query: str
    positive: str
    negatives: tuple[str, ...]
    instruction: str  # "" for none


class ContrastiveTokens(NamedTuple):
    """A batch, or one process's share of it.

    Attributes:
        queries: N.
        keys: their N positives in the same order, then all negatives, row by row.
        groups: one a key, from 0 to 2**63 - 1. A key is no negative of a query whose positive has the same id: their
            texts are equal, or belong to equal queries.
    """

    queries: list[Tokenized]
    keys: list[Tokenized]
    groups: list[int]


class PairData:
    """Queries, positives and hard negatives for supervised contrastive training; one file is one data set.

    A row holds a query, a positive and any number of negatives: in JSONL and Parquet `query`, `positive`, `negatives`
    (a list, which may be absent); in these and in CSV also `anchor` or `query`, `positive`, `negative`, `negative_1`, …
    or `sent0`, `sent1`, `hard_neg`, …, of which a row may leave negatives out. `instruction` is a further column.

    The instruction stands before the query, a space between unless it ends with white space; it attends and is not
    pooled.

    Args:
        files: files, folders and patterns, as `find_files` takes them.
        instruction: of rows that have none of their own; a row's empty string is one of its own.
        symmetric_instruction: put the instruction before positives and negatives too, as sets want in which queries and
            keys are of one kind (NLI).
    Attributes:
        names: the data sets' files.
        sizes: rows of each data set.
        fingerprint: SHA-256 over the files' names, sizes and contents, in order, and the settings that shape the rows.
    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: an argument, a file or a row is bad (a `RowError`, which names file and line), or a file has no row.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    fingerprint: str

    def __init__(
        self,
        files: Sequence[str],
        tokenizer: TextTokenizer,
        *,
        instruction: str | None = None,
        symmetric_instruction: bool = False,
    ):
        self._tokenizer = _RowTokenizer(tokenizer)
        self._symmetric_instruction = symmetric_instruction
        if instruction is not None:
            self._check_instructions({instruction: "instruction"})
        found = _find(files)
        self._rows: list[list[PairRow]] = []
        self._places: list[_Places] = []
        for file in found:
            rows, places = _pairs(file, instruction or "")
            first_rows: dict[str, int] = {}
            for number, row in enumerate(rows):
                first_rows.setdefault(row.instruction, number)
            self._check_instructions({text: places[number] for text, number in first_rows.items()})
            self._rows.append(rows)
            self._places.append(places)
        self.names = tuple(str(file.path) for file in found)
        self.sizes = tuple(map(len, self._rows))
        settings = {
            "instruction": instruction,
            "symmetric_instruction": symmetric_instruction,
            "max_length": tokenizer.max_length,
        }
        self.fingerprint = _fingerprint(_contents(found), settings)

    def __len__(self) -> int:
        """Rows of all data sets."""
        return sum(self.sizes)

    def rows(self, dataset: int, rows: Sequence[int]) -> list[PairRow]:
        """Rows of one data set, each with its own instruction or the default."""
        return [self._rows[dataset][row] for row in rows]

    def tokens(self, dataset: int, rows: Sequence[int], *, share: slice = slice(None)) -> ContrastiveTokens:
        """The token ids of `rows[share]`, with groups that hold for all of `rows`, the batch of all processes.

        A text of which no token is left after the instruction is a `RowError`.
        """
        group_of = text_groups(self.rows(dataset, rows))
        own = rows[share]
        pairs = self.rows(dataset, own)
        num_rows = len(pairs)
        with_negatives = [(index, text) for index, pair in enumerate(pairs) for text in pair.negatives]
        owners = [*range(num_rows), *range(num_rows), *(index for index, _ in with_negatives)]
        keys = [pair.positive for pair in pairs] + [text for _, text in with_negatives]
        prompts = [as_prompt(pair.instruction) for pair in pairs]
        key_prompts = [prompts[i] if self._symmetric_instruction else "" for i in owners[num_rows:]]
        tokenized = self._tokenizer(
            [pair.query for pair in pairs] + keys,
            prompts + key_prompts,
            lambda index: self._places[dataset][own[owners[index]]],
        )
        return ContrastiveTokens(tokenized[:num_rows], tokenized[num_rows:], [group_of[text] for text in keys])

    def _check_instructions(self, places: dict[str, str]) -> None:
        """That each instruction leaves room for a text."""
        names = list(places.values())
        self._tokenizer(["a"] * len(places), list(map(as_prompt, places)), names.__getitem__)


def text_groups(rows: Sequence[PairRow]) -> dict[str, int]:
    """The group id of each positive and negative of `rows`: see `ContrastiveTokens.groups`.

    Positives of equal queries (instruction and query) share a group, and so on transitively; its id is the smallest
    hash of its texts, which does not depend on the order of the rows.
    """
    parent: dict[Any, Any] = {}  # of texts, and of queries as (instruction, query)

    def root(node: Any) -> Any:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for row in rows:
        parent[root((row.instruction, row.query))] = root(row.positive)
    texts = {text for row in rows for text in (row.positive, *row.negatives)}
    smallest: dict[Any, int] = {}
    for text in texts:
        found = _hash(text.encode())
        smallest[root(text)] = min(found, smallest.get(root(text), found))
    return {text: smallest[root(text)] for text in texts}


class _Places:
    """Where each row stands, `file:line`, at 8 bytes a row."""

    def __init__(self) -> None:
        self._paths: list[str] = []
        self._first_rows: list[int] = []  # of each path
        self._lines = array("q")

    def append(self, path: str, line: int) -> None:
        if not self._paths or self._paths[-1] != path:
            self._paths.append(path)
            self._first_rows.append(len(self._lines))
        self._lines.append(line)

    def __getitem__(self, row: int) -> str:
        return f"{self._paths[bisect_right(self._first_rows, row) - 1]}:{self._lines[row]}"


class _RowTokenizer:
    """A `TextTokenizer` for which a text that leaves no token is a `RowError` that begins with the row's place."""

    def __init__(self, tokenizer: TextTokenizer):
        self._tokenizer = tokenizer
        (empty,) = tokenizer([""], [""])
        self._num_special = 0 if isinstance(empty, Rejected) else len(empty.ids)

    def __call__(self, texts: Sequence[str], prompts: Sequence[str], place: Callable[[int], str]) -> list[Tokenized]:
        tokenized = []
        for index, result in enumerate(self._tokenizer(texts, prompts)):
            if isinstance(result, Rejected):
                raise RowError(f"{place(index)}: {result.reason}")
            if len(result.ids) <= self._num_special:
                raise RowError(
                    f"{place(index)}: the text leaves no token of its own (max_length {self._tokenizer.max_length})"
                )
            tokenized.append(result)
        return tokenized


def look_at_texts(files: Sequence[str], text_column: str) -> None:
    """Read the first text of each file; raises as `TextData`."""
    for file in _find(files):
        next(_texts(file, text_column, leave_out_blank=True))


def look_at_pairs(files: Sequence[str]) -> None:
    """Read the first row of each file; raises as `PairData`."""
    for file in _find(files):
        next(_good_rows(file, _pair_columns(file)), None)


def _find(files: Sequence[str]) -> list[InputFile]:
    if not files:
        raise ValueError("files must name at least one file, got none")
    return find_files(files)


def _good_rows(file: InputFile, columns: Sequence[Column]) -> Iterator[FileRow]:
    for row in read_file(file, columns):
        if isinstance(row, BadRow):
            raise RowError(str(row))
        yield row


def _texts(file: InputFile, text_column: str, *, leave_out_blank: bool) -> Iterator[tuple[int, str]]:
    """Lines and texts of a file, at least one."""
    empty = True
    for line, (text,) in _good_rows(file, [Column(text_column, kind="string")]):
        if not text or text.isspace():
            if leave_out_blank:
                continue
            raise RowError(f"{file.path}:{line}: {text_fault(text)}")
        empty = False
        yield line, text
    if empty:
        raise ValueError(f"{file.path}: the file holds no text")


def _pairs(file: InputFile, default_instruction: str) -> tuple[list[PairRow], _Places]:
    rows, places = [], _Places()
    path = str(file.path)
    for line, (query, positive, instruction, listed, *named) in _good_rows(file, _pair_columns(file)):
        negatives = (*(listed or ()), *(text for text in named if text is not None))
        chosen = sys.intern(default_instruction if instruction is None else instruction)
        rows.append(PairRow(query, positive, negatives, chosen))
        places.append(path, line)
    if not rows:
        raise ValueError(f"{file.path}: the file holds no row")
    return rows, places


def _pair_columns(file: InputFile) -> list[Column]:
    """Query, positive, instruction, list of negatives, then each column of negatives."""
    names = column_names(file)
    chosen = next((pair for pair in _PAIR_COLUMNS if {*pair[:2]} <= {*names}), _PAIR_COLUMNS[0])
    if names and not {*chosen[:2]} <= {*names}:
        raise ValueError(
            f"{file.path}: a row needs the columns query and positive, anchor and positive, or sent0 and sent1; "
            f"the file's are {', '.join(map(repr, names))}"
        )
    query, positive, negative = chosen
    return [
        Column(query, "query"),
        Column(positive, "positive"),
        Column("instruction", "instruction", "string", required=False),
        Column("negatives", "negative", "texts", required=False),
        *(
            Column(name, "negative", required=False)
            for name in dict.fromkeys(names)
            if re.fullmatch(rf"{negative}(_\d+)?", name)
        ),
    ]


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def _contents(files: Sequence[InputFile]) -> list[list[Any]]:
    """Each file's name, size and SHA-256."""
    contents = []
    for file in files:
        with open(file.path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        contents.append([file.path.name, file.path.stat().st_size, digest])
    return contents


def _fingerprint(contents: list[list[Any]], settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([contents, settings], sort_keys=True).encode()).hexdigest()
