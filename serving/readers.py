"""Input files to rows: every row of every file comes out once, as a text to embed or as a failure with its place.

    .txt      a text a line; a blank line is an empty text, that is, a bad row
    .jsonl    a JSON object a line; a blank line is not a row
    .csv      comma-separated with a header; quoted newlines are text, a blank line is not a row
    .parquet  read in batches; only the used columns are read

All but Parquet, which compresses inside, may be gzipped (`.txt.gz`). Lines end at a line feed, with or without a
carriage return before it; a byte order mark at the start of a file is dropped; everything else must be strict UTF-8 and
strict JSON (no NaN, no key twice). Files are streamed: memory does not grow with their size, only with the longest row.

A place is the file and its physical line, or the row in Parquet, from 1; a CSV row stands where it begins. Without an
id column the id of a row is its place, `name:line`, where the name is the file's own or, for a file found in a folder
or by a pattern, its path below that folder or below the pattern's fixed part.
"""

import glob
import os
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .formats import FORMATS, Fault, InputFile, Unreadable

_MAX_NAMED_DUPLICATES = 5


class Row(NamedTuple):
    file: str
    line: int
    id: str
    text: str


class BadRow(NamedTuple):
    file: str
    line: int | None  # None: the file could not be opened at all
    reason: str
    rest_lost: bool = False  # the file could not be read from here on

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.reason}"


class RowError(ValueError):
    """A bad row where none is allowed: `file:line: reason`."""


def find_files(inputs: Sequence[str | os.PathLike[str]]) -> list[InputFile]:
    """The files that `inputs` name, in order: files as given, folders (recursively) and patterns sorted by path.

    In a folder, files and folders whose name begins with `.` or `_` are left out, as Arrow and Spark do.

    Raises:
        FileNotFoundError: an input does not exist, or a folder or pattern holds no file.
        ValueError: a file has an unknown extension, or its name is not UTF-8.
    """
    files: list[InputFile] = []
    for item in inputs:
        given = os.fspath(item)
        if os.path.isdir(given):
            root, paths = given, sorted(_walk(given))
            if not paths:
                raise FileNotFoundError(f"{given}: the folder holds no file")
        elif os.path.isfile(given):
            root, paths = os.path.dirname(given), [given]
        elif os.path.exists(given):
            raise ValueError(f"{given}: a regular file is needed: inputs are read twice, first to check them")
        elif glob.has_magic(given):
            parts = given.split(os.sep)
            fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
            root = os.sep.join(parts[:fixed]) or (os.sep if given.startswith(os.sep) else "")
            paths = sorted(path for path in glob.glob(given, recursive=True) if os.path.isfile(path))
            if not paths:
                raise FileNotFoundError(f"{given}: no file matches this pattern")
        else:
            raise FileNotFoundError(f"{given}: no such file or folder")
        files.extend(_input_file(path, root) for path in paths)
    return files


def _walk(folder: str) -> Iterator[str]:
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        seen.add(os.path.realpath(parent))  # a link to a folder above must not go round for ever
        folders[:] = [f for f in folders if f[0] not in "._" and os.path.realpath(os.path.join(parent, f)) not in seen]
        yield from (os.path.join(parent, name) for name in names if name[0] not in "._")


def _raise(error: OSError) -> None:
    raise error


def _input_file(path: str, root: str) -> InputFile:
    name = os.path.relpath(path, root or ".").replace(os.sep, "/")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path!r}: the file's name is not valid UTF-8, so no id can be made of it") from None
    stem, extension = os.path.splitext(name.lower())
    compressed = extension == ".gz"
    if compressed:
        extension = os.path.splitext(stem)[1]
    if compressed and extension == ".parquet":
        raise ValueError(
            f"{path}: a gzipped Parquet file cannot be read in place (Parquet compresses inside): gunzip it"
        )
    if extension[1:] not in FORMATS:
        raise ValueError(f"{path}: unknown extension; known are .txt, .jsonl, .csv (also with .gz) and .parquet")
    return InputFile(Path(path), name, extension[1:], compressed)


def read_rows(
    files: Iterable[InputFile], *, text_column: str = "text", id_column: str | None = None
) -> Iterator[Row | BadRow]:
    """Every row of `files` in order, good or bad; a file that cannot be read (further) is one bad row.

    Raises:
        ValueError: a file lacks a column (the columns present are listed: for JSONL, the keys of its first object), has
            it twice, or has it with a type that can hold no text (or no id).
    """
    for file in files:
        path, name, line = str(file.path), file.name, 0
        try:
            for line, identifier, text in FORMATS[file.format](file, text_column, id_column):
                reason = _text_fault(text)
                if reason is None and id_column is not None:
                    reason = _id_fault(identifier, id_column)
                if reason is None:
                    yield Row(path, line, f"{name}:{line}" if id_column is None else str(identifier), text)
                else:
                    yield BadRow(path, line, str(reason))
        except Unreadable as error:
            yield BadRow(path, line + 1 if line else None, str(error), rest_lost=True)
        except (OSError, EOFError, zlib.error) as error:
            reason = f"the file cannot be read: {getattr(error, 'strerror', None) or error}"
            yield BadRow(path, line + 1 if line else None, reason, rest_lost=True)


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


def _text_fault(text: Any) -> str | None:
    """Why `text` cannot be embedded, or None."""
    if type(text) is not str:
        return "the text is null" if text is None else _type_fault("text", text)
    if not text:
        return "the text is empty"
    if text.isspace():
        return "the text is only whitespace"
    return None if text.isascii() else _surrogate_fault("text", text)


def _id_fault(identifier: Any, column: str) -> str | None:
    if type(identifier) is int:
        return None
    if type(identifier) is not str:
        return f"no id in {column!r}" if identifier is None else _type_fault("id", identifier)
    return _surrogate_fault("id", identifier) if identifier else "the id is empty"


def _type_fault(what: str, value: Any) -> str:
    if isinstance(value, Fault):
        return value
    kinds = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return f"the {what} must be a string{' or an integer' * (what == 'id')}, got {kinds.get(type(value), type(value))}"


def _surrogate_fault(what: str, value: str) -> str | None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"the {what} holds a lone surrogate, U+{ord(value[error.start]):04X}, at character {error.start + 1}"
    return None
