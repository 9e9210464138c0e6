"""PEFT LoRA folders stacked on a packed Llama or merged into it, in order, with every tensor accounted for.

A module's name is what PEFT saw when the adapter was trained: `model.layers.0…` within a causal language model,
`layers.0…` without one. Its tensors' names say which, so its patterns match here what they matched there.
"""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from .adapter_config import ADAPTER_CONFIG, HEADS, MERGE, RESIDUAL_INITS, check_patterns, read_adapter_config
from .checkpoints import Checkpoint
from .config import ModelConfig
from .model import DecoderLayer, LlamaModel
from .weights import StoredTensor, list_problems, load_by_layer, load_model, read_headers, read_tensors

_TENSORS = "adapter_model.safetensors"
WRAPPER = "base_model.model."  # PEFT's own, before every name in a file
CAUSAL = "model."  # before a name as it stands in a causal language model


def stack_adapters(model: nn.Module, folders: Sequence[Path]) -> list[str]:
    """Put the adapters of `folders` beside `model`'s linears, float32, frozen and not yet active; returns their names.

    What PiSSA and OLoRA took out of the weights, earlier adapters included, is taken out of `model`'s in place.

    Raises:
        ValueError: a folder whose adapter does not fit (one of another base), or one that can only be merged (DoRA).
        FileNotFoundError: a folder without safetensors.
    """
    names, inits = add_adapters(model, folders)
    for name, folder in zip(names, folders, strict=True):
        if any(name in module.lora_magnitude_vector for module in _lora_layers(model)):
            raise ValueError(f"{folder / ADAPTER_CONFIG}: use_dora can be merged, not stacked; export the model first")
    for place, (name, init) in enumerate(zip(names, inits, strict=True)):
        take_out(model, name, init, earlier=names[:place])
    return names


def merge_adapters(model: nn.Module, folders: Sequence[Path]) -> None:
    """Add the adapters of `folders` to `model`'s weights in place; each weight's sum is taken in float32, rounded once.

    Each adapter stands on what those before it made of the weights.

    Raises as `stack_adapters`; DoRA is merged.
    """
    names, inits = add_adapters(model, folders)
    for path, module in list(model.named_modules()):
        if not isinstance(module, LoraLayer):
            continue
        base = module.get_base_layer()
        dtype = base.weight.dtype
        base.weight.data = base.weight.data.float()
        for name, init, folder in zip(names, inits, folders, strict=True):
            if name not in module.lora_A:
                continue
            if init in RESIDUAL_INITS:
                left, right = initial_factors(module, name, init, base.weight.data)
                base.weight.data = base.weight.data - left @ right
            module.merge(adapter_names=[name])
            module.merged_adapters.clear()  # for the next one these are the weights
            if not torch.isfinite(base.weight).all():
                raise ValueError(f"{folder}: {path}.weight is not finite with this adapter merged into it")
        base.weight.data = base.weight.data.to(dtype)
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, base)


def load_merged(checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype) -> LlamaModel:
    """A checkpoint's base in `dtype`, its adapters merged; raises as `load_model` and `merge_adapters`."""
    llama = load_model(LlamaModel, checkpoint.base, dtype, config)
    merge_adapters(llama, checkpoint.adapters)
    return llama


def load_merged_by_layer(
    checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> tuple[LlamaModel, Iterator[DecoderLayer]]:
    """As `load_merged`, on `device`, for whoever makes something else of each layer, which is gone when the next comes.

    Without adapters, one layer at a time is in memory, in float32. With them all are at first, in `dtype`.
    """
    if checkpoint.adapters:
        model = load_merged(checkpoint, config, dtype)
        layers: Iterator[nn.Module] = iter(model.layers)
        for kept in (model.embed_tokens, model.norm):  # copies, because a file is in memory as long as anything of it
            kept.weight.data = kept.weight.data.clone()
    else:
        model, layers = load_by_layer(checkpoint.base, dtype, config)
    model.embed_tokens.to(device)
    model.norm.to(device)

    def moved() -> Iterator[DecoderLayer]:
        for layer in layers:
            assert isinstance(layer, DecoderLayer)
            yield layer.to(device)
            layer.to("meta")  # the parameters can still be counted

    return model, moved()


def add_adapter(model: nn.Module, name: str, folder: Path, config: LoraConfig) -> str:
    """Inject the adapter `name` into `model`, filled from `folder`, float32, where the base may have 16 bits.

    PEFT's own matching code runs, on the names that it saw in training. Nothing is allocated before names and shapes
    are known to fit.

    Args:
        config: as `read_adapter_config(folder)` gives it; not changed.
    Returns:
        `CAUSAL` where its tensors are named as in a causal language model, else "".
    Raises:
        ValueError, FileNotFoundError: as `stack_adapters`.
    """
    path = adapter_tensors(folder)
    stored = [one for one in read_headers([path]) if one.name.removeprefix(WRAPPER).partition(".")[0] not in HEADS]
    prefix = CAUSAL if any(one.name.removeprefix(WRAPPER).startswith(CAUSAL) for one in stored) else ""
    _inject(model, name, config, prefix, folder / ADAPTER_CONFIG)
    expected = {file_key: (key, parameter) for file_key, key, parameter in _parameters(model, name)}
    found: dict[StoredTensor, str] = {}
    problems = []
    for one in stored:
        plain = one.name.removeprefix(WRAPPER)
        file_key = plain.removeprefix(prefix)
        if file_key not in expected or not plain.startswith(prefix):
            problems.append(f"unexpected {one.name}{_explained(file_key)}")
        elif problem := one.problem(expected[file_key][1].shape):
            problems.append(problem)
        elif file_key in found.values():
            problems.append(f"{one.name} stands there twice")
        found[one] = file_key
    problems += [f"missing {prefix}{file_key}" for file_key in expected.keys() - set(found.values())]
    if not problems:
        for one, read in read_tensors(found):
            tensor = read.float()
            if not torch.isfinite(tensor).all():
                problems.append(f"{one.name} holds NaN or infinity")
            key, parameter = expected[found[one]]
            owner, _, attribute = key.rpartition(".")
            filled = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            setattr(model.get_submodule(owner), attribute, filled)
    if problems:
        raise ValueError(f"{path} does not fit this base: {list_problems(sorted(problems))}")
    return prefix


def adapter_tensors(folder: Path) -> Path:
    """The file of an adapter's tensors; raises FileNotFoundError where there is none in safetensors."""
    path = folder / _TENSORS
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; an adapter must be in safetensors: a pickle is refused, save it with PEFT anew"
        )
    return path


def take_out(model: nn.Module, name: str, init: object, earlier: Sequence[str]) -> None:
    """Take what the adapter `name` began with out of `model`'s weights, as PEFT does where `init` is PiSSA or OLoRA.

    Its file holds the part as it became, so the weights must hold the rest. `earlier` adapters count as weights.
    """
    if init not in RESIDUAL_INITS:
        return
    for module in _lora_layers(model):
        if name in module.lora_A:
            weight = module.get_base_layer().weight
            whole = weight.data.float()
            for other in earlier:
                if other in module.lora_A:
                    whole = whole + module.get_delta_weight(other)
            left, right = initial_factors(module, name, init, whole)
            weight.data = (weight.data.float() - left @ right).to(weight.dtype)


@torch.no_grad()
def initial_factors(
    module: LoraLayer, name: str, init: object, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the adapter `name` began with, as a product of float32 `(out, r)` and `(r, in)`: the r largest singular
    values of `weight` `(out, in)` (PiSSA, arXiv:2404.02948), or the first r columns of its QR decomposition, scaled
    (OLoRA, arXiv:2406.01775)."""
    rank = module.r[name]
    if init == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        return left[:, :rank] * values[:rank], right[:rank]
    q, r = torch.linalg.qr(weight)
    return module.scaling[name] * q[:, :rank], r[:rank]


def add_adapters(model: nn.Module, folders: Sequence[Path]) -> tuple[list[str], list[object]]:
    """Inject the adapters under names of their own; returns these and how each was initialised."""
    names, inits = [], []
    for place, folder in enumerate(folders):
        config = read_adapter_config(folder)
        names.append(f"stage_{place}")
        inits.append(config.init_lora_weights)
        add_adapter(model, names[-1], folder, config)
    return names, inits


def _explained(name: str) -> str:
    """What PEFT means by a tensor that is not computed, and what to do."""
    if name.startswith("embed_tokens."):
        return f" (embeddings, whose rows may have been added: {MERGE})"
    if name.endswith(".bias"):
        return f" (a trained bias: {MERGE})"
    return ""


class _Inside(nn.Module):
    """A model under the name that it has in a causal language model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


def inject_adapter(model: nn.Module, name: str, config: LoraConfig, *, inside: bool = False) -> None:
    """PEFT's `inject_adapter_in_model`, beside the adapters that are there, of which it would warn.

    Args:
        inside: match names as they are within a causal language model.
    """
    earlier = model.__dict__.pop("peft_config", {})
    inject_adapter_in_model(config, _Inside(model) if inside else model, adapter_name=name)
    model.peft_config = earlier | {name: config}  # where PEFT looks for it


def _inject(model: nn.Module, name: str, config: LoraConfig, prefix: str, path: Path) -> None:
    config = copy.copy(config)
    config.init_lora_weights = False  # the file's tensors are the truth: compute nothing from the base
    check_patterns(path, config, [f"{prefix}{place}" for place, _ in model.named_modules()])
    try:
        with torch.device("meta"):
            inject_adapter(model, name, config, inside=bool(prefix))
    except ValueError as error:  # no module has such a name
        raise ValueError(f"{path} does not fit the base: {str(error).splitlines()[0]}") from error
    for place, module in model.named_modules():
        if isinstance(module, LoraLayer) and not isinstance(module.get_base_layer(), nn.Linear):
            raise ValueError(f"{path}: target_modules may only name linears, got {prefix}{place}")


def _parameters(model: nn.Module, name: str) -> Iterator[tuple[str, str, nn.Parameter]]:
    """An adapter's parameters: the name in its file (without prefixes), the name in `model`, and itself."""
    marker = f".{name}."
    for key, parameter in model.named_parameters():
        if marker in key:
            file_key = key.replace(marker, ".").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
            yield file_key, key, parameter


def _lora_layers(model: nn.Module) -> Iterator[LoraLayer]:
    return (module for module in model.modules() if isinstance(module, LoraLayer))
