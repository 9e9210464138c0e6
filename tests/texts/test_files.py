"""Which files an input names, in which order, and what is refused."""

import os

import pytest

from bivec.texts.files import find_files


def test_folders_and_patterns_are_sorted_and_name_their_files_from_there(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/deep er/ü.txt", ".hidden.txt", "_SUCCESS", "_temporary/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"text\n")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    names = ["a.txt", "b.txt", "sub/c.txt", "sub/deep er/ü.txt"]
    assert [file.name for file in find_files([tmp_path])] == names
    assert [file.name for file in find_files([f"{tmp_path}/[ab].txt"])] == ["a.txt", "b.txt"]
    assert [file.name for file in find_files([f"{tmp_path}/s*/*.txt"])] == ["sub/c.txt"]
    assert [file.name for file in find_files([tmp_path / "b.txt", tmp_path / "a.txt"])] == ["b.txt", "a.txt"]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path):
    for name in ("a[1].txt", "a1.txt"):
        (tmp_path / name).write_bytes(b"text\n")
    assert [file.name for file in find_files([tmp_path / "a[1].txt"])] == ["a[1].txt"]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("missing.txt", FileNotFoundError, "missing.txt: no such file or folder"),
        ("*.jsonl", FileNotFoundError, "no file matches this pattern"),
        ("empty", FileNotFoundError, "the folder holds no file"),
        ("a.json", ValueError, "a.json: unknown extension; known are .txt, .jsonl, .csv"),
        ("folder", ValueError, "notes.md: unknown extension"),
        ("a.gz", ValueError, "a.gz: unknown extension"),
        ("a.parquet.gz", ValueError, "a.parquet.gz: a gzipped Parquet file cannot be read in place"),
        ("pipe.txt", ValueError, "a regular file is needed"),
    ],
)
def test_inputs_that_cannot_be_read_are_refused(tmp_path, given, error, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    for name in ("a.json", "a.gz", "a.parquet.gz", "folder/notes.md"):
        (tmp_path / name).write_bytes(b"x\n")
    with pytest.raises(error, match=message):
        find_files([tmp_path / given])
