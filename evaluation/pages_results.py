"""Results of several models, tasks and runs, as one set of figures under names."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from .pages_figures import Figure
from .report import MODEL_NAMES, Report, Score, dtype_labels, fingerprint
from .summary import parts_of


class Result(NamedTuple):
    """One file, under its model's name."""

    name: str
    path: Path
    report: Report


class Subject(NamedTuple):
    """What figures are of that may stand in one column.

    Attributes:
        data: tells data sets of one name apart; empty where all results have the same.
    """

    task: str
    dataset: str
    data: str
    split: str
    metric: str
    probe: str | None
    read_out: str | None

    @property
    def data_name(self) -> str:
        """The data set, its split, and which data it is where another has its name."""
        split = "" if self.split == "all" else self.split
        return " ".join(part for part in (self.dataset, split, self.data and f"({self.data})") if part)


class Place(NamedTuple):
    """Whose figure it is: the model's own or a control's beside it, and of which layer.

    Attributes:
        variant: what tells the rows of one model apart, in tables that have several.
    """

    name: str
    system: str
    layer: int | None
    variant: str = ""

    @property
    def line(self) -> "Place":
        """All layers of it."""
        return self._replace(layer=None)


@dataclass(frozen=True)
class Findings:
    """All figures of all results.

    Attributes:
        names: of the models, in the order given.
        results: the files.
        figures: `figures[subject][place]`.
        unlike_data: names of data sets that are not the same in all results.
    """

    names: list[str]
    results: list[Result]
    figures: dict[Subject, dict[Place, Figure]]
    unlike_data: list[str]

    @cached_property
    def last_layers(self) -> dict[tuple[str, str], int]:
        """The last layer of which there are figures, by the model's name and the task."""
        last: dict[tuple[str, str], int] = {}
        for subject, places in self.figures.items():
            for place in places:
                if place.layer is not None:
                    key = place.name, subject.task
                    last[key] = max(place.layer, last.get(key, 0))
        return last


def read_results(arguments: Sequence[str]) -> list[Result]:
    """The files of `NAME=FILE` or `FILE`; a file without a name is called as `_implied_names` says.

    Raises:
        ValueError: a file is no result, or stands there twice.
        FileNotFoundError: a file does not exist.
    """
    given: list[tuple[str | None, Path]] = []
    for argument in arguments:
        name, equals, file = argument.partition("=")
        named = bool(equals and name) and not Path(argument).exists()
        given.append((name, Path(file)) if named else (None, Path(argument)))
    seen: dict[Path, Path] = {}
    for _, path in given:
        if (other := seen.setdefault(path.resolve(), path)) is not path:
            raise ValueError(f"{path} is given twice" + ("" if str(other) == str(path) else f", also as {other}"))
    reports = [Report.read(path) for _, path in given]
    unnamed = [index for index, (name, _) in enumerate(given) if name is None]
    implied = _implied_names([given[index][1] for index in unnamed], [reports[index] for index in unnamed])
    names = dict(zip(unnamed, implied, strict=True))
    return [
        Result(names[index] if name is None else name, path, report)
        for index, ((name, path), report) in enumerate(zip(given, reports, strict=True))
    ]


def gather(results: Sequence[Result]) -> Findings:
    """The results' figures; raises ValueError where one name's results of a task cannot be runs of one evaluation."""
    unlike = _unlike_data(results)
    figures: dict[Subject, dict[Place, Figure]] = defaultdict(dict)
    origin: dict[tuple[Subject, Place], Result] = {}
    for result in results:
        by_key = {score.key: score for score in result.report.scores}
        for score in result.report.scores:
            data = _data_of(result.report, score.dataset)
            subject = Subject(
                result.report.task,
                score.dataset,
                data[:8] if (result.report.task, score.dataset) in unlike else "",
                score.split,
                score.metric,
                score.probe,
                score.read_out,
            )
            place = Place(result.name, score.system, score.layer)
            if (subject, place) in origin:
                _check_runs(origin[subject, place], result, score)
            origin[subject, place] = result
            figure = figures[subject].setdefault(place, Figure([], []))
            figure.runs.append(score)
            figure.parts.append(parts_of(score, by_key))
    names = list(dict.fromkeys(result.name for result in results))
    return Findings(names, list(results), figures, sorted({dataset for _, dataset in unlike}))


def _implied_names(paths: Sequence[Path], reports: Sequence[Report]) -> list[str]:
    """The files' stems; the folder's name of a file that is named for its task, as `base/ner.json`.

    Results of one model in several dtypes have these behind their names. Files of one name are one model's if its
    description is the same and no task stands twice; else they are told apart by the folder before.
    """
    labels = dtype_labels(reports)
    parts = []
    for path, report in zip(paths, reports, strict=True):
        whole = path.resolve().with_suffix("").parts[1:]
        parts.append(whole[:-1] if path.stem == report.task and len(whole) > 1 else whole)
    depths = [1] * len(parts)
    while True:
        names = ["/".join(whole[-depth:]) + label for whole, depth, label in zip(parts, depths, labels, strict=True)]
        groups: dict[str, list[int]] = defaultdict(list)
        for index, name in enumerate(names):
            groups[name].append(index)
        clashing = [
            index
            for group in groups.values()
            if len({fingerprint(_identity(reports[index])) for index in group}) > 1
            or len({reports[index].task for index in group}) < len(group)
            for index in group
            if depths[index] < len(parts[index])
        ]
        if not clashing:
            return names
        for index in clashing:
            depths[index] += 1


def _identity(report: Report) -> Iterator[str]:
    return (str(report.model.get(name)) for name in (*MODEL_NAMES, "dtype"))


def _data_of(report: Report, dataset: str) -> str:
    """The fingerprint of the data that a score is of, by the longest name that its own begins with; else of all."""
    names = [name for name in report.data if dataset == name or dataset.startswith(f"{name} ")]
    return report.data[max(names, key=len)] if names else fingerprint(sorted(report.data.items()))


def _unlike_data(results: Sequence[Result]) -> set[tuple[str, str]]:
    """Tasks and data sets that have several fingerprints."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for _, _, report in results:
        for dataset in {score.dataset for score in report.scores}:
            found[report.task, dataset].add(_data_of(report, dataset))
    return {key for key, fingerprints in found.items() if len(fingerprints) > 1}


def _check_runs(first: Result, second: Result, score: Score) -> None:
    """Whether two results under one name are runs of one evaluation, that differ in the model's training alone."""
    if first is second:
        raise ValueError(f"{first.path} has two figures of {score.dataset} {score.split} {score.system} {score.what}")
    ours, theirs = first.report.settings, second.report.settings
    for what in [*ours, *(what for what in theirs if what not in ours)]:
        if what != "bivec" and ours.get(what) != theirs.get(what):
            raise ValueError(
                f"{first.path} and {second.path}, both named {first.name!r}, are no runs of one evaluation: {what} is "
                f"{ours.get(what)!r} and {theirs.get(what)!r}; give them names of their own"
            )
