"""Packages of the `eval` extra, or an error that says how to get them."""

import importlib
from typing import Any


def needed(module: str, package: str, purpose: str) -> Any:
    """The imported `module` of `package`; raises ValueError naming the extra where it is absent."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{purpose} needs {package}: pip install 'bivec[eval]' ({error})") from error
