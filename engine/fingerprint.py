"""What a model's files hold, as SHA-256: the same for a model that has moved, another once one of its files changed."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .checkpoints import Checkpoint
from .tokens import tokenizer_files
from .weights import checkpoint_files


def fingerprint(checkpoint: Checkpoint, *, weights: bool = True) -> dict[str, Any]:
    """SHA-256 of what each part of a model is made of: `base`, `tokenizer` and, in order, `adapters`.

    It reads every file: some seconds for a large model.

    Args:
        weights: whether the base's weights count, or its configuration alone.
    Raises:
        FileNotFoundError, ValueError: as `checkpoint_files`.
    """
    base = [checkpoint.base / "config.json", *(checkpoint_files(checkpoint.base) if weights else ())]
    return {
        "base": _sha256(base),
        "tokenizer": _sha256(tokenizer_files(checkpoint.tokenizer)),
        "adapters": [_sha256(adapter.glob("adapter_*")) for adapter in checkpoint.adapters],
    }


def _sha256(files: Iterable[Path]) -> str:
    """Over the names and contents of files."""
    whole = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        with path.open("rb") as stream:
            whole.update(f"{path.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()
