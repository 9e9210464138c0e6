"""What a published model's files say of its vectors: sentence-transformers' `modules.json`, or NVIDIA's `config.json`.

sentence-transformers has written its modules' types and keys in several spellings; those that its version 6 loads are
read. Such a model is what transformers makes of it: causal, unless its configuration says otherwise.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path, PureWindowsPath
from typing import Any

from .config import BIDIRECTIONAL, CAUSAL, LLAMA_BIDIREC, Window
from .json_files import read_list, read_object
from .run_folder import RunDescription

MODULES_FILE = "modules.json"
MAX_LENGTH_FILE = "sentence_bert_config.json"
PROMPTS_FILE = "config_sentence_transformers.json"
PUBLISHED = "published"

_TYPE = re.compile(r"sentence_transformers\.(?:models|base\.modules|sentence_transformer\.modules)(?:\.(\w+))?\.(\w+)")
_ORDERS = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])

# bivec's name of each pooling mode of sentence-transformers, and of what was a key for each
MODES = {"mean": "mean", "weightedmean": "weighted_mean", "lasttoken": "last", "cls": "first"}
LEGACY_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_WIDTHS = ("embedding_dimension", "word_embedding_dimension")
# NVIDIA's names; its weighted_avg is a sum
_NVIDIA_POOLING = {"avg": "mean", "last": "last", "cls": "first"}

_FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}
# keys of a Transformer's configuration that change its states or tokens, with the values that do not
_NEUTRAL: dict[str, tuple] = {
    "do_lower_case": (None, False),
    "transformer_task": (None, "feature-extraction"),
    "modality_config": (None, {"text": _FORWARD}),
    "module_output_name": (None, "token_embeddings"),
    "processing_kwargs": (None, {}),
    "query_length": (None,),
    "document_length": (None,),
    "query_expansion": (None,),
    "tokenizer_name_or_path": (None,),
}
# what is passed to transformers when it loads a part, and which of it changes no vector but for rounding
_PASSED_ON = ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs")
_HARMLESS = ("trust_remote_code", "torch_dtype", "dtype", "attn_implementation", "use_cache")
_WITHOUT_EFFECT = ("max_seq_length", "unpad_inputs")  # the first is read with the tokenizer


@dataclass(frozen=True)
class PublishedModel(RunDescription):
    """A description whose window is that of its base, which may not be here yet.

    Attributes:
        transformer: the folder of the transformer's files.
        width: elements that its pooling expects of a state, None where it does not say.
    """

    transformer: Path = Path()
    width: int | None = None

    def on(self, base: Path) -> RunDescription:
        """The description with the base's window.

        Raises:
            ValueError: the base's configuration does not say it, or its states have another width.
            FileNotFoundError: it has none.
        """
        values = read_object(base / "config.json")
        if self.width not in (None, values.get("hidden_size")):
            raise ValueError(
                f"{self.transformer}: its Pooling module's embedding_dimension is {self.width}, but hidden_size in "
                f"{base / 'config.json'} is {values.get('hidden_size')!r:.80}"
            )
        shared = {field.name: getattr(self, field.name) for field in fields(RunDescription)}
        return RunDescription(**shared | {"window": _own_window(base / "config.json", values)})


def read_published(folder: Path) -> PublishedModel | None:
    """How a folder's own files say that its vectors are made, None where they say nothing.

    Raises:
        ValueError: naming the file and what in it is wrong, or is not computed.
        FileNotFoundError: a file that it needs is not there.
    """
    if (folder / MODULES_FILE).is_file():
        return _read_modules(folder)
    if (folder / "1_Pooling").is_dir():
        raise FileNotFoundError(
            f"{folder / MODULES_FILE} does not exist, and 1_Pooling beside it says nothing without it; copy or "
            "download it again, or remove 1_Pooling where this is a checkpoint alone"
        )
    if not (folder / "config.json").is_file():
        return None
    values = read_object(folder / "config.json")
    if values.get("model_type") != LLAMA_BIDIREC:
        return None
    pooling = values.get("pooling", "avg")
    if not isinstance(pooling, str) or pooling not in _NVIDIA_POOLING:
        raise ValueError(
            f"{folder / 'config.json'}: pooling must be one of {', '.join(_NVIDIA_POOLING)}, got {pooling!r:.80}"
        )
    return PublishedModel(PUBLISHED, None, pooling=_NVIDIA_POOLING[pooling], pools_prompt=True, transformer=folder)


def _read_modules(folder: Path) -> PublishedModel:
    path = folder / MODULES_FILE
    kinds, places = [], []
    for entry in read_list(path):
        kind, place = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(place, str):
            raise ValueError(f"{path}: each module must have a type and a path, got {entry!r:.80}")
        found = _TYPE.fullmatch(kind)
        if found is None or (found[1] or found[2]).lower() != found[2].lower() or found[2] not in _ORDERS[-1]:
            raise ValueError(
                f"{path}: the module {kind!r:.80} is not computed, only sentence-transformers' "
                f"{', '.join(_ORDERS[-1])}; use the model with sentence-transformers"
            )
        if PureWindowsPath(place).anchor or ".." in PureWindowsPath(place).parts or "\0" in place:
            raise ValueError(f"{path}: path must name a folder within the model's, got {place!r:.80}")
        kinds.append(found[2])
        places.append(folder / place)
    if kinds not in _ORDERS:
        raise ValueError(
            f"{path}: the modules must be Transformer, Pooling and, at most, Normalize, in this order, "
            f"got {', '.join(kinds) or 'none'}"
        )
    _check_model(folder)
    _check_transformer(places[0])
    pooling, pools_prompt, width = _read_pooling(places[1] / "config.json")
    for place in places[2:]:
        _check_normalize(place / "config.json")
    return PublishedModel(
        PUBLISHED,
        None,
        pooling=pooling,
        pools_prompt=pools_prompt,
        counts_prompt_alone=not pools_prompt,
        normalize=len(places) > 2,
        transformer=places[0],
        width=width,
    )


def _check_model(folder: Path) -> None:
    """That `config_sentence_transformers.json` asks for no other vectors; its prompts are read elsewhere."""
    path = folder / PROMPTS_FILE
    if not path.is_file():
        return
    values = read_object(path)
    kind = values.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise ValueError(f"{path}: model_type must be SentenceTransformer, got {kind!r:.80}")
    if values.get("truncate_dim") is not None:
        raise ValueError(
            f"{path}: truncate_dim is not applied by default, got {values['truncate_dim']!r:.80}; remove it there and "
            "give it to encode"
        )


def _check_transformer(folder: Path) -> None:
    """That the files ask for plain last hidden states of plain text, which is cut at its end."""
    path = folder / "tokenizer_config.json"
    side = read_object(path).get("truncation_side") if path.is_file() else None
    if side not in (None, "right"):
        raise ValueError(f"{path}: truncation_side must be right, got {side!r:.80}; use sentence-transformers")
    path = folder / "tokenizer.json"
    cut = read_object(path).get("truncation") if side is None and path.is_file() else None
    if isinstance(cut, dict) and cut.get("direction") == "Left":  # which transformers heeds where nothing else says
        raise ValueError(f"{path}: truncation must have the direction Right, got 'Left'; use sentence-transformers")
    path = folder / MAX_LENGTH_FILE
    if not path.is_file():
        return
    values = read_object(path)
    _refuse_unknown(path, values, (*_NEUTRAL, *_PASSED_ON, *_WITHOUT_EFFECT))
    modalities = values.get("modality_config")
    if isinstance(modalities, dict) and "message" in modalities:
        raise ValueError(
            f"{path}: modality_config has 'message', by which sentence-transformers puts each text into the "
            "tokenizer's chat template; that is not computed, use sentence-transformers"
        )
    for key, neutral in _NEUTRAL.items():
        if values.get(key) not in neutral:
            raise ValueError(f"{path}: {key} is not supported, got {values[key]!r:.80}; use sentence-transformers")
    for key in _PASSED_ON:
        passed = values.get(key) or {}
        if not isinstance(passed, dict):
            raise ValueError(f"{path}: {key} must be an object, got {passed!r:.80}")
        for name in passed:
            if name not in _HARMLESS:
                raise ValueError(f"{path}: {key} is not supported, got {name!r:.80} there; use sentence-transformers")


def _read_pooling(path: Path) -> tuple[str, bool, int | None]:
    """The pooling mode, whether prompts are pooled, and the states' width, from either spelling."""
    values = read_object(path)
    _refuse_unknown(path, values, ("pooling_mode", "include_prompt", *_WIDTHS, *LEGACY_MODES))
    include_prompt = values.get("include_prompt", True)
    for key in ("include_prompt", *LEGACY_MODES):
        if not isinstance(values.get(key, True), bool):
            raise ValueError(f"{path}: {key} must be true or false, got {values[key]!r:.80}")
    modes = values.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in LEGACY_MODES.items() if values.get(key)] or "mean"
    mode = modes[0] if isinstance(modes, list) and len(modes) == 1 else modes
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"{path}: pooling_mode must be one of {', '.join(MODES)}, got {mode!r:.80}")
    if mode == "weightedmean" and not include_prompt:
        raise ValueError(
            f"{path}: pooling_mode 'weightedmean' with include_prompt false is not computed: sentence-transformers' "
            "weights begin with the prompt's tokens, bivec's with the text's; where no prompt is used, set "
            "include_prompt to true"
        )
    widths = [values[key] for key in _WIDTHS if values.get(key) is not None]
    for width in widths:
        if isinstance(width, bool) or not isinstance(width, int) or width != widths[0]:
            raise ValueError(f"{path}: embedding_dimension must be one number, got {width!r:.80}")
    # the last token is the same with the prompt, which need not be counted then
    return MODES[mode], include_prompt or mode == "lasttoken", widths[0] if widths else None


def _check_normalize(path: Path) -> None:
    """That it is the text's vector that is normalised."""
    if not path.is_file():
        return
    for key, value in read_object(path).items():
        if key not in ("module_input_name", "module_output_name") or value not in (None, "sentence_embedding"):
            raise ValueError(f"{path}: {key} is not supported, got {value!r:.80}; use sentence-transformers")


def _refuse_unknown(path: Path, values: dict[str, Any], known: Iterable[str]) -> None:
    unknown = sorted(values.keys() - set(known))
    if unknown:
        raise ValueError(
            f"{path}: {unknown[0]} is not known, got {values[unknown[0]]!r:.80}; use sentence-transformers"
        )


def _own_window(path: Path, values: dict[str, Any]) -> Window:
    """The mask that transformers gives a configuration: of all that it may say there, `is_causal` alone is heeded."""
    if values.get("model_type") == LLAMA_BIDIREC or values.get("auto_map"):  # all classes that are accepted there
        return BIDIRECTIONAL
    is_causal = values.get("is_causal", True)
    if not isinstance(is_causal, bool):
        raise ValueError(f"{path}: is_causal must be true or false, got {is_causal!r:.80}")
    return CAUSAL if is_causal else BIDIRECTIONAL
