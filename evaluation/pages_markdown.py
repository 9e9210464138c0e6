"""A report as Markdown: GitHub's tables, without pictures. Names out of files are shown as they are, never obeyed."""

import re
from collections.abc import Iterator

from .pages_document import Cell, Document, Table

_OBEYED = re.compile(r"[\\`*_\[\]|~$#!@]")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "\n": "\\n"})


def markdown(document: Document) -> str:
    return "\n".join(_lines(document)) + "\n"


def escaped(text: str) -> str:
    """On one line, with nothing that Markdown or HTML would take for its own."""
    return _OBEYED.sub(lambda found: f"\\{found[0]}", text).translate(_ENTITIES)


def _lines(document: Document) -> Iterator[str]:
    yield from ("", f"# {escaped(document.title)}")
    for note in document.notes:
        yield from ("", escaped(note))
    for section in document.sections:
        yield from ("", f"## {escaped(section.title)}")
        for part in section.parts:
            yield from ("", f"### {escaped(part.title)}")
            for block in part.blocks:
                if isinstance(block, Table):
                    yield from ("", *([f"{escaped(block.title)}:", ""] if block.title else []), *_table(block))


def _table(table: Table) -> Iterator[str]:
    heads = [": ".join(filter(None, column)) for column in table.columns]
    yield _row([escaped(head) for head in (table.corner, *heads)])
    yield _row(["---"] * (1 + len(heads)))
    for row in table.rows:
        label = escaped(row.label)
        yield _row([f"*{label}*" if row.is_apart else label, *map(_cell, row.cells)])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    text = f"**{escaped(cell.text)}**" if cell.is_best else escaped(cell.text)
    return f"{text} ({escaped('; '.join(cell.small))})" if cell.small else text
