"""Parquet files to rows: the used columns, in batches whose values fit into the memory however well they are packed.

A file of a kilobyte may hold a long text a thousand times, through a dictionary: bytes are counted before they are
decoded, by rows and by batches.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from . import rows
from .rows import Column, Fault, InputFile, Record, Start, Unreadable, column_place, decoded

_BATCH_ROWS = 2048
_BYTES_PER_ITEM = 8  # of a list, beside the text


def read(file: InputFile, columns: Sequence[Column], start: Start) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        metadata = pq.read_metadata(file.path)
        schema = metadata.schema.to_arrow_schema()
        present = [column for column in columns if column_place(file, schema.names, column) is not None]
        for column in present:
            _check_type(file, column, schema.field(column.name).type)
        names = [column.name for column in present]
        leaves = [metadata.schema.column(i).path for i in range(len(metadata.schema))]
        strings = [name for name in names if _is_string(schema.field(name).type)]
        # of lists, each text comes once and its places beside it: a list may repeat one without end
        lists = [path for path in leaves if path not in names and path.partition(".")[0] in names]
        # without pre-buffering, memory holds one row group's pages of these columns at most
        options = {"metadata": metadata, "pre_buffer": False, "page_checksum_verification": True}
        with (
            pq.ParquetFile(file.path, read_dictionary=lists, **options) as parquet,
            pq.ParquetFile(file.path, read_dictionary=strings, **options) as dictionaries,
        ):
            for group in range(metadata.num_row_groups):
                num_rows = metadata.row_group(group).num_rows
                if number + num_rows <= start.after:
                    number += num_rows
                    continue
                batch_rows = _batch_rows(dictionaries, group, strings, lists)
                for batch in parquet.iter_batches(batch_rows, row_groups=[group], columns=names):
                    values = [
                        _values(batch.column(column.name)) if column in present else iter([None] * batch.num_rows)
                        for column in columns
                    ]
                    for row in zip(*values, strict=True):
                        number += 1
                        if number > start.after:
                            yield number, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        empty = file.path.exists() and file.path.stat().st_size == 0
        raise Unreadable("the file is empty" if empty else f"the file cannot be read: {error}") from error


def column_names(file: InputFile) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(file.path).names
    except pa.ArrowException:
        return []


def _check_type(file: InputFile, column: Column, found: Any) -> None:
    import pyarrow as pa

    if column.kind == "texts":
        wanted, fits = "list of string", _is_list(found) and _is_string(found.value_type)
    elif column.kind == "id":
        kind = found.value_type if pa.types.is_dictionary(found) else found
        wanted, fits = "string or integer", pa.types.is_integer(kind) or _is_string(kind)
    else:
        wanted, fits = "string", _is_string(found)
    if not fits:
        raise ValueError(f"{file.path}: column {column.name!r} must be of type {wanted}, got {found}")


def _is_string(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    views = pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or views


def _batch_rows(dictionaries: Any, group: int, strings: list[str], lists: list[str]) -> int:
    """How many rows of a row group decode to what one row may have, by the largest text that its dictionaries hold.

    Beyond these, pages hold texts as they are, so what they decode to is known: the column's size.
    """
    found = dictionaries.metadata.row_group(group)
    chunks = {chunk.path_in_schema: chunk for chunk in map(found.column, range(found.num_columns))}
    most = max(1, min(found.num_rows, _BATCH_ROWS))
    largest = [chunks[path].num_values // max(found.num_rows, 1) * _BYTES_PER_ITEM for path in lists]
    sizes = [chunks[path].total_uncompressed_size for path in strings]
    if max(sizes, default=0) * most > rows.MAX_ROW_BYTES:
        largest += [size // max(found.num_rows, 1) for size in sizes]
        for batch in dictionaries.iter_batches(1, row_groups=[group], columns=strings):
            largest += [_sizes(column.dictionary).max(initial=0) for column in batch.columns]
            break
    return max(1, min(most, rows.MAX_ROW_BYTES // max([1, *map(int, largest)])))


def _values(array: Any) -> Iterator[Any]:
    """A column's values, decoded piece by piece; one that is too long or not UTF-8 as a fault."""
    import pyarrow as pa

    if pa.types.is_string_view(array.type):
        array = array.cast(pa.large_binary())
    elif pa.types.is_list_view(array.type) or pa.types.is_large_list_view(array.type):
        array = array.cast(pa.large_list(array.type.value_type))
    return _pieces(array, _sizes(array))


def _pieces(array: Any, sizes: np.ndarray) -> Iterator[Any]:
    if sizes.sum() <= rows.MAX_ROW_BYTES:
        yield from _decoded(array)
    elif len(array) == 1:
        yield Fault(f"longer than {rows.MAX_ROW_BYTES:,} bytes")
    else:
        half = len(array) // 2
        yield from _pieces(array[:half], sizes[:half])
        yield from _pieces(array[half:], sizes[half:])


def _sizes(array: Any) -> np.ndarray:
    """Bytes that each value decodes to, int64 `(n,)`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(array.type):
        sizes = pa.array(_sizes(array.dictionary)).take(array.indices)
    elif _is_list(array.type):
        up_to = np.concatenate([[0], np.cumsum(_sizes(array.values) + _BYTES_PER_ITEM)])
        sizes = pa.array(np.diff(up_to[array.offsets.to_numpy()]), mask=array.is_null().to_numpy(zero_copy_only=False))
    elif pa.types.is_integer(array.type):
        return np.zeros(len(array), np.int64)
    else:
        sizes = pc.binary_length(array)
    return sizes.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)


def _decoded(array: Any) -> list[Any]:
    import pyarrow as pa

    if _is_list(array.type):
        offsets = array.offsets.to_pylist()
        first = offsets[0]
        texts = _decoded(array.values[first : offsets[-1]])
        bounds = zip(array.is_valid().to_pylist(), offsets[:-1], offsets[1:], strict=True)
        return [texts[begin - first : end - first] if valid else None for valid, begin, end in bounds]
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if not pa.types.is_binary(array.type) and not pa.types.is_large_binary(array.type):
        try:
            array.validate(full=True)
            return array.to_pylist()
        except pa.ArrowInvalid:
            array = array.cast(pa.large_binary())
    return [value if value is None else decoded(value) for value in array.to_pylist()]
