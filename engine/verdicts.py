"""A verdict on a reader of a folder, and what more than one reader is judged by."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from .reader_files import ModelFiles


@dataclass(frozen=True)
class Verdict:
    """What one reader makes of a folder.

    Attributes:
        reader: its name.
        verdict: "yes", "with flags" or "no".
        reasons: of a "no", why; a clause each.
        notes: what to know of it, likewise.
        command: what to run, in a shell or as Python; of a "no", what helps, "" where nothing does.
    """

    reader: str
    verdict: str
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    command: str = ""

    def __str__(self) -> str:
        return ": ".join((self.reader, self.verdict, *filter(None, ["; ".join(self.reasons)])))


@dataclass
class Findings:
    """What stands against a reader, what it must be told, and what its user should know."""

    against: list[str] = field(default_factory=list)
    with_prompts: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    export_helps: bool = True

    def refuse(self, reason: str, *, export_helps: bool = False) -> None:
        """Add a reason against it, and whether an export does away with that."""
        self.against.append(reason)
        self.export_helps &= export_helps

    def verdict(self, reader: str, files: ModelFiles, command: str) -> Verdict:
        if self.against:
            helps = self.export_helps and not self.with_prompts and files.bidirectional
            reasons = (*self.against, *self.with_prompts)
            return Verdict(reader, "no", reasons, command=export_command(files.path) if helps else "")
        if self.with_prompts:
            reasons = (*self.with_prompts, "texts without a prompt come out right")
            return Verdict(reader, "no", reasons, tuple(self.notes), command)
        return Verdict(reader, "with flags" if self.flags else "yes", (), tuple(self.notes), command)


def judge_loading(files: ModelFiles, found: Findings, *, modules: bool = False) -> None:
    """Whether transformers loads it, and what its configuration makes of the mask.

    `modules` says whether the reader is sentence-transformers, which finds every file by `modules.json`.
    """
    if files.transformer and not modules:
        found.refuse(f"config.json lies in {files.transformer}", export_helps=True)
    if files.config.get("auto_map") or files.config["model_type"] == "llama_bidirec":
        found.refuse("its configuration asks for code of the model's own", export_helps=True)
    elif not files.bidirectional and files.config.get("is_causal") is False:
        found.refuse("config.json says is_causal: false, bivec.json a causal window")


def is_causal_missing(files: ModelFiles) -> bool:
    """Whether transformers must be told the mask, as the configuration does not say it."""
    return files.bidirectional and files.config.get("is_causal") is not False


def named_prompts(files: ModelFiles) -> str:
    return ", ".join(map(repr, files.prompts))


def quoted(files: ModelFiles) -> str:
    """The folder for a shell."""
    return shlex.quote(str(files.path))


def export_command(path: Path) -> str:
    """What makes a folder of a model that more readers can read; `path` is absolute."""
    return f"bivec export --model {shlex.quote(str(path))} --output {shlex.quote(f'{path}-exported')}"
