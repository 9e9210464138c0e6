"""A report as one page of HTML that needs nothing else: no script, no font, no picture from elsewhere."""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby

from .pages_document import Cell, Document, Panel, Pictures, Table
from .pages_pictures import NUM_COLORS, draw
from .report import number

# series: Okabe and Ito's colours, told apart by the colour blind, darkened or lightened for the two grounds
_LIGHT = ("#0072b2", "#c24e00", "#00795a", "#9a3d78", "#8a6d00", "#2a7fb8", "#555555", "#7a1f1f")
_DARK = ("#5ab4e8", "#f0884a", "#3cc39a", "#e39ac4", "#e8c93a", "#9ad0f5", "#bbbbbb", "#f0a0a0")
assert len(_LIGHT) == len(_DARK) == NUM_COLORS


def _variables(ground: str, ink: str, faint: str, line: str, colors: Sequence[str]) -> str:
    series = "".join(f"--series-{place}:{color};" for place, color in enumerate(colors))
    return f"--ground:{ground};--ink:{ink};--faint:{faint};--line:{line};{series}"


_CSS = f"""
:root {{ color-scheme: light dark; {_variables("#ffffff", "#1b1b1b", "#5f5f5f", "#d6d6d6", _LIGHT)} }}
@media (prefers-color-scheme: dark) {{
  :root {{ {_variables("#16181c", "#e8e8e8", "#a5a5a5", "#3a3d44", _DARK)} }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 80rem; padding: 1rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }}
h3 {{ font-size: 1.05rem; margin-bottom: .3rem; }}
.note {{ color: var(--faint); max-width: 46rem; font-size: .9rem; }}
.part {{ display: flex; flex-wrap: wrap; gap: .5rem 3rem; }}
.block {{ max-width: 100%; }} .block > p {{ margin: 0 0 .3rem; font-size: .9rem; }}
.pictures {{ flex: 1 1 20rem; }} details {{ flex-basis: 100%; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }}
td {{ min-width: 5.5rem; }}
thead th {{ vertical-align: bottom; }}
th[colspan] {{ border-left: 1px solid var(--line); }}
tbody th {{ font-weight: 600; position: sticky; left: 0; background: var(--ground); min-width: 8rem;
  max-width: 14rem; overflow-wrap: break-word; }}
tr.apart th, tr.apart td {{ color: var(--faint); font-weight: 400; font-style: italic; }}
tbody tr:not(.apart) + tr.apart > * {{ border-top: 2px solid var(--faint); }}
small {{ display: block; font-size: .72rem; color: var(--faint); white-space: nowrap; }}
.panels {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }}
figure {{ margin: 0; }} figcaption {{ font-size: .85rem; }}
svg {{ width: 100%; height: auto; max-width: 30rem; }}
.key {{ display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; margin: 0; padding: 0;
  font-size: .85rem; }}
.key i {{ display: inline-block; width: 1.2rem; height: .25rem; margin-right: .4rem; vertical-align: middle; }}
summary {{ cursor: pointer; }}
@media print {{
  :root {{ {_variables("#ffffff", "#000000", "#444444", "#bbbbbb", _LIGHT)} }}
  @page {{ size: landscape; margin: 1cm; }}
  .wide {{ overflow: visible; }} table {{ font-size: .6rem; }} small {{ font-size: .5rem; }}
  td, th {{ padding: .1rem .25rem; }} td {{ min-width: 0; }}
  details::details-content {{ content-visibility: visible; }}
  figure, table {{ break-inside: avoid; }}
}}
"""


def html(document: Document) -> str:
    return "\n".join(_lines(document)) + "\n"


def _lines(document: Document) -> Iterator[str]:
    title = escape(document.title)
    yield '<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<h1>{title}</h1>"
    yield from (f'<p class="note">{escape(note)}</p>' for note in document.notes)
    count = 0
    for section in document.sections:
        yield f"<section>\n<h2>{escape(section.title)}</h2>"
        for part in section.parts:
            yield f'<h3>{escape(part.title)}</h3>\n<div class="part">'
            for block in part.blocks:
                if isinstance(block, Table):
                    yield from _table(block, part.title)
                else:
                    yield from _pictures(block, document.models, count)
                    count += len(block.panels)
            yield "</div>"
        yield "</section>"
    yield "</body>\n</html>"


def _table(table: Table, title: str) -> Iterator[str]:
    name, caption = escape(": ".join(filter(None, (title, table.title)))), escape(table.title)
    if table.is_detail:
        yield f'<details class="block">\n<summary>{caption}</summary>\n<div>'
    else:
        yield f'<div class="block">{f"<p>{caption}</p>" if caption else ""}<div>'
    yield f'<div class="wide" role="region" aria-label="{name}" tabindex="0">\n<table>\n<thead>'
    corner = escape(table.corner)
    if any(column.group for column in table.columns):
        groups = [(group, len(list(columns))) for group, columns in groupby(table.columns, lambda column: column.group)]
        heads = "".join(f'<th scope="colgroup" colspan="{count}">{escape(group)}</th>' for group, count in groups)
        yield f'<tr><th scope="col" rowspan="2">{corner}</th>{heads}</tr>'
        corner_head = ""
    else:
        corner_head = f'<th scope="col">{corner}</th>'
    labels = "".join(f'<th scope="col">{escape(column.label)}</th>' for column in table.columns)
    yield f"<tr>{corner_head}{labels}</tr>\n</thead>\n<tbody>"
    for row in table.rows:
        cells = "".join(f"<td>{_cell(cell)}</td>" for cell in row.cells)
        yield f'<tr{" class=apart" * row.is_apart}><th scope="row">{escape(row.label)}</th>{cells}</tr>'
    yield f"</tbody>\n</table>\n</div></div></{'details' if table.is_detail else 'div'}>"


def _cell(cell: Cell) -> str:
    text = f"<b>{escape(cell.text)}</b>" if cell.is_best else escape(cell.text)
    return " ".join((text, *(f"<small>{escape(small)}</small>" for small in cell.small)))


def _pictures(pictures: Pictures, models: Sequence[str], count: int) -> Iterator[str]:
    is_apart = any(series.is_apart for panel in pictures.panels for series in panel.series)
    apart = "<li>dashed or hollow: controls and embeddings</li>" * is_apart
    drawn = sorted({series.color for panel in pictures.panels for series in panel.series if series.color is not None})
    keys = (
        f'<li><i style="background:var(--series-{color % NUM_COLORS})"></i>{escape(models[color])}</li>'
        for color in drawn
    )
    yield f'<div class="block pictures"><ul class="key">{"".join(keys)}{apart}</ul>\n<div class="panels">'
    for place, panel in enumerate(pictures.panels):
        svg = draw(panel, f"p{count + place}").replace("<svg", f'<svg role="img" aria-label="{escape(_alt(panel))}"', 1)
        yield f"<figure>\n{svg}\n<figcaption>{escape(panel.caption)}</figcaption>\n</figure>"
    yield "</div></div>"


def _alt(panel: Panel) -> str:
    """What the picture shows, in words; of lines their ends and their highest point."""
    parts = []
    for series in panel.series:
        points = [(x, figure.value) for x, figure in series.points]
        if panel.axis:
            told = dict.fromkeys((points[0], max(points, key=lambda point: point[1]), points[-1]))
            values = ", ".join(f"{number(value)} at {panel.axis} {x:g}" for x, value in told)
            if len(points) > 1 and len({value for _, value in points}) == 1:
                values = f"{number(points[0][1])} throughout"
        else:
            values = number(points[0][1])
        parts.append(f"{series.label} {values}")
    return f"{panel.title}: {'; '.join(parts)}"
