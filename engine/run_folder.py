"""`bivec.json`: what a training run adds to the files of its folder, so that `--model RUN` loads all of it.

A LoRA run holds PEFT's `adapter_config.json` and `adapter_model.safetensors`, copies of the adapters that lay beneath
it in `earlier/1`, `earlier/2`, …, and names its base; a run of full fine-tuning is a checkpoint of its own.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .config import BIDIRECTIONAL, Window
from .json_files import read_object
from .outputs import AtomicFile

RUN_FILE = "bivec.json"
# those of `kernels.pooling`, which imports torch
POOLINGS = ("mean", "weighted_mean", "last", "first")
EARLIER = "earlier"


@dataclass(frozen=True)
class RunDescription:
    """How the vectors of a run are made; also of a published model, whose own files say it.

    Attributes:
        stage: pretrain, mntp, simcse or supervised; export for a folder that `bivec export` merged; published for a
            model that others made.
        base_model: folder or hub id of the original base; None where the run's own folder is the checkpoint.
        earlier: adapters beneath the run's own, oldest first, as folders within the run's.
        window: the mask it was trained for, `(left, right)` with -1 for all.
        pooling: how a text's states become its vector.
        pools_special_tokens: whether BOS and the like are among them where there is no prompt.
        pools_prompt: whether a prompt's tokens, and BOS before them, are pooled with the text's.
        counts_prompt_alone: whether, where they are not, as many tokens are left out as the prompt has alone, as
            sentence-transformers does; else those before the text's first.
        normalize: whether every vector has length 1.
        instruction: put before a query, attended to and not pooled.
        symmetric_instruction: whether it is put before documents too.
        readout_shift: 1 where the state of the token before a word carries the word (MNTP), else 0.
        template: a chat template, as strings before and after instruction and text; special tokens in it are special.
            The text's states and those of what stands after it are pooled.
    """

    stage: str
    base_model: str | None
    earlier: tuple[str, ...] = ()
    window: Window = BIDIRECTIONAL
    pooling: str = "mean"
    pools_special_tokens: bool = True
    instruction: str = ""
    readout_shift: int = 0
    symmetric_instruction: bool = False
    pools_prompt: bool = False
    normalize: bool = False
    template: tuple[str, str] = ("", "")
    counts_prompt_alone: bool = False

    def write(self, folder: Path) -> None:
        """Write `bivec.json`, whole or not at all."""
        file = AtomicFile(folder / f".{RUN_FILE}.tmp")
        try:
            file.handle.write((json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n").encode())
            file.finish()
            file.publish(folder / RUN_FILE)
        finally:
            file.abort()

    @classmethod
    def read(cls, folder: Path) -> "RunDescription | None":
        """The description of a run's folder, None where there is none; raises ValueError naming what is wrong in it."""
        path = folder / RUN_FILE
        if not path.is_file():
            return None
        values = read_object(path)
        try:
            tuples = ("earlier", "window", *(key for key in ("template",) if key in values))
            run = cls(**(values | {key: _as_tuple(values, key) for key in tuples}))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} must describe a run, as `bivec train` writes it: {error}") from error
        run._check(path)
        return run

    def _check(self, path: Path) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"{path}: pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        if len(self.window) != 2 or not all(type(bound) is int and -1 <= bound < 2**31 for bound in self.window):
            raise ValueError(f"{path}: window must be two numbers of at least -1, got {self.window!r}")
        for name in self.earlier:
            parts = Path(name).parts if isinstance(name, str) else ()
            if not parts or Path(name).is_absolute() or ".." in parts:
                raise ValueError(f"{path}: earlier must name folders within the run's, got {name!r}")
        if len(set(self.earlier)) < len(self.earlier):
            raise ValueError(f"{path}: earlier must name each folder once, got {self.earlier!r:.200}")
        if not isinstance(self.instruction, str) or not isinstance(self.base_model, str | None):
            raise ValueError(f"{path}: base_model and instruction must be strings")
        if self.base_model == "" or (self.earlier and self.base_model is None):
            raise ValueError(f"{path}: base_model must name what the adapters stand on, got {self.base_model!r}")
        pooled = ("pools_special_tokens", "pools_prompt", "counts_prompt_alone")
        for key in ("symmetric_instruction", "normalize", *pooled):
            if not isinstance(value := getattr(self, key), bool):
                raise ValueError(f"{path}: {key} must be true or false, got {value!r:.80}")
        if self.pools_prompt and not self.pools_special_tokens:
            raise ValueError(f"{path}: pools_prompt pools special tokens too, so pools_special_tokens must be true")
        if len(self.template) != 2 or not all(isinstance(part, str) for part in self.template):
            raise ValueError(f"{path}: template must be the strings before and after a text, got {self.template!r:.80}")
        for key, words in (("instruction", self.instruction), ("template", "".join(self.template))):
            if re.search("[\ud800-\udfff]", words):
                raise ValueError(f"{path}: {key} must not hold a lone surrogate, got {words!r:.80}")
        if type(self.readout_shift) is not int or self.readout_shift not in (0, 1):
            raise ValueError(f"{path}: readout_shift must be 0 or 1, got {self.readout_shift!r:.80}")


def _as_tuple(values: dict[str, Any], key: str) -> tuple:
    if not isinstance(values[key], list):
        raise TypeError(f"{key} must be a list")
    return tuple(values[key])
