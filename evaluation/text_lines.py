"""Lines of a data set's file as text, one after the other, with what is wrong with a line in its place."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from ..texts.formats import lines
from ..texts.rows import Fault, InputFile, Unreadable, decoded


def text_lines(path: Path) -> Iterator[tuple[int, str | Fault]]:
    """Each line's number from 1, and its text without the line's end or why it is none; a .gz is unpacked.

    Raises:
        ValueError: the file is in another encoding, or a damaged archive; says which.
    """
    try:
        for number, line in lines(InputFile(path, path.name, "txt", compressed=path.suffix == ".gz")):
            text = line if isinstance(line, Fault) else decoded(line)
            yield number, text if isinstance(text, Fault) else text.rstrip("\r\n")
    except Unreadable as error:
        raise ValueError(f"{path}: {error}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: the file cannot be read: {error}") from error
