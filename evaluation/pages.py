"""`bivec evaluate report`: results of any number of models and tasks as one Markdown file or one page of HTML."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .pages_document import Cell, Column, Document, Part, Row, Section, Table
from .pages_html import html
from .pages_markdown import markdown
from .pages_results import Findings, Result, gather
from .pages_tables import sections

_WRITERS = {".md": markdown, ".html": html}
MARK = "<!-- written by bivec evaluate report -->"
_BEGINNINGS = (f"{MARK}\n", f"<!doctype html>\n{MARK}\n")


def render(results: Sequence[Result], output: Path) -> str:
    """The whole file's text, in the format of its name.

    Raises:
        ValueError: the name ends in neither `.md` nor `.html`; or as `gather`.
    """
    check_name(output)
    findings = gather(results)
    document = Document(
        "Evaluation",
        _notes(findings),
        findings.names,
        [Section("Models", [Part("What differs", _facts(findings))]), *sections(findings), *_checks(findings)],
    )
    suffix = output.suffix.lower()
    return _BEGINNINGS[suffix == ".html"] + _WRITERS[suffix](document)


def check_name(output: Path) -> None:
    if output.suffix.lower() not in _WRITERS:
        raise ValueError(f"{output}: the output must be named .md or .html")


def is_page(path: Path) -> bool:
    """Whether a file is one that `bivec evaluate report` wrote."""
    with path.open("rb") as file:
        beginning = file.read(max(map(len, _BEGINNINGS)))
    return beginning.startswith(tuple(text.encode() for text in _BEGINNINGS))


def _notes(findings: Findings) -> list[str]:
    notes = [
        "Beside a figure stands its 95 % bootstrap interval, in a column's head how many items (n) it is of. "
        "Differences are paired: both models on the same resamples of the same items, with "
        "the two-sided p-value of no difference, not corrected for the number of comparisons.",
        "Bold is the highest figure of a column's models where the interval of its paired difference to the second "
        "excludes zero. Controls and embeddings, which know no context, stand apart and are never bold.",
    ]
    if any(len(figure.runs) > 1 for places in findings.figures.values() for figure in places.values()):
        notes.append("A figure of several runs of a model is their mean, with each run's own beside it.")
    if findings.unlike_data:
        names = ", ".join(findings.unlike_data)
        notes.append(
            f"Not the same data in all results: {names}. Its columns have the beginning of the data's SHA-256 in their "
            "heads; figures of different data are not to be compared."
        )
    return notes


# settings that the model's description says with what came of them
_ASKED = {"pooling", "dtype", "max_length", "window"}


def _facts(findings: Findings) -> list[Any]:
    """What differs between the models and their evaluations, and what is the same for all."""
    said: dict[str, dict[str, dict[str, list[str]]]] = {}  # fact, task, value: models
    for name, _, report in findings.results:
        settings = {key: value for key, value in report.settings.items() if key not in _ASKED}
        if "layers" in settings:
            settings["evaluated layers"] = settings.pop("layers")  # beside how many the model has
        for fact, value in (report.model | settings).items():
            if fact not in ("found", "identity"):
                its = said.setdefault(fact, {}).setdefault(report.task, {}).setdefault(_shown(fact, value), [])
                its.append(name)
    differing = [fact for fact, tasks in said.items() if any(len(values) > 1 for values in tasks.values())]
    rows = []
    for name in findings.names:
        files = [f"{report.task}: {path.name}" for other, path, report in findings.results if other == name]
        facts = [_by_task(said[fact], name) for fact in differing]
        rows.append(Row(name, [Cell(text) for text in (", ".join(files), *facts)]))
    same = [Row(fact, [Cell(_by_task(tasks))]) for fact, tasks in said.items() if fact not in differing]
    return [
        Table("", "model", [Column("", fact) for fact in ("results", *differing)], rows),
        Table("What is the same for all", "fact", [Column("", "value")], same, is_detail=True),
    ]


def _by_task(tasks: dict[str, dict[str, list[str]]], name: str | None = None) -> str:
    """A fact's value, of one model or all; with the tasks where it has several."""
    values: dict[str, list[str]] = {}
    for task, found in tasks.items():
        for value, names in found.items():
            if name is None or name in names:
                values.setdefault(value, []).append(task)
    return "; ".join(f"{value} ({', '.join(its)})" if len(values) > 1 else value for value, its in values.items())


def _shown(fact: str, value: Any) -> str:
    """A fact's value; of a model's files their names, since where they lie says nothing elsewhere."""
    if isinstance(value, list | tuple):
        return ", ".join(_shown(fact, entry) for entry in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(key, entry)}" for key, entry in value.items()) or "none"
    if fact in ("name", "base", "adapters"):
        return "/".join(Path(str(value)).parts[-2:])
    return {None: "default", True: "yes", False: "no"}.get(value, str(value))


def _checks(findings: Findings) -> list[Section]:
    """What was verified, and what the results say beside their figures."""
    checks = [
        Row(name, [Cell(report.task), Cell(check), Cell("yes" if passed else "NO")])
        for name, _, report in findings.results
        for check, passed in report.checks.items()
    ]
    said: dict[tuple[str, str], list[str]] = {}
    for name, _, report in findings.results:
        for note in report.notes:
            said.setdefault((report.task, note), []).append(name)
    notes = [Row(task, [Cell(note), Cell(_names(its, findings))]) for (task, note), its in said.items()]
    parts = []
    if checks:
        columns = [Column("", head) for head in ("task", "statement", "holds")]
        parts.append(Part("Statements that were verified", [Table("", "model", columns, checks)]))
    if notes:
        columns = [Column("", head) for head in ("note", "models")]
        parts.append(Part("What to know of the data", [Table("", "task", columns, notes)]))
    return [Section("Notes", parts)] if parts else []


def _names(names: list[str], findings: Findings) -> str:
    return "all" if len(findings.names) > 1 and set(names) == set(findings.names) else ", ".join(dict.fromkeys(names))
