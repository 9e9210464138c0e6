"""What a dtype costs: a model's cosines with float32, and what changes in text similarity and classification.

    python -m bivec.benchmarks.dtype_quality --models base=stories260K/hf simcse=runs/simcse --dtypes bfloat16 int8 \
        --sts stsb --classification senteval-cls --splits dev test --output int8-quality.json

Every row is of a data set in a dtype: the figure in float32, how much higher it is in the dtype with the paired 95 %
interval of that, and the least and median cosine of its texts' vectors, as they are and seen from float32's mean. A
data set of classification has the figure of its test split alone.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..engine.agreement import cosines
from ..engine.encoder import Encoder
from ..evaluation import classification, sts
from ..evaluation.report import Score, aligned
from ..evaluation.statistics import spearman
from ..evaluation.summary import difference
from .ladder import named_file
from .machine import describe_machine
from .timing import compose, write_document

EXACT = "float32"


class DataSet(NamedTuple):
    """Texts, and the figure that their vectors give."""

    texts: list[str]
    score: Callable[[np.ndarray], Score]  # of vectors (N, dim)


def read_data_sets(similar: Path | None, labelled: Path | None, splits: Sequence[Any]) -> Iterator[DataSet]:
    """Raises FileNotFoundError or ValueError as the tasks of `bivec evaluate` do."""
    if similar is not None:
        for split in splits:
            for task in sts.read_tasks(similar, split):
                yield DataSet([*task.pairs.first, *task.pairs.second], partial(similarity_score, task))
    if labelled is not None:
        for labels in classification.read_tasks(labelled, "test"):
            yield DataSet(labels.all_texts, partial(accuracy, labels))


def similarity_score(task: sts.SimilarityTask, vectors: np.ndarray) -> Score:
    """Spearman's correlation, without the interval of its own that would take longer than all else."""
    items = {"gold": task.pairs.scores.tolist(), "similarity": sts.cosines_of_halves(vectors).tolist()}
    value = float(spearman(*items.values())(np.ones((1, len(items["gold"]))))[0])
    return Score(task.name, task.split, "model", "spearman", value, n=len(items["gold"]), items=items)


def accuracy(task: classification.ClassificationTask, vectors: np.ndarray) -> Score:
    features = classification.fixed_features(task, vectors)
    return classification.score(task, "test", "model", classification.classify(task, "test", features, [0]))[0]


def compare_dtypes(model: Path, dtypes: Sequence[str], data_sets: Sequence[DataSet]) -> Iterator[dict[str, Any]]:
    """A row for each data set in each dtype, on the CPU."""
    exact: list[tuple[np.ndarray, Score]] = []
    for dtype in (EXACT, *dtypes):
        encoder = Encoder.from_pretrained(model, dtype=dtype, device="cpu")
        for place, data_set in enumerate(data_sets):
            vectors = encoder.encode(data_set.texts)
            score = data_set.score(vectors)
            if dtype == EXACT:
                exact.append((vectors, score))
                continue
            theirs, reference = exact[place]
            change = difference([reference], [score])
            plain, centred = cosines(vectors, theirs)
            yield {
                "dtype": encoder.compute_dtype.name,
                "data": f"{score.dataset} {score.split}",
                "metric": score.metric,
                "n": score.n,
                EXACT: reference.value,
                "difference": None if change is None else change._asdict(),
                "cosine": {"least": plain.min(), "median": np.median(plain)},
                "centred cosine": {"least": centred.min(), "median": np.median(centred)},
            }


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    cells = [("model", "dtype", "data", "", EXACT, "difference", "95 % interval", "cosine: least", "median", "centred")]
    for row in rows:
        value, low, high, _ = (row["difference"] or dict.fromkeys(range(4), float("nan"))).values()
        shown = (f"{value:+.4f}", f"{low:+.4f} to {high:+.4f}")
        near = (*row["cosine"].values(), row["centred cosine"]["least"])
        names = (row["model"], row["dtype"], row["data"], row["metric"], f"{row[EXACT]:.4f}")
        cells.append((*names, *shown, *(f"{cosine:.4f}" for cosine in near)))
    yield from aligned(cells)


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    data_sets = list(read_data_sets(arguments.sts, arguments.classification, arguments.splits))
    rows: list[dict[str, Any]] = []
    for name, model in arguments.models:
        for row in compare_dtypes(model, arguments.dtypes, data_sets):
            rows.append({"model": name} | row)
            print(*table(rows[-1:]), sep="\n", file=sys.stderr, flush=True)
    document = compose("dtype_quality", rows, machine=describe_machine("cpu"))
    write_document(arguments.output, document)
    print("\n".join(table(document["rows"])))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=named_file, nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "int8"], help="beside float32")
    parser.add_argument("--sts", type=Path, help="folder of text similarity")
    parser.add_argument("--classification", type=Path, help="folder of classification")
    parser.add_argument("--splits", nargs="+", choices=("dev", "test"), default=["dev", "test"], help="of similarity")
    parser.add_argument("--output", type=Path, required=True, help="JSON document, which is replaced")
    return parser


if __name__ == "__main__":
    sys.exit(main())
