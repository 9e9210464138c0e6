"""Input files to texts to embed: every row comes out once, with an id, or as a failure with its place.

Without an id column the id of a row is its place, `name:line`, where the name is the file's own or, for a file found in
a folder or by a pattern, its path below that folder or below the pattern's fixed part.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..texts.formats import line_offsets, read_file
from ..texts.rows import BadRow, Column, InputFile, RowError, Start

# a killed worker loses one shard at most; a shard of 4,096 float32 numbers a row takes 268 MB
ROWS_PER_SHARD = 2**14
_MAX_NAMED_DUPLICATES = 5


class Row(NamedTuple):
    file: str
    line: int
    id: str
    text: str


class Shard(NamedTuple):
    """A range of rows: `num_rows` of them from a place in an input file on; it may reach into the next files."""

    file: int
    start: Start
    num_rows: int


def read_rows(
    files: Iterable[InputFile],
    *,
    text_column: str = "text",
    id_column: str | None = None,
    start: Start | None = None,
) -> Iterator[Row | BadRow]:
    """Every row of `files` in order, the first from `start` on; a file that cannot be read (further) is one bad row.

    Raises:
        ValueError: a file lacks a column, has it twice, or has it with a type that can hold no text (or no id).
    """
    columns = [Column(text_column)]
    if id_column is not None:
        columns.append(Column(id_column, "id", "id"))
    for file in files:
        path, name = str(file.path), file.name
        rows = read_file(file, columns, start or Start())
        start = None
        for row in rows:
            if isinstance(row, BadRow):
                yield row
            else:
                line, (text, *identifier) = row
                yield Row(path, line, str(identifier[0]) if identifier else f"{name}:{line}", text)


def check_rows(
    files: Sequence[InputFile],
    *,
    text_column: str = "text",
    id_column: str | None = None,
    limit: int | None = None,
    on_error: str = "fail",
    rows_per_shard: int = ROWS_PER_SHARD,
    progress: Callable[[int], object] | None = None,
) -> list[Shard]:
    """Reads the rows once, before any model is loaded, and divides them (at most `limit`) into shards.

    This costs a fraction of embedding them, and what would end a job hours later ends it now. Ids are kept as 8-byte
    hashes, 16 bytes a row while they are sorted; only when two hashes agree are the rows read again to compare the ids.

    Raises:
        RowError: with `on_error="fail"`, the first bad row.
        ValueError: a missing column, no row at all, or ids that are not unique, the first few named with their places.
    """
    if id_column is None:
        _check_names(files)

    def rows_of(index: int) -> Iterator[tuple[int, Row | BadRow]]:
        return ((index, row) for row in read_rows([files[index]], text_column=text_column, id_column=id_column))

    def rows() -> Iterator[tuple[int, Row | BadRow]]:
        return islice(chain.from_iterable(map(rows_of, range(len(files)))), limit)

    num_rows, hashes = 0, array("q")
    places: list[tuple[int, int]] = []  # where the shards begin: file and line
    for index, row in rows():
        if num_rows % rows_per_shard == 0:
            places.append((index, row.line or 1))
        num_rows += 1
        if isinstance(row, BadRow):
            if on_error == "fail":
                raise RowError(str(row))
        elif id_column is not None:
            hashes.append(hash(row.id))
        if progress is not None:
            progress(1)
    if num_rows == 0:
        raise ValueError(f"no row in {', '.join(str(file.path) for file in files[:5])}{', …' * (len(files) > 5)}")

    ordered = np.sort(np.array(hashes, dtype=np.int64))
    repeated = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if repeated:
        duplicates = _duplicates(row for _, row in rows() if isinstance(row, Row) and hash(row.id) in repeated)
        if duplicates:
            raise ValueError(f"ids of column {id_column!r} must be unique, but {'; '.join(duplicates)}")
    starts = [
        (index, Start(line - 1, offset))
        for index, group in groupby(places, key=lambda place: place[0])
        for line, offset in _with_offsets(files[index], [line for _, line in group])
    ]
    left = (num_rows - number * rows_per_shard for number in range(len(starts)))
    return [Shard(*start, min(rows_per_shard, rest)) for start, rest in zip(starts, left, strict=True)]


def _with_offsets(file: InputFile, lines: list[int]) -> Iterator[tuple[int, int]]:
    try:
        return zip(lines, line_offsets(file, lines), strict=True)
    except OSError:  # a file that cannot be read is one bad row, and was
        return zip(lines, [0] * len(lines), strict=True)


def fingerprint(files: Sequence[InputFile]) -> list[dict[str, Any]]:
    """Each file's name, size and SHA-256, by which a change between runs is seen wherever the files now lie."""
    found: list[dict[str, Any]] = []
    for file in files:
        try:
            with file.path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
                found.append({"name": file.name, "bytes": stream.tell(), "sha256": digest})
        except OSError:
            found.append({"name": file.name, "bytes": 0, "sha256": "unreadable"})
    return found


def _check_names(files: Iterable[InputFile]) -> None:
    paths: dict[str, Path] = {}
    for file in files:
        other = paths.setdefault(file.name, file.path)
        if other is not file.path:
            raise ValueError(
                f"{other} and {file.path} would give their rows the same ids ({file.name}:1, …): "
                "give each file once, name their common folder as the input, or give an id column"
            )


def _duplicates(rows: Iterable[Row]) -> list[str]:
    places: dict[str, str] = {}
    found: list[str] = []
    for row in rows:
        place = f"{row.file}:{row.line}"
        first = places.setdefault(row.id, place)
        if first is not place:
            if len(found) == _MAX_NAMED_DUPLICATES:
                return [*found, "…"]
            found.append(f"{row.id!r} is at {first} and at {place}")
    return found
