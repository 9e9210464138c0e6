"""Checkpoints that are complete or ignored: tensors in safetensors, the rest in JSON, nothing pickled.

    RUN/checkpoints/step-200/tensors.safetensors    parameters in training and the optimizer's moments
                            /state.json             step, settings, data, counters
                            /manifest.json          SHA-256 of both, written last

A checkpoint is written under a temporary name, synced and renamed; one whose manifest does not fit is passed over.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

CHECKPOINTS = "checkpoints"
_PREFIX = "step-"
_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


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
    folder.mkdir(parents=True, exist_ok=True)
    target, temporary = folder / f"{_PREFIX}{step}", folder / f".{_PREFIX}{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(temporary / _TENSORS))
        (temporary / _STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        sums = {name: _sha256(temporary / name) for name in (_TENSORS, _STATE)}
        (temporary / _MANIFEST).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
        for name in (_TENSORS, _STATE, _MANIFEST):
            _sync(temporary / name)
        _sync(temporary)
        if target.exists():  # of the same step, so of the same content
            shutil.rmtree(target)
        os.replace(temporary, target)
        _sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in sorted(_numbered(folder), reverse=True)[keep:]:
        shutil.rmtree(folder / f"{_PREFIX}{old}")
    return target


def newest(run: Path) -> Saved | None:
    """The newest complete checkpoint of a run, or None."""
    folder = run / CHECKPOINTS
    for step in sorted(_numbered(folder), reverse=True):
        path = folder / f"{_PREFIX}{step}"
        try:
            sums = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
            if all(_sha256(path / name) == sums[name] for name in (_TENSORS, _STATE)):
                state = json.loads((path / _STATE).read_text(encoding="utf-8"))
                return Saved(path, load_file(str(path / _TENSORS)), state)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            continue  # torn by a crash of the machine: an older one is whole
    return None


def _numbered(folder: Path) -> list[int]:
    names = [path.name.removeprefix(_PREFIX) for path in folder.glob(f"{_PREFIX}*") if path.is_dir()]
    return [int(name) for name in names if name.isdigit()]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
