"""What each stage adds: a small Llama climbs a ladder of training runs, with several seeds, and every rung is scored.

    python -m bivec.benchmarks.ladder recipes/stories260k/ladder.yaml --model stories260K \
        --data texts=wiki.txt.gz pairs=nli.csv --runs runs --seeds 1 2 \
        --evaluate sts=stsb classification=senteval-cls words=word-sim pos=ud-ewt probing=semantic-probing \
        --split dev --output ladder.json --report tables.html

The ladder is a YAML mapping of rungs; each has its recipe, the rung whose run it goes on from (without one, the
model), and the data it learns from, by the name that `--data` gives it; other fields override the recipe's:

    simcse: {after: mntp, recipe: simcse.yaml, data: texts}

Every rung, and the untrained model under both masks, goes through the evaluations of `bivec evaluate` (see
`ladder_evaluation`). The document has each figure with its interval and its paired differences (see `ladder_scores`),
the report is what `bivec evaluate report` makes of all results. The last lines of `texts` are held out, and runs of the
mntp stage report their loss on them before and after.

A ladder that was interrupted goes on where it stopped; of one that is done, only what has changed is scored again.
Processes with other `--seeds` may climb in the same `--runs` at a time.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml

from ..engine.checkpoints import resolve
from ..engine.fingerprint import fingerprint
from ..engine.outputs import AtomicFile, open_output
from ..engine.run_folder import RUN_FILE
from ..evaluation import pages, pages_results
from ..evaluation.report import Report
from ..evaluation.states import Layers
from ..training import TrainingSettings, checkpoint, read_settings, train
from ..training.output import LOG
from .ladder_evaluation import read_evaluations, score, seconds_of
from .ladder_scores import UNTRAINED, Figures, table
from .ladder_scores import rows as figure_rows
from .machine import describe_machine
from .texts import open_text
from .timing import compose, write_document

HELD_OUT = 1000  # texts

Reports = dict[
    str, dict[int | None, dict[str, Path]]
]  # files, by rung, seed (the untrained model's is None), evaluation


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


def chosen(rungs: list[Rung], names: Sequence[str] | None) -> list[Rung]:
    """The rungs of these names and those that they stand on, in the ladder's order; all where none is named."""
    if names is None:
        return rungs
    wanted = set(names)
    if unknown := wanted - {rung.name for rung in rungs}:
        raise ValueError(f"--rungs must be of the ladder's, got {', '.join(sorted(unknown))}")
    for rung in reversed(rungs):  # each after the one it stands on
        if rung.name in wanted and rung.after is not None:
            wanted.add(rung.after)
    return [rung for rung in rungs if rung.name in wanted]


def compared(rungs: list[Rung]) -> dict[str, list[str]]:
    """Which rungs each one's differences are to, the one that it stands on first."""
    causal, bidirectional = UNTRAINED
    found = {causal: [], bidirectional: [causal]}
    for rung in rungs:
        siblings = [other.name for other in rungs if other.recipe == rung.recipe and other is not rung]
        below = [] if rung.after is None else [rung.after]
        found[rung.name] = list(dict.fromkeys([*below, bidirectional, causal, *siblings]))
    return found


def split_texts(path: Path, folder: Path) -> tuple[Path, Path]:
    """Training and held-out texts as files: the last `HELD_OUT` lines that are not blank are held out."""
    training, held_out = folder / "training.txt", folder / "held-out.txt"
    folder.mkdir(parents=True, exist_ok=True)
    lock = AtomicFile(folder / ".held-out.txt.partial", wait=True)
    try:
        if not held_out.is_file():
            with open_text(path) as file:
                lines = [line for line in file if line.strip()]
            training.write_text("".join(lines[:-HELD_OUT]), encoding="utf-8")
            lock.handle.write("".join(lines[-HELD_OUT:]).encode())
            lock.finish()
            lock.publish(held_out)
    finally:
        lock.abort()
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
        output = arguments.runs / f"seed-{seed}" / rung.name
        model = arguments.model if rung.after is None else output.parent / rung.after
        given = ["--recipe", rung.recipe, "--model", model, "--output", output, "--seed", seed]
        given += ["--data", files[rung.data]]
        if rung.stage == "mntp" and held_out is not None:
            given += ["--eval-data", held_out]
        for field, value in rung.fields.items():
            given += [f"--{field}", *(value if isinstance(value, list) else [value])]
        settings = read_settings(rung.stage, [str(part) for part in (*given, "--resume", "--device", "cpu")])
        if not is_trained(settings):
            print(f"seed {seed}, {rung.name}", file=sys.stderr, flush=True)
            print(train(settings), file=sys.stderr, flush=True)


def is_trained(settings: TrainingSettings) -> bool:
    """Whether a run of these settings is finished; as far as a checkpoint tells, on the same model's files."""
    output = Path(settings.output)
    if not (output / RUN_FILE).is_file():
        return False
    with (output / LOG).open(encoding="utf-8") as file:
        before = json.loads(file.readline())["settings"]
    saved = checkpoint.newest(output)
    same_model = saved is None or saved.state["model"] == fingerprint(resolve(settings.model))
    return same_model and before == json.loads(json.dumps(settings.shaping_the_result()))


def held_out_losses(run: Path) -> dict[str, float]:
    """The held-out loss of a run before its first step and after its last."""
    with (run / LOG).open(encoding="utf-8") as file:
        losses = [entry["eval_loss"] for entry in map(json.loads, file) if "eval_loss" in entry]
    return {"before": losses[0], "after": losses[-1]} if losses else {}


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    rungs = chosen(read_ladder(arguments.ladder), arguments.rungs)
    scored = [rung.name for rung in rungs if arguments.rungs is None or rung.name in arguments.rungs]
    if arguments.report is not None:
        pages.check_name(arguments.report)
    files = dict(arguments.data)
    for rung in rungs:
        if rung.data not in files:
            raise ValueError(f"{rung.name} learns from {rung.data}: give --data {rung.data}=FILE")
    evaluations = read_evaluations(arguments.evaluate, arguments.split, arguments.layers)
    results = arguments.runs / "results" / arguments.split
    reports: Reports = {name: {} for name in (*UNTRAINED, *scored)}
    for name, window in UNTRAINED.items():
        reports[name][None] = score(arguments.model, window, results / name, evaluations)
    losses: dict[str, dict[str, Any]] = {}
    for seed in arguments.seeds:
        climb(rungs, arguments, seed)
        folder = arguments.runs / f"seed-{seed}"
        for name in scored:
            reports[name][seed] = score(folder / name, None, results / folder.name / name, evaluations)
        losses[str(seed)] = {rung.name: held_out_losses(folder / rung.name) for rung in rungs if rung.stage == "mntp"}

    rows = []
    others = compared(rungs)
    for name in (evaluation.name for evaluation in evaluations):
        figures = {
            rung: {seed: Figures(Report.read(its_reports[name])) for seed, its_reports in runs.items()}
            for rung, runs in reports.items()
        }
        rows += [{"evaluation": name} | row for row in figure_rows(figures, others)]
    document = compose(
        "ladder",
        rows,
        machine=describe_machine("cpu"),
        held_out_losses=losses,
        rungs={rung.name: _description(rung) for rung in rungs},
        evaluations=list(_evaluations(reports)),
    )
    write_document(arguments.output, document)
    if arguments.report is not None:
        _write_report(arguments.report, reports)
    stands_on = {name: names[0] for name, names in others.items() if names}
    for name in dict.fromkeys(row["evaluation"] for row in rows):
        print(f"\n{name}", end="")
        print("\n".join(table([row for row in document["rows"] if row["evaluation"] == name], stands_on)))
    return 0


def _parser() -> argparse.ArgumentParser:
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
    parser.add_argument(
        "--evaluate",
        type=named_file,
        nargs="+",
        required=True,
        metavar="TASK=DATA",
        help="what every rung is scored on: a task of bivec evaluate and its data",
    )
    parser.add_argument("--split", choices=("dev", "test"), default="dev", help="what is scored; choose on dev")
    parser.add_argument("--layers", choices=get_args(Layers), default="last", help="of tasks on words")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs and results, which are kept")
    parser.add_argument("--rungs", nargs="+", metavar="RUNG", help="score these alone; what they stand on is trained")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, required=True, help="JSON document of all figures, which is replaced")
    parser.add_argument("--report", type=Path, help="also tables and pictures of all results: a .html or .md")
    return parser


def _write_report(output: Path, reports: Reports) -> None:
    """Tables and pictures of all results; a rung's seeds are runs of one model."""
    results = [
        pages_results.Result(rung, path, Report.read(path))
        for rung, runs in reports.items()
        for its_reports in runs.values()
        for path in its_reports.values()
    ]
    with open_output(output, [result.path for result in results], overwrite=True, is_own=pages.is_page) as publish:
        publish(pages.render(results, output).encode())


def _description(rung: Rung) -> dict[str, Any]:
    recipe = f"{rung.recipe.parent.name}/{rung.recipe.name}"
    return {"stage": rung.stage, "recipe": recipe, "after": rung.after, "data": rung.data} | rung.fields


def _evaluations(reports: Reports) -> Iterator[dict[str, Any]]:
    """What was scored, and how long that took."""
    for rung, runs in reports.items():
        for seed, its_reports in runs.items():
            for name, path in its_reports.items():
                yield {"rung": rung, "seed": seed, "evaluation": name, "seconds": seconds_of(path)}


if __name__ == "__main__":
    sys.exit(main())
