"""What a report is made of, whatever it is written as: sections of tables and pictures."""

from typing import NamedTuple

from .pages_figures import Figure


class Cell(NamedTuple):
    """One field of a table; what is in `small` stands beside it in small print."""

    text: str = ""
    small: tuple[str, ...] = ()
    is_best: bool = False


class Column(NamedTuple):
    """Columns of one group stand side by side under its name."""

    group: str
    label: str


class Row(NamedTuple):
    """One that is apart is no model's, but stands below them for comparison."""

    label: str
    cells: list[Cell]
    is_apart: bool = False


class Table(NamedTuple):
    """The first of a part needs no title; one that is a detail is folded where that can be done."""

    title: str
    corner: str
    columns: list[Column]
    rows: list[Row]
    is_detail: bool = False


class Series(NamedTuple):
    """Figures of one model or control; `color` is the model's number, None for what is no model's alone.

    Attributes:
        points: `(x, figure)` in order of x.
    """

    label: str
    color: int | None
    is_apart: bool
    points: list[tuple[float, Figure]]


class Panel(NamedTuple):
    """A picture: lines over what `axis` says, or where that is empty a point and its interval a row.

    Attributes:
        title: what it shows; `caption` is the same, less what its part's title says.
    """

    title: str
    caption: str
    metric: str
    axis: str
    series: list[Series]


class Pictures(NamedTuple):
    panels: list[Panel]


class Part(NamedTuple):
    """Tables of the same figures, and their pictures."""

    title: str
    blocks: list[Table | Pictures]


class Section(NamedTuple):
    title: str
    parts: list[Part]


class Document(NamedTuple):
    """A whole report; `notes` are sentences below the title, `models` the names that colours stand for."""

    title: str
    notes: list[str]
    models: list[str]
    sections: list[Section]
