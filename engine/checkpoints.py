"""Which files make up a model: a base checkpoint and the adapters that stand on it, in order."""

import filecmp
from collections.abc import Sequence
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

from .json_files import read_object
from .modules import PublishedModel, read_published
from .run_folder import RunDescription

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
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

    `run` describes the training run on top, whose window, pooling and instruction hold; `base_name` is the base as it
    was named: folder or hub id.
    """

    name: str
    base: Path
    base_name: str
    tokenizer: Path
    adapters: tuple[Path, ...]
    run: RunDescription | None = None


@dataclass(frozen=True)
class _Part:
    """A folder that was named: the adapters that it brings, what these stand on, and the run that it is."""

    folder: Path
    adapters: tuple[Path, ...]
    base: str | None  # None where the folder is a checkpoint of its own
    run: RunDescription | None

    @classmethod
    def read(cls, folder: Path) -> "_Part":
        run = RunDescription.read(folder)
        if run is not None and run.base_model is not None:
            return cls(folder, (*(folder / name for name in run.earlier), folder), run.base_model, run)
        if run is None and (published := read_published(folder)) is not None:
            folder, run = published.transformer, published
        if (folder / ADAPTER_FILES[0]).is_file():
            return cls(folder, (folder,), adapter_base(folder), run)
        return cls(folder, (), None, run)

    def beneath(self) -> Path | None:
        """The local folder that it stands on; None where that is a hub id, or is not here."""
        if self.base is None:
            return None
        beside = self.folder.parent / self.base
        found = beside if self.base.startswith(".") and beside.is_dir() else Path(self.base).expanduser()
        return found if found.is_dir() else None


def resolve(
    model: str | Path, adapters: str | Path | Sequence[str | Path] = (), hub: HubOptions | None = None
) -> Checkpoint:
    """Find a model's files, downloading what a hub id names.

    Args:
        model: a base checkpoint (folder or hub id), the folder of a training run, or a PEFT or LLM2Vec adapter, whose
            configuration names its base.
        adapters: further adapters or runs (folders or hub ids), applied after it. A run brings the adapters that it
            stands on, its window, pooling and instruction, as it does as `model`.
        hub: `revision` applies to `model` alone.
    Raises:
        FileNotFoundError: no such folder, or the hub has no such repository and none is cached.
        ValueError: an adapter was trained on another base, is there already, or is a run that stands on other
            adapters than those before it.
    """
    hub = hub or HubOptions()
    others = HubOptions(token=hub.token, cache_dir=hub.cache_dir, local_files_only=hub.local_files_only)
    part = _Part.read(_fetch(str(model), hub))
    names, tokenizers = [str(model)], [part.folder]
    chain, run = part.adapters, part.run
    while part.base is not None:
        if part.base in names:
            raise ValueError(f"{part.folder}: its base {part.base!r} leads back to itself")
        names.append(part.base)
        part = _Part.read(part.beneath() or _fetch(part.base, others))
        tokenizers.append(part.folder)
        chain, run = part.adapters + chain, run or part.run
    base, base_name = part.folder, names[-1]
    for adapter in [adapters] if isinstance(adapters, str | Path) else adapters:
        part = _Part.read(_fetch(str(adapter), others))
        if not part.adapters:
            raise FileNotFoundError(f"{part.folder / ADAPTER_FILES[0]} does not exist; an adapter is a PEFT folder")
        names.append(str(adapter))
        top, brought, described = part, part.adapters, part.run
        while (under := part.beneath()) is not None and (lower := _Part.read(under)).adapters:
            if set(lower.adapters) & set(brought):
                raise ValueError(f"{part.folder}: its base {part.base!r} leads back to itself")
            part, brought, described = lower, lower.adapters + brought, described or lower.run
        alone = len(brought) == 1 and described is None
        _check_base(str(adapter), part, None if alone else base, names[:-1])
        if alone:
            if any(_same_files(earlier, top.folder, ADAPTER_FILES) for earlier in chain):
                raise ValueError(f"the adapter {adapter} is there already: {_listed(chain)}")
            chain += brought
            continue
        begins = len(chain) < len(brought) and all(
            _same_files(earlier, own, ADAPTER_FILES) for earlier, own in zip(chain, brought, strict=False)
        )
        if not begins:
            raise ValueError(
                f"{adapter} stands on {_listed(brought[:-1])}, and cannot be put on {_listed(chain)}; "
                "give it as the model"
            )
        chain, run = brought, described or run
        tokenizers.insert(0, top.folder)
    if isinstance(run, PublishedModel):
        run = run.on(base)
    tokenizer = next((folder for folder in tokenizers if _has_tokenizer(folder)), base)
    return Checkpoint(str(model), base, base_name, tokenizer, chain, run)


def _check_base(adapter: str, part: _Part, base: Path | None, names: list[str]) -> None:
    """Refuse an adapter of another base where that can be told; `base` is None for one that may stand on a folder where
    others were merged."""
    assert part.base is not None
    under = part.beneath()
    if under is not None and base is not None:
        weights = [path.name for path in sorted(under.glob("*.safetensors*"))]
        if not _same_files(under, base, ["config.json", *weights]):
            raise ValueError(f"{adapter} was trained on {under}, which differs from {base}")
    # folders move, so else only two hub ids can be compared; shapes are checked when the weights are read
    if _is_hub_id(part.base) and all(map(_is_hub_id, names)) and part.base not in names:
        raise ValueError(f"the adapter {adapter} was trained on {part.base}, not on {' or '.join(names)}")


def _same_files(first: Path, second: Path, names: Sequence[str]) -> bool:
    """Whether two folders hold the same files of these names, byte for byte."""
    if first.resolve() == second.resolve():
        return True
    paths = [(first / name, second / name) for name in names]
    return all(one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False) for one, other in paths)


def _listed(adapters: Sequence[Path]) -> str:
    return ", ".join(map(str, adapters)) if adapters else "no adapter"


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def adapter_base(folder: Path) -> str:
    """`base_model_name_or_path` of a PEFT folder; raises ValueError where its configuration has none."""
    path = folder / ADAPTER_FILES[0]
    base = read_object(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path}: base_model_name_or_path must be a folder or a hub id, got {base!r:.80}")
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
