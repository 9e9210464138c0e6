"""One evaluation from start to end: the task's files are read and checked, the model is loaded, scored and reported."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .. import __version__
from ..engine.config import BIDIRECTIONAL, CAUSAL
from ..engine.encoder import Encoder
from ..engine.outputs import open_output
from . import anisotropy, classification, generation, sts
from .baselines import BASELINES, tfidf
from .report import Report, Score, fingerprint, is_report
from .splits import Split
from .texts import read_texts

Task = Literal["sts", "classification", "generation", "anisotropy"]
WINDOWS = {"bidirectional": BIDIRECTIONAL, "causal": CAUSAL}

Scored = tuple[list[Score], dict[str, str], dict[str, bool]]  # figures, fingerprints of the data, checks


@dataclass(frozen=True)
class EvaluateSettings:
    """What is evaluated, and how.

    Attributes:
        data: the folder of the task's files; for generation and anisotropy also one file.
        window: `bidirectional`, `causal`, or None for the model's own.
        output: the JSON file that is written, or None.
        overwrite: replace `output` where it is an earlier report.
        split: of text similarity and classification.
        seeds: how many, from 0 on, where something is shuffled or drawn.
        baseline: whether TF-IDF is scored beside the model; text similarity and classification.
        num_texts: how many texts generation and anisotropy draw.
    """

    task: Task
    data: str
    model: str
    adapters: tuple[str, ...] = ()
    pooling: str | None = None
    max_length: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    attention: str = "auto"
    window: Literal["bidirectional", "causal"] | None = None
    output: str | None = None
    overwrite: bool = False
    split: Split = "test"
    seeds: int = 3
    baseline: bool = False
    num_texts: int = 500


def evaluate(settings: EvaluateSettings, show: Callable[[Report], object] = lambda report: None) -> Report:
    """Run a task and write its report where `output` asks for one.

    Args:
        show: called with the report before it is written, so that nothing is lost where that fails.
    Raises:
        ValueError, FileNotFoundError, FileExistsError: naming the argument, or the file and line, and what was
            expected.
        OSError: the report cannot be written.
    """
    if settings.output is None:
        report = _evaluate(settings)
        show(report)
        return report
    inputs = [Path(settings.data)]
    with open_output(Path(settings.output), inputs, overwrite=settings.overwrite, is_own=is_report) as publish:
        report = _evaluate(settings)
        show(report)
        publish(report.to_json())
    return report


def _evaluate(settings: EvaluateSettings) -> Report:
    encoder, (scores, data, checks) = _TASKS[settings.task](settings)
    description = encoder.describe()
    return Report(
        task=settings.task,
        model=description["model"] | description["encoding"] | {"dtype": str(encoder.dtype).removeprefix("torch.")},
        settings={"split": settings.split, "seeds": settings.seeds, "bivec": __version__},
        data=data,
        scores=scores,
        checks=checks,
    )


def load_encoder(settings: EvaluateSettings) -> Encoder:
    return Encoder.from_pretrained(
        settings.model,
        adapters=settings.adapters,
        pooling=settings.pooling,
        max_length=settings.max_length,
        device=settings.device,
        dtype=settings.dtype,
        attention=settings.attention,
        window=None if settings.window is None else WINDOWS[settings.window],
    )


def _sts(settings: EvaluateSettings) -> tuple[Encoder, Scored]:
    tasks = sts.read_tasks(Path(settings.data), settings.split)
    if settings.baseline:
        for task in tasks:
            if task.train is None:
                raise FileNotFoundError(f"the baseline of {task.name} needs its training split in {settings.data}")
    encoder = load_encoder(settings)
    scores, data = [], {}
    for task in tasks:
        first, second = task.pairs.first, task.pairs.second
        vectors = encoder.encode([*first, *second])
        scores += sts.score(task, "model", sts.cosines(vectors[: len(first)], vectors[len(first) :]))
        data[task.name] = fingerprint(first, second, task.pairs.scores)
        if settings.baseline and task.train is not None:
            for name in BASELINES:
                vectorizer = tfidf(name, [*task.train.first, *task.train.second])
                similarities = sts.cosines(vectorizer.transform(first), vectorizer.transform(second))
                scores += sts.score(task, name, similarities)
    return encoder, (scores, data, {})


def _classification(settings: EvaluateSettings) -> tuple[Encoder, Scored]:
    tasks = classification.read_tasks(Path(settings.data), settings.split)
    encoder = load_encoder(settings)
    scores, data = [], {}
    for task in tasks:
        vectors = encoder.encode(task.texts).astype(np.float64)
        systems: dict[str, classification.Features] = {"model": partial(fixed_features, vectors)}
        if settings.baseline:
            systems |= {name: partial(_tfidf_features, name, task.texts) for name in BASELINES}
        for name, features in systems.items():
            outcome = classification.classify(task, settings.split, features, range(settings.seeds))
            scores.append(classification.score(task, settings.split, name, outcome))
        data[task.name] = fingerprint(task.texts, task.labels)
    return encoder, (scores, data, {})


def _generation(settings: EvaluateSettings) -> tuple[Encoder, Scored]:
    held_out = read_texts(Path(settings.data), settings.num_texts)
    encoder = load_encoder(settings)
    scores, checks = generation.evaluate(encoder, held_out, range(settings.seeds))
    return encoder, (scores, {held_out.name: fingerprint(held_out.texts)}, checks)


def _anisotropy(settings: EvaluateSettings) -> tuple[Encoder, Scored]:
    held_out = read_texts(Path(settings.data), settings.num_texts)
    encoder = load_encoder(settings)
    scores = anisotropy.evaluate(encoder, held_out, range(settings.seeds))
    return encoder, (scores, {held_out.name: fingerprint(held_out.texts)}, {})


_TASKS: dict[Task, Callable[[EvaluateSettings], tuple[Encoder, Scored]]] = {
    "sts": _sts,
    "classification": _classification,
    "generation": _generation,
    "anisotropy": _anisotropy,
}


def fixed_features(vectors: np.ndarray, _: np.ndarray) -> np.ndarray:
    """Embeddings, which nothing is fitted for."""
    return vectors


def _tfidf_features(baseline: str, texts: list[str], rows: np.ndarray) -> Any:
    """TF-IDF of all texts, fitted on the rows that a classifier is fitted on."""
    return tfidf(baseline, [texts[row] for row in rows]).transform(texts)
