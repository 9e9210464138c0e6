"""Text classification: the accuracy of a logistic regression on frozen embeddings.

    stsa.binary.train    a label, a space and a text a line (SentEval's layout; `.all` or `.txt` may stand behind)
    stsa.binary.dev
    stsa.binary.test
    rt-polarity.all      a data set without splits

The strength of regularisation is chosen on the development split, or where there is none by cross-validation within
the training split; a data set without splits is scored by nested cross-validation in ten folds (Conneau and Kiela,
SentEval, 2018). The test split chooses nothing.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..texts.files import is_file
from ..texts.formats import refuse_wide_characters
from ..texts.rows import Unreadable
from .extras import needed
from .report import Score
from .splits import Split, find_splits, looked_for

EXTENSIONS = (".all", ".txt", "")
STRENGTHS = tuple(10.0**power for power in range(-3, 3))  # C, the inverse of the penalty's weight
FOLDS = 10
INNER_FOLDS = 3

Features = Callable[[np.ndarray], Any]  # rows to fit on -> features of all rows, dense or sparse (n, E)


class ClassificationTask(NamedTuple):
    """Labelled texts of all splits, one after the other.

    Attributes:
        labels: str `(n,)`.
        rows: each split's rows, int64; `train` is always there.
    """

    name: str
    texts: list[str]
    labels: np.ndarray
    rows: dict[str, np.ndarray]


class Outcome(NamedTuple):
    """Which of the scored texts were right, for one seed after the other: bool `(seeds, n)`, and each choice of C."""

    correct: np.ndarray
    strengths: list[float]


def read_tasks(folder: Path, split: Split) -> list[ClassificationTask]:
    """Every data set in `folder` that can be scored on `split`.

    Raises:
        FileNotFoundError: there is none, or one has no training split; says which names were looked for.
        ValueError: a line is malformed, with its file, or a label does not occur in the training split.
    """
    splits = find_splits(folder, EXTENSIONS)
    taken = {path for files in splits.values() for path in files.values()}
    whole = {path.stem: {"train": path} for path in sorted(folder.glob("*.all")) if path not in taken and is_file(path)}
    tasks = []
    for name, files in sorted((splits | whole).items()):
        if name in splits and split == "test" and "test" not in files:
            continue
        if "train" not in files:
            wanted = looked_for(name, "train", EXTENSIONS)
            raise FileNotFoundError(f"no training split beside {next(iter(files.values()))}: looked for {wanted}")
        task = _read_task(name, files)
        for used in sorted({"dev", split} & files.keys()):
            _check_labels(task, files["train"], files[used], used)
        tasks.append(task)
    if not tasks:
        wanted = looked_for("*", split, EXTENSIONS)
        raise FileNotFoundError(f"no labelled texts in {folder}: looked for {wanted} with their training split, *.all")
    return tasks


def read_labelled(path: Path) -> tuple[list[str], list[str]]:
    """Labels and texts of one file, in UTF-8 or, where it is not that, in Latin-1.

    Raises:
        ValueError: the file is empty or in UTF-16 or UTF-32, or a line is not a label, a space and a text.
    """
    content = path.read_bytes()
    try:
        refuse_wide_characters(content.partition(b"\n")[0])  # which would pass for Latin-1
    except Unreadable as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        decoded = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        decoded = content.decode("latin-1")  # as two of SentEval's files are
    labels, texts = [], []
    for line, entry in enumerate(decoded.removesuffix("\n").split("\n"), start=1):
        label, _, text = entry.rstrip("\r").partition(" ")
        if not label or not text.strip():
            raise ValueError(f"{path}:{line}: a line must be a label, a space and a text, got {entry[:40]!r}")
        labels.append(label)
        texts.append(text)
    return labels, texts


def classify(task: ClassificationTask, split: Split, features: Features, seeds: Sequence[int]) -> Outcome:
    """Fit and score for each seed; a single one is enough where a development split leaves nothing to chance.

    Raises:
        ValueError: scikit-learn is absent, or a label stands fewer times in the training split than there are folds.
    """
    if split == "test" and "test" in task.rows and "dev" in task.rows:
        seeds = seeds[:1]
    outcomes = [_classify(task, split, features, seed) for seed in seeds]
    correct, strengths = zip(*outcomes, strict=True)
    return Outcome(np.stack(correct), [strength for chosen in strengths for strength in chosen])


def score(task: ClassificationTask, split: Split, system: str, outcome: Outcome) -> Score:
    """Mean accuracy over seeds, its interval over texts, and each seed's own."""
    right = outcome.correct.mean(axis=0)
    details = {"accuracy of each seed": outcome.correct.mean(axis=1).tolist(), "chosen C": outcome.strengths}
    scored = split if split in task.rows else f"{FOLDS} folds"
    return Score.of_items(task.name, scored, system, "accuracy", {"correct": right}, details=details)


def _read_task(name: str, files: dict[str, Path]) -> ClassificationTask:
    labels: list[str] = []
    texts: list[str] = []
    rows = {}
    for split, path in files.items():
        its_labels, its_texts = read_labelled(path)
        rows[split] = np.arange(len(texts), len(texts) + len(its_texts))
        labels += its_labels
        texts += its_texts
    rarest, times = Counter(labels[row] for row in rows["train"]).most_common()[-1]
    if times < FOLDS or times == len(rows["train"]):
        raise ValueError(
            f"{files['train']}: two labels or more must each stand {FOLDS} times, got {rarest!r} {times} times"
        )
    return ClassificationTask(name, texts, np.array(labels), rows)


def _check_labels(task: ClassificationTask, train: Path, path: Path, split: str) -> None:
    """What a classifier has not seen it never answers: such a label is most often spelled otherwise."""
    known = set(task.labels[task.rows["train"]])
    unknown = Counter(label for label in task.labels[task.rows[split]] if label not in known)
    if unknown:
        label, times = unknown.most_common()[0]
        raise ValueError(
            f"{path}: every label must occur in the training split {train}, {str(label)!r} ({times} times) does not"
        )


def _classify(task: ClassificationTask, split: Split, features: Features, seed: int) -> tuple[np.ndarray, list[float]]:
    """Correct `(n,)` and the choices of C, for one seed."""
    train = task.rows["train"]
    if split in task.rows:
        development = task.rows.get("dev") if split == "test" else None
        correct, strength = _fit_and_score(task.labels, features, train, task.rows[split], development, seed)
        return correct, [strength]
    right = np.zeros(len(train), dtype=bool)
    strengths = []
    for kept, held_out in _folds(FOLDS, task.labels[train], seed):
        right[held_out], strength = _fit_and_score(task.labels, features, train[kept], train[held_out], None, seed)
        strengths.append(strength)
    return right, strengths


def _fit_and_score(
    labels: np.ndarray,
    features: Features,
    train: np.ndarray,
    scored: np.ndarray,
    development: np.ndarray | None,
    seed: int,
) -> tuple[np.ndarray, float]:
    """Which of `scored` are right, bool, and the C chosen on `development` or by folds within `train`."""
    matrix = features(train)
    if development is not None:
        parts = [(train, development)]
    else:
        parts = [(train[kept], train[held_out]) for kept, held_out in _folds(INNER_FOLDS, labels[train], seed)]
    right = np.zeros(len(STRENGTHS))
    for fit_on, judge_on in parts:
        right += [correct.sum() for correct in _correct(matrix, labels, fit_on, judge_on, STRENGTHS)]
    strength = STRENGTHS[int(right.argmax())]  # the strongest penalty of equals
    (correct,) = _correct(matrix, labels, train, scored, (strength,))
    return correct, strength


def _correct(
    matrix: Any, labels: np.ndarray, fit_on: np.ndarray, judge_on: np.ndarray, strengths: Sequence[float]
) -> list[np.ndarray]:
    """Which rows of `judge_on` each strength's classifier gets right, bool; dense features are standardised."""
    linear_model = needed("sklearn.linear_model", "scikit-learn", "classification")
    fitted, judged = matrix[fit_on], matrix[judge_on]
    if isinstance(matrix, np.ndarray):
        mean, deviation = fitted.mean(axis=0), fitted.std(axis=0)
        deviation[deviation == 0] = 1.0
        fitted, judged = (fitted - mean) / deviation, (judged - mean) / deviation
    # each strength starts where the last one ended
    classifier = linear_model.LogisticRegression(max_iter=1000, warm_start=True)
    outcomes = []
    for strength in strengths:
        classifier.set_params(C=strength).fit(fitted, labels[fit_on])
        outcomes.append(classifier.predict(judged) == labels[judge_on])
    return outcomes


def _folds(count: int, labels: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    selection = needed("sklearn.model_selection", "scikit-learn", "classification")
    folds = selection.StratifiedKFold(count, shuffle=True, random_state=seed)
    return list(folds.split(np.zeros(len(labels)), labels))
