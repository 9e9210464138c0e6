"""Which files make up a model: a base checkpoint and the adapters that stand on it, in order."""

import filecmp
import os
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

from .config import BIDIRECTIONAL, CAUSAL
from .json_files import read_object
from .llm2vec import Llm2VecAdapter, last_part, local_folder, own_name, read_adapter, read_merged
from .modules import PUBLISHED, PublishedModel, read_published
from .run_folder import EARLIER, RUN_FILE, RunDescription

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
UNDESCRIBED = RunDescription(PUBLISHED, None)  # a bare checkpoint
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
    was named: folder or hub id; `found` says line by line what was found, in the order in which it is applied.
    """

    name: str
    base: Path
    base_name: str
    tokenizer: Path
    adapters: tuple[Path, ...]
    run: RunDescription | None = None
    found: tuple[str, ...] = ()

    @property
    def description(self) -> RunDescription:
        """How its vectors are made, also where no file says it."""
        return self.run or UNDESCRIBED


@dataclass(frozen=True)
class _Part:
    """A folder that was named: the adapters that it brings, what these stand on, and how its vectors are made."""

    folder: Path
    adapters: tuple[Path, ...]
    lines: tuple[str, ...]  # what each adapter is
    base: str | None  # None where the folder is a checkpoint of its own
    run: RunDescription | None
    is_open: bool = False  # whether others may lie beneath its one adapter, which its files do not name
    undecided: str = ""  # what is wrong with taking it as it is, where nobody says what lies beneath it

    @classmethod
    def read(cls, folder: Path, hub: HubOptions, given: Sequence[Path] = ()) -> "_Part":
        """What a folder brings; `given` are the adapters that it is put on, or the base where there are none."""
        run = RunDescription.read(folder)
        if run is not None and run.base_model is not None:
            earlier = tuple(folder / name for name in run.earlier)
            lines = (*(f"adapter {path}, beneath the next run" for path in earlier), f"{run.stage} run {folder}")
            return cls(folder, (*earlier, folder), lines, run.base_model, run)
        if run is None and (published := read_published(folder)) is not None:
            folder, run = published.transformer, published
        if not (folder / ADAPTER_FILES[0]).is_file():
            return cls(folder, (), (), None, run or read_merged(folder))
        if run is None and (folder / EARLIER).is_dir():
            raise FileNotFoundError(
                f"{folder / RUN_FILE} does not exist, and nothing else says in which order the adapters in {EARLIER} "
                "lie beneath this one; copy the run again, whole"
            )
        base = adapter_base(folder)
        ours = read_adapter(folder, base)
        if ours is None:
            return cls(folder, (folder,), (f"adapter {folder}{_left_out(folder)}",), base, run, is_open=run is None)
        return cls._of_llm2vec(folder, ours, base, run or ours.description, hub, given)

    @classmethod
    def _of_llm2vec(
        cls,
        folder: Path,
        adapter: Llm2VecAdapter,
        base: str,
        run: RunDescription,
        hub: HubOptions,
        given: Sequence[Path],
    ) -> "_Part":
        if adapter.mntp is not None:
            mntp = _find_mntp(folder, adapter, base, hub, given)
            if not (mntp / ADAPTER_FILES[0]).is_file():
                line = f"LLM2Vec adapter {folder}, on MNTP's as it is merged into its base (from {adapter.source})"
                return cls(folder, (folder,), (line,), str(mntp), run)
            base = _check_mntp(folder, base, mntp)
            lines = (f"MNTP adapter {mntp} (from {adapter.source})", f"LLM2Vec adapter {folder}")
            return cls(folder, (mntp, folder), lines, base, run)
        if adapter.source:
            return cls(folder, (folder,), (f"MNTP adapter {folder} (from {adapter.source})",), base, run)
        undecided = (
            f"{folder / ADAPTER_FILES[0]}: neither it nor the folder's name says whether this adapter of LLM2Vec is "
            f"MNTP's own or stands on MNTP's; name the order: --model {base} --adapter MNTP --adapter {folder}, or "
            f"--model {base} --adapter {folder} if it is MNTP's own"
        )
        return cls(folder, (folder,), (f"LLM2Vec adapter {folder}",), base, run, is_open=True, undecided=undecided)

    @classmethod
    def read_whole(cls, folder: Path, hub: HubOptions) -> "_Part":
        """As `read`, where its own files must say all that lies beneath it; raises ValueError where they do not."""
        part = cls.read(folder, hub)
        if part.undecided:
            raise ValueError(part.undecided)
        return part

    def beneath(self) -> Path | None:
        """The local folder that it stands on; None where that is a hub id, or is not here."""
        if self.base is None:
            return None
        beside = self.folder.parent / self.base
        try:
            found = beside if self.base.startswith(".") and beside.is_dir() else Path(self.base).expanduser()
            return found if found.is_dir() else None
        except (OSError, RuntimeError) as error:  # too long, not to be looked at, the home of nobody
            raise ValueError(f"{self.file_of_base} names {self.base!r:.80}, which cannot be a folder") from error

    @property
    def file_of_base(self) -> Path:
        """The file that names what it stands on."""
        run = self.folder / RUN_FILE
        return run if run.is_file() else self.folder / ADAPTER_FILES[0]


def resolve(
    model: str | Path, adapters: str | Path | Sequence[str | Path] = (), hub: HubOptions | None = None
) -> Checkpoint:
    """Find a model's files, downloading what a hub id names.

    Args:
        model: a base checkpoint (folder or hub id), the folder of a training run, or a PEFT or LLM2Vec adapter, whose
            configuration names its base. A later stage of LLM2Vec brings its MNTP adapter: the folder of that name
            beside it, else the hub's.
        adapters: further adapters or runs (folders or hub ids), applied after it. A run or a stage of LLM2Vec brings
            the adapters that it stands on, its window, pooling and instruction, as it does as `model`.
        hub: `revision` applies to `model` alone.
    Raises:
        FileNotFoundError: no such folder, or the hub has no such repository and none is cached; an MNTP adapter that
            another stands on is not to be had.
        ValueError: an adapter was trained on another base, is there already, or is a run that stands on other
            adapters than those before it; nothing says what an adapter of LLM2Vec stands on.
    """
    hub = hub or HubOptions()
    others = HubOptions(token=hub.token, cache_dir=hub.cache_dir, local_files_only=hub.local_files_only)
    stack = _Stack.beneath(str(model), hub, others)
    for adapter in [adapters] if isinstance(adapters, str | Path) else adapters:
        stack.put_on(str(adapter), others)
    run = stack.run.on(stack.base) if isinstance(stack.run, PublishedModel) else stack.run
    tokenizer = next((folder for folder in stack.tokenizers if _has_tokenizer(folder)), stack.base)
    order = (f"{place}. {line}" for place, line in enumerate(stack.lines, 1))
    vectors = _vectors(run or UNDESCRIBED)
    found = (f"base: {stack.base_name}{stack.named_by}", *order, f"vectors: {vectors}")
    return Checkpoint(str(model), stack.base, stack.base_name, tokenizer, stack.chain, run, found)


@dataclass
class _Stack:
    """A base and what stands on it, from the bottom up.

    Attributes:
        names: of all models and adapters that were named so far.
        tokenizers: folders that may hold the tokenizer, the first that does has it.
        chain, lines: adapters, and what each is.
    """

    base: Path
    base_name: str
    named_by: str
    names: list[str]
    tokenizers: list[Path]
    chain: tuple[Path, ...]
    lines: tuple[str, ...]
    run: RunDescription | None

    @classmethod
    def beneath(cls, model: str, hub: HubOptions, others: HubOptions) -> "_Stack":
        """A model and all that it stands on; `others` are the options for what it names."""
        part = _Part.read_whole(_fetch(model, hub), others)
        names, tokenizers = [model], [part.folder, *reversed(part.adapters)]
        chain, lines, run = part.adapters, part.lines, part.run
        named_by = ""
        while part.base is not None:
            if part.base in names:
                raise ValueError(f"{part.folder}: its base {part.base!r} leads back to itself")
            names.append(part.base)
            named_by = f", named by {part.folder}"
            part = _Part.read_whole(part.beneath() or _fetch_base(part, others), others)
            tokenizers += [part.folder, *reversed(part.adapters)]
            chain, lines, run = part.adapters + chain, part.lines + lines, run or part.run
        return cls(part.folder, names[-1], named_by, names, tokenizers, chain, lines, run)

    def put_on(self, adapter: str, hub: HubOptions) -> None:
        """Put an adapter on top, with all that it brings."""
        part = top = _Part.read(_fetch(adapter, hub), hub, self.chain or (self.base,))
        if not part.adapters:
            raise FileNotFoundError(f"{part.folder / ADAPTER_FILES[0]} does not exist; an adapter is a PEFT folder")
        brought, lines, run = part.adapters, part.lines, part.run
        while (under := part.beneath()) is not None and (lower := _Part.read_whole(under, hub)).adapters:
            if set(lower.adapters) & set(brought):
                raise ValueError(f"{part.folder}: its base {part.base!r} leads back to itself")
            part, brought, lines, run = lower, lower.adapters + brought, lower.lines + lines, run or lower.run
        alone = len(brought) == 1 and top.is_open
        _check_base(adapter, part, None if alone else self.base, self.names)
        self.names.append(adapter)
        if not alone or run is not None:
            self.tokenizers[:0] = reversed(brought)
        if alone:
            if any(_same_files(earlier, top.folder, ADAPTER_FILES) for earlier in self.chain):
                raise ValueError(f"the adapter {adapter} is there already: {_listed(self.chain)}")
            brought, lines = self.chain + brought, self.lines + lines
        elif len(self.chain) >= len(brought) or not all(
            _same_files(earlier, own, ADAPTER_FILES) for earlier, own in zip(self.chain, brought, strict=False)
        ):
            raise ValueError(
                f"{adapter} stands on {_listed(brought[:-1])}, and cannot be put on {_listed(self.chain)}; "
                "give it as the model"
            )
        self.chain, self.lines, self.run = brought, lines, run or self.run


def _vectors(run: RunDescription) -> str:
    """How a model's vectors are made where nothing else is asked for."""
    own = "all tokens, or of those after the prompt" if run.pools_special_tokens else "the text's tokens"
    pooled = "all tokens, a prompt's too" if run.pools_prompt else own
    template = f", template {run.template[0]!r} … {run.template[1]!r}" if any(run.template) else ""
    mask = "" if run.window == BIDIRECTIONAL else ", causal" if run.window == CAUSAL else f", window {run.window}"
    return f"{run.pooling} of {pooled}{template}{', of length 1' if run.normalize else ''}{mask}"


def _find_mntp(folder: Path, adapter: Llm2VecAdapter, base: str, hub: HubOptions, given: Sequence[Path]) -> Path:
    """The folder of the MNTP adapter that another stands on.

    It is the one `given` that has its name, or that is the only one and may be MNTP's; else the folder of that name
    beside it, else the hub's.
    """
    assert adapter.mntp is not None
    name = last_part(adapter.mntp)
    beside = Path(os.path.abspath(folder)).parent / name
    for place in given:
        if last_part(own_name(place)) == name:
            return place
    if len(given) == 1 and (given[0] / ADAPTER_FILES[0]).is_file():
        lower = read_adapter(given[0], adapter_base(given[0]))
        if lower is not None and lower.mntp is None:
            return given[0]
    if local_folder(str(beside)) is not None:
        return beside
    if "/" not in adapter.mntp:
        missing, download = None, f"put it at {beside}"
    else:
        try:
            return _fetch(adapter.mntp, hub)
        except (OSError, RuntimeError) as error:  # not there, or no name of a folder
            missing = error
        cached = "/" in own_name(folder)
        download = f"hf download {adapter.mntp}" + ("" if cached else f" --local-dir {beside}")
    raise FileNotFoundError(
        f"{folder} stands on the MNTP adapter {adapter.mntp} (from {adapter.source}), which is not here: "
        f"{missing or f'{beside} does not exist'}. Without it the vectors would be wrong; {download}, or name its "
        f"folder: --model {base} --adapter MNTP --adapter {folder}"
    ) from missing


def _check_mntp(folder: Path, base: str, mntp: Path) -> str:
    """The base of an adapter and of the MNTP adapter that it stands on; raises ValueError where they cannot be two
    stages of one stack."""
    if _same_files(folder, mntp, ADAPTER_FILES):
        raise ValueError(f"{folder}: its MNTP adapter {mntp} is itself")
    below, run = adapter_base(mntp), RunDescription.read(mntp)
    lower = read_adapter(mntp, below)
    if (lower is not None and lower.mntp is not None) or (run is not None and run.earlier):
        raise ValueError(f"{folder} stands on {mntp}, which is no MNTP adapter: it stands on another one itself")
    first, second = local_folder(base), local_folder(below)
    if base == below or (first is not None and second is not None and first.samefile(second)):
        return base
    if last_part(base) == last_part(own_name(mntp)):  # PEFT names what transformers was given
        return below
    raise ValueError(
        f"{folder / ADAPTER_FILES[0]}: base_model_name_or_path is {base:.200}, but its MNTP adapter {mntp} was trained "
        f"on {below:.200}; take both adapters of one stack, or write the same base in both files where it is the same"
    )


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
        raise ValueError(
            f"the adapter {adapter} was trained on {part.base}, not on {' or '.join(names)}; if these are the same "
            "weights, give the folder in which they lie"
        )


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


def _left_out(folder: Path) -> str:
    """What an adapter was trained with and an encoder has no use of; more than heads is refused when it is loaded."""
    saved = read_object(folder / ADAPTER_FILES[0]).get("modules_to_save")
    return f", but for its head ({', '.join(map(str, saved))})" if isinstance(saved, list) and saved else ""


def adapter_base(folder: Path) -> str:
    """`base_model_name_or_path` of a PEFT folder; raises ValueError where its configuration has none."""
    path = folder / ADAPTER_FILES[0]
    base = read_object(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path}: base_model_name_or_path must be a folder or a hub id, got {base!r:.80}")
    return base


def _is_hub_id(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _fetch_base(part: _Part, hub: HubOptions) -> Path:
    """`_fetch`, of the base that a folder's file names."""
    assert part.base is not None
    try:
        return _fetch(part.base, hub)
    except (FileNotFoundError, PermissionError) as error:
        raise type(error)(
            f"{part.file_of_base} names a base that is not to be had: {error}; where it lies elsewhere, give its "
            f"folder as the model and {part.folder} as an adapter"
        ) from error


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
            f"{name} is no folder here, and could not be read from the hub "
            f"({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
