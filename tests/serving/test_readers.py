"""Rows in = rows out + failures, each with its id, and what is checked before a job begins."""

import pytest

from bivec.serving import readers
from bivec.serving.readers import Row, check_rows, read_rows
from bivec.texts.files import find_files
from bivec.texts.rows import BadRow, RowError


def read(*paths, **columns) -> list[Row | BadRow]:
    return list(read_rows(find_files(paths), **columns))


def num_rows(shards) -> int:
    return sum(shard.num_rows for shard in shards)


def write(path, content: bytes):
    path.write_bytes(content)
    return path


def test_rows_of_all_files_in_order_and_without_an_id_column_the_place_is_the_id(tmp_path):
    (tmp_path / "sub").mkdir()
    first = write(tmp_path / "a.txt", b"one\n\nthree\n")
    second = write(tmp_path / "sub" / "b.jsonl", b'\n{"text": "four"}\n')
    torn = write(tmp_path / "sub" / "c.txt.gz", b"not gzip")
    write(tmp_path / "sub" / "d.txt", b"last")
    *rows, lost, after = read(tmp_path)
    assert rows == [
        Row(str(first), 1, "a.txt:1", "one"),
        BadRow(str(first), 2, "the text is empty"),
        Row(str(first), 3, "a.txt:3", "three"),
        Row(str(second), 2, "sub/b.jsonl:2", "four"),
    ]
    assert (lost.file, lost.more_lost, after.text) == (str(torn), True, "last")


def test_ids_are_strings_or_integers(tmp_path):
    ids = ['"a"', "7", "-0", "12345678901234567890123", "1.5", "true", "null", '""', '"\\udfff"', "[1]"]
    path = write(tmp_path / "a.jsonl", "".join(f'{{"id": {i}, "text": "x"}}\n' for i in ids).encode())
    rows = read(path, id_column="id")
    assert [row.id for row in rows if isinstance(row, Row)] == ["a", "7", "0", "12345678901234567890123"]
    assert [row.reason for row in rows if isinstance(row, BadRow)] == [
        "the id must be a string or an integer, got a number",
        "the id must be a string or an integer, got a boolean",
        "no id in 'id'",
        "the id is empty",
        "the id holds a lone surrogate, U+DFFF, at character 1",
        "the id must be a string or an integer, got a list",
    ]


def test_duplicate_ids_are_named_with_their_places(tmp_path):
    first = write(tmp_path / "a.jsonl", b"".join(b'{"id": %d, "text": "x"}\n' % n for n in range(10)))
    second = write(
        tmp_path / "b.jsonl", b'{"id": "new", "text": "x"}\n{"id": "3", "text": "x"}\n{"id": 7, "text": "x"}\n'
    )
    with pytest.raises(ValueError, match="must be unique") as caught:
        check_rows(find_files([first, second]), id_column="id")
    assert f"'3' is at {first}:4 and at {second}:2; '7' is at {first}:8 and at {second}:3" in str(caught.value)
    assert num_rows(check_rows(find_files([first, second]), id_column="id", limit=11)) == 11
    with pytest.raises(ValueError, match="must be unique") as caught:
        check_rows(find_files([first, first]), id_column="id")
    assert str(caught.value).count(" is at ") == 5
    assert str(caught.value).endswith("…")


def test_equal_hashes_of_different_ids_are_no_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "hash", lambda _: 1, raising=False)
    path = write(tmp_path / "a.jsonl", b'{"id": 1, "text": "x"}\n{"id": 2, "text": "x"}\n')
    assert num_rows(check_rows(find_files([path]), id_column="id")) == 2


def test_a_row_that_failed_does_not_take_its_id(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"id": 1, "text": ""}\n{"id": 1, "text": "x"}\n')
    assert num_rows(check_rows(find_files([path]), id_column="id", on_error="skip")) == 2


def test_files_that_would_share_ids_are_refused_without_an_id_column(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "x.txt", b"text\n")
    with pytest.raises(ValueError, match=r"a/x\.txt and .*b/x\.txt would give their rows the same ids \(x\.txt:1"):
        check_rows(find_files([tmp_path / "a" / "x.txt", tmp_path / "b" / "x.txt"]))
    assert num_rows(check_rows(find_files([tmp_path]))) == 2


def test_check_stops_at_the_first_bad_row_or_counts_it(tmp_path):
    path = write(tmp_path / "a.txt", b"one\n\nthree\n\n")
    with pytest.raises(RowError, match=r"a\.txt:2: the text is empty$"):
        check_rows(find_files([path]))
    assert num_rows(check_rows(find_files([path]), on_error="skip")) == 4
    assert num_rows(check_rows(find_files([path]), limit=1)) == 1
    with pytest.raises(ValueError, match=r"no row in .*b\.csv"):
        check_rows(find_files([write(tmp_path / "b.csv", b"text\n")]), on_error="skip")
