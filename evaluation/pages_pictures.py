"""A panel as SVG that stands within a page: its colours are the page's, its identifiers its own, its names text."""

import io
import re
from typing import Any

import numpy as np

from .extras import needed
from .pages_document import Panel, Series

NUM_COLORS = 8
_MARKERS = "osD^vPX*"
_INK, _FAINT = "#010203", "#040506"
_COLORS = [f"#0708{place:02x}" for place in range(NUM_COLORS)]
# what the drawing's placeholders become: the page knows whether it is light or dark
_VARIABLES = {_INK: "var(--ink)", _FAINT: "var(--faint)"} | {
    color: f"var(--series-{place})" for place, color in enumerate(_COLORS)
}
_IDENTIFIER = re.compile(r'(\bid="|href="#|url\(#)')
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bivec",
    "text.parse_math": False,
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _FAINT,
    "grid.alpha": 0.3,
}


def draw(panel: Panel, prefix: str) -> str:
    """An `<svg>` element without a name of its own.

    Args:
        prefix: of its identifiers, different for each panel of a page.
    """
    matplotlib = needed("matplotlib", "matplotlib", "a page of HTML")
    figure_module = needed(
        "matplotlib.figure", "matplotlib", "a page of HTML"
    )  # no pyplot: it would look for a display
    with matplotlib.rc_context(_SETTINGS):
        height = 2.5 if panel.axis else 0.7 + 0.24 * len(panel.series)
        figure = figure_module.Figure(figsize=(4.2, height), layout="constrained")
        axes = figure.subplots()
        if panel.axis:
            _draw_lines(axes, panel)
        else:
            _draw_points(axes, panel)
        picture = io.StringIO()
        figure.savefig(picture, format="svg", transparent=True, metadata={"Date": None})
    return _embedded(picture.getvalue(), prefix)


def _draw_lines(axes: Any, panel: Panel) -> None:
    for series in panel.series:
        places, values, bounds = _numbers(series)
        color = _color(series)
        marker = _MARKERS[(series.color or 0) % len(_MARKERS)]
        style = {"linestyle": "--", "alpha": 0.7} if series.is_apart else {"linestyle": "-"}
        style |= {"marker": "o", "markerfacecolor": "none"} if series.is_apart else {"marker": marker}
        axes.plot(places, values, color=color, markersize=4, linewidth=1.4, **style)
        if not series.is_apart:
            axes.fill_between(places, *bounds, color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel(panel.axis)
    axes.set_ylabel(panel.metric)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y")


def _draw_points(axes: Any, panel: Panel) -> None:
    for height, series in enumerate(panel.series):
        _, values, bounds = _numbers(series)
        color = _color(series)
        errors = np.abs(bounds - values)
        face = "none" if series.is_apart else color
        marker = _MARKERS[(series.color or 0) % len(_MARKERS)]
        axes.errorbar(
            values, [height], xerr=errors, fmt=marker, color=color, markersize=5, markerfacecolor=face, linewidth=1.4
        )
    axes.set_yticks(range(len(panel.series)), [_short(series.label) for series in panel.series])
    axes.set_ylim(len(panel.series) - 0.5, -0.5)
    axes.set_xlabel(panel.metric)
    axes.grid(axis="x")


def _numbers(series: Series) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places and values `(n,)`, bounds `(2, n)`; NaN, of which nothing is drawn, where there is no interval."""
    places, figures = zip(*series.points, strict=True)
    bounds = [figure.interval or (np.nan, np.nan) for figure in figures]
    return np.array(places), np.array([figure.value for figure in figures]), np.array(bounds, dtype=float).T


def _color(series: Series) -> str:
    return _FAINT if series.color is None else _COLORS[series.color % NUM_COLORS]


def _short(label: str) -> str:
    return label if len(label) <= 30 else f"{label[:29]}…"


def _embedded(svg: str, prefix: str) -> str:
    """Without what a file of its own needs: the declarations, the metadata and the size in points."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = _IDENTIFIER.sub(lambda found: f"{found[0]}{prefix}-", svg)
    return re.sub("|".join(_VARIABLES), lambda found: _VARIABLES[found[0]], svg).strip()
