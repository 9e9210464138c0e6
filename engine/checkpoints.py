"""Which files make up a model: a base checkpoint and the adapters that stand on it, in order."""

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from .run_folder import RunDescription

# configuration, tokenizer and safetensors: no pickle and no code is ever downloaded
_DOWNLOADED = ["*.json", "*.safetensors", "tokenizer.model", "*.txt"]


@dataclass(frozen=True)
class HubOptions:
    """Where and how hub ids are looked up, as in `huggingface_hub.snapshot_download`."""

    revision: str | None = None
    token: str | None = None
    cache_dir: str | None = None
    local_files_only: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """A base folder, the tokenizer's folder, and adapter folders in the order in which they were trained.

    `run` describes the training run that `name` is, `base_name` is the base as it was named: folder or hub id.
    """

    name: str
    base: Path
    base_name: str
    tokenizer: Path
    adapters: tuple[Path, ...]
    run: RunDescription | None = None


def resolve(model: str | Path, adapters: tuple[str | Path, ...] = (), hub: HubOptions | None = None) -> Checkpoint:
    """Find a model's files, downloading what a hub id names.

    Args:
        model: a base checkpoint (folder or hub id), the folder of a training run, or a PEFT or LLM2Vec adapter, whose
            configuration names its base.
        adapters: further adapters (folders or hub ids), applied after it.
        hub: `revision` applies to `model` alone.
    Raises:
        FileNotFoundError: no such folder, or the hub has no such repository and none is cached.
        ValueError: an adapter was trained on another base.
    """
    hub = hub or HubOptions()
    others = HubOptions(token=hub.token, cache_dir=hub.cache_dir, local_files_only=hub.local_files_only)
    names = [str(model)]
    folder = _fetch(str(model), hub)
    chain: list[Path] = []
    tokenizer = folder
    base_name = str(model)
    run = RunDescription.read(folder)
    if run is not None and run.base_model is not None:
        chain = [*(folder / name for name in run.earlier), folder]
        base_name = run.base_model
        names.append(base_name)
        folder = _fetch(base_name, others)
    while (folder / "adapter_config.json").is_file():
        chain.insert(0, folder)
        base = adapter_base(folder)
        if base in names:
            raise ValueError(f"{folder / 'adapter_config.json'}: base_model_name_or_path {base!r} leads back to itself")
        names.append(base)
        base_name = base
        beside = folder.parent / base
        folder = beside if base.startswith(".") and beside.is_dir() else _fetch(base, others)
    if not any((tokenizer / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        tokenizer = folder
    for adapter in map(str, adapters):
        path = _fetch(adapter, others)
        if not (path / "adapter_config.json").is_file():
            raise FileNotFoundError(f"{path / 'adapter_config.json'} does not exist; an adapter is a PEFT folder")
        base = adapter_base(path)
        # folders move, so only two hub ids can be compared; shapes are checked when the weights are read
        if _is_hub_id(base) and all(map(_is_hub_id, names)) and base not in names:
            raise ValueError(f"the adapter {adapter} was trained on {base}, not on {' or '.join(names)}")
        chain.append(path)
        names.append(adapter)
    return Checkpoint(str(model), folder, base_name, tokenizer, tuple(chain), run)


def adapter_base(folder: Path) -> str:
    """`base_model_name_or_path` of a PEFT folder; raises ValueError where its configuration has none."""
    path = folder / "adapter_config.json"
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be a JSON object with base_model_name_or_path") from error
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path}: base_model_name_or_path must be a folder or a hub id, got {base!r}")
    return base


def _is_hub_id(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _fetch(name: str, hub: HubOptions) -> Path:
    """The local folder of a folder's name or a hub id."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not _is_hub_id(name):
        raise FileNotFoundError(f"{name} is no folder, and does not look like a hub id (owner/name)")
    try:
        return Path(
            snapshot_download(
                name,
                revision=hub.revision,
                token=hub.token,
                cache_dir=hub.cache_dir,
                local_files_only=hub.local_files_only,
                allow_patterns=_DOWNLOADED,
            )
        )
    except GatedRepoError as error:
        raise PermissionError(f"{name} is gated: accept its licence on the hub and pass a token") from error
    except HFValidationError as error:
        raise FileNotFoundError(f"{name} is no folder, and cannot be a hub id (owner/name)") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{name} is neither a folder nor a model on the hub") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{name} is no folder here, and could not be read from the hub ({type(error).__name__}: {error})"
        ) from error
