"""What each stage adds: a small Llama climbs MNTP, SimCSE and supervised training, with several seeds.

    python -m bivec.benchmarks.ladder --model stories260K --texts wiki.txt.gz --pairs nli.csv --sts STSB --runs runs \
        --output ladder.json

After each stage the Spearman correlation on STS-B's development set is taken, with a bootstrap interval and the paired
difference from the untrained model, bidirectional and causal. MNTP's held-out loss stands beside that of the same
adapter trained under the causal mask. A ladder that was interrupted goes on where it stopped.
"""

import argparse
import gzip
import sys
import time
from pathlib import Path
from typing import Any

from ..engine.config import CAUSAL, Window
from ..engine.encoder import Encoder
from ..evaluation.statistics import Difference, Statistic, estimate, paired_difference, spearman
from ..evaluation.sts import SimilarityTask, cosines, read_tasks
from ..training import read_settings, train
from .machine import describe_machine
from .timing import report

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "stories260k"
HELD_OUT = 1000  # texts


def split_texts(path: Path, folder: Path) -> tuple[Path, Path]:
    """Training and held-out texts as files: the last `HELD_OUT` lines that are not blank are held out."""
    training, held_out = folder / "training.txt", folder / "held-out.txt"
    if not held_out.is_file():
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            lines = [line for line in file if line.strip()]
        folder.mkdir(parents=True, exist_ok=True)
        training.write_text("".join(lines[:-HELD_OUT]), encoding="utf-8")
        held_out.write_text("".join(lines[-HELD_OUT:]), encoding="utf-8")
    return training, held_out


def run_stage(stage: str, output: Path, seed: int, *arguments: object) -> dict[str, float]:
    """Train a stage, or take its finished run; returns its held-out figures."""
    recipe = ["--recipe", RECIPES / f"{stage}.yaml", "--output", output, "--seed", seed, "--resume", "--device", "cpu"]
    summary = train(read_settings(stage, [str(argument) for argument in (*recipe, *arguments)]))
    print(summary, file=sys.stderr, flush=True)
    return summary.evaluation


def similarity(model: Path, task: SimilarityTask, window: Window | None = None) -> Statistic:
    encoder = Encoder.from_pretrained(model, dtype="float32", device="cpu", window=window)
    first, second = encoder.encode(task.pairs.first), encoder.encode(task.pairs.second)
    return spearman(task.pairs.scores, cosines(first, second))


def climb(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Every stage of one seed; its figures."""
    training, held_out = split_texts(arguments.texts, arguments.runs)
    folder = arguments.runs / f"seed-{seed}"
    texts = ("--data", training, "--eval-data", held_out)
    start = time.perf_counter()
    losses = {"mntp": run_stage("mntp", folder / "mntp", seed, "--model", arguments.model, *texts)}
    control = ("--model", arguments.model, "--mask-schedule", "causal", *texts)
    losses["mntp, causal mask"] = run_stage("mntp", folder / "mntp-causal", seed, *control)
    run_stage("simcse", folder / "simcse", seed, "--model", folder / "mntp", "--data", training)
    run_stage("supervised", folder / "supervised", seed, "--model", folder / "simcse", "--data", arguments.pairs)
    seconds = time.perf_counter() - start

    (task,) = read_tasks(arguments.sts, "dev")
    num_pairs = len(task.pairs.scores)
    untrained = {
        "causal": similarity(arguments.model, task, CAUSAL),
        "bidirectional": similarity(arguments.model, task),
    }
    cells = untrained | {f"+ {stage}": similarity(folder / stage, task) for stage in ("mntp", "simcse", "supervised")}
    rows = []
    for name, statistic in cells.items():
        value, low, high = estimate(statistic, num_pairs)
        row: dict[str, Any] = {"seed": seed, "cell": name, "spearman": value, "low": low, "high": high}
        for base in untrained:
            difference: Difference = paired_difference(untrained[base], statistic, num_pairs)
            row |= {f"over_{base}": difference.value, f"over_{base}_low": difference.low}
        rows.append(row)
    return {"rows": rows, "losses": losses, "seconds": seconds}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of stories260K")
    parser.add_argument("--texts", type=Path, required=True, help="a text a line, may end in .gz")
    parser.add_argument("--pairs", type=Path, required=True, help="rows of query, positive and negatives")
    parser.add_argument("--sts", type=Path, required=True, help="folder of the STS benchmark")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs, which are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, help="also write the JSON document to this file")
    arguments = parser.parse_args(argv)
    found = {seed: climb(arguments, seed) for seed in arguments.seeds}
    report(
        "ladder",
        [row for result in found.values() for row in result["rows"]],
        machine=describe_machine("cpu"),
        output=arguments.output,
        held_out={str(seed): result["losses"] for seed, result in found.items()},
        seconds={str(seed): result["seconds"] for seed, result in found.items()},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
