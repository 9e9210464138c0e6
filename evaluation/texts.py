"""Held-out texts for the tasks that need no labels: the same sample of a folder's texts for every model."""

import random
from pathlib import Path
from typing import NamedTuple

from ..texts.files import find_files
from ..texts.formats import read_file
from ..texts.rows import BadRow, Column, RowError

PATTERNS = ("*.txt", "*.txt.gz", "*.jsonl", "*.jsonl.gz")


class HeldOutTexts(NamedTuple):
    name: str
    texts: list[str]


def read_texts(source: Path, count: int) -> HeldOutTexts:
    """`count` texts of a file, or of a folder's .txt and .jsonl files (key `text`), drawn evenly, always the same ones.

    A text is a line; blank lines of a .txt are left out. All are taken where there are fewer.

    Raises:
        FileNotFoundError: there is no such file; says which names were looked for.
        ValueError: a row is malformed, with its file and line.
    """
    if source.is_dir():
        paths = sorted(path for pattern in PATTERNS for path in source.glob(pattern))
        if not paths:
            raise FileNotFoundError(f"no texts in {source}: looked for {', '.join(PATTERNS)}")
    else:
        paths = [source]
    texts = []
    for file in find_files(paths):
        for row in read_file(file, [Column("text", kind="string")]):
            if isinstance(row, BadRow):
                raise RowError(str(row))
            if row.values[0].strip():
                texts.append(row.values[0])
    if not texts:
        raise ValueError(f"{', '.join(map(str, paths))}: every line is blank")
    chosen = sorted(random.Random(0).sample(range(len(texts)), min(count, len(texts))))
    return HeldOutTexts(source.resolve().name, [texts[place] for place in chosen])
