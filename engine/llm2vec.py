"""What the files of an LLM2Vec model say: which MNTP adapter it stands on, and how its vectors are made.

LLM2Vec publishes a stage a repository: MNTP's adapter, beside a whole configuration and code; then a SimCSE or
supervised adapter whose `base_model_name_or_path` is the original base, though it was trained on base and MNTP. MNTP is
named in `auto_mapping.parent_library` alone, the module of the code that was run, or in the repository's own name. Code
is never run.

`llm2vec_config.json` has `pooling_mode`, `max_length`, `skip_instruction` and `doc_max_length`. The last, by which
LLM2Vec cuts a text after whole words before it joins it to an instruction, is not applied.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .json_files import read_object
from .modules import PUBLISHED
from .published import RECIPE, TEMPLATES, published_base
from .run_folder import RunDescription

LLM2VEC_CONFIG = "llm2vec_config.json"
_KEYS = ("pooling_mode", "max_length", "doc_max_length", "skip_instruction")
_POOLING = {"mean": "mean", "weighted_mean": "weighted_mean", "last_token": "last"}

_REMOTE, _LIBRARY = "transformers_modules", "llm2vec"  # where transformers puts a repository's code; LLM2Vec's own
_CODE = re.compile(r"modeling_\w+_encoder")
_CLASS = re.compile(r"(.+--)?modeling_\w+_encoder\.\w+")
_ARCHITECTURE = re.compile(r"(Llama|Mistral|Gemma|Qwen2)(BiModel|EncoderModel)")
_NAME = re.compile(r"[A-Za-z0-9][\w-]*(\.[\w-]+)*")  # leads out of no folder
_COMMIT = re.compile(r"[0-9a-f]{16,64}")


@dataclass(frozen=True)
class Llm2VecAdapter:
    """An adapter of LLM2Vec, and how vectors are made with it on top.

    Attributes:
        mntp: the MNTP adapter that it stands on, a hub id or a folder's name; None for MNTP's own, or an unknown one.
        source: what says so; empty where nothing does.
    """

    mntp: str | None
    source: str
    description: RunDescription


def own_name(folder: Path) -> str:
    """The hub id of a folder in the hub's cache, else the folder's name."""
    path = Path(os.path.abspath(folder))
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name


def last_part(name: str) -> str:
    """A repository's or folder's name without what stands before it."""
    return name.rpartition("/")[2]


def local_folder(name: str) -> Path | None:
    """The folder of a name; None where there is none, or can be none."""
    try:
        path = Path(name).expanduser()
        return path if path.is_dir() else None
    except (OSError, RuntimeError):  # too long, not to be looked at, the home of nobody
        return None


def read_adapter(folder: Path, base: str) -> Llm2VecAdapter | None:
    """What the files and the name of a PEFT folder say; None where it is none of LLM2Vec's.

    Args:
        base: its `base_model_name_or_path`.
    Raises:
        ValueError: a file that says what it must not, or asks for what is not computed.
    """
    name, path, beside = own_name(folder), folder / "adapter_config.json", folder / "config.json"
    library = _parent_library(path)
    traced = _traced(library, path)
    has_code = beside.is_file() and _names_code(read_object(beside))
    of_library = library.split(".")[0] == _LIBRARY or (folder / LLM2VEC_CONFIG).is_file()
    is_published = published_base(last_part(name)) is not None
    if not (traced or has_code or of_library or is_published):
        return None
    stage = next((stage for stage in RECIPE.stages if name.endswith(f"-{stage}")), None)
    mntp, source = None, ""
    if traced:
        mntp, source = traced, f"auto_mapping.parent_library of {path}"
    elif base.endswith("-mntp") and stage != "mntp":  # PEFT names what transformers was given
        mntp, source = base, f"base_model_name_or_path of {path}"
    elif stage is not None:
        source = f"the name {name}"
        if (below := RECIPE.stages[stage]) is not None:
            mntp = (f"{RECIPE.owner}/{last_part(name)}" if is_published else name).removesuffix(stage) + below
    elif has_code:
        source = f"auto_map of {beside}"
    return Llm2VecAdapter(mntp, source, _describe(folder, (name, mntp or ""), base, bool(source) and mntp is None))


def read_merged(folder: Path) -> RunDescription | None:
    """How vectors are made with a whole checkpoint that LLM2Vec saved; None where it is none. Raises ValueError."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    values = read_object(path)
    classes = values.get("architectures")
    known = isinstance(classes, list) and any(isinstance(one, str) and _ARCHITECTURE.fullmatch(one) for one in classes)
    name = own_name(folder)
    has_name = published_base(last_part(name)) is not None
    if not (known or has_name or _names_code(values) or (folder / LLM2VEC_CONFIG).is_file()):
        return None
    return _describe(folder, (name,), None)


def own_llm2vec_length(folder: Path) -> int | None:
    """`max_length` of a folder's `llm2vec_config.json`, in tokens; None where it says none."""
    return _settings(folder).get("max_length")


def _parent_library(path: Path) -> str:
    mapping = read_object(path).get("auto_mapping") or {}
    library = mapping.get("parent_library") if isinstance(mapping, dict) else mapping
    if not isinstance(library, str | None):
        raise ValueError(f"{path}: auto_mapping.parent_library must be a module's name, got {library!r:.80}")
    return library or ""


def _traced(library: str, path: Path) -> str | None:
    """The repository or folder whose code a module of transformers is, where that is LLM2Vec's.

    It is `transformers_modules.owner.name.commit.modeling_llama_encoder`, with or without "-" and "." written out, and
    of a local folder without owner and commit.
    """
    place, *parts = library.split(".")
    if place != _REMOTE or not parts:
        return None
    *parts, code = (part.replace("_hyphen_", "-").replace("_dot_", ".") for part in parts)
    parts = [part[1:] if re.match(r"_\d", part) else part for part in parts]
    if has_commit := bool(parts) and _COMMIT.fullmatch(parts[-1]) is not None:
        parts.pop()
    # a name may have dots of its own
    owner, name = (parts[0], ".".join(parts[1:])) if has_commit and len(parts) > 1 else (None, ".".join(parts))
    if not all(part is None or _NAME.fullmatch(part) for part in (owner, name)):
        raise ValueError(f"{path}: auto_mapping.parent_library must be a module's name, got {library!r:.80}")
    if not _CODE.fullmatch(code) and not name.endswith("-mntp"):
        return None
    if owner is None and published_base(name) is not None:
        owner = RECIPE.owner
    return name if owner is None else f"{owner}/{name}"


def _names_code(values: dict[str, Any]) -> bool:
    """Whether a configuration has LLM2Vec's class for `AutoModel`."""
    classes = values.get("auto_map")
    named = classes.get("AutoModel") if isinstance(classes, dict) else None
    return isinstance(named, str) and _CLASS.fullmatch(named) is not None


def _describe(folder: Path, names: Sequence[str], base: str | None, is_mntp: bool = False) -> RunDescription:
    """How vectors are made with what `folder` holds on top.

    LLM2Vec chooses a template by the base's hub id, or by what a folder's own configuration calls itself; where a base
    lies elsewhere, what is published under one of `names` has its own.
    """
    place = folder if base is None else local_folder(base)
    whole = place / "config.json" if place is not None else None
    named = read_object(whole).get("_name_or_path") if whole is not None and whole.is_file() else base
    bases = [*(published_base(last_part(name)) for name in names), named]
    return RunDescription(
        stage=PUBLISHED,
        base_model=base,
        pooling=_POOLING[_settings(folder).get("pooling_mode", RECIPE.pooling)],
        pools_special_tokens=RECIPE.pools_special_tokens,
        pools_prompt=RECIPE.pools_prompt,
        template=next((TEMPLATES.get(one, ("", "")) for one in bases if isinstance(one, str)), ("", "")),
        readout_shift=int(is_mntp),
    )


def _settings(folder: Path) -> dict[str, Any]:
    """`llm2vec_config.json`, where a folder has it; raises ValueError naming a key that cannot be met."""
    path = folder / LLM2VEC_CONFIG
    if not path.is_file():
        return {}
    values = {key: value for key, value in read_object(path).items() if value is not None}
    pooling, length = values.get("pooling_mode", "mean"), values.get("max_length", 1)
    unknown = next((key for key in values if key not in _KEYS), None)
    if unknown is not None:
        raise ValueError(f"{path}: {unknown} is not supported, got {values[unknown]!r:.80}")
    if not isinstance(pooling, str) or pooling not in _POOLING:
        raise ValueError(f"{path}: pooling_mode must be one of {', '.join(_POOLING)}, got {pooling!r:.80}")
    if values.get("skip_instruction", True) is not True:
        raise ValueError(f"{path}: skip_instruction must be true, got {values['skip_instruction']!r:.80}")
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"{path}: max_length must be a number of tokens, got {length!r:.80}")
    return values
