"""PEFT LoRA folders stacked on a packed Llama or merged into it, in order, with every tensor accounted for."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from .checkpoints import Checkpoint
from .config import ModelConfig
from .model import LlamaModel
from .weights import list_problems, load_model, read_tensors


def read_adapter_config(folder: Path) -> LoraConfig:
    """The LoRA configuration of a PEFT folder; raises ValueError for what cannot be merged into an encoder."""
    path = folder / "adapter_config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        peft_type = values.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} must be a JSON object") from error
    if peft_type != "LORA":
        raise ValueError(f"{path}: peft_type must be LORA, got {peft_type!r}")
    for key in (
        "auto_mapping_code",
        "modules_to_save",
        "trainable_token_indices",
        "megatron_config",
        "use_dora",
        "lora_bias",
    ):
        if values.get(key):
            raise ValueError(f"{path}: {key} is not supported, got {values[key]!r}")
    if values.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias must be none, got {values['bias']!r}")
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no LoRA configuration that PEFT can read: {error}") from error
    config.task_type = None  # the encoder has no head: PEFT's task wrappers do not apply
    config.inference_mode = True
    return config


def stack_adapters(model: nn.Module, folders: Sequence[Path]) -> list[str]:
    """Put the adapters of `folders` beside `model`'s linears, float32, frozen and not yet active; returns their names.

    Raises:
        ValueError: a folder without safetensors, or with tensors that do not fit (an adapter of another base).
    """
    names = [f"stage_{place}" for place in range(len(folders))]
    for name, folder in zip(names, folders, strict=True):
        config = read_adapter_config(folder)
        try:
            inject_adapter_in_model(config, model, adapter_name=name)
        except ValueError as error:  # no module has such a name
            raise ValueError(f"{folder / 'adapter_config.json'} does not fit the base: {error}") from error
        load_adapter(model, name, folder)
    return names


def merge_adapters(model: nn.Module, folders: Sequence[Path]) -> None:
    """Add the adapters of `folders` to `model`'s weights in place; each weight's sum is taken in float32, rounded once.

    Raises as `stack_adapters`.
    """
    names = stack_adapters(model, folders)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            dtype = base.weight.dtype
            base.weight.data = base.weight.data.float()
            module.merge(safe_merge=True, adapter_names=names)
            base.weight.data = base.weight.data.to(dtype)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, base)


def load_merged(checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype) -> LlamaModel:
    """A checkpoint's base in `dtype`, its adapters merged; raises as `load_model` and `stack_adapters`."""
    llama = load_model(LlamaModel, checkpoint.base, dtype, config)
    merge_adapters(llama, checkpoint.adapters)
    return llama


def load_adapter(model: nn.Module, name: str, folder: Path) -> None:
    """Fill the injected adapter `name` from `folder`, strictly."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; an adapter must be in safetensors (a pickle is refused)")
    for module in model.modules():
        if isinstance(module, LoraLayer):  # PEFT makes the pair in the base's dtype, which may be 16 bits
            for pair in (module.lora_A, module.lora_B):
                if name in pair:
                    pair[name].float()
    made = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    expected = {_plain(key): (key, value) for key, value in made.items()}
    loaded: dict[str, torch.Tensor] = {}
    problems = []
    for _, file_key, tensor in read_tensors([path]):
        key, target = expected.get(_plain(file_key), (None, None))
        if key is None or target is None:
            problems.append(f"unexpected {file_key}")
        elif tensor.shape != target.shape:
            problems.append(f"{file_key} must have shape {tuple(target.shape)}, got {tuple(tensor.shape)}")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{file_key} holds NaN or infinity")
        else:
            loaded[key] = tensor
    problems += [f"missing {plain}" for plain, (key, _) in expected.items() if key not in loaded]
    if problems:
        raise ValueError(f"{path} does not fit this base: {list_problems(problems)}")
    set_peft_model_state_dict(model, loaded, adapter_name=name)


def _plain(key: str) -> str:
    """An adapter tensor's name without the wrappers of whoever saved it (PEFT's, a causal model's)."""
    return key.removeprefix("base_model.model.").removeprefix("model.")
