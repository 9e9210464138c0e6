"""Input files to texts to embed: every row comes out once, with an id, or as a failure with its place.

Without an id column the id of a row is its place, `name:line`, where the name is the file's own or, for a file found in
a folder or by a pattern, its path below that folder or below the pattern's fixed part.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..engine.row_files import BadRow, Column, InputFile, RowError, read_file

_MAX_NAMED_DUPLICATES = 5


class Row(NamedTuple):
    file: str
    line: int
    id: str
    text: str


def read_rows(
    files: Iterable[InputFile], *, text_column: str = "text", id_column: str | None = None
) -> Iterator[Row | BadRow]:
    """Every row of `files` in order, good or bad; a file that cannot be read (further) is one bad row.

    Raises:
        ValueError: a file lacks a column, has it twice, or has it with a type that can hold no text (or no id).
    """
    columns = [Column(text_column)]
    if id_column is not None:
        columns.append(Column(id_column, "id", "id"))
    for file in files:
        path, name = str(file.path), file.name
        for row in read_file(file, columns):
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
    progress: Callable[[int], object] | None = None,
) -> int:
    """Reads the rows once, before any model is loaded, and returns how many there are (at most `limit`).

    This costs a fraction of embedding them, and what would end a job hours later ends it now. Ids are kept as 8-byte
    hashes, 16 bytes a row while they are sorted; only when two hashes agree are the rows read again to compare the ids.

    Raises:
        RowError: with `on_error="fail"`, the first bad row.
        ValueError: a missing column, no row at all, or ids that are not unique, the first few named with their places.
    """
    if id_column is None:
        _check_names(files)

    def rows() -> Iterator[Row | BadRow]:
        return islice(read_rows(files, text_column=text_column, id_column=id_column), limit)

    num_rows, hashes = 0, array("q")
    for row in rows():
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
        duplicates = _duplicates(row for row in rows() if isinstance(row, Row) and hash(row.id) in repeated)
        if duplicates:
            raise ValueError(f"ids of column {id_column!r} must be unique, but {'; '.join(duplicates)}")
    return num_rows


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
