"""Which files the user's inputs name: files as given, folders and patterns searched."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from .rows import FORMATS, InputFile


def find_files(inputs: Sequence[str | os.PathLike[str]]) -> list[InputFile]:
    """The files that `inputs` name, in order: files as given, folders (recursively) and patterns sorted by path.

    In a folder, files and folders whose name begins with `.` or `_` are left out, as Arrow and Spark do.

    Raises:
        FileNotFoundError: an input does not exist, or a folder or pattern holds no file.
        ValueError: a file has an unknown extension, or its name is not UTF-8.
    """
    files: list[InputFile] = []
    for item in inputs:
        given = os.fspath(item)
        if os.path.isdir(given):
            root, paths = given, sorted(_walk(given))
            if not paths:
                raise FileNotFoundError(f"{given}: the folder holds no file")
        elif os.path.isfile(given):
            root, paths = os.path.dirname(given), [given]
        elif os.path.exists(given):
            raise ValueError(f"{given}: a regular file is needed: inputs are read twice, first to check them")
        elif glob.has_magic(given):
            parts = given.split(os.sep)
            fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
            root = os.sep.join(parts[:fixed]) or (os.sep if given.startswith(os.sep) else "")
            paths = sorted(path for path in glob.glob(given, recursive=True) if os.path.isfile(path))
            if not paths:
                raise FileNotFoundError(f"{given}: no file matches this pattern")
        else:
            raise FileNotFoundError(f"{given}: no such file or folder")
        files.extend(_input_file(path, root) for path in paths)
    return files


def _walk(folder: str) -> Iterator[str]:
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        seen.add(os.path.realpath(parent))  # a link to a folder above must not go round for ever
        folders[:] = [f for f in folders if f[0] not in "._" and os.path.realpath(os.path.join(parent, f)) not in seen]
        yield from (os.path.join(parent, name) for name in names if name[0] not in "._")


def _raise(error: OSError) -> None:
    raise error


def _input_file(path: str, root: str) -> InputFile:
    name = os.path.relpath(path, root or ".").replace(os.sep, "/")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path!r}: the file's name is not valid UTF-8, so no id can be made of it") from None
    stem, extension = os.path.splitext(name.lower())
    compressed = extension == ".gz"
    if compressed:
        extension = os.path.splitext(stem)[1]
    if compressed and extension == ".parquet":
        raise ValueError(
            f"{path}: a gzipped Parquet file cannot be read in place (Parquet compresses inside): gunzip it"
        )
    if extension[1:] not in FORMATS:
        raise ValueError(f"{path}: unknown extension; known are .txt, .jsonl, .csv (also with .gz) and .parquet")
    return InputFile(Path(path), name, extension[1:], compressed)
