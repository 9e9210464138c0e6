"""Safetensors into a model, strictly: every tensor expected, none extra, none misshapen, all finite.

Pickle checkpoints are refused. Tensors whose dtype is already the wanted one stay memory-mapped.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .config import ModelConfig, load_config
from .json_files import read_object
from .model import DecoderLayer, LanguageModel, LlamaModel
from .outputs import sync

_PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("F16", "BF16", "F32", "F64")
Model = TypeVar("Model", bound=LlamaModel | LanguageModel)
_LISTED = 10  # names that an error lists


class StoredTensor(NamedTuple):
    """What a safetensors header says of a tensor."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def problem(self, expected: Sequence[int]) -> str | None:
        """Why it cannot be a weight of the expected shape; None where it can."""
        place = f"{self.name} in {self.path.name}"
        if self.dtype not in _DTYPES:
            return f"{place} must be floating point ({', '.join(_DTYPES)}), got {self.dtype}"
        if self.shape != tuple(expected):
            return f"{place} must have shape {tuple(expected)}, got {self.shape}"
        return None


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: `model.safetensors`, or the shards that its index names.

    Raises:
        FileNotFoundError: there are none, or a shard is absent.
        ValueError: there is only a pickle, or the index names a path outside the folder.
    """
    folder = Path(folder)
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if not (folder / _INDEX).is_file():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{folder} holds {', '.join(pickles)} but no safetensors; a pickle can run code when it is loaded, "
                "convert it with transformers' save_pretrained"
            )
        raise FileNotFoundError(f"{folder} holds neither {_SINGLE} nor {_INDEX}")
    names = set(_read_index(folder / _INDEX).values())
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist, but {_INDEX} names it")
    return [folder / name for name in sorted(names)]


def read_headers(files: Iterable[Path]) -> Iterator[StoredTensor]:
    """Every tensor of the files, unread; raises ValueError naming a file that cannot be read."""
    for path in files:
        try:
            with safe_open(path, framework="pt", device="cpu") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (safe_open is no dictionary)
                    part = tensors.get_slice(name)
                    yield StoredTensor(path, name, tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from error


def read_tensors(stored: Iterable[StoredTensor]) -> Iterator[tuple[StoredTensor, torch.Tensor]]:
    """The tensors themselves, file by file."""
    by_file: dict[Path, list[StoredTensor]] = {}
    for one in stored:
        by_file.setdefault(one.path, []).append(one)
    for path, wanted in by_file.items():
        with safe_open(path, framework="pt", device="cpu") as tensors:
            for one in wanted:
                yield one, tensors.get_tensor(one.name)


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Safetensors with the mode of any other new file: the library makes them for their owner alone.

    Raises:
        OSError: naming the path, where the disk is full, or the like.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path), {"format": "pt"})
    except SafetensorError as error:  # it says what the system refused in words alone
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    path.chmod(mode)


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """As `write_tensors`, under a temporary name first: a killed process leaves no half file under the real one."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_tensors(tensors, temporary)
    sync(temporary)
    temporary.replace(path)


def load_model(kind: type[Model], folder: Path, dtype: torch.dtype, config: ModelConfig | None = None) -> Model:
    """A `LlamaModel` or `LanguageModel` with the weights of a base checkpoint's folder, on the CPU.

    Nothing is built before the files are known to hold as many layers as the configuration asks for, and nothing is
    read before all names, shapes and dtypes fit.

    Args:
        dtype: of the weights.
        config: default the folder's.
    Raises:
        ValueError: names missing, unexpected, doubled or misshapen tensors, one that its index places in another
            file, or one that holds NaN or infinity; else as `load_config` and `checkpoint_files`.
        FileNotFoundError: as these.
    """
    model, stored = _empty_model(kind, folder, config or load_config(folder))
    tied = _tied_names(model)
    _fill(model, stored, dtype, folder)
    for name, twin in tied.items():
        _set_parameter(model, name, model.get_parameter(twin))
    return model


def load_by_layer(folder: Path, dtype: torch.dtype, config: ModelConfig) -> tuple[LlamaModel, Iterator[DecoderLayer]]:
    """As `load_model`, with the layers' weights on the meta device: the iterator reads them, one layer at a time.

    What it gives is in float32, and should be moved to the meta device before the next.
    Raises as `load_model`, of NaN when its layer is read.

    Args:
        dtype: of all other weights.
    """
    model, stored = _empty_model(LlamaModel, folder, config)
    by_layer: dict[str, dict[str, StoredTensor]] = {}
    for name, one in stored.items():
        by_layer.setdefault(_layer_of(name), {})[name] = one
    _fill(model, by_layer.pop("", {}), dtype, folder)

    def layers() -> Iterator[DecoderLayer]:
        for place, layer in enumerate(model.layers):
            assert isinstance(layer, DecoderLayer)
            # the file is opened anew for each: what was read of it before is not kept in memory
            _fill(model, by_layer[str(place)], torch.float32, folder)
            yield layer

    return model, layers()


def _empty_model(kind: type[Model], folder: Path, config: ModelConfig) -> tuple[Model, dict[str, StoredTensor]]:
    """A model on the meta device, and what the files hold for each of its parameters; raises as `load_model`."""
    stored, problems = _find(folder, _encoder_name if kind is LlamaModel else _language_model_name)
    layers = {_layer_of(name) for name in stored}
    absent = next((place for place in range(config.num_hidden_layers) if str(place) not in layers), None)
    if absent is not None:
        raise ValueError(
            f"{folder} does not fit its config.json: num_hidden_layers is {config.num_hidden_layers}, "
            f"but there is no tensor of layers.{absent}"
        )
    with torch.device("meta"):
        model = kind(config)
    expected = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    tied = _tied_names(model)
    for name, one in stored.items():
        if name not in expected:
            problems.append(f"unexpected {one.name} in {one.path.name}")
        elif problem := one.problem(expected[name]):
            problems.append(problem)
    problems += [f"missing {name}" for name in expected if name not in stored and tied.get(name) not in stored]
    _raise_problems(folder, problems)
    return model, stored


def _fill(model: nn.Module, stored: Mapping[str, StoredTensor], dtype: torch.dtype, folder: Path) -> None:
    """Put tensors of the files, by their name in the model, in their places."""
    problems = []
    names = {one: name for name, one in stored.items()}
    for one, tensor in read_tensors(stored.values()):
        if torch.isfinite(tensor).all():
            _set_parameter(model, names[one], nn.Parameter(tensor.to(dtype), requires_grad=False))
        else:
            problems.append(f"{one.name} in {one.path.name} holds NaN or infinity")
    _raise_problems(folder, problems)


def _raise_problems(folder: Path, problems: Sequence[str]) -> None:
    if problems:
        raise ValueError(f"{folder} does not fit its config.json: {list_problems(problems)}")


def _layer_of(name: str) -> str:
    """The number of the layer that a parameter is of; empty for those of none."""
    return name.partition("layers.")[2].partition(".")[0]


def list_problems(problems: Sequence[str]) -> str:
    """The first problems and how many more there are, for one line of an error."""
    more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
    return "; ".join(problems[:_LISTED]) + more


def _find(folder: Path, rename: Callable[[str], str | None]) -> tuple[dict[str, StoredTensor], list[str]]:
    """A checkpoint's tensors by their name in the model, and what is wrong with where they stand."""
    files = checkpoint_files(folder)
    places = None if files == [folder / _SINGLE] else _read_index(folder / _INDEX)
    stored: dict[str, StoredTensor] = {}
    problems = []
    for one in read_headers(files):
        name = rename(one.name)
        if name is None:
            continue
        if places is not None and places.get(one.name) != one.path.name:
            named = places.get(one.name, "no file")
            problems.append(f"{one.name} is in {one.path.name}, but {_INDEX} names {named} for it")
        elif name in stored:
            problems.append(f"{one.name} and {stored[name].name} are both {name}")
        else:
            stored[name] = one
    return stored, problems


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor, as an index names them."""
    places = read_object(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{path} must hold a weight_map of tensor names to files")
    for name in places.values():
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            raise ValueError(f"{path}: a shard must be the name of a .safetensors file in that folder, got {name!r}")
    return places


def _set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, parameter)


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


def _encoder_name(name: str) -> str | None:
    """A checkpoint tensor's name within `LlamaModel`; None for what an encoder does not use."""
    if name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq"):
        return None
    return name.removeprefix("model.")


def _language_model_name(name: str) -> str | None:
    """A checkpoint tensor's name within `LanguageModel`; None for buffers that are computed."""
    if name.endswith("rotary_emb.inv_freq"):
        return None
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
