"""Rows in = rows out + failures, each with its place and its reason."""

import csv
import gzip
import io
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bivec.texts import formats
from bivec.texts import rows as row_files
from bivec.texts.files import find_files
from bivec.texts.formats import column_names, line_offsets, read_file
from bivec.texts.rows import BadRow, Column, FileRow, Start

TEXT, ID = Column("text"), Column("id", "id", "id")

few = settings(max_examples=60, derandomize=True, deadline=None)


def read(path, *columns: Column) -> list[FileRow | BadRow]:
    (file,) = find_files([path])
    return list(read_file(file, columns or [TEXT]))


def places(rows) -> list[tuple[int | None, str]]:
    """(line, first value) of good rows, (line, "!" + reason) of bad ones."""
    return [(row.line, row.values[0] if isinstance(row, FileRow) else "!" + row.reason) for row in rows]


def write(path, content: bytes):
    if path.suffix == ".gz":
        content = gzip.compress(content)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_txt_is_a_text_a_line(tmp_path, ending):
    content = "\ufeffone\r\n  two \n\n\t \nthree\x0bstill\u2028three \ufeff\rtoo\x00\nlast".encode()
    path = write(tmp_path / f"a.txt{ending}", content)
    rows = read(path)
    assert places(rows) == [
        (1, "one"),
        (2, "  two "),
        (3, "!the text is empty"),
        (4, "!the text is only whitespace"),
        (5, "three\x0bstill\u2028three \ufeff\rtoo\x00"),
        (6, "last"),
    ]
    assert str(rows[2]) == f"{path}:3: the text is empty"


def test_txt_invalid_utf8_is_one_bad_row(tmp_path):
    path = write(tmp_path / "a.txt", b"good\nb\xffd\nalso \xed\xa0\x80\ngood too\ntorn \xe2\x82")
    assert places(read(path)) == [
        (1, "good"),
        (2, "!invalid UTF-8: byte 0xff at position 2"),
        (3, "!invalid UTF-8: byte 0xed at position 6"),
        (4, "good too"),
        (5, "!invalid UTF-8: byte 0xe2 at position 6"),
    ]


JSONL_FAULTS = {
    b'{"text": null}': "the text is null",
    b'{"text": 5}': "the text must be a string, got a number",
    b'{"text": true}': "the text must be a string, got a boolean",
    b'{"text": ["a"]}': "the text must be a string, got a list",
    b'{"text": {"a": 1}}': "the text must be a string, got an object",
    b'{"text": ""}': "the text is empty",
    b'{"text": " \\t\\n\\u3000"}': "the text is only whitespace",
    b'{"text": "a\\ud800b"}': "the text holds a lone surrogate, U+D800, at character 2",
    b'{"text": "a\xff"}': "invalid UTF-8: byte 0xff at position 12",
    b'{"other": "a"}': "no 'text' in this row",
    b'{"text": "a", "text": "b"}': "invalid JSON: key 'text' occurs twice",
    b'{"text": "a", "score": NaN}': "invalid JSON: NaN is not JSON",
    b'{"text": "a", "score": -Infinity}': "invalid JSON: -Infinity is not JSON",
    b'{"text": "a"} {"text": "b"}': "invalid JSON: Extra data at character 15",
    b'{"text": "a"': "invalid JSON: Expecting ',' delimiter at character 13",
    b'{"text": "a\tb"}': "invalid JSON: Invalid control character at at character 12",
    b'["a"]': "a row must be a JSON object, got list",
    b'"a"': "a row must be a JSON object, got str",
    b"not json": "invalid JSON: Expecting value at character 1",
    b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "invalid JSON: nested too deeply",
    b'{"text": "a", "n": ' + b"1" * 5000 + b"}": "invalid JSON: Exceeds the limit (4300 digits)",
}


@pytest.mark.parametrize(("line", "reason"), JSONL_FAULTS.items(), ids=[f"{line[:24]!r}" for line in JSONL_FAULTS])
def test_a_bad_jsonl_row_is_reported_and_its_neighbours_are_read(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    before, bad, after = read(path)
    assert (before.line, before.values, after.line, after.values) == (1, ["before"], 3, ["after"])
    assert bad.line == 2
    assert bad.reason.startswith(reason)
    assert str(bad).startswith(f"{path}:2: {reason}")


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_jsonl_mark_line_ends_and_blank_lines(tmp_path, ending):
    path = write(
        tmp_path / f"a.jsonl{ending}",
        b'\xef\xbb\xbf{"text": "one"}\r\n\r\n \n'
        b'{"x": 1e999, "text": "a\\u2028\xe2\x80\xa8\\ud83d\\ude00"}\n{"text": "end"}',
    )
    assert places(read(path)) == [(1, "one"), (4, "a\u2028\u2028😀"), (5, "end")]


def test_jsonl_truncated_last_line(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "one"}\n{"text": "tw')
    assert places(read(path))[1] == (
        2,
        "!truncated last line? invalid JSON: Unterminated string starting at at character 10",
    )
    path = write(tmp_path / "b.jsonl", '{"text": "one"}\n{"text": "zwölf'.encode()[:-3])
    assert "truncated last line? invalid UTF-8" in places(read(path))[1][1]


def test_a_line_without_end_is_a_bad_row_and_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "MAX_ROW_BYTES", 1000)
    path = write(tmp_path / "a.txt", b"x" * 1000 + b"\n" + b"a\n" + b"y" * 5000 + b"\nb\n" + b"z" * 999 + b"\n")
    rows = places(read(path))
    assert [line for line, _ in rows] == [1, 2, 3, 4, 5]
    assert [text for _, text in rows] == [
        "!longer than 1,000 bytes",
        "a",
        "!longer than 1,000 bytes",
        "b",
        "z" * 999,
    ]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_csv_quotes_newlines_and_physical_lines(tmp_path, ending):
    content = (
        b'\xef\xbb\xbfid,text\r\n1,"two\nlines, ""quoted"""\r\n\r\n2,plain\r\n3\r\n4,a,b\r\n5,\r\n6,"a"b\r\n'
        b"7,b\xff\r\n8,\xe2\x82\xac\r\n" + b"9," + b"x" * 200_000 + b"\r\n"
    )
    rows = read(write(tmp_path / f"a.csv{ending}", content), TEXT, ID)
    assert places(rows) == [
        (2, 'two\nlines, "quoted"'),
        (5, "plain"),
        (6, "!1 fields, but the header has 2"),
        (7, "!3 fields, but the header has 2"),
        (8, "!the text is empty"),
        (9, "!invalid CSV: ',' expected after '\"'"),
        (10, "!invalid UTF-8: byte 0xff at position 2"),
        (11, "€"),
        (12, "x" * 200_000),
    ]
    assert [row.values[1] for row in rows if isinstance(row, FileRow)] == ["1", "2", "8", "9"]


def test_csv_quote_that_is_never_closed(tmp_path, monkeypatch):
    path = write(tmp_path / "a.csv", b'text,n\nfine,1\n"open,2\nswallowed,3\n' + b"swallowed,4\n" * 10)
    fine, bad = read(path)
    assert places([fine]) == [(2, "fine")]
    reason = "a quote is opened and never closed: all lines to the file's last, 14, are lost"
    assert bad == BadRow(str(path), 3, reason, more_lost=True)
    previous = csv.field_size_limit(1000)
    monkeypatch.setattr(row_files, "MAX_ROW_BYTES", 1000)
    try:
        path = write(tmp_path / "b.csv", b'text,n\n"fine\n",1\n"open,2\n' + b"swallowed,3\n" * 1000)
        (_, bad) = read(path)
    finally:
        csv.field_size_limit(previous)
    reason = "a quote is not closed within 1,000 characters: the rest of the file is lost"
    assert bad == BadRow(str(path), 4, reason, more_lost=True)


def test_csv_lines_that_a_quote_swallows_are_told(tmp_path):
    content = b'text,n\n"open,2\na,3\nb,4\n"so, closed",5\nfine,6\n"two\nlines"\nfine,7\n'
    path = write(tmp_path / "a.csv", content)
    torn, first, wide, second = read(path)
    reason = "invalid CSV: ',' expected after '\"'; a quote makes one row of all lines from here to 5"
    assert torn == BadRow(str(path), 2, reason, more_lost=True)
    reason = "1 fields, but the header has 2; a quote makes one row of all lines from here to 8"
    assert wide == BadRow(str(path), 7, reason, more_lost=True)
    assert places([first, second]) == [(6, "fine"), (9, "fine")]


def test_a_csv_line_that_is_too_long_has_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "MAX_ROW_BYTES", 100)
    path = write(tmp_path / "a.csv", b'text,n\n"two\nlines",1\n' + b"x" * 101 + b",2\nfine,3\n")
    first, lost = read(path)
    assert first.values == ["two\nlines"]
    reason = "a line is longer than 100 bytes; it and the rest of the file are lost"
    assert lost == BadRow(str(path), 4, reason, more_lost=True)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.csv.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_a_file_of_wide_characters_is_named(tmp_path, name, encoding):
    content = '{"text": "one"}\n' if name == "a.jsonl" else "text,n\none,1\n"
    path = write(tmp_path / name, content.encode(encoding))
    (bad,) = read(path)
    assert (bad.line, bad.more_lost) == (None, True)
    assert bad.reason.startswith("the file is in UTF-")
    assert encoding[4:6] in bad.reason
    assert "must be in UTF-8: convert it, as by `iconv -f UTF-" in bad.reason
    assert column_names(*find_files([path])) == []


# hashable stand-ins: what stands in a row, and what must come out
GOOD_TEXT = st.text(min_size=1).filter(lambda text: not text.isspace())


@few
@given(
    st.lists(st.tuples(st.sampled_from(["good", "bad", "blank"]), GOOD_TEXT, st.integers(0, len(JSONL_FAULTS) - 1))),
    st.booleans(),
    st.sampled_from([b"\n", b"\r\n"]),
)
@example([], True, b"\n")
def test_jsonl_rows_in_are_rows_out_and_failures(tmp_path_factory, lines, escaped, line_end):
    faults = list(JSONL_FAULTS)
    content, expected = b'{"text": "first"}' + line_end, [(1, "first")]
    for line, (kind, text, fault) in enumerate(lines, start=2):
        if kind == "good":
            content += json.dumps({"text": text, "n": line}, ensure_ascii=escaped).encode()
            expected.append((line, text))
        elif kind == "bad":
            content += faults[fault]
            expected.append((line, "!" + JSONL_FAULTS[faults[fault]]))
        content += line_end
    path = write(tmp_path_factory.mktemp("jsonl") / "a.jsonl", content)
    found = places(read(path))
    assert len(found) == len(expected)
    for (line, text), (expected_line, expected_text) in zip(found, expected, strict=True):
        assert line == expected_line
        assert text == expected_text or (text[0] == "!" and text.startswith(expected_text))


@few
@given(st.lists(st.one_of(GOOD_TEXT, st.none())), st.sampled_from(["\n", "\r\n"]), st.sampled_from([0, 1]))
def test_csv_rows_in_are_rows_out_and_failures(tmp_path_factory, texts, line_end, quoting):
    out = io.StringIO(newline="")
    if any("\r" in (text or "") for text in texts):
        quoting = csv.QUOTE_ALL  # csv.writer leaves a carriage return bare, which no reader can tell from a line's end
    writer = csv.writer(out, lineterminator=line_end, quoting=quoting)
    writer.writerow(["n", "text"])
    expected = []
    for number, text in enumerate(texts):
        line = out.getvalue().count("\n") + 1
        if text is None:
            writer.writerow([number])
            expected.append((line, "!1 fields, but the header has 2"))
        else:
            writer.writerow([number, text])
            expected.append((line, text))
    path = write(tmp_path_factory.mktemp("csv") / "a.csv", out.getvalue().encode())
    assert places(read(path)) == expected


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.txt.gz", "a.jsonl.gz"])
def test_an_empty_file_is_named(tmp_path, name):
    (bad,) = read(write(tmp_path / name, b""))
    assert str(bad) == f"{tmp_path / name}: the file is empty"


def test_truncated_gzip_gives_its_rows_and_says_what_is_lost(tmp_path):
    content = b"".join(b"text number %d\n" % n for n in range(50_000))
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(content)[:-5000])
    rows = read(path)
    good, bad = rows[:-1], rows[-1]
    assert places(good) == [(n + 1, f"text number {n}") for n in range(len(good))]
    assert len(good) > 10_000
    assert (bad.line, bad.more_lost) == (len(good) + 1, True)
    assert str(bad).startswith(f"{path}:{len(good) + 1}: the file cannot be read: Compressed file ended")


def test_a_file_that_is_not_gzip_is_named(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(b"plain text\n")
    (bad,) = read(tmp_path / "a.txt.gz")
    assert str(bad).startswith(f"{tmp_path / 'a.txt.gz'}: the file cannot be read: Not a gzipped file")


@pytest.mark.parametrize(
    ("name", "content", "columns"),
    [
        ("a.jsonl", b'\n{"title": "x", "body": "y"}\n{"text": "z"}\n', "'title', 'body'"),
        ("a.csv", b"title,body\nx,y\n", "'title', 'body'"),
        ("a.csv", b"title;text\nx;y\n", "'title;text'"),
    ],
)
def test_a_missing_column_lists_the_columns_present(tmp_path, name, content, columns):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=f"{name}: no column 'text'; its columns are {columns}"):
        read(path)


def test_a_missing_column_of_parquet_and_a_missing_id_column(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"title": ["x"], "body": ["y"]}), path)
    with pytest.raises(ValueError, match="no column 'text'; its columns are 'title', 'body'"):
        read(path)
    with pytest.raises(ValueError, match="no column 'id'; its columns are 'title', 'body'"):
        read(path, Column("body"), ID)
    with pytest.raises(ValueError, match=r"a\.txt: a \.txt file has no columns, so no id column 'id'"):
        read(write(tmp_path / "a.txt", b"x\n"), TEXT, ID)


def test_a_column_that_occurs_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="column 'text' occurs 2 times"):
        read(write(tmp_path / "a.csv", b"text,text\nx,y\n"))


@pytest.mark.parametrize(
    ("name", "content", "names"),
    [
        ("a.csv", b'\xef\xbb\xbf\n"a ""b""",c\n1,2\n', ['a "b"', "c"]),
        ("a.jsonl", b'\n \n{"b": 1, "a": 2}\n{"c": 1}\n', ["b", "a"]),
        ("a.txt", b"text\n", []),
        ("a.csv", b"", []),
        ("a.csv", b'"a', []),
        ("a.jsonl", b"\n", []),
        ("a.jsonl", b"{\n", []),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-4], []),
        ("a.parquet", b"PAR1", []),
    ],
)
def test_column_names_or_none_where_they_cannot_be_told(tmp_path, name, content, names):
    path = tmp_path / name
    path.write_bytes(content)
    assert column_names(*find_files([path])) == names


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.csv"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    line = {"txt": b"some text\n", "jsonl": b'{"text": "some text"}\n', "csv": b"some text,1\n"}[name.split(".")[1]]
    path = write(tmp_path / name, (b"text,n\n" if name == "a.csv" else b"") + line * (1_000_000 // len(line)))
    rows = read_file(*find_files([path]), [TEXT])
    tracemalloc.start()
    try:
        num_rows = sum(1 for _ in rows)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_rows > 40_000
    assert peak < 300_000


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.csv", "a.parquet"])
def test_reading_from_any_row_on_gives_the_rest(tmp_path, monkeypatch, name):
    monkeypatch.setattr(formats, "_OFFSETS_CHUNK", 7)
    path = tmp_path / name
    texts = [f"text {n}" for n in range(12)]
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": texts}), path, row_group_size=5)
    else:
        lines = {
            "txt": "\ufeff" + "".join(f"{text}\n" for text in texts).replace("text 4", ""),
            "jsonl": "".join(f'{{"text": "{text}"}}\n\n' for text in texts) + '{"text": "torn',
            "csv": "n,text\n" + "".join(f'{n},"{text}\n{n}"\n' for n, text in enumerate(texts)) + "1\n",
        }[name.split(".")[1]].encode()
        path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    (file,) = find_files([path])
    rows = list(read_file(file, [TEXT]))
    places = [row.line for row in rows]
    offsets = line_offsets(file, places)
    assert any(offsets) == (name in ("a.txt", "a.jsonl"))
    for number, (line, offset) in enumerate(zip(places, offsets, strict=True)):
        assert list(read_file(file, [TEXT], Start(line - 1, offset))) == rows[number:]
        assert list(read_file(file, [TEXT], Start(line - 1))) == rows[number:]


def test_a_line_that_is_not_there_any_more(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (file,) = find_files([tmp_path / "a.txt"])
    assert line_offsets(file, [1, 2]) == [0, 4]
    with pytest.raises(ValueError, match=r"a\.txt: the file has no line 4 any more"):
        line_offsets(file, [2, 4])
