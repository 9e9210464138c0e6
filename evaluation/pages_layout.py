"""In which table, column and row of a report a figure stands: both papers' tables in shape, a plain one for the rest.

- Chunking, named entities and parts of speech are columns of one table (LLM2Vec's Table 4, arXiv 2404.05961).
- The context probes are read from each of five positions: columns of one table, by task and position; the other
  semantic probing tasks are columns of another (Feng et al., arXiv 2510.01652).
- Every other task has a table a metric, with a column a data set.

All of these once for each probe and read-out, but for LLM2Vec's own protocol, in which each model has its own read-out.
"""

import re
from dataclasses import replace
from typing import NamedTuple

from .pages_document import Column
from .pages_figures import Figure
from .pages_results import Findings, Place, Subject

TAGGING = {"chunking": "Chunking", "ner": "NER", "pos": "POS"}
SECTIONS = dict.fromkeys(TAGGING, "Chunking, named entities, parts of speech") | {
    "words": "Word similarity",
    "probing": "Semantic probing",
    "sts": "Text similarity",
    "classification": "Classification",
    "anisotropy": "Anisotropy",
    "generation": "Generation",
}
_READ_OUTS = {"token": "the token", "previous": "the position before", "both": "the token and the position before"}
_POSITION = re.compile(r"(.+) position (\d+)")

Grid = dict[Subject, dict[Place, Figure]]  # of one table, and of its pictures


class Spot(NamedTuple):
    """A figure's table and column; `variant` is what its row's label says beside the model's name."""

    section: str
    title: str
    column: Column
    variant: str = ""


def arranged(findings: Findings) -> dict[str, dict[str, Grid]]:
    """Every figure, by section and table."""
    sections: dict[str, dict[str, Grid]] = {}

    def add(home: Subject, places: dict[Place, Figure]) -> None:
        spot = spot_of(home)
        column = home._replace(read_out=None) if spot.variant else home
        grid = sections.setdefault(spot.section, {}).setdefault(spot.title, {})
        for place, figure in places.items():
            is_joined = place.system != "model" and home.read_out is not None and figure.runs[0].read_out is None
            grid.setdefault(column, {})[place._replace(variant="" if is_joined else spot.variant)] = figure

    subjects = sorted(findings.figures, key=_rank)
    homes = {subject: _homes(findings, subject, subjects) for subject in subjects}
    for subject in subjects:
        if not homes[subject]:
            add(subject, findings.figures[subject])
    for subject in subjects:
        for count, home in enumerate(homes[subject]):
            places = findings.figures[subject]
            # its lead is the one over the first: other read-outs' are not known
            add(home, places if count == 0 else {place: _without_lead(figure) for place, figure in places.items()})
    return sections


def spot_of(subject: Subject) -> Spot:
    read_out = f"read at {_READ_OUTS.get(subject.read_out, subject.read_out)}" if subject.read_out else ""
    probe = f"{subject.probe} probe" if subject.probe else ""
    position = _POSITION.fullmatch(subject.dataset)
    variant = ""
    if subject.probe and "llm2vec" in subject.probe:
        read_out, variant = "", read_out
    section = SECTIONS.get(subject.task, subject.task)
    of_data = subject.data_name
    if subject.task in TAGGING:
        column, first = Column(f"{TAGGING[subject.task]}: {of_data}", subject.metric), ""
    elif subject.task == "probing" and position:
        group = subject._replace(dataset=position[1]).data_name
        column, first = Column(group, position[2]), f"{subject.metric} by position"
    elif subject.task == "probing":
        column, first = Column(of_data, subject.metric), "words in context"
    else:
        column, first = Column("", of_data), subject.metric
    title = ", ".join(part for part in (first, probe, read_out) if part)
    return Spot(section, title or "controls", column, variant)


def position_of(subject: Subject) -> tuple[Subject, int] | None:
    """What is read from several positions, and from which; None for all else."""
    found = _POSITION.fullmatch(subject.dataset) if subject.task == "probing" else None
    return None if found is None else (subject._replace(dataset=found[1]), int(found[2]))


def name_of(subject: Subject) -> str:
    """The column, and of which table it is."""
    return ", ".join(part for part in (caption_of(subject), spot_of(subject).title) if part)


def caption_of(subject: Subject) -> str:
    """The column alone."""
    return ", ".join(part for part in spot_of(subject).column if part)


def _rank(subject: Subject) -> int:
    """Tasks as `SECTIONS` orders them, then those that it does not have; else the results' order stays."""
    return list(SECTIONS).index(subject.task) if subject.task in SECTIONS else len(SECTIONS)


def _homes(findings: Findings, subject: Subject, subjects: list[Subject]) -> list[Subject]:
    """Where a control's figures stand that has neither probe nor read-out: beside every model's of the same data."""
    places = findings.figures[subject]
    if subject.probe or subject.read_out or any(place.system == "model" for place in places):
        return []
    return [
        other
        for other in subjects
        if other[:5] == subject[:5] and any(place.system == "model" for place in findings.figures[other])
    ]


def _without_lead(figure: Figure) -> Figure:
    return Figure([replace(score, lead=None) for score in figure.runs], figure.parts)
