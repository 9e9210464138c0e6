"""Which files the user's inputs name: files as given, folders and patterns searched."""

import fnmatch
import glob
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .formats import FORMATS
from .rows import InputFile

_KINDS = {
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def find_files(inputs: Sequence[str | os.PathLike[str]]) -> list[InputFile]:
    """The files that `inputs` name, in order: files as given, folders (recursively) and patterns sorted by path.

    In a folder, files and folders whose name begins with `.` or `_` are left out, as Arrow and Spark do; of a pattern,
    only those that begin with `.`, as in a shell. Links are followed, but a folder or a pattern gives every file once,
    however many ways lead to it, by the shortest, of equal ones the first.

    Raises:
        FileNotFoundError: an input does not exist, or a folder or pattern holds no file.
        ValueError: a file has an unknown extension, its name is not UTF-8, or it is no regular file.
    """
    files: list[InputFile] = []
    for item in inputs:
        given = os.fspath(item)
        if os.path.isdir(given):
            root = given
            paths = _each_once(path for folder in _folders(given, hidden="._") for path in _names(folder, hidden="._"))
            if not paths:
                raise FileNotFoundError(f"{given}: the folder holds no file")
        elif os.path.exists(given):
            root, paths = os.path.dirname(given), _each_once([given])
        elif glob.has_magic(given):
            parts = given.split(os.sep)
            fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
            root = os.sep.join(parts[:fixed]) or (os.sep if given.startswith(os.sep) else "")
            paths = _each_once(_matches(root, parts[fixed:]))
            if not paths:
                raise FileNotFoundError(f"{given}: no file matches this pattern")
        else:
            raise FileNotFoundError(f"{given or repr(given)}: no such file or folder")
        files.extend(_input_file(path, root) for path in paths)
    return files


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a file and no folder; what cannot be opened is left to its reader.

    Raises:
        ValueError: it is something else, which may never end or never begin: a named pipe, a socket, a device.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return True
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return stat.S_ISREG(mode)
    kind = next(name for is_kind, name in _KINDS.items() if is_kind(mode))
    raise ValueError(f"{path}: a regular file is needed, as inputs are read more than once, got {kind}")


def _each_once(paths: Iterable[str]) -> list[str]:
    """The files among `paths`, sorted, each by its shortest path."""
    shortest: dict[str, str] = {}
    for path in sorted(set(paths), key=lambda path: (path.count(os.sep), path)):
        if is_file(path):
            shortest.setdefault(os.path.realpath(path), path)
    return sorted(shortest.values())


def _folders(top: str, hidden: str) -> Iterator[str]:
    """`top` and every folder below it, the nearest first and each once, whatever links lead to it."""
    seen: set[str] = set()
    level = [top]
    while level:
        folders = []
        for folder in level:
            real = os.path.realpath(folder)
            if real not in seen:
                seen.add(real)
                yield folder
                folders += [path for path in _names(folder, hidden) if os.path.isdir(path)]
        level = sorted(folders)


def _names(folder: str, hidden: str) -> list[str]:
    """Paths of what is in `folder`, without the names that begin with a character of `hidden`."""
    return sorted(os.path.join(folder, name) for name in os.listdir(folder or os.curdir) if name[0] not in hidden)


def _matches(folder: str, parts: Sequence[str]) -> Iterator[str]:
    """What below `folder` the parts of a pattern match, as `glob` has it; `**` goes through every folder once."""
    part, *rest = parts
    if part == "**":
        for below in _folders(folder, hidden="."):
            yield from _matches(below, rest or ["*"])
        return
    if glob.has_magic(part):
        hidden = "" if part.startswith(".") else "."
        found = [path for path in _names(folder, hidden) if fnmatch.fnmatchcase(os.path.basename(path), part)]
    else:
        found = [os.path.join(folder, part)]
    for path in found:
        if not rest:
            if os.path.lexists(path):
                yield path
        elif os.path.isdir(path):
            yield from _matches(path, rest)


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
