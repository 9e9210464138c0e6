"""Two reports of one task side by side: what changed, by how much, and whether that is more than chance."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .extras import needed
from .report import Report, Score, aligned, difference_cells, interval, number
from .statistics import Difference
from .summary import difference, parts_of


class Row(NamedTuple):
    """One figure of both reports; the difference is second minus first, where items can be paired."""

    scores: tuple[Score, Score]
    difference: Difference | None

    @property
    def known(self) -> Score:
        """Either score: dataset, metric and the like are the same in both."""
        return self.scores[0]


class Comparison(NamedTuple):
    """The figures that both reports have, and the names of those that only the first has, or the second."""

    rows: list[Row]
    alone: tuple[list[str], list[str]]


def compare(first: Report, second: Report) -> Comparison:
    """Every figure of both; raises ValueError where the two cannot be compared, or have none in common."""
    if first.task != second.task:
        raise ValueError(f"both reports must be of one task, got {first.task} and {second.task}")
    for name in first.data.keys() & second.data.keys():
        if first.data[name] != second.data[name]:
            raise ValueError(f"both reports must be of the same texts, but those of {name} differ")
    ours, theirs = ({score.key: score for score in report.scores} for report in (first, second))
    if not ours.keys() & theirs.keys():
        here, there = (", ".join(report.data) or "none" for report in (first, second))
        raise ValueError(f"both reports must have figures in common, got the data sets {here} and {there}")
    rows = [
        Row((score, theirs[key]), _difference((score, theirs[key]), (ours, theirs)))
        for key, score in ours.items()
        if key in theirs
    ]
    return Comparison(rows, (_alone(first, second, theirs), _alone(second, first, ours)))


def table(comparison: Comparison, names: tuple[str, str]) -> Iterator[str]:
    """Lines: both values with their 95 % intervals, the difference with its own, and its p-value; what is left out."""
    cells: list[tuple[str, ...]] = [
        ("", "n", names[0], "95 % interval", names[1], "95 % interval", "difference", "95 % interval", "p")
    ]
    for row in comparison.rows:
        values = [cell for score in row.scores for cell in (number(score.value), interval(score))]
        count = "" if row.known.n is None else f"{row.known.n:,}"
        cells.append((f"{_subject(row)} {row.known.what}", count, *values, *difference_cells(row.difference)))
    yield from aligned(cells)
    for name, alone in zip(names, comparison.alone, strict=True):
        if alone:
            yield f"only in {name}: {', '.join(alone)}"


def draw(rows: list[Row], names: tuple[str, str], path: Path) -> bytes:
    """A picture of the rows: lines over layers, and points with their intervals for the rest.

    Args:
        path: its suffix names the format.
    Raises:
        ValueError: matplotlib is absent or does not know the format.
    """
    figure_module = needed("matplotlib.figure", "matplotlib", "the picture")  # no pyplot: it would look for a display
    # a panel a metric: a perplexity would flatten every share
    panels: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        panels.setdefault((row.known.metric, row.known.layer is None), []).append(row)
    figure = figure_module.Figure(figsize=(8, 1 + 2.2 * len(panels)), layout="constrained")
    for axis, ((metric, is_of_no_layer), its_rows) in zip(
        figure.subplots(len(panels), 1, squeeze=False).flat, panels.items(), strict=True
    ):
        axis.set_title(metric)
        draw_panel = _draw_points if is_of_no_layer else _draw_lines
        draw_panel(axis, its_rows, names)
        axis.legend()
    picture = io.BytesIO()
    try:
        figure.savefig(picture, format=path.suffix.removeprefix(".") or "png", dpi=150)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return picture.getvalue()


# how .png, .svg and .pdf files begin
_PICTURES = (b"\x89PNG", b"<?xml", b"%PDF")


def is_picture(path: Path) -> bool:
    """Whether a file may be what `draw` made."""
    with path.open("rb") as file:
        return file.read(5).startswith(_PICTURES)


def _draw_lines(axis: Any, rows: list[Row], names: tuple[str, str]) -> None:
    lines: dict[tuple, list[Row]] = {}
    for row in rows:
        lines.setdefault(replace(row.known, layer=None).key, []).append(row)
    for its_rows in lines.values():
        for place, name in enumerate(names):
            scores = [row.scores[place] for row in its_rows]
            label = name if its_rows[0] is rows[0] else None  # a model's lines share its colour
            values = [score.value for score in scores]
            axis.plot([score.layer for score in scores], values, marker=".", color=f"C{place}", label=label)
    axis.set_xlabel("layer")


def _draw_points(axis: Any, rows: list[Row], names: tuple[str, str]) -> None:
    for place, name in enumerate(names):
        scores = [row.scores[place] for row in rows]
        values = np.array([score.value for score in scores])
        bounds = np.array([[score.low, score.high] for score in scores], dtype=float)  # None is nan
        errors = np.abs(bounds.T - values)
        heights = np.arange(len(rows)) + 0.2 * place
        axis.errorbar(values, heights, xerr=errors, fmt="o", label=name)
    axis.set_yticks(range(len(rows)), [_subject(row) for row in rows])
    axis.invert_yaxis()


def _subject(row: Row) -> str:
    return _name(row.known)


def _name(score: Score) -> str:
    return f"{score.dataset} {score.split} {score.system}"


def _alone(report: Report, other: Report, theirs: dict[tuple, Score]) -> list[str]:
    """Data sets, and figures of common ones, that `report` has and `other`, whose scores by key are `theirs`, not."""
    names = [
        score.dataset if score.dataset in report.data and score.dataset not in other.data else _name(score)
        for score in report.scores
        if score.key not in theirs
    ]
    return list(dict.fromkeys(names))


def _difference(scores: tuple[Score, Score], of_reports: tuple[dict, dict]) -> Difference | None:
    """Paired where both have the same items; the scores of a baseline are the same twice."""
    first, second = (parts_of(score, known) for score, known in zip(scores, of_reports, strict=True))
    if [part.key for part in first] != [part.key for part in second]:
        return None  # means of different sets
    if all(ours.items == theirs.items for ours, theirs in zip(first, second, strict=True)):
        return None
    return difference(first, second)
