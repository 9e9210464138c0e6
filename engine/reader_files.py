"""What a folder's files say of the vectors that are made of it, for `readers`: no weights, no torch, no network."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .json_files import read_list, read_object

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "llama_bidirec")
BIDIRECTIONAL, CAUSAL = (-1, -1), (-1, 0)

# of sentence-transformers' pooling modes those that bivec has; of its older keys what stands behind `pooling_mode_`
_MODES = {"mean": "mean", "weightedmean": "weighted_mean", "lasttoken": "last", "cls": "first"}
_LEGACY = {
    f"pooling_mode_{mode}{end}": mode for mode, end in zip(_MODES, ("_tokens", "_tokens", "", "_token"), strict=True)
}
_NVIDIA = {"avg": "mean", "last": "last", "cls": "first"}

_MOST_HEADER_BYTES = 2**26
_DEFAULT_LENGTH = 512


@dataclass(frozen=True)
class ModelFiles:
    """A checkpoint's folder, and what bivec makes of it: the vectors that a reader must give to be said to read it.

    Attributes:
        path: of the folder, absolute.
        transformer: the folder within it that holds the transformer's files, "" for itself.
        config, tokenizer: `config.json` and `tokenizer_config.json` with what `special_tokens_map.json` adds.
        modules: sentence-transformers' modules as `(kind, path, full type)`, None where there is no `modules.json`.
        pooling_config: what the Pooling module says, None where there is none.
        length_file: `sentence_bert_config.json`, None where there is none.
        tensors: names of the weights.
        dtype: of the weights: float32, bfloat16, float16, or as it is written there.
        window, pooling, pools_special_tokens, pools_prompt, template, normalize: as in `RunDescription`.
        prompts, default_prompt: by name; those that are empty are left out.
        max_length: tokens that a text is cut to.
    """

    path: Path
    transformer: str
    config: dict[str, Any]
    tokenizer: dict[str, Any]
    modules: tuple[tuple[str, str, str], ...] | None
    pooling_config: dict[str, Any] | None
    length_file: dict[str, Any] | None
    tensors: frozenset[str]
    dtype: str
    window: tuple[int, int]
    pooling: str
    pools_special_tokens: bool
    pools_prompt: bool
    template: bool
    normalize: bool
    prompts: dict[str, str]
    default_prompt: str | None
    max_length: int

    @classmethod
    def read(cls, folder: Path) -> "ModelFiles":
        """Raises FileNotFoundError where there is no `config.json`, ValueError naming what is wrong in which file."""
        modules = _modules(folder / "modules.json")
        places = {kind: place for kind, place, _ in modules or ()}
        transformer = "" if (folder / "config.json").is_file() else places.get("Transformer", "")
        inner = folder / transformer
        path = inner / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; a model's folder holds it and *.safetensors")
        config = read_object(path)
        if config.get("model_type") not in MODEL_TYPES:
            raise ValueError(
                f"{path}: model_type must be one of {', '.join(MODEL_TYPES)}, got {config.get('model_type')!r:.80}"
            )
        for key in ("hidden_size", "num_attention_heads", "max_position_embeddings"):
            _positive(path, config, key)
        pooling_config = read_object(folder / places["Pooling"] / "config.json") if "Pooling" in places else None
        described = _described(folder, config, modules, pooling_config)
        prompts, default = _prompts(folder / "config_sentence_transformers.json")
        instruction = described.pop("instruction")
        if instruction:
            prompts.setdefault("query", instruction)
        length_path = inner / "sentence_bert_config.json"
        length_file = read_object(length_path) if length_path.is_file() else None
        length = _DEFAULT_LENGTH
        if length_file is not None and length_file.get("max_seq_length") is not None:
            length = _positive(length_path, length_file, "max_seq_length")
        tensors, dtype = _weights(inner, config)
        return cls(
            path=folder.absolute(),
            transformer=transformer,
            config=config,
            tokenizer=_optional(inner / "special_tokens_map.json") | _optional(inner / "tokenizer_config.json"),
            modules=modules,
            pooling_config=pooling_config,
            length_file=length_file,
            tensors=tensors,
            dtype=dtype,
            prompts={name: text for name, text in prompts.items() if text},
            default_prompt=default if default and prompts.get(default) else None,
            max_length=min(length, config["max_position_embeddings"]),
            **described,
        )

    @property
    def bidirectional(self) -> bool:
        return self.window == BIDIRECTIONAL

    @property
    def has_normalize(self) -> bool:
        return any(kind == "Normalize" for kind, _, _ in self.modules or ())

    @property
    def said_pooling(self) -> str:
        """What the Pooling module says; the mean where there is none."""
        return _mode(self.pooling_config)

    @property
    def head_dim(self) -> int:
        """As transformers takes it; of what it is not given, Qwen3 alone has a default of its own."""
        found = self.config.get("head_dim")
        if isinstance(found, int) and not isinstance(found, bool):
            return found
        even = self.config["hidden_size"] // self.config["num_attention_heads"]
        return 128 if self.config["model_type"] == "qwen3" else even

    @property
    def rope_type(self) -> str:
        scaling = self.config.get("rope_scaling") or self.config.get("rope_parameters")
        scaling = scaling if isinstance(scaling, dict) else {}
        return str(scaling.get("rope_type") or scaling.get("type") or "default")

    @property
    def sliding_window(self) -> int | None:
        """The window that some layers slide, None for none."""
        kind, layers = self.config["model_type"], self.config.get("layer_types")
        if not (kind == "mistral" or (kind in ("qwen2", "qwen3") and self.config.get("use_sliding_window") is True)):
            return None
        if isinstance(layers, list) and "sliding_attention" not in layers:
            return None
        window = self.config.get("sliding_window", 4096)
        return window if isinstance(window, int) else None

    @property
    def narrowed(self) -> bool:
        """Whether a text can be longer than the window that slides over it."""
        return self.sliding_window is not None and self.sliding_window < self.max_length

    @property
    def prompts_left_out(self) -> list[str]:
        """Names of the prompts that are attended to and not pooled; the last token is the same with and without."""
        return [] if self.pools_prompt or self.pooling == "last" else list(self.prompts)


def _described(
    folder: Path, config: dict[str, Any], modules: tuple | None, pooling_config: dict[str, Any] | None
) -> dict[str, Any]:
    """How bivec makes vectors: of a run as `bivec.json` says, of others as their own files do."""
    path = folder / "bivec.json"
    run = _optional(path)
    mode = _mode(pooling_config)
    window, pools_prompt = BIDIRECTIONAL, False
    if config["model_type"] == "llama_bidirec":
        mode, pools_prompt = _NVIDIA.get(str(config.get("pooling", "avg")), str(config.get("pooling"))), True
    elif modules is not None and not run:
        # such a model is what transformers makes of it
        window = BIDIRECTIONAL if config.get("is_causal") is False or config.get("auto_map") else CAUSAL
        pools_prompt = pooling_config is None or pooling_config.get("include_prompt") is not False
    found = {
        "window": run.get("window", list(window)),
        "pooling": run.get("pooling", mode),
        "pools_special_tokens": run.get("pools_special_tokens", True),
        "pools_prompt": run.get("pools_prompt", pools_prompt),
        "template": run.get("template", ["", ""]),
        "normalize": run.get("normalize", any(kind == "Normalize" for kind, _, _ in modules or ())),
        "instruction": run.get("instruction", ""),
    }
    for key, value in found.items():
        kind = list if key in ("window", "template") else str if key in ("pooling", "instruction") else bool
        if not isinstance(value, kind):
            raise ValueError(f"{path}: {key} must be a {kind.__name__}, got {value!r:.80}")
    return found | {"window": tuple(found["window"]), "template": any(found["template"])}


def _mode(pooling_config: dict[str, Any] | None) -> str:
    """bivec's name of a pooling mode, of either spelling; of one that it does not have, or of several, theirs."""
    values = pooling_config or {}
    mode = values.get("pooling_mode")
    if mode is None:
        old = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
        mode = [_LEGACY.get(key, key) for key in old] or ["mean"]
    modes = mode if isinstance(mode, list) else [mode]
    return " + ".join(_MODES.get(str(mode), str(mode)) for mode in modes)


def _modules(path: Path) -> tuple[tuple[str, str, str], ...] | None:
    if not path.is_file():
        return None
    found = []
    for entry in read_list(path):
        kind, place = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(place, str) or ".." in Path(place).parts or place[:1] == "/":
            raise ValueError(f"{path}: each module must have a type, and a path within the folder, got {entry!r:.80}")
        found.append((kind.rpartition(".")[2], place, kind))
    return tuple(found)


def _prompts(path: Path) -> tuple[dict[str, str], str | None]:
    values = _optional(path)
    prompts, default = values.get("prompts") or {}, values.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise ValueError(f"{path}: prompts must be strings by name, got {prompts!r:.80}")
    if default is not None and (not isinstance(default, str) or default not in prompts):
        raise ValueError(f"{path}: default_prompt_name must be one of {sorted(prompts)}, got {default!r:.80}")
    return dict(prompts), default


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
    first = next((entry["dtype"] for entry in header.values()), None)
    found = config.get("dtype") or config.get("torch_dtype")
    named = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(str(first), str(first))
    return names or frozenset(header), found if isinstance(found, str) else named


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


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _positive(path: Path, values: dict[str, Any], key: str) -> int:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{path}: {key} must be a positive integer, got {value!r:.80}")
    return value
