"""JSON files of checkpoints, adapters and runs: one value a file, of bounded size and depth, errors that name it."""

import json
from pathlib import Path
from typing import Any

_MOST_BYTES = 2**26  # an index of a thousand shards has 10 MB
_DEEPEST = 64  # below what Python's recursion bears, wherever the values are walked later


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is larger than 64 MiB, is not JSON in UTF-8, nests deeper than 64, or holds no object.
    """
    return _read(path, dict, "object")


def read_list(path: Path) -> list[Any]:
    """The JSON array that a file holds; raises as `read_object`."""
    return _read(path, list, "array")


def _read(path: Path, kind: type, kind_name: str) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"{path} must have at most {_MOST_BYTES:,} bytes")
    try:
        values = json.loads(content.decode("utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} nests deeper than {_DEEPEST} levels") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, kind):
        raise ValueError(f"{path} must hold a JSON {kind_name}, got {type(values).__name__}")
    level: list[Any] = [values]
    for _ in range(_DEEPEST):
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)]
        level = [value for value in level if isinstance(value, dict | list)]
        if not level:
            return values
    raise ValueError(f"{path} nests deeper than {_DEEPEST} levels")
