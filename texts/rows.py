"""Files of texts to rows: every row comes out once, as the values of some columns or as a failure with its place.

    .txt      a text a line; a blank line is an empty text
    .jsonl    a JSON object a line; a blank line is not a row
    .csv      comma-separated with a header; quoted newlines are text, a blank line is not a row
    .parquet  read in batches; only the used columns are read

All but Parquet, which compresses inside, may be gzipped (`.txt.gz`). Lines end at a line feed, with or without a
carriage return before it; a byte order mark at the start of a file is dropped; everything else must be strict UTF-8 and
strict JSON (no NaN, no key twice). Files are streamed: memory does not grow with their size, only with the longest row.

A place is the file and its physical line, or the row in Parquet, from 1; a CSV row stands where it begins.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

MAX_ROW_BYTES = 64 * 2**20  # a longer line is a bad row: a file that is one endless line must not fill the memory
_PARQUET_BATCH_ROWS = 2048
_OFFSETS_CHUNK = 2**18


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


_BEGINNING = Start()


class FileRow(NamedTuple):
    line: int
    values: Sequence[Any]  # one a column


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


def read_file(file: InputFile, columns: Sequence[Column], start: Start = _BEGINNING) -> Iterator[FileRow | BadRow]:
    """Every row of `file` from `start` on, good or bad; a file that cannot be read (further) is one bad row.

    Raises:
        ValueError: the file lacks a required column (the columns present are listed: for JSONL, the keys of its first
            object), has one twice, or has one with a type that can hold no such values.
    """
    path, line = str(file.path), start.after
    try:
        for line, values in FORMATS[file.format](file, columns, start):
            reason = values if isinstance(values, _Fault) else _first_fault(columns, values)
            yield FileRow(line, values) if reason is None else BadRow(path, line, str(reason))
    except _Unreadable as error:
        yield BadRow(path, line + 1 if line else None, str(error), rest_lost=True)
    except (OSError, EOFError, zlib.error) as error:
        reason = f"the file cannot be read: {getattr(error, 'strerror', None) or error}"
        yield BadRow(path, line + 1 if line else None, reason, rest_lost=True)


def column_names(file: InputFile) -> list[str]:
    """The file's columns, for JSONL the keys of its first object; none if that cannot be told: `read_file` says why."""
    try:
        return NAMES[file.format](file)
    except (_Unreadable, OSError, EOFError, zlib.error):
        return []


def line_offsets(file: InputFile, lines: Sequence[int]) -> list[int]:
    """The bytes at which some lines (ascending) of a file begin; 0 for each where its format cannot begin at a byte.

    Raises:
        ValueError: the file has fewer lines.
    """
    if file.compressed or file.format not in ("txt", "jsonl"):
        return [0] * len(lines)
    offsets: list[int] = []
    wanted = list(reversed(lines))
    with open(file.path, "rb") as stream:
        line, base = 1, 0  # `line` begins at or before `base`
        while wanted and wanted[-1] == line:
            offsets.append(base)
            wanted.pop()
        while wanted and (chunk := stream.read(_OFFSETS_CHUNK)):
            place = 0
            num_lines = chunk.count(b"\n")
            while wanted and wanted[-1] <= line + num_lines:
                while line < wanted[-1]:
                    place = chunk.index(b"\n", place) + 1
                    line += 1
                    num_lines -= 1
                offsets.append(base + place)
                wanted.pop()
            line += num_lines
            base += len(chunk)
    if wanted:
        raise ValueError(f"{file.path}: the file has no line {wanted[-1]} any more: it has changed")
    return offsets


def text_fault(value: Any, what: str = "text") -> str | None:
    """Why `value` is no text that a model can take, or None."""
    if type(value) is not str:
        return f"the {what} is null" if value is None else _type_fault(what, "a string", value)
    if not value:
        return f"the {what} is empty"
    if value.isspace():
        return f"the {what} is only whitespace"
    return _surrogate_fault(what, value)


def _first_fault(columns: Sequence[Column], values: Sequence[Any]) -> str | None:
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
    if isinstance(value, _Fault):
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


class _Fault(str):
    """Why a value, or a whole row, is bad, in its place."""

    __slots__ = ()


class _Unreadable(Exception):
    """Why the file cannot be read from here on."""


# a generator a format: values come as the file has them, of any type, and are judged above alike for all formats
_Record = tuple[int, Sequence[Any] | _Fault]


def _decoded(value: bytes) -> str | _Fault:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        return _Fault(f"invalid UTF-8: byte 0x{value[error.start]:02x} at position {error.start + 1}")


def _lines(file: InputFile, start: Start = _BEGINNING) -> Iterator[tuple[int, bytes | _Fault]]:
    """Numbered physical lines with their line ends, without the byte order mark; a too long one is bad."""
    opener: Callable[..., Any] = gzip.open if file.compressed else open
    with opener(file.path, "rb") as stream:
        number = start.after if start.offset else 0
        stream.seek(start.offset)
        for line in iter(lambda: stream.readline(MAX_ROW_BYTES + 1), b""):
            number += 1
            too_long = len(line) > MAX_ROW_BYTES
            if too_long:
                _skip_line(stream, line)
            if number <= start.after:
                continue
            if too_long:
                yield number, _Fault(f"longer than {MAX_ROW_BYTES:,} bytes")
            else:
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if number == 0:
            raise _Unreadable("the file is empty")


def _skip_line(stream: BinaryIO, piece: bytes) -> None:
    while piece and not piece.endswith(b"\n"):
        piece = stream.readline(MAX_ROW_BYTES)


def _read_txt(file: InputFile, columns: Sequence[Column], start: Start) -> Iterator[_Record]:
    for column in columns[1:]:
        if column.required:
            raise ValueError(f"{file.path}: a .txt file has no columns, so no {column.what} column {column.name!r}")
    absent = [None] * len(columns[1:])
    for number, line in _lines(file, start):
        text = line if isinstance(line, _Fault) else _decoded(line.removesuffix(b"\n").removesuffix(b"\r"))
        yield number, [text, *absent]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return row


def _no_constant(literal: str) -> Any:
    raise ValueError(f"{literal} is not JSON")


_parse_json = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant).decode


def _read_jsonl(file: InputFile, columns: Sequence[Column], start: Start) -> Iterator[_Record]:
    first = start == _BEGINNING
    for number, line in _lines(file, start):
        row: Any = line
        if not isinstance(line, _Fault):
            if not line.strip():
                continue
            row = _json_object(line)
        if isinstance(row, _Fault):
            yield number, row
            continue
        missing = [column.name for column in columns if column.required and column.name not in row]
        if missing and first:
            raise ValueError(_missing(file, missing[0], list(row)))
        first = False
        if missing:
            yield number, _Fault(f"no {missing[0]!r} in this row")
        else:
            yield number, [row.get(column.name) for column in columns]


def _jsonl_names(file: InputFile) -> list[str]:
    for _, line in _lines(file):
        if isinstance(line, _Fault) or line.strip():
            row = line if isinstance(line, _Fault) else _json_object(line)
            return [] if isinstance(row, _Fault) else list(row)
    return []


def _json_object(line: bytes) -> dict[str, Any] | _Fault:
    torn = "" if line.endswith(b"\n") else "truncated last line? "
    text = _decoded(line)
    if isinstance(text, _Fault):
        return _Fault(torn + text)
    try:
        row = _parse_json(text.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        return _Fault(f"{torn}invalid JSON: {error.msg} at character {error.pos + 1}")
    except ValueError as error:
        return _Fault(f"invalid JSON: {error}")
    except RecursionError:
        return _Fault("invalid JSON: nested too deeply")
    return row if isinstance(row, dict) else _Fault(f"a row must be a JSON object, got {type(row).__name__}")


def _csv_reader(file: InputFile) -> tuple[Any, list[str]]:
    """A `csv.reader` that stands behind the header, and the header."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))

    def decoded() -> Iterator[str]:
        for _, line in _lines(file):
            if isinstance(line, _Fault):
                raise _Unreadable(f"a line from here on is {line}")
            yield line.decode("utf-8", "surrogateescape")  # _field finds the bytes that were not UTF-8

    reader = csv.reader(decoded(), strict=True)
    try:
        return reader, next((row for row in reader if row), [])
    except csv.Error as error:
        raise _Unreadable(f"the header is not CSV: {error}") from error


def _read_csv(file: InputFile, columns: Sequence[Column], start: Start) -> Iterator[_Record]:
    reader, header = _csv_reader(file)
    places = [(_place(file, header, column), column.required) for column in columns]
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "field limit" in str(error):
                raise _Unreadable("a field is too long: a quote that is never closed?") from error
            never_closed = "unexpected end of data" in str(error)
            if number > start.after:
                yield number, _Fault("a quote is opened and never closed" if never_closed else f"invalid CSV: {error}")
            continue
        if not row or number <= start.after:
            continue
        if len(row) != len(header):
            yield number, _Fault(f"{len(row)} fields, but the header has {len(header)}")
            continue
        yield number, [_csv_value(row, place, required) for place, required in places]


def _csv_value(row: list[str], place: int | None, required: bool) -> str | _Fault | None:
    if place is None or not (row[place] or required):
        return None
    return _field(row[place])


def _field(value: str) -> str | _Fault:
    return value if value.isascii() else _decoded(value.encode("utf-8", "surrogateescape"))


def _read_parquet(file: InputFile, columns: Sequence[Column], start: Start) -> Iterator[_Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file.path, pre_buffer=False, page_checksum_verification=True) as parquet:
            schema = parquet.schema_arrow
            present = [column.name for column in columns if _place(file, schema.names, column) is not None]
            for column in columns:
                if column.name in present:
                    _check_type(file, column, schema.field(column.name).type)
            first_group, sizes = 0, [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
            while first_group < len(sizes) and number + sizes[first_group] <= start.after:
                number += sizes[first_group]
                first_group += 1
            groups = range(first_group, len(sizes))
            # without pre-buffering, memory holds one row group's pages of these columns at most
            for batch in parquet.iter_batches(_PARQUET_BATCH_ROWS, row_groups=groups, columns=present):
                absent = [None] * batch.num_rows
                values = [
                    _values(batch.column(column.name)) if column.name in present else absent for column in columns
                ]
                for row in zip(*values, strict=True):
                    number += 1
                    if number > start.after:
                        yield number, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        empty = file.path.exists() and file.path.stat().st_size == 0
        raise _Unreadable("the file is empty" if empty else f"the file cannot be read: {error}") from error


def _parquet_names(file: InputFile) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(file.path).names
    except pa.ArrowException:
        return []


def _check_type(file: InputFile, column: Column, found: Any) -> None:
    import pyarrow as pa

    kind, wanted = found, "string"
    if column.kind == "texts":
        wanted = "list of string"
        kind = found.value_type if pa.types.is_list(found) or pa.types.is_large_list(found) else pa.null()
    elif column.kind == "id":
        wanted = "string or integer"
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    integer = column.kind == "id" and pa.types.is_integer(kind)
    if not (integer or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"{file.path}: column {column.name!r} must be of type {wanted}, got {found}")


def _values(array: Any) -> list[Any]:
    """A column's values; a string that is not UTF-8 as a fault."""
    import pyarrow as pa

    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    try:
        array.validate(full=True)
        return array.to_pylist()
    except pa.ArrowInvalid:
        if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
            return [None if texts is None else _values(texts.values) for texts in array]
        return [value if value is None else _decoded(value) for value in array.cast(pa.large_binary()).to_pylist()]


def _place(file: InputFile, names: list[str], column: Column) -> int | None:
    """Where the column stands among `names`, or None where it may be absent."""
    if names.count(column.name) > 1:
        raise ValueError(f"{file.path}: column {column.name!r} occurs {names.count(column.name)} times")
    if column.name not in names:
        if column.required:
            raise ValueError(_missing(file, column.name, names))
        return None
    return names.index(column.name)


def _missing(file: InputFile, column: str, columns: list[str]) -> str:
    return f"{file.path}: no column {column!r}; its columns are {', '.join(map(repr, columns)) or 'none'}"


FORMATS: dict[str, Callable[[InputFile, Sequence[Column], Start], Iterator[_Record]]] = {
    "txt": _read_txt,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
}
NAMES: dict[str, Callable[[InputFile], list[str]]] = {
    "txt": lambda file: [],
    "jsonl": _jsonl_names,
    "csv": lambda file: _csv_reader(file)[1],
    "parquet": _parquet_names,
}
