"""One evaluation from start to end: the task's files are read and checked, the model is loaded, scored and reported."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .. import __version__
from ..engine.config import BIDIRECTIONAL, CAUSAL
from ..engine.encoder import Encoder
from ..engine.outputs import open_output
from . import anisotropy, classification, generation, semantic, sts, tagging, word_in_context, word_similarity
from .baselines import TFIDF, TOKEN_AVERAGE, tfidf, token_averages
from .report import Report, fingerprint, is_report
from .splits import Split
from .states import READ_OUTS, Layers, ReadOut, SubTokens
from .summary import summarized
from .texts import read_texts
from .units import Scored, Unfinished, Unit

Task = Literal["sts", "classification", "generation", "anisotropy", "chunking", "pos", "ner", "words", "probing"]
_WITH_MEANS: tuple[Task, ...] = ("sts", "classification")  # whose data sets are of a kind
WINDOWS = {"bidirectional": BIDIRECTIONAL, "causal": CAUSAL}


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
        baseline: whether TF-IDF and the token average are scored beside the model; similarity and classification.
        num_texts: how many texts generation and anisotropy draw.
        resume: go on with an evaluation into `output` that was interrupted; with `overwrite`, unless it was another.
        layers: of tasks on words: `last` with the embeddings beside it, or `all`.
        read_out: of these: `token`, `previous`, `both`, or `all` three; None is all, but what the model was trained
            for where the protocol is `llm2vec`.
        sub_tokens: of these: which of a word's tokens its vector is made of.
        protocol: of tasks with probes: `bivec`'s, or the published one, `llm2vec` or `feng2025`.
        on_error: whether a bad row of the data ends the evaluation or is left out, and counted.
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
    resume: bool = False
    layers: Layers = "last"
    read_out: Literal["token", "previous", "both", "all"] | None = None
    sub_tokens: SubTokens = "mean"
    protocol: Literal["bivec", "llm2vec", "feng2025"] = "bivec"
    on_error: Literal["fail", "skip"] = "fail"

    @property
    def read_outs(self) -> tuple[ReadOut, ...]:
        return READ_OUTS if self.read_out is None or self.read_out == "all" else (self.read_out,)

    def shaping_the_figures(self) -> dict[str, Any]:
        """What figures depend on beside model and data."""
        left_out = {"task", "data", "model", "adapters", "device", "attention", "output", "overwrite", "resume"}
        return {name: value for name, value in asdict(self).items() if name not in left_out}


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
        if settings.resume:
            raise ValueError("resume needs an output, beside which what is scored is kept")
        report = _evaluate(settings)
        show(report)
        return report
    output = Path(settings.output)
    inputs = [Path(settings.data)]
    with open_output(output, inputs, overwrite=settings.overwrite, is_own=is_report) as publish:
        unfinished = Unfinished(output, resume=settings.resume, overwrite=settings.overwrite)
        report = _evaluate(settings, unfinished)
        show(report)
        publish(report.to_json())
        unfinished.remove()
    return report


def _evaluate(settings: EvaluateSettings, unfinished: Unfinished | None = None) -> Report:
    units = read_units(settings)
    dtype = settings.dtype if unfinished is None else unfinished.dtype(settings.dtype)
    encoder = load_encoder(replace(settings, dtype=dtype))
    report = empty_report(settings, {unit.name: unit.fingerprint for unit in units}, encoder)
    if unfinished is not None:
        unfinished.begin(report)
    for unit in units:
        found = None if unfinished is None else unfinished.finished(unit.name)
        if found is None:
            found = unit.score(encoder)
            if unfinished is not None:
                unfinished.keep(unit.name, found)
        report.scores.extend(found.scores)
        report.checks.update(found.checks)
        report.notes.extend(found.notes)
    return replace(report, scores=summarized(report.scores, means=settings.task in _WITH_MEANS))


def read_units(settings: EvaluateSettings) -> list[Unit]:
    """All that is to be scored, from the task's files, which are read and checked; errors as of `evaluate`."""
    return _TASKS[settings.task](settings)


def empty_report(settings: EvaluateSettings, data: dict[str, str], encoder: Encoder) -> Report:
    """What a report says before anything is scored: its origin is all that the figures will come from."""
    description = encoder.describe()
    computed = {"dtype": encoder.compute_dtype.name, "identity": encoder.identity()}
    return Report(
        task=settings.task,
        model=description["model"] | description["encoding"] | computed,
        settings=settings.shaping_the_figures() | {"bivec": __version__},
        data=data,
        scores=[],
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


def _sts(settings: EvaluateSettings) -> list[Unit]:
    def score(task: sts.SimilarityTask, encoder: Encoder) -> Scored:
        texts = [*task.pairs.first, *task.pairs.second]
        scores = sts.score(task, "model", sts.cosines_of_halves(encoder.encode(texts)))
        notes = _notes(task)
        if settings.baseline:
            fit_on = texts if task.train is None else [*task.train.first, *task.train.second]
            for name in TFIDF:
                scores += sts.score(task, name, sts.cosines_of_halves(tfidf(name, fit_on).transform(texts)))
            scores += sts.score(task, TOKEN_AVERAGE, sts.cosines_of_halves(token_averages(encoder, texts)))
            fitted = "the training split" if task.train else "the scored sentences, whose scores it does not see"
            notes.append(f"{task.name}: TF-IDF is fitted on {fitted}")
        return Scored(scores, notes=notes)

    tasks = sts.read_tasks(Path(settings.data), settings.split, settings.on_error)
    return [Unit(task.name, fingerprint(*task.pairs), partial(score, task)) for task in tasks]


def _classification(settings: EvaluateSettings) -> list[Unit]:
    def score(task: classification.ClassificationTask, encoder: Encoder) -> Scored:
        systems = {"model": classification.fixed_features(task, encoder.encode(task.all_texts))}
        if settings.baseline:
            systems |= {name: partial(_tfidf_features, name, task) for name in TFIDF}
            averages = token_averages(encoder, task.all_texts)
            systems[TOKEN_AVERAGE] = classification.fixed_features(task, averages)
        scores = []
        for name, features in systems.items():
            outcome = classification.classify(task, settings.split, features, range(settings.seeds))
            scores += classification.score(task, settings.split, name, outcome)
        return Scored(scores, notes=_notes(task))

    tasks = classification.read_tasks(Path(settings.data), settings.split, settings.on_error)
    return [Unit(task.name, fingerprint(*task.columns, task.labels), partial(score, task)) for task in tasks]


def _notes(task: sts.SimilarityTask | classification.ClassificationTask) -> list[str]:
    return [f"{task.name}: {task.num_left_out:,} bad rows are left out"] if task.num_left_out else []


def _generation(settings: EvaluateSettings) -> list[Unit]:
    held_out = read_texts(Path(settings.data), settings.num_texts)

    def score(encoder: Encoder) -> Scored:
        return generation.evaluate(encoder, held_out, range(settings.seeds))

    return [Unit(held_out.name, fingerprint(held_out.texts), score)]


def _anisotropy(settings: EvaluateSettings) -> list[Unit]:
    held_out = read_texts(Path(settings.data), settings.num_texts)

    def score(encoder: Encoder) -> Scored:
        return Scored(anisotropy.evaluate(encoder, held_out, range(settings.seeds)))

    return [Unit(held_out.name, fingerprint(held_out.texts), score)]


def _tagging(kind: tagging.Tags, settings: EvaluateSettings) -> list[Unit]:
    if settings.protocol == "feng2025":
        raise ValueError(f"protocol of {kind} must be bivec or llm2vec, got feng2025")
    if settings.protocol == "llm2vec" and settings.sub_tokens != "mean":
        raise ValueError(f"sub_tokens of protocol llm2vec must be mean, got {settings.sub_tokens}")
    read_outs = None if settings.read_out is None else settings.read_outs
    chosen = tagging.TaggingSettings(
        settings.protocol, settings.layers, read_outs, settings.sub_tokens, range(settings.seeds)
    )
    tasks = tagging.read_tasks(Path(settings.data), kind, settings.split, settings.on_error)
    return [
        Unit(task.name, fingerprint(task.words, task.tags, task.roles), partial(tagging.score, task, chosen))
        for task in tasks
    ]


def _words(settings: EvaluateSettings) -> list[Unit]:
    return word_similarity.units(
        Path(settings.data),
        layers=settings.layers,
        read_outs=settings.read_outs,
        sub_tokens=settings.sub_tokens,
        on_error=settings.on_error,
    )


def _probing(settings: EvaluateSettings) -> list[Unit]:
    pairs = word_in_context.read_units(settings)
    return [*semantic.read_units(settings, needed=not pairs), *pairs]


_TASKS: dict[Task, Callable[[EvaluateSettings], list[Unit]]] = {
    "sts": _sts,
    "classification": _classification,
    "generation": _generation,
    "anisotropy": _anisotropy,
    "chunking": partial(_tagging, "chunking"),
    "pos": partial(_tagging, "pos"),
    "ner": partial(_tagging, "ner"),
    "words": _words,
    "probing": _probing,
}


def _tfidf_features(baseline: str, task: classification.ClassificationTask, rows: np.ndarray) -> Any:
    """TF-IDF of all texts, fitted on the rows that a classifier is fitted on."""
    vectorizer = tfidf(baseline, [column[row] for column in task.columns for row in rows])
    matrix = vectorizer.transform(task.all_texts)
    return classification.pair_features(matrix) if task.seconds else matrix
