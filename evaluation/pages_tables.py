"""The tables and pictures of figures that stand together: what is beside them, and what may be called best.

A model's row has the figures of its last layer. Apart from these rows stand the embeddings (layer 0, which know no
context) and the controls. More than these two layers have tables of their own, and pictures over layers.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .pages_document import Cell, Column, Panel, Part, Pictures, Row, Section, Series, Table
from .pages_figures import Figure, difference, lead, seeds_of
from .pages_layout import Grid, arranged, caption_of, name_of, position_of, spot_of
from .pages_results import Findings, Place, Subject
from .report import difference_cells, number
from .statistics import Difference

_WITH_MEAN = ("sts", "classification")
_HIGHER_IS_BETTER = {"accuracy", "f1", "spearman", "pearson"}


def sections(findings: Findings) -> Iterator[Section]:
    """All figures."""
    for title, grids in arranged(findings).items():
        yield Section(title, [Part(name, list(_blocks(findings, grid))) for name, grid in grids.items()])


def _blocks(findings: Findings, grid: Grid) -> Iterator[Table | Pictures]:
    headline = _Headline(findings, grid)
    yield headline.table()
    yield from headline.differences()
    yield from headline.leads()
    yield from headline.breakdowns()
    layers: dict[str, set[int]] = {}
    for place in (place for places in grid.values() for place in places):
        if place.layer is not None:
            layers.setdefault(place.name, set()).add(place.layer)
    has_curves = any(len(its) > 2 for its in layers.values())  # the last layers of two models make none
    if all(map(position_of, grid)):
        yield Pictures(headline.over_positions())
    elif not has_curves:
        yield Pictures(headline.panels())
    if has_curves:
        yield Pictures([_over_layers(findings, subject, places) for subject, places in grid.items()])
        for subject, places in grid.items():
            yield _layer_table(findings, subject, places)


class _Key(NamedTuple):
    """Whose row of the first table it is."""

    name: str
    system: str
    is_embeddings: bool
    variant: str

    @property
    def is_apart(self) -> bool:
        return self.system != "model" or self.is_embeddings

    @property
    def what(self) -> list[str]:
        """What the row is beside the model's own."""
        parts = [self.system] * (self.system != "model") + ["layer 0 (embeddings)"] * self.is_embeddings
        return parts + [self.variant] * bool(self.variant)


class _Headline:
    """The figures of the last layers, and of the embeddings and controls, as rows by their labels."""

    def __init__(self, findings: Findings, grid: Grid):
        self._names = findings.names
        self._subjects = list(grid)
        found: dict[_Key, dict[Subject, Figure]] = {}
        for subject, places in grid.items():
            for place, figure in places.items():
                last = findings.last_layers.get((place.name, subject.task))
                if place.layer in (None, 0, last):
                    key = _Key(place.name, place.system, place.layer == 0 and last != 0, place.variant)
                    found.setdefault(key, {})[subject] = figure
        self._found = found
        self._rows = self._labelled(found)

    def _labelled(self, found: dict[_Key, dict[Subject, Figure]]) -> dict[str, tuple[_Key, dict[Subject, Figure]]]:
        """Models first, then what is apart: one row where it is the same beside every model."""
        kinds: dict[tuple[str, ...], list[_Key]] = {}
        for key in sorted(found, key=lambda key: (key.is_apart, key.system != "model", self._names.index(key.name))):
            kinds.setdefault(tuple(key.what) if key.is_apart else (), []).append(key)
        rows: dict[str, tuple[_Key, dict[Subject, Figure]]] = {}
        for what, keys in kinds.items():
            if what and (merged := _merged([found[key] for key in keys])) is not None:
                rows[", ".join(what)] = keys[0], merged
                continue
            rows |= {", ".join((key.name, *key.what)): (key, found[key]) for key in keys}
        return rows

    @property
    def _models(self) -> dict[str, dict[Subject, Figure]]:
        return {label: figures for label, (key, figures) in self._rows.items() if not key.is_apart}

    def table(self) -> Table:
        best = {subject: self._best(subject) for subject in self._subjects}
        columns = [self._counted(subject) for subject in self._subjects]
        rows = []
        for label, (key, figures) in self._rows.items():
            cells = [_cell(figures.get(subject), is_best=best[subject] == label) for subject in self._subjects]
            rows.append(Row(label, cells, key.is_apart))
        if self._needs_mean():
            columns.append(Column("", "mean"))
            for row, (_, figures) in zip(rows, self._rows.values(), strict=True):
                row.cells.append(_mean([figures.get(subject) for subject in self._subjects]))
        return Table("", "model", columns, rows)

    def _needs_mean(self) -> bool:
        """Whether there are several data sets, and no result that has their mean."""
        has_mean = any(figure.is_mean for _, figures in self._rows.values() for figure in figures.values())
        return len(self._subjects) > 1 and self._subjects[0].task in _WITH_MEAN and not has_mean

    def differences(self) -> Iterator[Table]:
        """Each further model less the first, where anything can be paired."""
        (first, ours), *others = self._models.items() or [("", {})]
        rows = [
            Row(label, [_difference(difference(ours.get(subject), theirs.get(subject))) for subject in self._subjects])
            for label, theirs in others
        ]
        yield from self._compared(f"difference to {first}", rows)

    def leads(self) -> Iterator[Table]:
        """Each model less its baselines, where the results say how far it is ahead."""
        rows = []
        for key, controls in self._found.items():
            ours = self._found.get(key._replace(system="model"), {})
            cells = [_difference(lead(controls.get(subject), ours.get(subject))) for subject in self._subjects]
            if any(cell.text for cell in cells):
                rows.append(Row(f"{key.name} over {key.system}", cells))
        yield from self._compared("lead over the baselines", rows)

    def _compared(self, title: str, rows: list[Row]) -> Iterator[Table]:
        if any(cell.text for row in rows for cell in row.cells):
            yield Table(title, "model", [spot_of(subject).column for subject in self._subjects], rows)

    def breakdowns(self) -> Iterator[Table]:
        """Of what a figure is the mean, where the results say so: a correlation of each dimension, say."""
        for subject in self._subjects:
            found: dict[str, dict[str, dict[str, Any]]] = {}
            for label, (_, figures) in self._rows.items():
                details = figures[subject].runs[0].details if subject in figures and figures[subject].is_of_one else {}
                for what, parts in details.items():
                    if what.startswith(f"{subject.metric} of each ") and isinstance(parts, dict):
                        found.setdefault(what, {})[label] = parts
            for what, each in found.items():
                heads = list(dict.fromkeys(head for parts in each.values() for head in parts))
                rows = [Row(label, [_plain_cell(parts.get(head)) for head in heads]) for label, parts in each.items()]
                title = f"{caption_of(subject)}: {what}"
                yield Table(title, "model", [Column("", head) for head in heads], rows, is_detail=True)

    def panels(self) -> list[Panel]:
        """A point a row."""
        panels = []
        for subject in self._subjects:
            series = self._series({subject: 0.0})
            panels.append(Panel(name_of(subject), caption_of(subject), subject.metric, "", series))
        return panels

    def over_positions(self) -> list[Panel]:
        """A line a row over the positions of a text from which the same is read."""
        groups: dict[Subject, dict[Subject, float]] = {}
        for subject in self._subjects:
            if (found := position_of(subject)) is not None:
                groups.setdefault(found[0], {})[subject] = float(found[1])
        return [
            Panel(f"{of.dataset}: {spot_of(subject).title}", of.data_name, of.metric, "position", self._series(places))
            for of, places in groups.items()
            for subject in list(places)[:1]
        ]

    def _series(self, places: dict[Subject, float]) -> list[Series]:
        series = []
        for label, (key, figures) in self._rows.items():
            points = [(x, figures[subject]) for subject, x in places.items() if subject in figures]
            if points:
                color = None if key.is_apart else self._names.index(key.name)
                series.append(Series(label, color, key.is_apart, sorted(points, key=lambda point: point[0])))
        return series

    def _best(self, subject: Subject) -> str | None:
        """The model with the highest figure, if its paired difference to the second's excludes zero."""
        if not _HIGHER_IS_BETTER & set(subject.metric.lower().split()):
            return None
        figures = {label: row[subject] for label, row in self._models.items() if subject in row}
        ranked = sorted(figures, key=lambda label: -figures[label].value)
        if len(ranked) < 2 or any(np.isnan(figure.value) for figure in figures.values()):
            return None
        found = difference(figures[ranked[1]], figures[ranked[0]])
        return ranked[0] if found is not None and found.low > 0 else None

    def _counted(self, subject: Subject) -> Column:
        """The column with how many items its figures are of."""
        rows = (figures[subject] for _, figures in self._rows.values() if subject in figures)
        counts = sorted({score.n for figure in rows for score in figure.runs if score.n is not None})
        column = spot_of(subject).column
        if not counts:
            return column
        several = f" to {counts[-1]:,}" if len(counts) > 1 else ""
        return column._replace(label=f"{column.label} (n = {counts[0]:,}{several})")


def _merged(rows: Sequence[dict[Subject, Figure]]) -> dict[Subject, Figure] | None:
    """One row of rows that have the same figures, as far as they have them; None where they differ."""
    merged: dict[Subject, Figure] = {}
    for row in rows:
        for subject, figure in row.items():
            if _cell(merged.setdefault(subject, figure)) != _cell(figure):
                return None
    return merged


def _over_layers(findings: Findings, subject: Subject, places: dict[Place, Figure]) -> Panel:
    series = []
    layers = [float(place.layer) for place in places if place.layer is not None]
    for line in sorted(dict.fromkeys(place.line for place in places), key=_rank_of(findings)):
        points = [
            (float(place.layer), places[place]) for place in places if place.line == line and place.layer is not None
        ]
        # what is of no layer is beside all
        points = sorted(points, key=lambda point: point[0]) or [
            (end, places[line]) for end in (min(layers), max(layers))
        ]
        label = ", ".join(
            part for part in (line.name, "" if line.system == "model" else line.system, line.variant) if part
        )
        series.append(Series(label, findings.names.index(line.name), line.system != "model", points))
    return Panel(name_of(subject), caption_of(subject), subject.metric, "layer", series)


def _layer_table(findings: Findings, subject: Subject, places: dict[Place, Figure]) -> Table:
    """A row a layer, a column a model or control."""
    lines = _lines(findings, places)
    layers = sorted({place.layer for place in places if place.layer is not None})
    rows = [Row(str(layer), [_cell(places.get(line._replace(layer=layer))) for line in lines]) for layer in layers]
    columns = [
        Column("" if line.system == "model" else line.system, ", ".join(filter(None, (line.name, line.variant))))
        for line in lines
    ]
    return Table(f"{caption_of(subject)}, by layer", "layer", columns, rows, is_detail=True)


def _lines(findings: Findings, places: dict[Place, Figure]) -> list[Place]:
    """What has figures by layer, without the layer, models first."""
    return sorted(dict.fromkeys(place.line for place in places if place.layer is not None), key=_rank_of(findings))


def _rank_of(findings: Findings) -> Callable[[Place], tuple]:
    return lambda place: (place.system != "model", place.system, findings.names.index(place.name))


def _cell(figure: Figure | None, *, is_best: bool = False) -> Cell:
    if figure is None:
        return Cell()
    small = [] if figure.interval is None else [" to ".join(map(number, figure.interval))]
    each = seeds_of(figure)
    if each:
        small.append(f"{len(each)} seeds {number(min(each))} to {number(max(each))}")
    if len(figure.runs) > 1:
        small.append(f"runs {', '.join(number(score.value) for score in figure.runs)}")
    return Cell(number(figure.value), tuple(small), is_best)


def _plain_cell(value: object) -> Cell:
    return Cell(number(value)) if isinstance(value, float) else Cell()


def _difference(found: Difference | None) -> Cell:
    value, interval, p_value = difference_cells(found)
    return Cell(value, (interval, f"p {p_value}") if value else ())


def _mean(figures: Sequence[Figure | None]) -> Cell:
    """Over all data sets; a gap where one is absent."""
    values = [figure.value for figure in figures if figure is not None]
    return Cell(number(float(np.mean(values)))) if len(values) == len(figures) else Cell()
