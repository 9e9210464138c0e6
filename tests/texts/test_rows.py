"""What a column may ask for beside a text: lists of texts, and values that may be absent."""

import pyarrow as pa
import pyarrow.parquet as pq

from bivec.texts.files import find_files
from bivec.texts.formats import read_file
from bivec.texts.rows import BadRow, Column, FileRow

TEXT = Column("text")


def read(path, *columns: Column) -> list[FileRow | BadRow]:
    (file,) = find_files([path])
    return list(read_file(file, columns))


def write(path, content: bytes):
    path.write_bytes(content)
    return path


NEGATIVES = Column("negatives", "negative", "texts", required=False)
NOTE = Column("note", "note", "string", required=False)

LISTS = {
    "[]": [],
    '["a", "b"]': ["a", "b"],
    "null": None,
    '"a"': "the negatives must be a list of strings, got a string",
    "5": "the negatives must be a list of strings, got a number",
    '["a", " "]': "the negative 2 is only whitespace",
    '["", "b"]': "the negative 1 is empty",
    '["a", null]': "the negative 2 is null",
    "[7]": "the negative 1 must be a string, got a number",
    '["a", "b", "\\ud800"]': "the negative 3 holds a lone surrogate, U+D800, at character 1",
}


def test_jsonl_lists_of_texts(tmp_path):
    lines = [f'{{"text": "x", "negatives": {negatives}}}\n' for negatives in LISTS] + ['{"text": "x"}\n']
    rows = read(write(tmp_path / "a.jsonl", "".join(lines).encode()), TEXT, NEGATIVES)
    assert [row.values[1] if isinstance(row, FileRow) else row.reason for row in rows] == [*LISTS.values(), None]


def test_a_value_that_is_not_required_may_be_absent(tmp_path):
    jsonl = write(
        tmp_path / "a.jsonl",
        b'{"text": "x"}\n{"text": "x", "note": null}\n{"text": "x", "note": ""}\n{"text": "x", "note": 5}\n',
    )
    *good, bad = read(jsonl, TEXT, NOTE)
    assert [row.values[1] for row in good] == [None, None, ""]
    assert bad.reason == "the note must be a string, got a number"
    assert read(write(tmp_path / "a.txt", b"x\n"), TEXT, NOTE)[0].values == ["x", None]
    assert read(write(tmp_path / "a.csv", b"text\nx\n"), TEXT, NOTE)[0].values == ["x", None]
    # a CSV knows no null
    rows = read(write(tmp_path / "b.csv", b"note,text\n,x\n ,y\n"), TEXT, NOTE)
    assert [tuple(row.values) for row in rows] == [("x", None), ("y", " ")]
    pq.write_table(pa.table({"text": ["x", "y"]}), tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet", TEXT, NOTE)
    assert [tuple(row.values) for row in rows] == [("x", None), ("y", None)]
