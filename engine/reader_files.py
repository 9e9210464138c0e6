"""A folder for its readers: what bivec makes of it, by its one resolver, and the files that others go by."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoints import ADAPTER_FILES, HubOptions, resolve
from .config import BIDIRECTIONAL, ModelConfig, load_config
from .json_files import read_list, read_object
from .lengths import own_max_length
from .modules import LEGACY_MODES, MAX_LENGTH_FILE, MODES, MODULES_FILE
from .prompts import model_prompts
from .run_folder import RunDescription

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_MOST_HEADER_BYTES = 2**26


@dataclass(frozen=True)
class ModelFiles:
    """A checkpoint's folder, and what bivec makes of it: the vectors that a reader must give to be said to read it.

    Attributes:
        path: of the folder, absolute.
        transformer: the folder within it that holds the transformer's files, "" for itself.
        run: how its vectors are made; `shape` is what is computed.
        prompts, default_prompt: by name; those that are empty are left out.
        max_length: tokens that a text is cut to.
        config: `config.json` as it stands.
        tokenizer: `tokenizer_config.json`, with what `special_tokens_map.json` adds.
        modules: the types of sentence-transformers' modules, None where there is no `modules.json`.
        pooling_config: what the Pooling module says, None where there is none.
        length_file: `sentence_bert_config.json`, None where there is none.
        tensors: names of the weights.
        dtype: of the weights: float32, bfloat16, float16, or as it is written there.
    """

    path: Path
    transformer: str
    run: RunDescription
    shape: ModelConfig
    prompts: dict[str, str]
    default_prompt: str | None
    max_length: int
    config: dict[str, Any]
    tokenizer: dict[str, Any]
    modules: tuple[str, ...] | None
    pooling_config: dict[str, Any] | None
    length_file: dict[str, Any] | None
    tensors: frozenset[str]
    dtype: str

    @classmethod
    def read(cls, folder: Path) -> "ModelFiles":
        """The files of a folder that is no adapter.

        Raises:
            ValueError: naming the file and what is wrong in it, or what bivec does not compute.
            FileNotFoundError: a file that it needs is not there.
        """
        checkpoint = resolve(folder, hub=HubOptions(local_files_only=True))
        if checkpoint.adapters:
            raise FileNotFoundError(
                f"{folder / ADAPTER_FILES[0]} does not exist, and the folder is said to hold an adapter; copy it again"
            )
        inner = checkpoint.base
        shape, config = load_config(inner), read_object(inner / "config.json")
        prompts, default = model_prompts(checkpoint)
        modules = _modules(folder / MODULES_FILE)
        pooling = next((place for kind, place in modules or () if kind.endswith(".Pooling")), None)
        tensors, dtype = _weights(inner, config)
        return cls(
            path=folder.absolute(),
            transformer=inner.relative_to(folder).as_posix().removeprefix("."),
            run=checkpoint.description,
            shape=shape,
            prompts={name: text for name, text in prompts.items() if text},
            default_prompt=default if default and prompts.get(default) else None,
            max_length=min(own_max_length(checkpoint), shape.max_position_embeddings),
            config=config,
            tokenizer=(_read(inner / "special_tokens_map.json") or {}) | (_read(inner / "tokenizer_config.json") or {}),
            modules=None if modules is None else tuple(kind for kind, _ in modules),
            pooling_config=None if pooling is None else read_object(folder / pooling / "config.json"),
            length_file=_read(inner / MAX_LENGTH_FILE),
            tensors=tensors,
            dtype=dtype,
        )

    @property
    def bidirectional(self) -> bool:
        return self.run.window == BIDIRECTIONAL

    @property
    def has_normalize(self) -> bool:
        return any(kind.endswith(".Normalize") for kind in self.modules or ())

    @property
    def said_pooling(self) -> str:
        """What the Pooling module says, in bivec's words where it has one; the mean where there is none."""
        values = self.pooling_config or {}
        mode = values.get("pooling_mode")
        if mode is None:
            old = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
            mode = [LEGACY_MODES.get(key, key) for key in old] or ["mean"]
        return " + ".join(MODES.get(str(one), str(one)) for one in (mode if isinstance(mode, list) else [mode]))

    @property
    def sliding_window(self) -> int | None:
        """The window that some layers slide, None for none."""
        return next((window for window in self.shape.sliding_windows if window is not None), None)

    @property
    def prompts_left_out(self) -> list[str]:
        """Names of the prompts that are attended to and not pooled; the last token is the same with and without."""
        return [] if self.run.pools_prompt or self.run.pooling == "last" else list(self.prompts)


def _modules(path: Path) -> list[tuple[str, str]] | None:
    """Type and path of each module."""
    if not path.is_file():
        return None
    found = []
    for entry in read_list(path):
        kind, place = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(place, str) or ".." in Path(place).parts or place[:1] == "/":
            raise ValueError(f"{path}: each module must have a type, and a path within the folder, got {entry!r:.80}")
        found.append((kind, place))
    return found


def _weights(folder: Path, config: dict[str, Any]) -> tuple[frozenset[str], str]:
    """Names and dtype of the weights, from the configuration and the header of a safetensors file."""
    index, file = folder / "model.safetensors.index.json", folder / "model.safetensors"
    names: frozenset[str] = frozenset()
    if not file.is_file() and index.is_file():
        shards = read_object(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise ValueError(f"{index}: weight_map must name a file for each tensor, got {shards!r:.80}")
        names = frozenset(shards)
        file = folder / Path(next(iter(shards.values()), "none")).name
    header = _header(file) if file.is_file() else {}
    first = next((str(entry["dtype"]) for entry in header.values()), "")
    found = config.get("dtype") or config.get("torch_dtype")
    return names or frozenset(header), found if isinstance(found, str) else _DTYPES.get(first, first)


def _header(file: Path) -> dict[str, Any]:
    """A safetensors file's tensors by name, without their data."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        content = stream.read(size) if size <= _MOST_HEADER_BYTES else b""
    try:
        values = json.loads(content)
        return {name: entry for name, entry in values.items() if name != "__metadata__" and entry["dtype"]}
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is no whole safetensors file: its header cannot be read") from error


def _read(path: Path) -> dict[str, Any] | None:
    return read_object(path) if path.is_file() else None
