"""What a PEFT folder's `adapter_config.json` asks; whatever bivec does not compute is refused by name."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig

from .json_files import read_object

ADAPTER_CONFIG = "adapter_config.json"

# modules of task models that an encoder does not have: what an adapter holds of them changes no state
HEADS = ("lm_head", "score", "classifier")

# what its tensors mean
_READ = (
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
)
# who made it and how it was trained: nothing that its tensors do not hold
_OF_TRAINING = (
    "peft_type",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "auto_mapping",
    "inference_mode",
    "fan_in_fan_out",
    "lora_dropout",
    "bias",  # a bias that was trained stands among the tensors, and is refused there
    "megatron_core",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "loftq_config",
    "qalora_group_size",
    "ensure_weight_tying",
)
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
# these took a part out of the base that can be computed again
RESIDUAL_INITS = ("pissa", "olora")

_LARGEST_RANK = 2**24

_NAME = re.compile(r"[\w.^\\-]*")  # what most patterns are
_MATCHING = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.match(pattern, name), re.fullmatch(pattern, name)
"""
_SECONDS = 10
_LONGEST_PATTERN = 10_000

# the remedy for what is not computed
MERGE = "where PEFT can merge the adapter (merge_and_unload), load the model that it then saves"


def read_adapter_config(folder: Path) -> LoraConfig:
    """The LoRA configuration of a PEFT folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a key of a wrong type, a pattern that is no regular expression, or something that is not computed.
    """
    path = folder / ADAPTER_CONFIG
    values = read_object(path)
    try:
        return _parse(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _parse(values: dict[str, Any]) -> LoraConfig:
    if values.get("peft_type") != "LORA":
        raise ValueError(f"peft_type must be LORA, got {values.get('peft_type')!r:.80}")
    defaults = {field.name: field.default for field in fields(LoraConfig) if field.default is not MISSING}
    for key, value in values.items():
        known = key in _READ or key in _OF_TRAINING
        # {} is no neutral value: of KaSA and its like it means their defaults
        if not known and value not in (None, False, "none", [], defaults.get(key)) and not _of_heads(key, value):
            raise ValueError(f"{key} is not supported, got {value!r:.80}; {MERGE}")
    init = values.get("init_lora_weights", True)
    if init not in _PLAIN_INITS + RESIDUAL_INITS:
        raise ValueError(
            f"init_lora_weights {init!r:.80} trains on weights that are not the base's and cannot be computed again; "
            "convert the adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    for key in ("use_rslora", "use_dora"):
        if not isinstance(values.get(key), bool | None):
            raise ValueError(f"{key} must be true or false, got {values[key]!r:.80}")
    if "r" in values:
        _check_rank("r", values["r"])
    if "lora_alpha" in values:
        _check_alpha("lora_alpha", values["lora_alpha"])
    for key, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_alpha)):
        patterns = {} if values.get(key) is None else values[key]
        if not isinstance(patterns, dict):
            raise ValueError(f"{key} must be an object, got {patterns!r:.80}")
        for pattern, value in patterns.items():
            _check_pattern(key, pattern)
            check(f"{key} of {pattern!r:.80}", value)
    if not values.get("target_modules"):
        raise ValueError(f"target_modules must name modules, got {values.get('target_modules')!r}")
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        _check_names(key, values.get(key))
    layers = values.get("layers_to_transform")
    for layer in layers if isinstance(layers, list) else [layers]:
        if isinstance(layer, bool) or not isinstance(layer, int | None):
            raise ValueError(f"layers_to_transform must be a layer's number or a list of them, got {layers!r:.80}")
    # the encoder has no head: PEFT's task wrappers do not apply
    return LoraConfig(
        **{key: values[key] for key in _READ if values.get(key) is not None and key != "init_lora_weights"},
        init_lora_weights=init if init in RESIDUAL_INITS else True,
        base_model_name_or_path=values.get("base_model_name_or_path"),
        inference_mode=True,
    )


def check_patterns(path: Path, config: LoraConfig, names: Sequence[str]) -> None:
    """Raises ValueError, naming the file, where matching modules' names takes longer than ten seconds.

    An expression such as `(.+)+x` takes longer than anyone waits, and `re` is only stopped with its process.
    """
    layers = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or ()
    patterns = {
        "target_modules": [config.target_modules] if isinstance(config.target_modules, str) else [],
        "exclude_modules": [config.exclude_modules] if isinstance(config.exclude_modules, str) else [],
        "layers_pattern": layers,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
    }
    for key, found in patterns.items():
        expressions = [_composed(key, pattern) for pattern in found if not _NAME.fullmatch(pattern)]
        if not expressions:
            continue
        given = json.dumps([expressions, list(names)]).encode()
        try:
            subprocess.run([sys.executable, "-I", "-S", "-c", _MATCHING], input=given, timeout=_SECONDS, check=True)
        except subprocess.TimeoutExpired as error:
            raise ValueError(
                f"{path}: {key} takes more than {_SECONDS} s to match against the modules' names; list these instead"
            ) from error


def _composed(key: str, pattern: str) -> str:
    """The expression that PEFT makes of a pattern."""
    if key == "layers_pattern":
        return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."
    return rf"(.*\.)?({pattern})$" if key in ("rank_pattern", "alpha_pattern") else pattern


def _of_heads(key: str, value: Any) -> bool:
    return key == "modules_to_save" and isinstance(value, list) and all(name in HEADS for name in value)


def _check_rank(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST_RANK:
        raise ValueError(f"{name} must be an integer from 1 to {_LARGEST_RANK}, got {value!r:.80}")


def _check_alpha(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise ValueError(f"{name} must be a finite number, got {value!r:.80}")


def _check_names(key: str, value: Any) -> None:
    """A regular expression, or a list of names; `layers_pattern` is a list of expressions too."""
    if isinstance(value, str):
        _check_pattern(key, value)
    elif not isinstance(value, list | None) or not all(isinstance(name, str) for name in value or ()):
        raise ValueError(f"{key} must be a string or a list of strings, got {value!r:.80}")
    elif key == "layers_pattern":
        for pattern in value or ():
            _check_pattern(key, pattern)


def _check_pattern(key: str, pattern: str) -> None:
    if len(pattern) > _LONGEST_PATTERN:
        raise ValueError(f"{key}: a pattern must have at most {_LONGEST_PATTERN} characters, got {len(pattern)}")
    try:
        re.compile(_composed(key, pattern))
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{key}: {pattern!r:.80} is no regular expression ({error})") from error
