"""All that can be known of a run before anything large is read, so that a mistake ends it at once.

Texts are read once the settings fit the model, weights once every row is known to be good, and texts are tokenised
last, the held-out ones first.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn

from ..engine import ops
from ..engine.adapter_config import read_adapter_config
from ..engine.adapters import adapter_tensors
from ..engine.checkpoints import Checkpoint, resolve
from ..engine.config import ModelConfig, load_config
from ..engine.dtypes import choose_dtype
from ..engine.model import LlamaModel
from ..engine.tokens import TextTokenizer, load_tokenizer
from ..engine.weights import checkpoint_files
from .masking import mask_token_id
from .settings import ContrastiveSettings, MntpSettings, PretrainSettings, TrainingSettings


@dataclass(frozen=True)
class Prepared:
    """A model that fits the settings, before its weights are read.

    Attributes:
        settings: with every length that the model's positions decide.
        notes: what to say of these.
        dtype: of the computation.
        earlier: adapters that stay frozen beneath the one in training.
        continued: the adapter that goes on to be trained, and its configuration.
    """

    settings: TrainingSettings
    notes: list[str]
    checkpoint: Checkpoint
    config: ModelConfig
    tokenizer: TextTokenizer
    device: torch.device
    dtype: torch.dtype
    backend: str
    earlier: tuple[Path, ...]
    continued: tuple[Path, LoraConfig] | None


def prepare(settings: TrainingSettings, device: torch.device, checkpoint: Checkpoint | None = None) -> Prepared:
    """Check the settings against the model's configuration, tokenizer and adapters.

    Args:
        checkpoint: what `settings.model` resolves to, if that is known.
    Raises:
        ValueError, FileNotFoundError: naming the field or file and what was expected.
    """
    checkpoint = checkpoint or resolve(settings.model)
    config = load_config(checkpoint.base)
    dtype = choose_dtype(settings.dtype, device, config).floats
    if dtype is torch.float16:
        raise ValueError(
            "dtype must be float32: this GPU has no bfloat16, and float16's range is too small for gradients"
        )
    settings, notes = settings.within(config.max_position_embeddings)
    draws_masks = settings.attention_dropout or settings.mask_schedule == "annealed"
    if settings.attention in ("varlen", "flash") and draws_masks:
        raise ValueError(
            f"attention {settings.attention!r} cannot draw the masks of attention_dropout or mask_schedule annealed"
        )
    backend = ops.choose_backend(settings.attention, device, dtype, config.head_dim)
    assert settings.max_length is not None
    tokenizer = TextTokenizer(load_tokenizer(checkpoint.tokenizer, config.vocab_size), settings.max_length)
    if isinstance(settings, MntpSettings):
        mask_token_id(tokenizer.hugging_face, settings.mask_token)
    if getattr(settings, "train_head", False) and config.tie_word_embeddings:
        raise ValueError("train_head needs a head of its own; this model's is tied to its embeddings")
    if isinstance(settings, ContrastiveSettings) and max(settings.dims, default=1) > config.hidden_size:
        raise ValueError(f"dims must be at most the model's hidden size, {config.hidden_size}, got {settings.dims}")
    if not (isinstance(settings, PretrainSettings) and settings.random_weights):
        checkpoint_files(checkpoint.base)
    earlier, continued = _adapters(settings, checkpoint, config)
    return Prepared(settings, notes, checkpoint, config, tokenizer, device, dtype, backend, tuple(earlier), continued)


def _adapters(
    settings: TrainingSettings, checkpoint: Checkpoint, config: ModelConfig
) -> tuple[tuple[Path, ...], tuple[Path, LoraConfig] | None]:
    """Those that stay frozen, and the one that goes on to be trained."""
    earlier = checkpoint.adapters
    configurations = [read_adapter_config(folder) for folder in earlier]
    for folder in earlier:
        adapter_tensors(folder)
    if settings.full_finetuning:
        if earlier:
            raise ValueError(f"full_finetuning needs a model without adapters, {settings.model} has {len(earlier)}")
        return (), None
    if not settings.continue_adapter:
        _check_target_modules(settings, config)
        return earlier, None
    if not earlier:
        raise ValueError(f"continue_adapter needs a model with an adapter, {settings.model} has none")
    if configurations[-1].use_dora:
        raise ValueError(f"continue_adapter cannot train DoRA, which {earlier[-1]} uses")
    return earlier[:-1], (earlier[-1], configurations[-1])


def _check_target_modules(settings: TrainingSettings, config: ModelConfig) -> None:
    with torch.device("meta"):
        modules = LlamaModel(config).named_modules()
        linears = {name.rpartition(".")[2] for name, part in modules if isinstance(part, nn.Linear)}
    for name in settings.target_modules:
        if name not in linears:
            raise ValueError(f"target_modules must be among {', '.join(sorted(linears))}, got {name!r}")
