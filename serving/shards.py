"""Shards of rows to shards of vectors: reading and tokenising, computing, and writing run at the same time.

A shard is read in windows. Within it a text that stands there twice is embedded once: the vector is the same anyway.
"""

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from ..engine.overlap import Behind, ahead
from ..texts.rows import BadRow, InputFile, RowError
from .readers import Row, Shard, read_rows

# texts are packed by length within a window, so it is large; long texts end it earlier, so that memory stays flat
_WINDOW_ROWS = 4096
_WINDOW_CHARACTERS = 2**25

Progress = Callable[[int, int], object]  # called with texts and tokens after each pass


class RowEncoder(Protocol):
    """The part of `Encoder` that a job uses."""

    prompts: dict[str, str]
    default_prompt_name: str | None

    def get_embedding_dimension(self) -> int: ...

    def describe(self) -> dict[str, Any]: ...

    def identity(self) -> dict[str, Any]: ...

    def tokenize_rows(self, texts: Sequence[str], *, prompt: str) -> list[Any]: ...

    def encode_tokenized(
        self,
        tokenized: Sequence[Any],
        *,
        normalize_embeddings: bool,
        truncate_dim: int | None,
        precision: Any,
        progress: Progress | None,
    ) -> tuple[np.ndarray, list[str | None], int]: ...


class Output(Protocol):
    """Where vectors and bad rows go; `FileShards` and `folder.ShardOutput` are such."""

    def begin_shard(self, number: int) -> None: ...

    def write(self, ids: Sequence[str], vectors: np.ndarray) -> None: ...

    def fail(self, row: BadRow) -> None: ...

    def end_shard(self, num_tokens: int, num_cut: int) -> None: ...


class Done(NamedTuple):
    """What became of a shard; `num_cut` of the rows written had more tokens than `max_length`."""

    number: int
    num_written: int
    num_cut: int
    num_tokens: int
    bad_rows: list[BadRow]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a job and what is done with them; small, and the same for every worker.

    Attributes:
        stamps: size and modification time of each file as it was checked.
    """

    files: Sequence[InputFile]
    shards: Sequence[Shard]
    stamps: Sequence[tuple[int, int] | None]
    text_column: str
    id_column: str | None
    on_error: Literal["fail", "skip"]
    prompt: str
    normalize: bool
    truncate_dim: int | None
    precision: str


def stamp(file: InputFile) -> tuple[int, int] | None:
    """Size and modification time, by which a change while the job runs is seen; None: it cannot be read."""
    try:
        found = os.stat(file.path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


class _Window(NamedTuple):
    shard: int
    rows: list[Row | BadRow]
    tokenized: list[Any]  # of the texts that this shard has not had yet
    sources: array  # of each good row: the place of its vector among the shard's different texts
    is_first: bool
    is_last: bool


class _Vectors(NamedTuple):
    window: _Window
    vectors: np.ndarray  # one a good row
    reasons: list[str | None]
    num_cut: int
    num_tokens: int


def embed_shards(
    rows: Rows,
    numbers: Iterable[int],
    encoder: RowEncoder,
    output: Output,
    *,
    on_done: Callable[[Done], object],
    progress: Progress | None = None,
) -> None:
    """Embeds shards, in the order in which `numbers` gives them, and calls `on_done` after each.

    Raises:
        RowError: a bad row, with `on_error="fail"`.
        OSError: an input was changed or removed, the disk is full, or the like.
    """
    writer = _Writer(rows, output, on_done)
    prepared = ahead(_prepare(rows, numbers, encoder))
    try:
        with Behind(writer) as written:
            for vectors in _compute(prepared, rows, encoder, progress):
                written.put(vectors)
    finally:
        prepared.close()


def _prepare(rows: Rows, numbers: Iterable[int], encoder: RowEncoder) -> Iterator[_Window]:
    for number, read in _read(rows, numbers):
        known: dict[bytes, int] = {}
        windows = _with_last(_windows(read))
        for index, (window, is_last) in enumerate(windows):
            texts: list[str] = []
            sources = array("q")
            for row in window:
                if isinstance(row, Row):
                    key = blake2b(row.text.encode(), digest_size=16).digest()
                    if key not in known:
                        known[key] = len(known)
                        texts.append(row.text)
                    sources.append(known[key])
            tokenized = encoder.tokenize_rows(texts, prompt=rows.prompt)
            yield _Window(number, window, tokenized, sources, index == 0, is_last)


def _read(rows: Rows, numbers: Iterable[int]) -> Iterator[tuple[int, Iterator[Row | BadRow]]]:
    """The rows of each shard; a shard that follows the one before is read on, without opening the file again."""
    reading: Iterator[Row | BadRow] = iter(())
    following = -1
    for number in numbers:
        shard = rows.shards[number]
        if number != following:
            reading = read_rows(
                rows.files[shard.file :], text_column=rows.text_column, id_column=rows.id_column, start=shard.start
            )
        yield number, _unchanged(rows, number, islice(reading, shard.num_rows))
        following = number + 1


def _unchanged(rows: Rows, number: int, read: Iterator[Row | BadRow]) -> Iterator[Row | BadRow]:
    """The rows of a shard, and at their end, before the shard can be done, a look at the files they came from."""
    yield from read
    shard = rows.shards[number]
    last = rows.shards[number + 1].file if number + 1 < len(rows.shards) else len(rows.files) - 1
    for index in range(shard.file, last + 1):
        if rows.stamps[index] != stamp(rows.files[index]):
            raise OSError(f"{rows.files[index].path}: the file was changed or removed after it was checked")


def _with_last(windows: Iterable[list]) -> Iterator[tuple[list, bool]]:
    """Each window, and whether it is the last one; at least one, if empty."""
    previous: list | None = None
    for window in windows:
        if previous is not None:
            yield previous, False
        previous = window
    yield previous or [], True


def _windows(rows: Iterable[Row | BadRow]) -> Iterator[list[Row | BadRow]]:
    window: list[Row | BadRow] = []
    num_characters = 0
    for row in rows:
        window.append(row)
        num_characters += len(row.text) if isinstance(row, Row) else 0
        if len(window) == _WINDOW_ROWS or num_characters >= _WINDOW_CHARACTERS:
            yield window
            window, num_characters = [], 0
    if window:
        yield window


def _compute(
    windows: Iterable[_Window], rows: Rows, encoder: RowEncoder, progress: Progress | None
) -> Iterator[_Vectors]:
    for window in windows:
        if window.is_first:
            different: list[np.ndarray] = []  # of the shard's different texts, a window's each
            reasons: list[str | None] = []
            cut: list[bool] = []
        found, failures, num_tokens = encoder.encode_tokenized(
            window.tokenized,
            normalize_embeddings=rows.normalize,
            truncate_dim=rows.truncate_dim,
            precision=rows.precision,
            progress=progress,
        )
        finite = np.isfinite(found).all(axis=1)
        reasons += [
            reason or (None if ok else "its vector is not finite") for reason, ok in zip(failures, finite, strict=True)
        ]
        cut += [text.cut for text in window.tokenized]
        different.append(found)
        vectors = _gather(different, np.array(window.sources, dtype=np.int64))
        num_cut = sum(cut[source] and reasons[source] is None for source in window.sources)
        yield _Vectors(window, vectors, [reasons[source] for source in window.sources], num_cut, num_tokens)


def _gather(parts: list[np.ndarray], places: np.ndarray) -> np.ndarray:
    """Rows `places` of the parts as if they were one array."""
    first = sum(map(len, parts[:-1]))
    if np.array_equal(places, np.arange(first, first + len(parts[-1]))):
        return parts[-1]  # nothing stands there twice
    return (parts[0] if len(parts) == 1 else np.concatenate(parts))[places]


class _Writer:
    """Writes windows in order, in the thread behind."""

    def __init__(self, rows: Rows, output: Output, on_done: Callable[[Done], object]):
        self._rows = rows
        self._output = output
        self._on_done = on_done

    def __call__(self, computed: _Vectors) -> None:
        window = computed.window
        if window.is_first:
            self._output.begin_shard(window.shard)
            self._num_written = self._num_cut = self._num_tokens = 0
            self._bad_rows: list[BadRow] = []
        reasons = iter(computed.reasons)
        for row in window.rows:
            if isinstance(row, Row):
                reason = next(reasons)
                if reason is None:
                    continue
                row = BadRow(row.file, row.line, reason)
            if self._rows.on_error == "fail":
                raise RowError(str(row))
            self._output.fail(row)
            self._bad_rows.append(row)
        good = [row.id for row in window.rows if isinstance(row, Row)]
        kept = np.array([reason is None for reason in computed.reasons], dtype=bool)
        vectors = computed.vectors if kept.all() else computed.vectors[kept]
        self._output.write([identifier for identifier, keep in zip(good, kept, strict=True) if keep], vectors)
        self._num_written += len(vectors)
        self._num_cut += computed.num_cut
        self._num_tokens += computed.num_tokens
        if window.is_last:
            self._output.end_shard(self._num_tokens, self._num_cut)
            self._on_done(Done(window.shard, self._num_written, self._num_cut, self._num_tokens, self._bad_rows))


class FileShards:
    """All shards into one file."""

    def __init__(self, output: Any):
        self.write: Callable[[Sequence[str], np.ndarray], None] = output.write
        self.fail: Callable[[BadRow], None] = output.fail

    def begin_shard(self, number: int) -> None:
        """Nothing begins: the file goes on."""

    def end_shard(self, num_tokens: int, num_cut: int) -> None:
        """Nothing ends before the job does."""
