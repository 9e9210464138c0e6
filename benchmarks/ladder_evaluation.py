"""How a ladder's models are scored: a report of each model and evaluation, which is kept while it is true.

    RUNS/results/SPLIT/untrained-causal/sts-stsb.json    what `bivec evaluate` writes
                      /seed-1/simcse/sts-stsb.json
                      /seed-1/simcse/seconds.jsonl       what each took

A report is true where model files, data and settings are those that it was made of. Processes that climb other seeds of
the same ladder may score at the same time.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, cast, get_args

from ..engine.outputs import open_locked
from ..evaluation.report import Report
from ..evaluation.splits import Split
from ..evaluation.states import Layers
from ..evaluation.tasks import EvaluateSettings, Task, empty_report, evaluate, load_encoder, read_units

Window = Literal["causal", "bidirectional"]
WITH_BASELINES = ("sts", "classification")
SECONDS = "seconds.jsonl"


class Evaluation(NamedTuple):
    """What every model of a ladder goes through.

    Attributes:
        name: of its reports' files.
        settings: all but the model.
        data: SHA-256 of each data set.
    """

    name: str
    settings: EvaluateSettings
    data: dict[str, str]


def read_evaluations(given: Sequence[tuple[str, Path]], split: Split, layers: Layers) -> list[Evaluation]:
    """The evaluations of `(task, data)`, whose files are read and checked before anything is trained.

    Raises:
        ValueError, FileNotFoundError: no such task, data that are given twice, or as `evaluate`.
    """
    evaluations = []
    for task, data in given:
        if task not in get_args(Task):
            raise ValueError(f"--evaluate {task}={data}: the task must be one of {', '.join(get_args(Task))}")
        settings = EvaluateSettings(
            cast(Task, task),
            str(data),
            model="",
            device="cpu",
            dtype="float32",
            split=split,
            seeds=1,  # of a probe or a shuffle: a ladder's seeds are its runs'
            layers=layers,
            baseline=task in WITH_BASELINES,
            overwrite=True,
            resume=True,
        )
        units = {unit.name: unit.fingerprint for unit in read_units(settings)}
        evaluations.append(Evaluation(f"{task}-{data.resolve().name}", settings, units))
    name, times = Counter(evaluation.name for evaluation in evaluations).most_common(1)[0]
    if times > 1:
        raise ValueError(f"--evaluate has {times} data folders of one name: {name.replace('-', '=', 1)}")
    return evaluations


def score(model: Path, window: Window | None, folder: Path, evaluations: Sequence[Evaluation]) -> dict[str, Path]:
    """A model's reports in `folder`, by evaluation; those that are there and true are not made again.

    Args:
        window: `causal`, `bidirectional`, or None for the model's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reports = {}
    encoder = None
    for name, settings, data in evaluations:
        path = reports[name] = folder / f"{name}.json"
        settings = replace(settings, model=str(model), window=window, output=str(path))
        encoder = encoder or load_encoder(settings)
        with _waiting(path):
            if _is_true(path, empty_report(settings, data, encoder)):
                continue
            print(f"{folder.name}: {name}", file=sys.stderr, flush=True)
            start = time.perf_counter()
            evaluate(settings)
            with (folder / SECONDS).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"evaluation": name, "seconds": time.perf_counter() - start}) + "\n")
    return reports


def seconds_of(path: Path) -> float | None:
    """What the evaluation took that wrote a report; of one that was interrupted, its last part."""
    with (path.parent / SECONDS).open(encoding="utf-8") as file:
        entries = [json.loads(line) for line in file]
    return next((entry["seconds"] for entry in reversed(entries) if entry["evaluation"] == path.stem), None)


@contextmanager
def _waiting(path: Path) -> Iterator[None]:
    """While no other process of the ladder makes this report."""
    lock = path.with_name(f".{path.name}.lock")
    with open_locked(lock, wait=True):
        try:
            yield
        finally:
            lock.unlink()


def _is_true(path: Path, expected: Report) -> bool:
    try:
        return Report.read(path).origin == expected.origin
    except (FileNotFoundError, ValueError):
        return False
