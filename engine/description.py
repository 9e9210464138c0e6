"""What an encoder is and which choices were made for it, for `bivec inspect`, logs and output files."""

import hashlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import numpy as np
import torch

from ..kernels.attention.batched import LENGTHS
from .checkpoints import Checkpoint
from .config import ModelConfig, Window
from .dtypes import ComputeDtype
from .fingerprint import fingerprint
from .model import LlamaModel
from .runner import Runner
from .slabs import Slabs
from .tokens import Rejected, Tokenized


class Described(Protocol):
    """The part of `Encoder` that is told of."""

    model: LlamaModel
    config: ModelConfig
    checkpoint: Checkpoint
    runner: Runner
    slabs: Slabs
    windows: tuple[Window, ...]
    pooling: str
    normalize: bool
    backend: str
    backend_reason: str
    prompts: dict[str, str]
    default_prompt_name: str | None
    compute_dtype: ComputeDtype
    self_test: dict[str, str]

    def encode_tokenized(
        self, tokenized: Sequence[Tokenized | Rejected]
    ) -> tuple[np.ndarray, list[str | None], int]: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def max_length(self) -> int: ...

    @property
    def pooled(self) -> str: ...

    @property
    def template(self) -> tuple[str, str]: ...


def describe(encoder: Described) -> dict[str, Any]:
    """Sections of texts, numbers and lists; sizes are computed from shapes, the self-test's lines are its results."""
    config, runner, checkpoint = encoder.config, encoder.runner, encoder.checkpoint
    parameters = sum(parameter.numel() for parameter in encoder.model.parameters())
    held = sum(parameter.nbytes for parameter in encoder.model.parameters() if not parameter.is_meta)
    windows = sorted(set(encoder.windows))
    activations = runner.pass_bytes(encoder.slabs.tokens)
    heads = f"{config.num_attention_heads} query, {config.num_key_value_heads} key/value, of {config.head_dim}"
    return {
        "model": {
            "name": checkpoint.name,
            "base": str(checkpoint.base),
            "adapters": [str(adapter) for adapter in checkpoint.adapters],
            "found": {name.rstrip(":"): line for name, _, line in (line.partition(" ") for line in checkpoint.found)},
            "architecture": config.model_type,
            "parameters": f"{parameters:,}",
            "layers": config.num_hidden_layers,
            "hidden size": config.hidden_size,
            "heads": heads,
            "rope": f"{config.rope.rope_type}, theta {config.rope.theta:g}",
            "vocabulary": config.vocab_size,
        },
        "encoding": {
            "mask": ("causal" if all(right == 0 for _, right in windows) else "bidirectional")
            + f", window {', '.join(map(str, windows))}",
            "pooling": encoder.pooling,
            "pooled tokens": encoder.pooled,
            "normalized": "always" if encoder.normalize else "when asked for",
            "max length": f"{encoder.max_length} tokens (the model has {config.max_position_embeddings} positions)",
            "prompts": encoder.prompts,
            "default prompt": encoder.default_prompt_name or "none",
            "template": " … ".join(map(repr, encoder.template)) if any(encoder.template) else "none",
        },
        "backend": {
            "device": _device_name(encoder.device),
            "dtype": f"{encoder.compute_dtype.name}: {encoder.compute_dtype.reason}",
            "attention": f"{runner.backend}: {encoder.backend_reason}" if encoder.backend_reason else runner.backend,
            **({"attention in batches": _in_batches()} if runner.in_batches else {}),
            "equal-length attention": f"one by one: {runner.one_by_one}" if runner.one_by_one else "batched",
            "cores a pass": f"1: {runner.one_core}" if runner.one_core else "any number, with the same bits",
            "row tiles": ", ".join(map(str, runner.tiles)),
            **({"matrix products": runner.products} if encoder.device.type == "cuda" else {}),
        },
        "memory": {
            "weights": _mebibytes(held),
            "weights packed for inference": _mebibytes(runner.packed_bytes),
            "activations": f"{_mebibytes(activations)} for a pass of {encoder.slabs.tokens} tokens, "
            f"{runner.passes_at_once} at once",
        },
        "self-test": encoder.self_test,
    }


# what takes part in making a vector, from text to numbers
_LIBRARIES = ("torch", "triton", "tokenizers", "transformers", "flash-attn")


def identity(encoder: Described) -> dict[str, Any]:
    """All that a vector's bits depend on but its text and the arguments of `encode`, as JSON has it.

    Files count by SHA-256, not by name: a model that has moved is the same one.
    """
    on_cuda = encoder.device.type == "cuda"
    device = torch.cuda.get_device_name(encoder.device) if on_cuda else torch.backends.cpu.get_cpu_capability()
    return {
        **fingerprint(encoder.checkpoint),
        "window": [list(window) for window in sorted(set(encoder.windows))],
        "pooling": encoder.pooling,
        "pooled": encoder.pooled,
        "template": list(encoder.template),
        "normalize": encoder.normalize,
        "max_length": encoder.max_length,
        "dtype": encoder.compute_dtype.name,
        "backend": encoder.backend,
        "device": f"{encoder.device.type}: {device}",
        "row_tiles": list(encoder.runner.tiles),
        "sample": _sample(encoder),
        "libraries": {name: found for name in _LIBRARIES if (found := _version(name)) is not None},
    }


def _sample(encoder: Described) -> str:
    """SHA-256 of the vectors of a few tokens: processors that are named alike, or are told apart by no name, differ."""
    ids = [(17 * place + 3) % encoder.config.vocab_size for place in range(min(27, encoder.max_length))]
    vectors, _, _ = encoder.encode_tokenized([Tokenized(ids[:length], 0) for length in (1, 9, 27)])
    return hashlib.sha256(vectors.tobytes()).hexdigest()


def _in_batches() -> str:
    return f"over {LENGTHS.start} to {LENGTHS.stop - 1} tokens, of bfloat16 products"


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"
