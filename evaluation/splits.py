"""Which files of a folder are the training, development and test split of which data set, by their names."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ..texts.files import is_file

Split = Literal["train", "dev", "test"]
_CALLED = {  # in files' names
    "train": "train",
    "dev": "dev",
    "valid": "dev",
    "validation": "dev",
    "testa": "dev",  # of CoNLL-2003
    "test": "test",
    "testb": "test",
}
_SPLIT = re.compile(rf"(?:(.*)[-_.])?({'|'.join(_CALLED)})")


def find_splits(folder: Path, extensions: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Files named `NAME-train`, `NAME_dev`, `NAME.test` or by the split alone, as `{name: {split: file}}`, sorted.

    `valid`, `validation` and `testa` are names of `dev`, `testb` is one of `test`.

    Args:
        extensions: what may stand behind, the first that fits counts; `""` for nothing.
    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: two files are the same split of a data set, or one is no regular file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; --data is one that holds a task's files")
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        extension = next((extension for extension in extensions if path.name.endswith(extension)), None)
        match = None if extension is None else _SPLIT.fullmatch(path.name.removesuffix(extension))
        if match and is_file(path):
            name, split = match.group(1) or folder.resolve().name, _CALLED[match.group(2)]
            other = found.setdefault(name, {}).setdefault(split, path)
            if other is not path:
                raise ValueError(f"{other} and {path} are both the {split} split of {name}")
    return found


def looked_for(name: str, split: str, extensions: Sequence[str]) -> str:
    """The names under which a split is found, for an error; `name` is `*` for any."""
    return ", ".join(f"{name}{mark}{split}{extension}" for extension in extensions for mark in "-_.")
