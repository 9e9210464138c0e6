"""Files of texts to rows: every row comes out once, as the values of some columns or as a failure with its place.

    .txt      a text a line; a blank line is an empty text
    .jsonl    a JSON object a line; a blank line is not a row
    .csv      comma-separated with a header; quoted newlines are text, a blank line is not a row
    .parquet  read in batches; only the used columns are read

All but Parquet, which compresses inside, may be gzipped (`.txt.gz`). Lines end at a line feed, with or without a
carriage return before it; a byte order mark at the start of a file is dropped; everything else must be strict UTF-8 and
strict JSON (no NaN, no key twice). Files are streamed: memory does not grow with their size, only with the longest row.
"""

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from . import parquet, rows
from .rows import (
    BadRow,
    Column,
    Fault,
    FileRow,
    InputFile,
    LinesLost,
    Record,
    Start,
    Unreadable,
    column_place,
    decoded,
    first_fault,
    missing_column,
)

_OFFSETS_CHUNK = 2**18
_BEGINNING = Start()
_WIDE_MARKS = {  # of UTF-32 one begins as one of UTF-16
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


def read_file(file: InputFile, columns: Sequence[Column], start: Start = _BEGINNING) -> Iterator[FileRow | BadRow]:
    """Every row of `file` from `start` on, good or bad; a file that cannot be read (further) is one bad row.

    Raises:
        ValueError: the file lacks a required column (the columns present are listed: for JSONL, the keys of its first
            object), has one twice, or has one with a type that can hold no such values.
    """
    path, line = str(file.path), start.after
    try:
        for line, values in FORMATS[file.format](file, columns, start):
            reason = values if isinstance(values, Fault) else first_fault(columns, values)
            if reason is None:
                yield FileRow(line, values)
            else:
                yield BadRow(path, line, str(reason), more_lost=isinstance(reason, LinesLost))
    except Unreadable as error:
        yield BadRow(path, error.line or (line + 1 if line else None), str(error), more_lost=True)
    except (OSError, EOFError, zlib.error) as error:
        reason = f"the file cannot be read: {getattr(error, 'strerror', None) or error}"
        yield BadRow(path, line + 1 if line else None, reason, more_lost=True)


def column_names(file: InputFile) -> list[str]:
    """The file's columns, for JSONL the keys of its first object; none if that cannot be told: `read_file` says why."""
    try:
        return NAMES[file.format](file)
    except (Unreadable, OSError, EOFError, zlib.error):
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


def lines(file: InputFile, start: Start = _BEGINNING) -> Iterator[tuple[int, bytes | Fault]]:
    """Numbered physical lines with their line ends, without the byte order mark; a too long one is bad.

    Raises:
        Unreadable: the file is empty, or is not in UTF-8 from its first line on.
    """
    opener: Callable[..., Any] = gzip.open if file.compressed else open
    with opener(file.path, "rb") as stream:
        number = start.after if start.offset else 0
        stream.seek(start.offset)
        for line in iter(lambda: stream.readline(rows.MAX_ROW_BYTES + 1), b""):
            number += 1
            if number == 1:
                refuse_wide_characters(line)
            too_long = len(line) > rows.MAX_ROW_BYTES
            if too_long:
                _skip_line(stream, line)
            if number <= start.after:
                continue
            if too_long:
                yield number, Fault(f"longer than {rows.MAX_ROW_BYTES:,} bytes")
            else:
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if number == 0:
            raise Unreadable("the file is empty")


def refuse_wide_characters(line: bytes) -> None:
    """Raises Unreadable where a file's first line is UTF-16 or UTF-32, by its mark or, of ASCII, by its zeros."""
    name = next((name for name, marks in _WIDE_MARKS.items() if line.startswith(marks)), None)
    even, odd = line[::2], line[1::2]
    if name is None and len(line) > 3 and any(line) and not (any(even) and any(odd)):
        name = "UTF-16 or UTF-32"
    if name is not None:
        convert = f"convert it, as by `iconv -f {name[:6]} -t UTF-8`"
        raise Unreadable(f"the file is in {name}, and must be in UTF-8: {convert}")


def _skip_line(stream: BinaryIO, piece: bytes) -> None:
    while piece and not piece.endswith(b"\n"):
        piece = stream.readline(rows.MAX_ROW_BYTES)


def _read_txt(file: InputFile, columns: Sequence[Column], start: Start) -> Iterator[Record]:
    for column in columns[1:]:
        if column.required:
            raise ValueError(f"{file.path}: a .txt file has no columns, so no {column.what} column {column.name!r}")
    absent = [None] * len(columns[1:])
    for number, line in lines(file, start):
        text = line if isinstance(line, Fault) else decoded(line.removesuffix(b"\n").removesuffix(b"\r"))
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


def _read_jsonl(file: InputFile, columns: Sequence[Column], start: Start) -> Iterator[Record]:
    first = start == _BEGINNING
    for number, line in lines(file, start):
        row: Any = line
        if not isinstance(line, Fault):
            if not line.strip():
                continue
            row = _json_object(line)
        if isinstance(row, Fault):
            yield number, row
            continue
        missing = [column.name for column in columns if column.required and column.name not in row]
        if missing and first:
            raise ValueError(missing_column(file, missing[0], list(row)))
        first = False
        if missing:
            yield number, Fault(f"no {missing[0]!r} in this row")
        else:
            yield number, [row.get(column.name) for column in columns]


def _jsonl_names(file: InputFile) -> list[str]:
    for _, line in lines(file):
        if isinstance(line, Fault) or line.strip():
            row = line if isinstance(line, Fault) else _json_object(line)
            return [] if isinstance(row, Fault) else list(row)
    return []


def _json_object(line: bytes) -> dict[str, Any] | Fault:
    torn = "" if line.endswith(b"\n") else "truncated last line? "
    text = decoded(line)
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


def _csv_reader(file: InputFile) -> tuple[Any, list[str]]:
    """A `csv.reader` that stands behind the header, and the header."""
    csv.field_size_limit(max(csv.field_size_limit(), rows.MAX_ROW_BYTES))

    def csv_lines() -> Iterator[str]:
        for number, line in lines(file):
            if isinstance(line, Fault):
                raise Unreadable(f"a line is {line}; it and the rest of the file are lost", number)
            yield line.decode("utf-8", "surrogateescape")  # _field finds the bytes that were not UTF-8

    reader = csv.reader(csv_lines(), strict=True)
    try:
        return reader, next((row for row in reader if row), [])
    except csv.Error as error:
        raise Unreadable(f"the header is not CSV: {error}") from error


def _read_csv(file: InputFile, columns: Sequence[Column], start: Start) -> Iterator[Record]:
    reader, header = _csv_reader(file)
    places = [(column_place(file, header, column), column.required) for column in columns]
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if number > start.after:
                yield number, _csv_fault(str(error), number, reader.line_num)
            if "field limit" in str(error):
                return
            continue
        if not row or number <= start.after:
            continue
        if len(row) != len(header):
            reason = f"{len(row)} fields, but the header has {len(header)}"
            yield number, _csv_fault(reason, number, reader.line_num)
            continue
        yield number, [_csv_value(row, place, required) for place, required in places]


def _csv_fault(reason: str, line: int, last_line: int) -> Fault:
    """Why the row that reaches from `line` to `last_line` is bad: where a quote was not meant, several rows are."""
    if "unexpected end of data" in reason:
        return LinesLost(f"a quote is opened and never closed: all lines to the file's last, {last_line}, are lost")
    if "field limit" in reason:
        limit = csv.field_size_limit()
        return LinesLost(f"a quote is not closed within {limit:,} characters: the rest of the file is lost")
    if not reason[0].isdigit():
        reason = f"invalid CSV: {reason}"
    if last_line > line:
        return LinesLost(f"{reason}; a quote makes one row of all lines from here to {last_line}")
    return Fault(reason)


def _csv_value(row: list[str], place: int | None, required: bool) -> str | Fault | None:
    if place is None or not (row[place] or required):
        return None
    return _field(row[place])


def _field(value: str) -> str | Fault:
    return value if value.isascii() else decoded(value.encode("utf-8", "surrogateescape"))


FORMATS: dict[str, Callable[[InputFile, Sequence[Column], Start], Iterator[Record]]] = {
    "txt": _read_txt,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": parquet.read,
}
NAMES: dict[str, Callable[[InputFile], list[str]]] = {
    "txt": lambda file: [],
    "jsonl": _jsonl_names,
    "csv": lambda file: _csv_reader(file)[1],
    "parquet": parquet.column_names,
}
