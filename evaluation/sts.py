"""Text similarity: how well cosines of embeddings order pairs that people have scored.

stsb-en-train.csv    without header: sentence1,sentence2,score; with one, these three columns in any place
stsb-en-dev.csv      a .tsv has tabs and no quotes, as GLUE's files
stsb-en-test.csv     the name before the split is the data set's
"""

import csv
import math
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..texts.formats import lines
from ..texts.rows import MAX_ROW_BYTES, Fault, InputFile, Unreadable, decoded
from .bad_rows import LEFT_OUT, BadRows, OnError
from .report import Score
from .splits import Split, find_splits, looked_for

EXTENSIONS = (".csv", ".tsv")
COLUMNS = ("sentence1", "sentence2", "score")


class Pairs(NamedTuple):
    """Scored pairs of texts; `scores` float64 `(n,)`."""

    first: list[str]
    second: list[str]
    scores: np.ndarray


class SimilarityTask(NamedTuple):
    """A data set's pairs of one split, and the training split's where its file is there.

    Attributes:
        num_left_out: rows of both that were bad.
    """

    name: str
    split: Split
    pairs: Pairs
    train: Pairs | None
    num_left_out: int = 0


def read_tasks(folder: Path, split: Split, on_error: OnError = "fail") -> list[SimilarityTask]:
    """Every data set in `folder` that has `split`.

    Raises:
        FileNotFoundError: none has; says which names were looked for.
        ValueError: a row is malformed and not to be left out, with its file and line.
    """
    tasks = []
    for name, files in find_splits(folder, EXTENSIONS).items():
        if split in files:
            bad_rows = BadRows(on_error)
            train = read_pairs(files["train"], bad_rows) if "train" in files else None
            pairs = read_pairs(files[split], bad_rows)
            tasks.append(SimilarityTask(name, split, pairs, train, bad_rows.count))
    if not tasks:
        raise FileNotFoundError(f"no scored pairs in {folder}: looked for {looked_for('*', split, EXTENSIONS)}")
    return tasks


def read_pairs(path: Path, bad_rows: BadRows) -> Pairs:
    """The pairs of one file; raises ValueError naming file and line of a row that is none and not to be left out."""
    rows = _rows(path, bad_rows)
    first_line, header = next(rows, (1, None))
    if header is None:
        raise ValueError(f"{path}: the file is empty")
    places = [header.index(column) for column in COLUMNS if column in header]
    pairs: list[tuple[str, str, float]] = []

    width = len(header)
    if len(places) < len(COLUMNS):  # it is a pair itself
        places, width = [0, 1, 2], len(COLUMNS)
        rows = chain([(first_line, header)], rows)
    for line, fields in rows:
        pair = _pair(fields, width, places)
        if isinstance(pair, str):
            bad_rows.add(f"{path}:{line}: {pair}")
        else:
            pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path}: no pair stands below the header")
    first, second, scores = zip(*pairs, strict=True)
    return Pairs(list(first), list(second), np.array(scores))


def cosines(first: Any, second: Any) -> np.ndarray:
    """Cosines float64 `(n,)` of the rows of two dense arrays or scipy matrices `(n, E)`; 0 where one is all zeros."""
    if isinstance(first, np.ndarray):
        first, second = first.astype(np.float64), second.astype(np.float64)
        products, norms = (first * second).sum(axis=1), [np.linalg.norm(rows, axis=1) for rows in (first, second)]
    else:
        products = np.asarray(first.multiply(second).sum(axis=1)).ravel()
        norms = [np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1)).ravel()) for rows in (first, second)]
    scale = norms[0] * norms[1]
    return np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)


def cosines_of_halves(vectors: Any) -> np.ndarray:
    """`cosines` of the first half of the rows `(2 n, E)` with the second."""
    half = vectors.shape[0] // 2
    return cosines(vectors[:half], vectors[half:])


def score(task: SimilarityTask, system: str, similarities: np.ndarray) -> list[Score]:
    """Spearman's and Pearson's correlation of `similarities` `(n,)` with the scores, with their intervals."""
    gold = task.pairs.scores
    items = {"gold": gold, "similarity": similarities}
    details = {LEFT_OUT: task.num_left_out} if task.num_left_out else {}
    return [
        Score.of_items(task.name, task.split, system, metric, items, details=details)
        for metric in ("spearman", "pearson")
    ]


def _rows(path: Path, bad_rows: BadRows) -> Iterator[tuple[int, list[str]]]:
    """Fields of each row that is not blank, with the line it begins on."""
    tabs = path.suffix == ".tsv"
    dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    line = 1
    reader = csv.reader(_lines(path, bad_rows), **dialect)
    try:
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: {error}") from error
    except Unreadable as error:
        raise ValueError(f"{path}: {error}") from error


def _lines(path: Path, bad_rows: BadRows) -> Iterator[str]:
    for number, line in lines(InputFile(path, path.name, "csv", compressed=False)):
        text = line if isinstance(line, Fault) else decoded(line)
        if isinstance(text, Fault):
            bad_rows.add(f"{path}:{number}: {text}")
            text = "\n"  # so that lines behind it keep their numbers
        yield text


def _pair(fields: Sequence[str], width: int, places: Sequence[int]) -> tuple[str, str, float] | str:
    """A pair, or why it is none."""
    if len(fields) != width:
        return f"{width} fields are needed ({', '.join(COLUMNS)}), got {len(fields)}"
    first, second, score = (fields[place] for place in places)
    if not first.strip() or not second.strip():
        return "a sentence is empty"
    try:
        number = float(score)
    except ValueError:
        number = math.nan
    return (first, second, number) if math.isfinite(number) else f"the score must be a number, got {score!r}"
