"""Checkpoints that are complete or ignored: tensors in safetensors, the rest in JSON, nothing pickled.

    RUN/checkpoints/step-200/tensors.safetensors    parameters in training and the optimizer's moments
                            /state.json             step, settings, data, counters
                            /manifest.json          SHA-256 of both, written last

A checkpoint is written under a temporary name, synced and renamed; one whose manifest does not fit is passed over.
"""

import hashlib
import json
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..engine.outputs import naming, sync
from ..engine.weights import write_tensors

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
FILES = _MANIFEST, _STATE, _TENSORS = "manifest.json", "state.json", "tensors.safetensors"
_PREFIX = "step-"


class Saved(NamedTuple):
    """What a checkpoint holds."""

    path: Path
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


def save(run: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint of `run` after `step` steps and keep the newest `keep`; returns its folder.

    Raises:
        OSError: the disk is full, or the like; earlier checkpoints are as they were.
    """
    folder = run / CHECKPOINTS
    target, temporary = folder / f"{_PREFIX}{step}", folder / f".{_PREFIX}{step}.tmp"
    with naming(target):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            write_tensors(tensors, temporary / _TENSORS)
            (temporary / _STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
            sums = {name: _sha256(temporary / name) for name in (_TENSORS, _STATE)}
            (temporary / _MANIFEST).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
            for name in (_TENSORS, _STATE, _MANIFEST):
                sync(temporary / name)
            sync(temporary)
            if target.exists():  # of the same step, so of the same content
                _remove(target)
            os.replace(temporary, target)
            sync(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    found = steps(run)
    kept = [older for older in found if older <= step][:keep]
    for other in set(found).difference(kept):  # a newer one is damaged, or the run would have gone on from it
        _remove(folder / f"{_PREFIX}{other}")
    return target


def newest(run: Path) -> Saved | None:
    """The newest complete checkpoint of a run, None where it has none.

    Raises:
        ValueError: it has checkpoints, and every one is damaged.
    """
    damaged: list[str] = []
    for step in steps(run):
        path = run / CHECKPOINTS / f"{_PREFIX}{step}"
        try:
            sums = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
            if all(_sha256(path / name) == sums[name] for name in (_TENSORS, _STATE)):
                state = json.loads((path / _STATE).read_text(encoding="utf-8"))
                if damaged:
                    logger.warning("%s: damaged, passed over for %s", ", ".join(damaged), path)
                return Saved(path, load_file(str(path / _TENSORS)), state)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            pass  # torn by a crash of the machine: an older one is whole
        damaged.append(str(path))
    if damaged:
        raise ValueError(
            f"every checkpoint is damaged, so there is none to go on from: {', '.join(damaged)}; "
            "put one back from a copy, or begin anew with --overwrite"
        )
    return None


def steps(run: Path) -> list[int]:
    """The steps of a run's checkpoints, complete or not, the newest first."""
    folder = run / CHECKPOINTS
    names = [path.name.removeprefix(_PREFIX) for path in folder.glob(f"{_PREFIX}*") if path.is_dir()]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def _remove(path: Path) -> None:
    """A checkpoint's own files, the manifest first, and its folder unless somebody put something there."""
    for name in FILES:
        (path / name).unlink(missing_ok=True)
    with suppress(OSError):
        path.rmdir()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
