"""Which files an input names, in which order, and what is refused."""

import glob
import os
import socket

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


@pytest.mark.parametrize("order", [sorted, lambda names: sorted(names, reverse=True)])
def test_a_file_comes_once_by_its_shortest_path_whatever_the_order_of_folders(tmp_path, monkeypatch, order):
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: order(listdir(folder)))
    for name in ("in/deep/er/a.txt", "in/b.txt", "out/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"text\n")
    links = {
        "deep/loop": "..",
        "deep/er/up": "../..",
        "short": "deep/er",
        "z": "deep/er",
        "b2.txt": "b.txt",
        "o": "../out",
    }
    for name, target in links.items():
        (tmp_path / "in" / name).symlink_to(target)
    names = ["b.txt", "o/c.txt", "short/a.txt"]
    for given in ("in", "in/**", "in/**/*.txt", "in/**/**/*.txt"):
        assert [file.name for file in find_files([tmp_path / given])] == names
    assert [file.name for file in find_files([tmp_path / "in/*/*.txt"])] == [
        "deep/loop/b.txt",
        "o/c.txt",
        "short/a.txt",
    ][1:]
    assert [file.name for file in find_files([tmp_path / "in/*/er/**/a*"])] == ["deep/er/a.txt"]
    # what is given by name is taken by that name, as often as it is given
    given = [tmp_path / "in" / name for name in ("b2.txt", "b.txt", "b.txt")]
    assert [file.name for file in find_files(given)] == ["b2.txt", "b.txt", "b.txt"]


def test_patterns_match_as_in_a_shell(tmp_path):
    for name in ("a.txt", "b.jsonl", ".c.txt", "_d.txt", "x/e.txt", "x/.y/f.txt", "x/y/g.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"text\n")
    for pattern in (
        "*",
        "*.txt",
        ".*",
        "**",
        "**/*.txt",
        "x/**/*",
        "*/y/g.txt",
        "?/**",
        "[!b].*",
        "**/y/*",
        "x/*/../e.txt",
    ):
        expected = {path for path in glob.glob(f"{tmp_path}/{pattern}", recursive=True) if os.path.isfile(path)}
        assert {str(file.path) for file in find_files([f"{tmp_path}/{pattern}"])} == expected


def test_a_link_to_nothing_is_left_to_its_reader(tmp_path):
    (tmp_path / "a.txt").symlink_to("nowhere")
    (tmp_path / "b.txt").symlink_to("b.txt")
    for given in (tmp_path, f"{tmp_path}/*"):
        assert [file.name for file in find_files([given])] == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("", ValueError, "pipe.txt: a regular file is needed, as inputs are read more than once, got a named pipe"),
        ("*.txt", ValueError, "pipe.txt: a regular file is needed"),
        ("sockets", ValueError, "listening.txt: a regular file is needed, .* got a socket"),
        ("devices", ValueError, "null.txt: a regular file is needed, .* got a device"),
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
def test_inputs_that_cannot_be_read_are_refused(tmp_path, monkeypatch, given, error, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "devices").mkdir()
    (tmp_path / "devices" / "null.txt").symlink_to(os.devnull)
    (tmp_path / "sockets").mkdir()
    monkeypatch.chdir(tmp_path)  # a socket's path may have 108 bytes
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("sockets/listening.txt")
    for name in ("a.json", "a.gz", "a.parquet.gz", "folder/notes.md"):
        (tmp_path / name).write_bytes(b"x\n")
    with pytest.raises(error, match=message):
        find_files([tmp_path / given])
