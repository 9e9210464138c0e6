"""Parquet: rows in = rows out + failures, in bounded memory whatever a file of a kilobyte unpacks to."""

import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bivec.texts import rows as row_files
from bivec.texts.files import find_files
from bivec.texts.formats import column_names, read_file
from bivec.texts.rows import BadRow, Column, FileRow

TEXT, ID = Column("text"), Column("id", "id", "id")
NEGATIVES = Column("negatives", "negative", "texts", required=False)


def read(path, *columns: Column) -> list[FileRow | BadRow]:
    (file,) = find_files([path])
    return list(read_file(file, columns or [TEXT]))


def places(rows) -> list[tuple[int | None, str]]:
    """(line, first value) of good rows, (line, "!" + reason) of bad ones."""
    return [(row.line, row.values[0] if isinstance(row, FileRow) else "!" + row.reason) for row in rows]


def table(path, **columns):
    pq.write_table(pa.table(columns), path, row_group_size=4)
    return path


def not_utf8(*values: bytes) -> pa.Array:
    raw = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())


def test_rows_and_their_faults(tmp_path):
    texts = pa.array(["one", None, "", " ", "zwölf", "six"])
    path = table(
        tmp_path / "a.parquet", id=pa.array([10, 20, 30, 40, 50, None]), text=texts, other=pa.array([None] * 6)
    )
    rows = read(path, TEXT, ID)
    assert places(rows) == [
        (1, "one"),
        (2, "!the text is null"),
        (3, "!the text is empty"),
        (4, "!the text is only whitespace"),
        (5, "zwölf"),
        (6, "!no id in 'id'"),
    ]
    assert [row.values[1] for row in rows if isinstance(row, FileRow)] == [10, 50]


def test_invalid_utf8_costs_one_row(tmp_path):
    path = table(tmp_path / "a.parquet", text=not_utf8(b"one", b"t\xffo", b"\xed\xa0\x80", b"vier", b"five"))
    assert places(read(path)) == [
        (1, "one"),
        (2, "!invalid UTF-8: byte 0xff at position 2"),
        (3, "!invalid UTF-8: byte 0xed at position 1"),
        (4, "vier"),
        (5, "five"),
    ]


@pytest.mark.parametrize(
    "texts",
    [
        pa.array(["a", None, "c"], pa.large_string()),
        pa.array(["a", None, "c"]).dictionary_encode(),
        pa.chunked_array([["a"], [None, "c"]]),
    ],
    ids=["large", "dictionary", "chunked"],
)
def test_string_types(tmp_path, texts):
    path = table(tmp_path / "a.parquet", **{"the.text": texts})
    assert places(read(path, Column("the.text"))) == [(1, "a"), (2, "!the text is null"), (3, "c")]


@pytest.mark.parametrize("texts", [pa.array([1]), pa.array([b"a"]), pa.array([["a"]])])
def test_column_of_a_wrong_type_is_refused(tmp_path, texts):
    path = table(tmp_path / "a.parquet", text=texts)
    with pytest.raises(ValueError, match=r"a\.parquet: column 'text' must be of type string, got (int64|binary|list)"):
        read(path)


def test_torn_or_empty_file_is_named(tmp_path):
    whole = table(tmp_path / "whole.parquet", text=pa.array(["a", "b"])).read_bytes()
    for name, content in {"a": whole[:-10], "b": b"", "c": b"PAR1", "d": b"not a parquet file at all"}.items():
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(content)
        (bad,) = read(path)
        assert (bad.file, bad.line, bad.more_lost) == (str(path), None, True)
        assert str(bad).startswith(f"{path}: the file ")


def test_corrupt_page_ends_the_file(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": [f"text number {i}" for i in range(5000)]}),
        path,
        row_group_size=1000,
        use_dictionary=False,
        compression="none",
        write_page_checksum=True,
    )
    content = bytearray(path.read_bytes())
    place = content.index(b"text number 3500")
    content[place : place + 4] = b"TEXT"
    path.write_bytes(content)
    *good, bad = read(path)
    assert bad.more_lost
    assert 1000 < bad.line <= 3500
    assert places(good) == [(i + 1, f"text number {i}") for i in range(bad.line - 1)]


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.large_string())])
def test_lists_of_texts(tmp_path, kind):
    negatives = [["a", "b"], [], None, ["c", None], [""]]
    path = table(tmp_path / "a.parquet", text=pa.array(["x"] * 5), negatives=pa.array(negatives, kind))
    rows = read(path, TEXT, NEGATIVES)
    assert [row.values[1] if isinstance(row, FileRow) else row.reason for row in rows] == [
        ["a", "b"],
        [],
        None,
        "the negative 2 is null",
        "the negative 1 is empty",
    ]


def test_invalid_utf8_in_a_list_costs_one_row(tmp_path):
    strings = not_utf8(b"one", b"t\xffo", b"three")
    path = table(
        tmp_path / "a.parquet",
        text=pa.array(["x", "y", "z"]),
        negatives=pa.ListArray.from_arrays([0, 1, 2, 3], strings),
    )
    first, bad, last = read(path, TEXT, NEGATIVES)
    assert (first.values[1], last.values[1]) == (["one"], ["three"])
    assert (bad.line, bad.reason) == (2, "invalid UTF-8: byte 0xff at position 2")


@pytest.mark.parametrize("values", [pa.array(["a"]), pa.array([[1]]), pa.array([1])])
def test_column_that_holds_no_lists_of_strings_is_refused(tmp_path, values):
    path = table(tmp_path / "a.parquet", text=pa.array(["x"]), negatives=values)
    with pytest.raises(ValueError, match=r"a\.parquet: column 'negatives' must be of type list of string, got "):
        read(path, TEXT, NEGATIVES)


def test_column_names(tmp_path):
    path = table(tmp_path / "a.parquet", b=pa.array(["x"]), a=pa.array([["y"]]))
    assert column_names(*find_files([path])) == ["b", "a"]


def test_views(tmp_path):
    texts = pa.array(["a", None, "ü"], pa.string_view())
    negatives = pa.array([["b", "c"], ["d"], None], pa.list_view(pa.string()))
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts, "negatives": negatives}), path)
    first, bad, last = read(path, TEXT, NEGATIVES)
    assert (first.values, bad.reason, last.values) == (("a", ["b", "c"]), "the text is null", ("ü", None))


def repeated(text: str, times: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int32()), pa.array([text]))


@pytest.mark.parametrize("stored_schema", [True, False])
@pytest.mark.parametrize("column", ["text", "id", "negatives"])
def test_a_small_file_of_large_texts_takes_little_memory(tmp_path, monkeypatch, stored_schema, column):
    """The texts of all rows are one in the file; Arrow decodes a text of a dictionary once a row."""
    monkeypatch.setattr(row_files, "MAX_ROW_BYTES", 2**20)
    num_rows = 200
    large = repeated("x" * 2**19, num_rows)
    columns = {"text": repeated("a", num_rows), "id": repeated("b", num_rows), "negatives": repeated("c", num_rows)}
    columns[column] = large
    columns["negatives"] = pa.ListArray.from_arrays(range(num_rows + 1), columns["negatives"])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path, compression="zstd", store_schema=stored_schema)
    assert path.stat().st_size < 10_000
    (file,) = find_files([path])
    before, most, found = pa.total_allocated_bytes(), 0, 0
    tracemalloc.start()
    try:
        for row in read_file(file, [TEXT, ID, NEGATIVES]):
            assert isinstance(row, FileRow), row
            most = max(most, pa.total_allocated_bytes() - before)
            found += 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == num_rows
    assert max(most, peak) < 10 * 2**20  # of 100 MiB


def test_a_row_longer_than_any_other_format_allows_is_bad(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "MAX_ROW_BYTES", 100)
    texts = ["a" * 100, "b" * 101, "c", "ü" * 51, None]
    negatives = [["a"], ["a"] * 20, ["d" * 80, "e" * 4], ["f"], ["g" * 90]]
    path = table(tmp_path / "a.parquet", text=texts, negatives=pa.array(negatives))
    bad = "!longer than 100 bytes"
    assert places(read(path)) == [(1, "a" * 100), (2, bad), (3, "c"), (4, bad), (5, "!the text is null")]
    rows = read(path, Column("text", required=False), NEGATIVES)
    found = [row.values[1] if isinstance(row, FileRow) else row.reason for row in rows]
    assert found == [["a"], bad[1:], ["d" * 80, "e" * 4], bad[1:], ["g" * 90]]
