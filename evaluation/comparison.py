"""Two reports of one task side by side: what changed, by how much, and whether that is more than chance."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .extras import needed
from .report import Report, Score, aligned, interval, number, statistic_of
from .statistics import Difference, paired_difference


class Row(NamedTuple):
    """One figure in both reports, or in one; the difference is second minus first, where items can be paired."""

    scores: tuple[Score | None, Score | None]
    difference: Difference | None

    @property
    def known(self) -> Score:
        """The first score there is: dataset, metric and the like are the same in both."""
        return next(score for score in self.scores if score is not None)


def compare(first: Report, second: Report) -> list[Row]:
    """Every figure of either report; raises ValueError where the two cannot be compared."""
    if first.task != second.task:
        raise ValueError(f"both reports must be of one task, got {first.task} and {second.task}")
    for name in first.data.keys() & second.data.keys():
        if first.data[name] != second.data[name]:
            raise ValueError(f"both reports must be of the same texts, but those of {name} differ")
    ours, theirs = ({score.key: score for score in report.scores} for report in (first, second))
    rows = []
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        a, b = ours.get(key), theirs.get(key)
        rows.append(Row((a, b), _difference(a, b) if a is not None and b is not None else None))
    return rows


def table(rows: list[Row], names: tuple[str, str]) -> Iterator[str]:
    """Lines: both values with their 95 % intervals, the difference with its own, and its p-value."""
    cells: list[tuple[str, ...]] = [
        ("", names[0], "95 % interval", names[1], "95 % interval", "difference", "95 % interval", "p")
    ]
    for row in rows:
        values = [cell for score in row.scores for cell in _cells(score)]
        change = ["", "", ""]
        if row.difference is not None:
            value, low, high, p_value = row.difference
            change = [f"{value:+.4f}", f"{low:+.4f} to {high:+.4f}", f"{p_value:.4f}"]
        cells.append((f"{_subject(row)} {row.known.what}", *values, *change))
    yield from aligned(cells)


def draw(rows: list[Row], names: tuple[str, str], path: Path) -> bytes:
    """A picture of the rows: lines over layers, and points with their intervals for the rest.

    Args:
        path: its suffix names the format.
    Raises:
        ValueError: matplotlib is absent or does not know the format.
    """
    figure_module = needed("matplotlib.figure", "matplotlib", "the picture")  # no pyplot: it would look for a display
    # a panel a metric: a perplexity would flatten every share
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(row.known.metric, []).append(row)
    figure = figure_module.Figure(figsize=(8, 1 + 2.2 * len(panels)), layout="constrained")
    for axis, (metric, its_rows) in zip(
        figure.subplots(len(panels), 1, squeeze=False).flat, panels.items(), strict=True
    ):
        axis.set_title(metric)
        draw_panel = _draw_points if its_rows[0].known.layer is None else _draw_lines
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
    for place, name in enumerate(names):
        scores = [score for row in rows if (score := row.scores[place]) is not None]
        axis.plot([score.layer for score in scores], [score.value for score in scores], marker=".", label=name)
    axis.set_xlabel("layer")


def _draw_points(axis: Any, rows: list[Row], names: tuple[str, str]) -> None:
    for place, name in enumerate(names):
        found = [(height, score) for height, row in enumerate(rows) if (score := row.scores[place]) is not None]
        values = np.array([score.value for _, score in found])
        bounds = np.array([[score.low, score.high] for _, score in found], dtype=float).reshape(-1, 2)  # None is nan
        errors = np.abs(bounds.T - values)
        heights = [height + 0.2 * place for height, _ in found]
        axis.errorbar(values, heights, xerr=errors, fmt="o", label=name)
    axis.set_yticks(range(len(rows)), [_subject(row) for row in rows])
    axis.invert_yaxis()


def _subject(row: Row) -> str:
    return f"{row.known.dataset} {row.known.split} {row.known.system}"


def _cells(score: Score | None) -> tuple[str, str]:
    return ("", "") if score is None else (number(score.value), interval(score))


def _difference(first: Score, second: Score) -> Difference | None:
    """Paired where both have the same items; the scores of a baseline are the same twice."""
    if first.items == second.items or first.items.get("cluster") != second.items.get("cluster"):
        return None
    before, after = (statistic_of(score.metric, score.items) for score in (first, second))
    if before is None or after is None or before.num_items != after.num_items:
        return None
    return paired_difference(before.statistic, after.statistic, before.num_items)
