"""Rows of texts: which columns are wanted of a file, what a row is, and what makes one bad.

A place is the file and its physical line, or the row in Parquet, from 1; a CSV row stands where it begins.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

MAX_ROW_BYTES = 64 * 2**20  # a longer one is a bad row: a file that is one endless line must not fill the memory


class InputFile(NamedTuple):
    path: Path
    name: str  # what ids are made of: it does not change when the folder moves
    format: str  # a key of FORMATS
    compressed: bool


class Column(NamedTuple):
    """A column, or JSON key, to read.

    Attributes:
        what: what its values are called when one is bad: "text" gives `the text is empty`.
        kind: `text`, a string with more than white space in it; `string`, any; `texts`, a list of `text`s, of which
            `what` names one; `id`, a string that is not empty, or an integer.
        required: if not, the file may lack the column and a row its value, which is then None; so is, in a CSV, an
            empty field.
    """

    name: str
    what: str = "text"
    kind: Literal["text", "string", "texts", "id"] = "text"
    required: bool = True


class Start(NamedTuple):
    """Where to begin in a file: behind the rows at places up to `after`.

    `offset`, where it is not 0, is the byte at which place `after + 1` begins, from `line_offsets`.
    """

    after: int = 0
    offset: int = 0


class FileRow(NamedTuple):
    line: int
    values: Sequence[Any]  # one a column


class BadRow(NamedTuple):
    file: str
    line: int | None  # None: the file could not be opened at all
    reason: str
    more_lost: bool = False  # than one row: the rest of the file, or the lines that a quote encloses

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.reason}"


class RowError(ValueError):
    """A bad row where none is allowed: `file:line: reason`."""


class Fault(str):
    """Why a value, or a whole row, is bad, in its place."""

    __slots__ = ()


class LinesLost(Fault):
    """Why several lines are bad, which may have been rows."""

    __slots__ = ()


Record = tuple[int, Sequence[Any] | Fault]  # a place, and values as the file has them, of any type


class Unreadable(Exception):
    """Why a file cannot be read from here on; `line` is where, if that is not behind the last row."""

    def __init__(self, reason: str, line: int | None = None):
        super().__init__(reason)
        self.line = line


def text_fault(value: Any, what: str = "text") -> str | None:
    """Why `value` is no text that a model can take, or None."""
    if type(value) is not str:
        return f"the {what} is null" if value is None else _type_fault(what, "a string", value)
    if not value:
        return f"the {what} is empty"
    if value.isspace():
        return f"the {what} is only whitespace"
    return _surrogate_fault(what, value)


def first_fault(columns: Sequence[Column], values: Sequence[Any]) -> str | None:
    """Why a row of these values, one a column, is bad, or None."""
    for column, value in zip(columns, values, strict=True):
        _, what, kind, required = column
        if value is None and not required:
            continue
        reason = text_fault(value, what) if kind == "text" else _fault(value, column)
        if reason is not None:
            return reason
    return None


def _fault(value: Any, column: Column) -> str | None:
    what = column.what
    if column.kind == "texts":
        if type(value) is not list:
            return _type_fault(f"{what}s", "a list of strings", value)
        faults = (text_fault(text, f"{what} {number}") for number, text in enumerate(value, start=1))
        return next((fault for fault in faults if fault is not None), None)
    if column.kind == "id":
        if type(value) is int:
            return None
        if type(value) is not str:
            return (
                f"no {what} in {column.name!r}" if value is None else _type_fault(what, "a string or an integer", value)
            )
        if not value:
            return f"the {what} is empty"
    elif type(value) is not str:
        return _type_fault(what, "a string", value)
    return _surrogate_fault(what, value)


def _type_fault(what: str, wanted: str, value: Any) -> str:
    if isinstance(value, Fault):
        return value
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    found = "null" if value is None else kinds.get(type(value), type(value))
    return f"the {what} must be {wanted}, got {found}"


def _surrogate_fault(what: str, value: str) -> str | None:
    if value.isascii():
        return None
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"the {what} holds a lone surrogate, U+{ord(value[error.start]):04X}, at character {error.start + 1}"
    return None


def decoded(value: bytes) -> str | Fault:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        return Fault(f"invalid UTF-8: byte 0x{value[error.start]:02x} at position {error.start + 1}")


def column_place(file: InputFile, names: list[str], column: Column) -> int | None:
    """Where the column stands among `names`, or None where it may be absent."""
    if names.count(column.name) > 1:
        raise ValueError(f"{file.path}: column {column.name!r} occurs {names.count(column.name)} times")
    if column.name not in names:
        if column.required:
            raise ValueError(missing_column(file, column.name, names))
        return None
    return names.index(column.name)


def missing_column(file: InputFile, column: str, columns: list[str]) -> str:
    return f"{file.path}: no column {column!r}; its columns are {', '.join(map(repr, columns)) or 'none'}"
