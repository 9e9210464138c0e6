"""Safetensors into a model, strictly: every tensor expected, none extra, none misshapen, all finite.

Pickle checkpoints are refused. Tensors whose dtype is already the wanted one stay memory-mapped.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .config import ModelConfig, load_config
from .model import LanguageModel, LlamaModel

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
Model = TypeVar("Model", bound=LlamaModel | LanguageModel)
_LISTED = 10  # names that an error lists


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: `model.safetensors`, or the shards that its index names.

    Raises:
        FileNotFoundError: there are none, or a shard is absent.
        ValueError: there is only a pickle, or the index names a path outside the folder.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{folder} holds {', '.join(pickles)} but no safetensors; a pickle can run code when it is loaded, "
                "convert it with transformers' save_pretrained"
            )
        raise FileNotFoundError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} must hold a JSON object with a weight_map of tensor names to files") from error
    for name in names:
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: a shard must be the name of a .safetensors file in that folder, got {name!r}")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist, but {index.name} names it")
    return [folder / name for name in names]


def read_tensors(files: Iterable[Path]) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """Every tensor of the files as `(file, name, tensor)`; raises ValueError naming a file that cannot be read."""
    for path in files:
        try:
            with safe_open(path, framework="pt", device="cpu") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (safe_open is no dictionary)
                    yield path, name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from error


def load_model(kind: type[Model], folder: Path, dtype: torch.dtype, config: ModelConfig | None = None) -> Model:
    """A `LlamaModel` or `LanguageModel` with the weights of a base checkpoint's folder, on the CPU.

    Args:
        dtype: of the weights.
        config: default the folder's.
    Raises:
        ValueError, FileNotFoundError: as `load_config`, `checkpoint_files` and `load_weights`.
    """
    with torch.device("meta"):
        model = kind(config or load_config(folder))
    load_weights(model, checkpoint_files(folder), dtype, encoder_name if kind is LlamaModel else language_model_name)
    return model


def load_weights(
    module: nn.Module,
    files: Iterable[Path],
    dtype: torch.dtype | None,
    rename: Callable[[str], str | None],
) -> None:
    """Fill `module`, made on the meta device, from safetensors files.

    Args:
        dtype: of the loaded weights; None keeps each file's own.
        rename: a tensor's name in the file to its name in the module, or None for a tensor to leave out.
    Raises:
        ValueError: names missing, unexpected or misshapen tensors, or one that holds NaN or infinity.
    """
    expected = {name: parameter.shape for name, parameter in module.named_parameters(remove_duplicate=False)}
    loaded: dict[str, torch.Tensor] = {}
    problems: list[str] = []
    source = ""
    for path, file_name, tensor in read_tensors(files):
        source = str(path.parent)
        name = rename(file_name)
        if name is None:
            continue
        if name not in expected:
            problems.append(f"unexpected {file_name} in {path.name}")
        elif tensor.shape != expected[name]:
            problems.append(
                f"{file_name} in {path.name} must have shape {tuple(expected[name])}, got {tuple(tensor.shape)}"
            )
        elif not tensor.is_floating_point():
            problems.append(f"{file_name} in {path.name} must be floating point, got {tensor.dtype}")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{file_name} in {path.name} holds NaN or infinity")
        else:
            loaded[name] = tensor.to(dtype or tensor.dtype)
    tied = _tied_names(module)
    problems += [f"missing {name}" for name in expected if name not in loaded and tied.get(name) not in loaded]
    if problems:
        raise ValueError(f"{source} does not fit its config.json: {list_problems(problems)}")
    for name, parameter in loaded.items():
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, nn.Parameter(parameter, requires_grad=False))
    for name, twin in tied.items():
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, module.get_parameter(twin))


def list_problems(problems: Sequence[str]) -> str:
    """The first problems and how many more there are, for one line of an error."""
    more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
    return "; ".join(problems[:_LISTED]) + more


def _tied_names(module: nn.Module) -> dict[str, str]:
    """Parameters that share another's storage, as `{name: first name}`."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return tied


def encoder_name(name: str) -> str | None:
    """A checkpoint tensor's name within `LlamaModel`; None for what an encoder does not use."""
    if name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq"):
        return None
    return name.removeprefix("model.")


def language_model_name(name: str) -> str | None:
    """A checkpoint tensor's name within `LanguageModel`; None for buffers that are computed."""
    if name.endswith("rotary_emb.inv_freq"):
        return None
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
