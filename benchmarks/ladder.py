"""What each stage adds: a small Llama climbs a ladder of training runs, with several seeds, and every rung is scored.

    python -m bivec.benchmarks.ladder recipes/stories260k/ladder.yaml --model stories260K \
        --data texts=wiki.txt.gz pairs=nli.csv --sts STSB --runs runs --output ladder.json

The ladder is a YAML mapping of rungs; each has its recipe, the rung whose run it goes on from (without one, the
model), and the data it learns from, by the name that `--data` gives it; other fields override the recipe's:

    simcse: {after: mntp, recipe: simcse.yaml, data: texts}

Scored is the Spearman correlation on the STS benchmark, with a bootstrap interval and the paired difference from the
untrained model, bidirectional and causal; and with `--classification`, the accuracy of a logistic regression. The last
lines of `texts` are held out, and runs of the mntp stage report their loss on them before and after. A ladder that was
interrupted goes on where it stopped; one that is done is only scored.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from ..engine.config import BIDIRECTIONAL, CAUSAL, Window
from ..engine.encoder import Encoder
from ..evaluation import classification, sts
from ..evaluation.splits import Split
from ..evaluation.statistics import Statistic, estimate, paired_difference, spearman
from ..evaluation.tasks import fixed_features
from ..training import read_settings, train
from ..training.output import LOG
from .machine import describe_machine
from .texts import open_text
from .timing import report

HELD_OUT = 1000  # texts
UNTRAINED = {"causal": CAUSAL, "bidirectional": BIDIRECTIONAL}  # rows of every table, by their mask


class Rung(NamedTuple):
    """A training run of the ladder."""

    name: str
    stage: str
    recipe: Path
    after: str | None
    data: str
    fields: dict[str, Any]


def read_ladder(path: Path) -> list[Rung]:
    """The rungs of a ladder's file, each after the one it goes on from.

    Raises:
        ValueError: a rung is malformed, or comes after none above it.
    """
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(entries, dict):
        raise ValueError(f"{path} must be a mapping of rungs")
    rungs: list[Rung] = []
    for name, entry in entries.items():
        fields = dict(entry) if isinstance(entry, dict) else {}
        recipe, after, data = (fields.pop(key, None) for key in ("recipe", "after", "data"))
        if recipe is None or data is None:
            raise ValueError(f"{path}: {name} needs a recipe and data")
        if after is not None and after not in [rung.name for rung in rungs]:
            raise ValueError(f"{path}: {name} comes after {after!r}, which is not above it")
        stage = yaml.safe_load((path.parent / recipe).read_text(encoding="utf-8"))["stage"]
        rungs.append(Rung(name, stage, path.parent / recipe, after, data, fields))
    return rungs


def split_texts(path: Path, folder: Path) -> tuple[Path, Path]:
    """Training and held-out texts as files: the last `HELD_OUT` lines that are not blank are held out."""
    training, held_out = folder / "training.txt", folder / "held-out.txt"
    if not held_out.is_file():
        with open_text(path) as file:
            lines = [line for line in file if line.strip()]
        folder.mkdir(parents=True, exist_ok=True)
        training.write_text("".join(lines[:-HELD_OUT]), encoding="utf-8")
        held_out.write_text("".join(lines[-HELD_OUT:]), encoding="utf-8")
    return training, held_out


def named_file(argument: str) -> tuple[str, Path]:
    name, separator, path = argument.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"must be NAME=FILE, got {argument!r}")
    return name, Path(path)


def climb(rungs: list[Rung], arguments: argparse.Namespace, seed: int) -> None:
    """Train every rung of one seed that is not trained yet."""
    files = dict(arguments.data)
    held_out = None
    if "texts" in files:
        files["texts"], held_out = split_texts(files["texts"], arguments.runs)
    for rung in rungs:
        if rung.data not in files:
            raise ValueError(f"{rung.name} learns from {rung.data}: give --data {rung.data}=FILE")
        output = arguments.runs / f"seed-{seed}" / rung.name
        model = arguments.model if rung.after is None else output.parent / rung.after
        given = ["--recipe", rung.recipe, "--model", model, "--output", output, "--seed", seed]
        given += ["--data", files[rung.data]]
        if rung.stage == "mntp" and held_out is not None:
            given += ["--eval-data", held_out]
        for field, value in rung.fields.items():
            given += [f"--{field}", *(value if isinstance(value, list) else [value])]
        print(f"seed {seed}, {rung.name}", file=sys.stderr, flush=True)
        settings = read_settings(rung.stage, [str(part) for part in (*given, "--resume", "--device", "cpu")])
        print(train(settings), file=sys.stderr, flush=True)


class Scorer:
    """Scores an encoder on one split of the tasks that were named."""

    def __init__(self, sts_folder: Path, classification_folder: Path | None, split: Split):
        (self._pairs,) = sts.read_tasks(sts_folder, split)
        labelled = classification_folder and classification.read_tasks(classification_folder, split)
        self._labelled = labelled or []
        self._split = split
        self._untrained: dict[str, Statistic] = {}

    def __call__(self, name: str, model: Path, window: Window | None = None) -> dict[str, Any]:
        """The row of one model; those of `UNTRAINED` must come before all others."""
        encoder = Encoder.from_pretrained(model, dtype="float32", device="cpu", window=window)
        pairs = self._pairs.pairs
        vectors = encoder.encode([*pairs.first, *pairs.second])
        first, second = vectors[: len(pairs.first)], vectors[len(pairs.first) :]
        statistic = spearman(pairs.scores, sts.cosines(first, second))
        value, low, high = estimate(statistic, len(pairs.scores))
        row: dict[str, Any] = {"rung": name, "split": self._split, "spearman": value, "low": low, "high": high}
        if name in UNTRAINED:
            self._untrained[name] = statistic
        for base, before in self._untrained.items():
            difference = paired_difference(before, statistic, len(pairs.scores))
            row |= {f"over_{base}": difference.value, f"over_{base}_low": difference.low}
        for task in self._labelled:
            features = encoder.encode(task.texts).astype(np.float64)
            outcome = classification.classify(task, self._split, partial(fixed_features, features), [0])
            row[task.name] = classification.score(task, self._split, name, outcome).value
        return row


def held_out_losses(run: Path) -> dict[str, float]:
    """The held-out loss of a run before its first step and after its last."""
    with (run / LOG).open(encoding="utf-8") as file:
        losses = [entry["eval_loss"] for entry in map(json.loads, file) if "eval_loss" in entry]
    return {"before": losses[0], "after": losses[-1]} if losses else {}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ladder", type=Path, help="YAML file of the rungs")
    parser.add_argument("--model", type=Path, required=True, help="folder of the base that all stand on")
    parser.add_argument(
        "--data",
        type=named_file,
        nargs="+",
        required=True,
        metavar="NAME=FILE",
        help="what the rungs learn from; texts is a text a line and may end in .gz",
    )
    parser.add_argument("--sts", type=Path, required=True, help="folder of the STS benchmark")
    parser.add_argument("--classification", type=Path, help="folder of labelled texts")
    parser.add_argument("--split", choices=("dev", "test"), default="dev", help="what is scored; choose on dev")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs, which are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, help="also write the JSON document to this file")
    arguments = parser.parse_args(argv)
    rungs = read_ladder(arguments.ladder)
    scorer = Scorer(arguments.sts, arguments.classification, arguments.split)
    rows = [scorer(name, arguments.model, window) for name, window in UNTRAINED.items()]
    losses: dict[str, dict[str, Any]] = {}
    for seed in arguments.seeds:
        climb(rungs, arguments, seed)
        folder = arguments.runs / f"seed-{seed}"
        rows += [{"seed": seed} | scorer(rung.name, folder / rung.name) for rung in rungs]
        losses[str(seed)] = {rung.name: held_out_losses(folder / rung.name) for rung in rungs if rung.stage == "mntp"}
    machine = describe_machine("cpu")
    report("ladder", rows, machine=machine, output=arguments.output, held_out_losses=losses)
    return 0


if __name__ == "__main__":
    sys.exit(main())
