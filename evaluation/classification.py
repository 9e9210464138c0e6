"""Classification of texts, or of pairs of texts: the accuracy of a logistic regression on frozen embeddings.

The strength of regularisation is chosen on the development split, or where there is none by cross-validation within
the training split; a data set without splits is scored by nested cross-validation in ten folds (Conneau and Kiela,
SentEval, 2018). The test split chooses nothing. A pair (u, v) has the features |u - v| and u * v, and F1 of the label 1
beside the accuracy, as there.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .bad_rows import LEFT_OUT, BadRows, OnError
from .extras import needed
from .labelled_files import DataSet, read_folder
from .logistic_regression import LogisticRegression
from .report import Score
from .splits import Split

STRENGTHS = tuple(10.0**power for power in range(-3, 3))  # C, the inverse of the penalty's weight
FOLDS = 10
INNER_FOLDS = 3

Features = Callable[[np.ndarray], Any]  # rows to fit on -> features of all rows, dense or sparse (n, E)


class ClassificationTask(NamedTuple):
    """Labelled texts of all splits, one after the other.

    Attributes:
        labels: str `(n,)`.
        rows: each split's rows, int64; `train` is always there.
        seconds: the second texts of pairs, else none.
        num_left_out: rows that were bad.
    """

    name: str
    texts: list[str]
    labels: np.ndarray
    rows: dict[str, np.ndarray]
    seconds: Sequence[str] = ()
    num_left_out: int = 0

    @property
    def columns(self) -> list[Sequence[str]]:
        """The texts, and the second texts where there are any."""
        return [self.texts, self.seconds] if self.seconds else [self.texts]

    @property
    def all_texts(self) -> list[str]:
        return [*self.texts, *self.seconds]


class Outcome(NamedTuple):
    """Which of the scored texts were right, for one seed after the other: bool `(seeds, n)`, and each choice of C."""

    correct: np.ndarray
    strengths: list[float]


def read_tasks(folder: Path, split: Split, on_error: OnError = "fail") -> list[ClassificationTask]:
    """Every data set in `folder` that can be scored on `split`.

    Raises:
        FileNotFoundError: there is none, or one has no training split; says which names were looked for.
        ValueError: a line is malformed and not to be left out, with its file, or a label does not occur in the training
            split.
    """
    bad_rows: dict[str, BadRows] = {}
    found = list(read_folder(folder, split, lambda name: bad_rows.setdefault(name, BadRows(on_error))))
    return [_task(data, bad_rows[data.name].count) for data in found]


def fixed_features(task: ClassificationTask, vectors: np.ndarray) -> Features:
    """Vectors of `task.all_texts`, `(n, E)` or of pairs `(2 n, E)`, for which nothing is fitted."""
    matrix = vectors.astype(np.float64)
    if task.seconds:
        matrix = pair_features(matrix)
    return lambda rows: matrix


def pair_features(vectors: Any) -> Any:
    """|u - v| and u * v `(n, 2 E)` of vectors `(2 n, E)`, all u before all v; dense, or scipy's sparse."""
    half = vectors.shape[0] // 2
    first, second = vectors[:half], vectors[half:]
    if isinstance(vectors, np.ndarray):
        return np.concatenate([np.abs(first - second), first * second], axis=1)
    sparse = needed("scipy.sparse", "scipy", "classification of pairs")
    return sparse.hstack([abs(first - second), first.multiply(second)], format="csr")


def classify(task: ClassificationTask, split: Split, features: Features, seeds: Sequence[int]) -> Outcome:
    """Fit and score for each seed, which shuffles the folds; a single one is enough where there are none.

    Raises:
        ValueError: scikit-learn is absent.
    """
    regression, labels, train = LogisticRegression(), task.labels, task.rows["train"]
    if split not in task.rows:
        outcomes = [_nested(regression, labels, train, features, seed) for seed in seeds]
        correct, strengths = zip(*outcomes, strict=True)
        return Outcome(np.stack(correct), [strength for chosen in strengths for strength in chosen])
    development = task.rows.get("dev") if split == "test" else None
    matrix = features(train)
    chosen = [
        _chosen_strength(regression, matrix, labels, train, development, seed)
        for seed in (seeds if development is None else seeds[:1])
    ]
    by_strength = {
        strength: _correct(regression, matrix, labels, train, task.rows[split], (strength,))[0]
        for strength in set(chosen)
    }
    return Outcome(np.stack([by_strength[strength] for strength in chosen]), chosen)


def score(task: ClassificationTask, split: Split, system: str, outcome: Outcome) -> list[Score]:
    """Mean accuracy over seeds, its interval over texts, and each seed's own; of pairs also F1 of the label 1.

    F1 is of all seeds' answers together.
    """
    details: dict[str, Any] = {
        "accuracy of each seed": outcome.correct.mean(axis=1).tolist(),
        "chosen C": outcome.strengths,
    }
    if task.num_left_out:
        details[LEFT_OUT] = task.num_left_out
    scored = split if split in task.rows else f"{FOLDS} folds"
    items = {"correct": outcome.correct.mean(axis=0)}
    scores = [Score.of_items(task.name, scored, system, "accuracy", items, details=details)]
    if task.seconds:
        is_one = task.labels[task.rows[split if split in task.rows else "train"]] == "1"
        says_one = outcome.correct == is_one
        items = {"over": 2 * (says_one & is_one).mean(axis=0), "under": says_one.mean(axis=0) + is_one}
        scores.append(Score.of_items(task.name, scored, system, "f1", items, details=details))
    return scores


def _task(data: DataSet, num_left_out: int) -> ClassificationTask:
    """Raises ValueError where a label is too rare to be learned, or to be found in every fold."""
    ends = np.cumsum([len(rows) for rows in data.rows.values()])
    numbers = dict(zip(data.rows, np.split(np.arange(ends[-1]), ends[:-1]), strict=True))
    labels, texts, seconds = zip(*(row for rows in data.rows.values() for row in rows), strict=True)
    train = data.paths["train"]
    counts = Counter(row.label for row in data.rows["train"])
    rarest, times = counts.most_common()[-1]
    if times < FOLDS or len(counts) < 2:
        raise ValueError(f"{train}: two labels or more must each stand {FOLDS} times, got {rarest!r} {times} times")
    # what a classifier has not seen it never answers: such a label is most often spelled otherwise
    for split, rows in sorted(data.rows.items()):
        unknown = Counter(row.label for row in rows if row.label not in counts)
        if unknown:
            label, times = unknown.most_common()[0]
            raise ValueError(
                f"{data.paths[split]}: every label must occur in the training split {train}, {label!r} "
                f"({times} times) does not"
            )
    pairs = list(seconds) if data.is_pairs else ()
    return ClassificationTask(data.name, list(texts), np.array(labels), numbers, pairs, num_left_out)


def _nested(
    regression: LogisticRegression, labels: np.ndarray, train: np.ndarray, features: Features, seed: int
) -> tuple[np.ndarray, list[float]]:
    """Correct `(n,)` of rows that are each held out once, and the choice of C for each fold."""
    right = np.zeros(len(train), dtype=bool)
    strengths = []
    for kept, held_out in _folds(FOLDS, labels[train], seed):
        matrix = features(train[kept])
        strength = _chosen_strength(regression, matrix, labels, train[kept], None, seed)
        (right[held_out],) = _correct(regression, matrix, labels, train[kept], train[held_out], (strength,))
        strengths.append(strength)
    return right, strengths


def _chosen_strength(
    regression: LogisticRegression,
    matrix: Any,
    labels: np.ndarray,
    train: np.ndarray,
    development: np.ndarray | None,
    seed: int,
) -> float:
    """The C that is best on `development`, or by folds within `train`."""
    if development is not None:
        parts = [(train, development)]
    else:
        parts = [(train[kept], train[held_out]) for kept, held_out in _folds(INNER_FOLDS, labels[train], seed)]
    right = np.zeros(len(STRENGTHS))
    for fit_on, judge_on in parts:
        right += [correct.sum() for correct in _correct(regression, matrix, labels, fit_on, judge_on, STRENGTHS)]
    return STRENGTHS[int(right.argmax())]  # the strongest penalty of equals


def _correct(
    regression: LogisticRegression,
    matrix: Any,
    labels: np.ndarray,
    fit_on: np.ndarray,
    judge_on: np.ndarray,
    strengths: Sequence[float],
) -> list[np.ndarray]:
    """Which rows of `judge_on` each strength's classifier gets right, bool; dense features are standardised."""
    fitted, judged = matrix[fit_on], matrix[judge_on]
    if isinstance(matrix, np.ndarray):
        mean, deviation = fitted.mean(axis=0), fitted.std(axis=0)
        deviation[deviation == 0] = 1.0
        fitted, judged = (fitted - mean) / deviation, (judged - mean) / deviation
    known, targets = np.unique(labels[fit_on], return_inverse=True)
    classifiers = regression.path(fitted, targets, strengths)
    return [known[classifier.predict(judged)] == labels[judge_on] for classifier in classifiers]


def _folds(count: int, labels: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    selection = needed("sklearn.model_selection", "scikit-learn", "classification")
    folds = selection.StratifiedKFold(count, shuffle=True, random_state=seed)
    return list(folds.split(np.zeros(len(labels)), labels))
