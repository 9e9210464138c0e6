"""The tables and pictures of a report: which figures stand in which, what stands beside them, what may be called best.

A model's row has the figures of its last layer. Apart from these rows stand the embeddings (layer 0, which know no
context) and the controls. More than these two layers have tables of their own, and pictures over layers.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .pages_document import Cell, Column, Panel, Part, Pictures, Row, Section, Series, Table
from .pages_figures import Figure, difference
from .pages_results import Findings, Place, Subject
from .report import number

# the first three stand in one table, as in LLM2Vec's Table 4
_TAGGING = {"chunking": "Chunking", "ner": "NER", "pos": "POS"}
_SECTIONS = dict.fromkeys(_TAGGING, "Chunking, named entities, parts of speech") | {
    "words": "Word similarity",
    "probing": "Semantic probing",
    "sts": "Text similarity",
    "classification": "Classification",
    "anisotropy": "Anisotropy",
    "generation": "Generation",
}
_READ_OUTS = {"token": "the token", "previous": "the position before", "both": "the token and the position before"}
_WITH_MEAN = ("words", "sts", "classification")
_HIGHER_IS_BETTER = {"accuracy", "f1", "spearman", "pearson"}


def sections(findings: Findings) -> Iterator[Section]:
    """All figures, a section a kind of task, a table a probe and read-out (and metric, where tables have one)."""
    kinds: dict[str, dict[str, list[Subject]]] = {}
    for subject in sorted(findings.figures, key=_rank):
        tables = kinds.setdefault(_SECTIONS.get(subject.task, subject.task), {})
        tables.setdefault(_title(subject), []).append(subject)
    for kind, tables in kinds.items():
        yield Section(kind, [Part(title, list(_blocks(findings, its))) for title, its in tables.items()])


def _rank(subject: Subject) -> int:
    """Tasks as `_SECTIONS` orders them, then those that it does not have; else the results' order stays."""
    return list(_SECTIONS).index(subject.task) if subject.task in _SECTIONS else len(_SECTIONS)


def _title(subject: Subject) -> str:
    parts = [] if subject.task in _TAGGING else [subject.metric]
    if subject.probe:
        parts.append(f"{subject.probe} probe")
    if subject.read_out:
        parts.append(f"read at {_READ_OUTS.get(subject.read_out, subject.read_out)}")
    return ", ".join(parts) or "figures"


def _column(subject: Subject) -> Column:
    if subject.task in _TAGGING:
        return Column(f"{_TAGGING[subject.task]}: {subject.data_name}", subject.metric)
    return Column("", subject.data_name)


def _panel_title(subject: Subject) -> str:
    column = _column(subject)
    return ", ".join(filter(None, (column.group, column.label, _title(subject))))


def _blocks(findings: Findings, subjects: Sequence[Subject]) -> Iterator[Table | Pictures]:
    headline = _Headline(findings, subjects)
    yield headline.table()
    if (differences := headline.differences()) is not None:
        yield differences
    layers = {place.layer for subject in subjects for place in findings.figures[subject]} - {None}
    if len(layers) <= 2:
        yield Pictures(headline.panels())
        return
    yield Pictures([_over_layers(findings, subject) for subject in subjects])
    for subject in subjects:
        yield _layer_table(findings, subject)


class _Key(NamedTuple):
    """Whose row of the first table it is."""

    name: str
    system: str
    is_embeddings: bool

    @property
    def is_apart(self) -> bool:
        return self.system != "model" or self.is_embeddings


class _Headline:
    """The figures of the last layers, and of the embeddings and controls, as rows by their labels."""

    def __init__(self, findings: Findings, subjects: Sequence[Subject]):
        self._names = findings.names
        self._subjects = subjects
        found: dict[_Key, dict[Subject, Figure]] = {}
        for subject in subjects:
            for place, figure in findings.figures[subject].items():
                last = findings.last_layer(place.name, subject.task)
                if place.layer in (None, 0, last):
                    key = _Key(place.name, place.system, place.layer == 0 and last != 0)
                    found.setdefault(key, {})[subject] = figure
        self._rows = self._labelled(found)

    def _labelled(self, found: dict[_Key, dict[Subject, Figure]]) -> dict[str, tuple[_Key, dict[Subject, Figure]]]:
        """Models first, then what is apart: one row where it is the same beside every model."""
        kinds: dict[tuple[str, bool], list[_Key]] = {}
        for key in sorted(found, key=lambda key: (key.is_apart, key.system != "model", self._names.index(key.name))):
            kinds.setdefault((key.system, key.is_embeddings), []).append(key)
        rows: dict[str, tuple[_Key, dict[Subject, Figure]]] = {}
        for (system, is_embeddings), keys in kinds.items():
            what = [system] * (system != "model") + ["layer 0 (embeddings)"] * is_embeddings
            if what and (merged := _merged([found[key] for key in keys])) is not None:
                rows[", ".join(what)] = keys[0], merged
                continue
            rows |= {", ".join((key.name, *what)): (key, found[key]) for key in keys}
        return rows

    @property
    def _models(self) -> dict[str, dict[Subject, Figure]]:
        return {label: figures for label, (key, figures) in self._rows.items() if not key.is_apart}

    def table(self) -> Table:
        best = {subject: self._best(subject) for subject in self._subjects}
        has_mean = len(self._subjects) > 1 and self._subjects[0].task in _WITH_MEAN
        columns = [self._counted(subject) for subject in self._subjects]
        rows = []
        for label, (key, figures) in self._rows.items():
            cells = [_cell(figures.get(subject), is_best=best[subject] == label) for subject in self._subjects]
            if has_mean:
                cells.append(_mean([figures.get(subject) for subject in self._subjects]))
            rows.append(Row(label, cells, key.is_apart))
        return Table("", "model", columns + [Column("", "mean")] * has_mean, rows)

    def differences(self) -> Table | None:
        """Each further model less the first; None where nothing can be paired."""
        if len(self._models) < 2:
            return None
        (first, ours), *others = self._models.items()
        rows = [
            Row(label, [_difference(ours.get(subject), theirs.get(subject)) for subject in self._subjects])
            for label, theirs in others
        ]
        if not any(cell.text for row in rows for cell in row.cells):
            return None
        return Table(f"difference to {first}", "model", list(map(_column, self._subjects)), rows)

    def panels(self) -> list[Panel]:
        return [
            Panel(
                _panel_title(subject),
                subject.metric,
                "",
                [
                    Series(label, self._color(key), key.is_apart, [(0.0, figures[subject])])
                    for label, (key, figures) in self._rows.items()
                    if subject in figures
                ],
            )
            for subject in self._subjects
        ]

    def _color(self, key: _Key) -> int | None:
        return None if key.is_apart else self._names.index(key.name)

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
        column = _column(subject)
        if not counts:
            return column
        return column._replace(
            label=f"{column.label} (n = {' to '.join(f'{n:,}' for n in (counts[0], counts[-1])[: len(counts)])})"
        )


def _merged(rows: Sequence[dict[Subject, Figure]]) -> dict[Subject, Figure] | None:
    """One row of rows that have the same figures, as far as they have them; None where they differ."""
    merged: dict[Subject, Figure] = {}
    for row in rows:
        for subject, figure in row.items():
            if _cell(merged.setdefault(subject, figure)) != _cell(figure):
                return None
    return merged


def _over_layers(findings: Findings, subject: Subject) -> Panel:
    series = []
    for name, system in _lines(findings, subject):
        places = findings.figures[subject].items()
        points = [
            (float(place.layer), figure)
            for place, figure in places
            if place[:2] == (name, system) and place.layer is not None
        ]
        label = name if system == "model" else f"{system}, {name}"
        series.append(
            Series(label, findings.names.index(name), system != "model", sorted(points, key=lambda point: point[0]))
        )
    return Panel(_panel_title(subject), subject.metric, "layer", series)


def _layer_table(findings: Findings, subject: Subject) -> Table:
    """A row a layer, a column a model or control."""
    figures, lines = findings.figures[subject], _lines(findings, subject)
    layers = sorted({place.layer for place in figures if place.layer is not None})
    rows = [
        Row(str(layer), [_cell(figures.get(Place(name, system, layer))) for name, system in lines]) for layer in layers
    ]
    columns = [Column("" if system == "model" else system, name) for name, system in lines]
    return Table(f"{_panel_title(subject)}, by layer", "layer", columns, rows, is_detail=True)


def _lines(findings: Findings, subject: Subject) -> list[tuple[str, str]]:
    """Name and system of what has figures by layer, models first."""
    found = dict.fromkeys((place.name, place.system) for place in findings.figures[subject] if place.layer is not None)
    return sorted(found, key=lambda line: (line[1] != "model", line[1], findings.names.index(line[0])))


def _cell(figure: Figure | None, *, is_best: bool = False) -> Cell:
    if figure is None:
        return Cell()
    small = [] if figure.interval is None else [" to ".join(map(number, figure.interval))]
    if len(figure.runs) > 1:
        small.append(f"runs {', '.join(number(score.value) for score in figure.runs)}")
    return Cell(number(figure.value), "; ".join(small), is_best)


def _difference(first: Figure | None, second: Figure | None) -> Cell:
    found = None if first is None or second is None else difference(first, second)
    if found is None:
        return Cell()
    return Cell(f"{found.value:+.4f}", f"{found.low:+.4f} to {found.high:+.4f}, p {found.p_value:.4f}")


def _mean(figures: Sequence[Figure | None]) -> Cell:
    """Over all data sets; a gap where one is absent."""
    values = [figure.value for figure in figures if figure is not None]
    return Cell(number(float(np.mean(values)))) if len(values) == len(figures) else Cell()
