"""One file to records, a generator a format: `(line, id, text)`, where a bad row's text is a `Fault` that says why.

Values come as the file has them, of any type; a string that is not UTF-8 comes as a `Fault`. Whether a text can be
embedded is judged in `readers.py`, alike for all formats.
"""

import csv
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

MAX_ROW_BYTES = 64 * 2**20  # a longer line is a bad row: a file that is one endless line must not fill the memory
_PARQUET_BATCH_ROWS = 2048


class InputFile(NamedTuple):
    path: Path
    name: str  # what ids are made of: it does not change when the folder moves
    format: str  # a key of FORMATS
    compressed: bool


class Fault(str):
    """Why a row is bad, in the place of its text."""

    __slots__ = ()


class Unreadable(Exception):
    """Why the file cannot be read from here on."""


Record = tuple[int, Any, Any]


def _decoded(value: bytes) -> str | Fault:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        return Fault(f"invalid UTF-8: byte 0x{value[error.start]:02x} at position {error.start + 1}")


def _lines(file: InputFile) -> Iterator[tuple[int, bytes | Fault]]:
    """Numbered physical lines with their line ends, without the byte order mark; a too long one is bad."""
    opener: Callable[..., Any] = gzip.open if file.compressed else open
    with opener(file.path, "rb") as stream:
        number = 0
        for number, line in enumerate(iter(lambda: stream.readline(MAX_ROW_BYTES + 1), b""), start=1):
            if len(line) > MAX_ROW_BYTES:
                _skip_line(stream, line)
                yield number, Fault(f"longer than {MAX_ROW_BYTES:,} bytes")
            else:
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if number == 0:
            raise Unreadable("the file is empty")


def _skip_line(stream: BinaryIO, piece: bytes) -> None:
    while piece and not piece.endswith(b"\n"):
        piece = stream.readline(MAX_ROW_BYTES)


def _read_txt(file: InputFile, text_column: str, id_column: str | None) -> Iterator[Record]:
    if id_column is not None:
        raise ValueError(f"{file.path}: a .txt file has no columns, so no id column {id_column!r}")
    for number, line in _lines(file):
        if isinstance(line, Fault):
            yield number, None, line
            continue
        yield number, None, _decoded(line.removesuffix(b"\n").removesuffix(b"\r"))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return row


def _no_constant(literal: str) -> Any:
    raise ValueError(f"{literal} is not JSON")


_parse_json = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant).decode


def _read_jsonl(file: InputFile, text_column: str, id_column: str | None) -> Iterator[Record]:
    columns = [text_column] if id_column is None else [text_column, id_column]
    first = True
    for number, line in _lines(file):
        row: Any = line
        if not isinstance(line, Fault):
            if not line.strip():
                continue
            row = _json_object(line)
        if isinstance(row, Fault):
            yield number, None, row
            continue
        missing = [column for column in columns if column not in row]
        if missing and first:
            raise ValueError(_missing(file, missing[0], list(row)))
        first = False
        if missing:
            yield number, None, Fault(f"no {missing[0]!r} in this row")
        else:
            yield number, None if id_column is None else row[id_column], row[text_column]


def _json_object(line: bytes) -> dict[str, Any] | Fault:
    torn = "" if line.endswith(b"\n") else "truncated last line? "
    text = _decoded(line)
    if isinstance(text, Fault):
        return Fault(torn + text)
    try:
        row = _parse_json(text.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        return Fault(f"{torn}invalid JSON: {error.msg} at character {error.pos + 1}")
    except ValueError as error:
        return Fault(f"invalid JSON: {error}")
    except RecursionError:
        return Fault("invalid JSON: nested too deeply")
    return row if isinstance(row, dict) else Fault(f"a row must be a JSON object, got {type(row).__name__}")


def _read_csv(file: InputFile, text_column: str, id_column: str | None) -> Iterator[Record]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))

    def decoded() -> Iterator[str]:
        for _, line in _lines(file):
            if isinstance(line, Fault):
                raise Unreadable(f"a line from here on is {line}")
            yield line.decode("utf-8", "surrogateescape")  # _field finds the bytes that were not UTF-8

    reader = csv.reader(decoded(), strict=True)
    try:
        header = next((row for row in reader if row), [])
    except csv.Error as error:
        raise Unreadable(f"the header is not CSV: {error}") from error
    places = [_column(file, header, column) for column in (text_column, id_column) if column is not None]
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "field limit" in str(error):
                raise Unreadable("a field is too long: a quote that is never closed?") from error
            never_closed = "unexpected end of data" in str(error)
            yield number, None, Fault("a quote is opened and never closed" if never_closed else f"invalid CSV: {error}")
            continue
        if not row:
            continue
        if len(row) != len(header):
            yield number, None, Fault(f"{len(row)} fields, but the header has {len(header)}")
            continue
        text, *identifier = (_field(row[place]) for place in places)
        yield number, identifier[0] if identifier else None, text


def _field(value: str) -> str | Fault:
    return value if value.isascii() else _decoded(value.encode("utf-8", "surrogateescape"))


def _read_parquet(file: InputFile, text_column: str, id_column: str | None) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file.path, pre_buffer=False, page_checksum_verification=True) as parquet:
            schema = parquet.schema_arrow
            columns = [text_column] if id_column is None else [text_column, id_column]
            for column in columns:
                kind = schema.field(_column(file, schema.names, column)).type
                kind = kind.value_type if pa.types.is_dictionary(kind) else kind
                integer = column == id_column and pa.types.is_integer(kind)
                if not (integer or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                    wanted = "string or integer" if column == id_column else "string"
                    raise ValueError(f"{file.path}: column {column!r} must be of type {wanted}, got {kind}")
            # without pre-buffering, memory holds one row group's pages of these columns at most
            for batch in parquet.iter_batches(_PARQUET_BATCH_ROWS, columns=columns):
                texts = _values(batch.column(text_column))
                ids = _values(batch.column(id_column)) if id_column is not None else [None] * len(texts)
                for identifier, text in zip(ids, texts, strict=True):
                    number += 1
                    yield number, identifier, text
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        empty = file.path.exists() and file.path.stat().st_size == 0
        raise Unreadable("the file is empty" if empty else f"the file cannot be read: {error}") from error


def _values(column: Any) -> list[Any]:
    """A column's values; a string that is not UTF-8 as a fault."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        values = column.cast(pa.large_binary()).to_pylist()
        return [value if value is None else _decoded(value) for value in values]
    return column.to_pylist()


def _column(file: InputFile, columns: list[str], column: str) -> int:
    if columns.count(column) > 1:
        raise ValueError(f"{file.path}: column {column!r} occurs {columns.count(column)} times")
    if column not in columns:
        raise ValueError(_missing(file, column, columns))
    return columns.index(column)


def _missing(file: InputFile, column: str, columns: list[str]) -> str:
    return f"{file.path}: no column {column!r}; its columns are {', '.join(map(repr, columns)) or 'none'}"


FORMATS: dict[str, Callable[[InputFile, str, str | None], Iterator[Record]]] = {
    "txt": _read_txt,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
}
