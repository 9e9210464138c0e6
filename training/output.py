"""The folder of a run: what may be in it, who holds it, whether a run is begun or gone on with, and its log.

RUN/adapter_config.json, adapter_model.safetensors    PEFT's, and the adapters beneath in earlier/1, earlier/2, ...
   /config.json, model.safetensors, tokenizer's       of full fine-tuning, instead
   /bivec.json                                        written last
   /log.jsonl                                         first entry: settings and versions
   /checkpoints/step-200/                             see `checkpoint`
   /trackers/                                         what `report_to` writes
"""

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..engine.checkpoints import ADAPTER_FILES
from ..engine.outputs import AtomicFile, lock_output, naming, refuse_foreign_files, sync
from ..engine.run_folder import EARLIER, RUN_FILE
from ..engine.tokens import TOKENIZER_FILES
from . import checkpoint
from .settings import TrainingSettings

logger = logging.getLogger(__name__)

LOG = "log.jsonl"
TRACKERS = "trackers"
_LOCK = ".lock"
_LOG_TEMPORARY = f".{LOG}.tmp"

# written when all steps are done
_RESULT = (RUN_FILE, *ADAPTER_FILES, "config.json", "model.safetensors", *TOKENIZER_FILES)


def _any_of(names: Iterable[str]) -> str:
    return f"({'|'.join(map(re.escape, names))})"


# all that a run writes, and the names that files have until they are whole: safetensors' own are .tmp and six letters
_OWN_NAMES = re.compile(
    rf"{re.escape(_LOCK)}|{_any_of((LOG, *_RESULT))}|\.{_any_of((LOG, *_RESULT))}\.tmp"
    rf"|{EARLIER}/\d+/{_any_of(ADAPTER_FILES)}"
    rf"|{checkpoint.CHECKPOINTS}/(step-\d+|\.step-\d+\.tmp)/{_any_of(checkpoint.FILES)}"
    rf"|({checkpoint.CHECKPOINTS}/\.step-\d+\.tmp/)?\.tmp\w{{6}}"
    rf"|{TRACKERS}/.*"
)


def check_output(output: Path, settings: TrainingSettings) -> None:
    """That a run may be begun in `output`, gone on with there, or put in the place of the run there.

    Raises:
        FileExistsError: it is no folder, or holds what is no run, or a run that is neither to be resumed nor
            overwritten, or, where it is to be overwritten, a file that `bivec train` did not write.
    """
    if not _names(output):
        return
    if not settings.resume and not settings.overwrite:
        raise FileExistsError(
            f"{output} is not empty: give --resume to go on with its run, or --overwrite to replace it"
        )
    if _first_entry(output) is None and not checkpoint.steps(output):
        done = "resumed" if settings.resume else "overwritten"
        raise FileExistsError(f"{output} holds no run of bivec train, so nothing in it is {done}")
    if settings.overwrite:
        refuse_foreign_files(output, _OWN_NAMES)


def _names(output: Path) -> set[str]:
    """Of what stands in a folder, but for what a run leaves that was killed before its log began."""
    if not output.exists():
        return set()
    if not output.is_dir():
        raise FileExistsError(f"output must be a folder, {output} is none")
    return {path.name for path in output.iterdir()} - {_LOCK, _LOG_TEMPORARY}


@contextmanager
def hold(output: Path) -> Iterator[None]:
    """Keep `output` for this process, made if need be; a folder that was made and stays empty is removed again.

    Raises:
        FileExistsError: another run has it.
    """
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    lock: BinaryIO | None = None
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = lock_output(output, output / _LOCK)
        yield
    finally:
        if lock is not None:
            (output / _LOCK).unlink(missing_ok=True)
            lock.close()
        for folder in made:
            with suppress(OSError):  # it holds something
                folder.rmdir()


def find_checkpoint(output: Path, settings: TrainingSettings) -> checkpoint.Saved | None:
    """The checkpoint that a run of these settings goes on from, None to begin.

    Raises:
        ValueError: the run is of another configuration, or every checkpoint is damaged.
        FileExistsError: the run is finished and has no checkpoint, or a file of another origin stands where its result
            is to be written.
    """
    if not settings.resume or not _names(output):
        return None
    saved = checkpoint.newest(output)
    entry = _first_entry(output) if saved is None else saved.state
    if entry is None:
        raise FileExistsError(f"{output} holds no run of bivec train, so nothing in it is resumed")
    before, source = entry["settings"], output / LOG if saved is None else saved.path
    now = json.loads(json.dumps(settings.shaping_the_result()))
    changed = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(f"{source} is of another configuration: {'; '.join(changed)}")
    steps = checkpoint.steps(output)
    if not steps and (output / RUN_FILE).exists():
        raise FileExistsError(
            f"{output} is a finished run without checkpoints: there is nothing to go on with, --overwrite begins anew"
        )
    if max(steps, default=0) < settings.max_steps:
        foreign = next((name for name in _RESULT if os.path.lexists(output / name)), None)
        if foreign is not None:
            raise FileExistsError(f"{output} holds {foreign}, which its unfinished run has not written: move it away")
    if saved is None:
        logger.warning("%s has no checkpoint yet: the run begins anew", output)
    return saved


def clear(output: Path) -> None:
    """Remove what an earlier run has written, but its log, which marks the folder until the next run's replaces it."""
    (output / RUN_FILE).unlink(missing_ok=True)  # which says that the others are complete
    for parent, _, names in os.walk(output, topdown=False):
        for path in (Path(parent, name) for name in names):
            own = _OWN_NAMES.fullmatch(path.relative_to(output).as_posix())
            if own and path not in (output / LOG, output / _LOCK):
                path.unlink()
        if Path(parent) != output:
            with suppress(OSError):  # something came into it meanwhile
                os.rmdir(parent)
    sync(output)


class Log:
    """`log.jsonl`: a line an entry, the first one the run's settings.

    Args:
        active: whether this process writes it.
        first_entry: begins a new log.
        step: of a run that is resumed: lines beyond it are taken out, they come again.
    """

    def __init__(self, output: Path, active: bool, first_entry: dict[str, Any], step: int):
        self._path = output / LOG
        self._file = None
        if not active:
            return
        if step:
            lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []
            lines = [line for line in lines if _step_of(line) <= step]
        else:
            lines = [json.dumps(first_entry)]
        with naming(self._path):
            whole = AtomicFile(output / _LOG_TEMPORARY)
            try:
                whole.handle.writelines(f"{line}\n".encode() for line in lines)
                whole.finish()
                whole.publish(self._path)
            finally:
                whole.abort()
            self._file = self._path.open("a", encoding="utf-8")

    def write(self, entry: dict[str, Any]) -> None:
        if self._file is not None:
            with naming(self._path):
                self._file.write(json.dumps(entry) + "\n")
                self._file.flush()

    def sync(self) -> None:
        if self._file is not None:
            with naming(self._path):
                os.fsync(self._file.fileno())


def _step_of(line: str) -> float:
    """The step of a line of the log; a line that a crash has torn belongs to none."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _first_entry(output: Path) -> dict[str, Any] | None:
    """The first entry of a run's log, None where there is no such log."""
    try:
        with (output / LOG).open(encoding="utf-8") as file:
            entry = json.loads(file.readline())
    except (FileNotFoundError, ValueError):
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("settings"), dict) else None
