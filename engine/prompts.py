"""What stands before a text: an instruction becomes a prompt by one rule, and a model may have prompts by name.

An *instruction* (of training, of `bivec embed`, of LLM2Vec's pairs, of a run) is words to which a text is joined; a
*prompt* (of `encode`, of sentence-transformers' configuration) is put before a text as it is.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from .checkpoints import Checkpoint
from .json_files import read_object
from .modules import MODULES_FILE, PROMPTS_FILE
from .run_folder import RunDescription


def as_prompt(instruction: str) -> str:
    """What stands before a text: the instruction and, as in LLM2Vec, a space unless it ends with white space."""
    return instruction + " " if instruction and not instruction[-1].isspace() else instruction


def model_prompts(checkpoint: Checkpoint) -> tuple[dict[str, str], str | None]:
    """A model's prompts by name and the default's name: of its folder, and of the run that it is.

    A run's instruction is the prompt named `query`; one that stood before documents too is theirs and the default.
    """
    prompts, default = read_prompts(checkpoint.tokenizer)
    run = checkpoint.run
    if run is not None and run.instruction:
        names = ("query", "document") if run.symmetric_instruction else ("query",)
        prompts |= dict.fromkeys(names, as_prompt(run.instruction))
        default = "query" if run.symmetric_instruction else default
    return prompts, default


def read_prompts(folder: Path) -> tuple[dict[str, str], str | None]:
    """Prompts by name and the default's name, from sentence-transformers' configuration where a folder has one."""
    path = folder / PROMPTS_FILE
    if not path.is_file() and (folder.parent / MODULES_FILE).is_file():  # the transformer has a folder of its own
        path = folder.parent / PROMPTS_FILE
    if not path.is_file():
        return {}, None
    values = read_object(path)
    prompts, default = values.get("prompts"), values.get("default_prompt_name")
    prompts = {} if prompts is None else prompts
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise ValueError(f"{path}: prompts must be strings by name, got {prompts!r:.80}")
    if default is not None and (not isinstance(default, str) or default not in prompts):
        raise ValueError(f"{path}: default_prompt_name must be one of {sorted(prompts)}, got {default!r:.80}")
    return prompts, default


def texts_and_prompts(sentences: Iterable, prompt: str) -> tuple[list[str], list[str]]:
    """Texts and what stands before each: `prompt`, or the instruction of a pair `[instruction, text]`.

    Raises:
        ValueError: texts of another kind; what is iterated by its keys or columns is refused.
    """
    rows = sentences.tolist() if isinstance(sentences, np.ndarray) else sentences
    keyed = isinstance(rows, Mapping) or hasattr(rows, "columns")
    if keyed or isinstance(rows, str | bytes) or not isinstance(rows, Iterable):
        raise ValueError(
            f"sentences must be a str or a sequence of str or [instruction, text], got {type(sentences).__name__}"
        )
    texts, prompts = [], []
    for place, sentence in enumerate(rows):
        if isinstance(sentence, str):
            texts.append(sentence)
            prompts.append(prompt)
        elif isinstance(sentence, list | tuple) and len(sentence) == 2 and all(isinstance(s, str) for s in sentence):
            instruction, text = sentence
            texts.append(text)
            prompts.append(as_prompt(instruction))
        else:
            raise ValueError(f"sentences[{place}] must be a str or [instruction, text], got {sentence!r:.80}")
    return texts, prompts


def document_prompt(prompts: dict[str, str]) -> str:
    """The prompt named `document`, `passage` or `corpus`, whichever there is first; else none."""
    return next((prompts[name] for name in ("document", "passage", "corpus") if name in prompts), "")


def unused_instruction(folders: list[str]) -> str | None:
    """The instruction that the last run among `folders` puts before queries alone, which no default applies."""
    found = None
    for folder in folders:
        run = RunDescription.read(Path(folder).expanduser())
        if run is not None:
            found = None if run.symmetric_instruction else run.instruction or None
    return found
