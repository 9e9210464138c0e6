"""The lexical-semantic probing tasks of Feng et al. (arXiv 2510.01652) as released: words in context with labels.

    Task1_Context-probes/subject_animacy/train.txt, test.txt     the horse lectured the sound,1
        (and verb_causative, verb_dynamic, object_animacy)       five words; the label is one word's
    Task2_*/telicity_train.txt, duration_train.txt               number TAB text TAB verb TAB index TAB label
    Task3_*/CONcreTEXT_test_EN.txt                               a header and its columns, between tabs
    Task4_*/contextualized_sensorimotor_norms_with_ls.txt        a header and its columns, between commas

A folder that holds some of these is read, and so is one of a single task. Indices count words between white space from
0 on. What the released files have that is not so, and what is done about it:

- Task 2: of 46 verbs the index points beside the word, as spaces that are no words were counted; the occurrence nearest
  to it is taken. 16 targets are no words (`,`, `"`, `812_11`) and are left out. Some rows stand twice.
- Task 1: 28 rows of the test files and one of a training file stand twice; both files of `verb_dynamic` have "needed".
- Task 3: one text stands twice, with two ratings. Its index is right everywhere, also where the form is not the target.
- Task 4: the word has no index and often another form (break: "He broke the dish."). It is the sentence's word that
  shares the longest beginning with it; of equals, the one that stands in all sentences of the word.

Repeated rows are kept, as no fold by word type divides them, and counted.
"""

import csv
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ..texts.files import is_file
from ..texts.rows import Fault
from .bad_rows import OnError
from .states import Span
from .text_lines import text_lines

CONTEXT_PROBES = {"subject_animacy": 2, "verb_causative": 3, "verb_dynamic": 3, "object_animacy": 5}
ASPECTS = ("telicity", "duration")
CONCRETENESS = "CONcreTEXT_test_EN.txt"
NORMS = "contextualized_sensorimotor_norms_with_ls.txt"
SENSES = ("Vision", "Hearing", "Olfaction", "Interoception", "Taste", "Touch")
EFFECTORS = ("Foot_leg", "Mouth_throat", "Torso", "Head", "Hand_arm")
DIMENSIONS = (*SENSES, *EFFECTORS)
_CONCRETENESS_COLUMNS = ("TARGET", "INDEX", "TEXT", "AVG")
_NORMS_COLUMNS = ("word", "sentence", *(f"{dimension}.M" for dimension in DIMENSIONS))

_COMMAS: dict[str, Any] = {"strict": True}
_TABS: dict[str, Any] = {"strict": True, "delimiter": "\t"}
_PLAIN_TABS: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}


class SemanticTask(NamedTuple):
    """Words in context, and what is told of them.

    Shapes: N items, D dimensions of the target.

    Attributes:
        kind: `context`, `aspect`, `concreteness` or `norms`.
        texts: N of them.
        spans: the words of a text that are read, as characters: one, or all five of a context probe.
        types: N words: what the labels belong to, in one form.
        targets: int64 `(D, N)` classes or float32 `(D, N)` ratings.
        num_classes: 0 for ratings.
        is_test: bool `(N,)` in the released split; None where there is none.
        counts: what the files have that was left out or looked up: how many, by what it is.
    """

    name: str
    kind: Literal["context", "aspect", "concreteness", "norms", "pairs"]
    texts: list[str]
    spans: list[list[Span]]
    types: np.ndarray
    targets: np.ndarray
    num_classes: int
    is_test: np.ndarray | None
    counts: dict[str, int]


class Row(NamedTuple):
    text: str
    spans: list[Span]
    type: str
    targets: list[float]
    is_test: bool = False
    is_moved: bool = False  # whether the word was found beside its index


class _Bad(ValueError):
    """Why a row is bad, without its place."""


def read_tasks(folder: Path, on_error: OnError = "fail", *, needed: bool = True) -> list[SemanticTask]:
    """All tasks whose files are in `folder` or in a folder within it.

    Raises:
        FileNotFoundError: one is `needed` and there is none, or a context probe lacks one of its two files; says what
            was looked for.
        ValueError: a row is malformed, with its file and line, unless these are left out; or a file stands in two
            places.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; --data is one that holds a task's files")
    inner = sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir())

    def find(name: str) -> Path | None:
        found = [place / name for place in (folder, *inner) if (place / name).exists() and is_file(place / name)]
        if len(found) > 1:
            raise ValueError(f"{found[0]} and {found[1]} are both {name}: name the folder of one")
        return found[0] if found else None

    tasks = []
    for name in CONTEXT_PROBES:
        files = {split: find(f"{name}/{split}.txt") for split in ("train", "test")}
        if any(files.values()):
            lacking = next((split for split, path in files.items() if path is None), None)
            if lacking is not None:
                raise FileNotFoundError(f"{name} has no {lacking}.txt in {folder}")
            tasks.append(_context_probe(name, [path for path in files.values() if path is not None], on_error))
    for name in ASPECTS:
        if path := find(f"{name}_train.txt"):
            tasks.append(_task(name, "aspect", *_read(path, _PLAIN_TABS, _aspect_row, on_error)))
    if path := find(CONCRETENESS):
        found = _read(path, _TABS, _concreteness_row, on_error, _CONCRETENESS_COLUMNS)
        tasks.append(_task("concreteness", "concreteness", *found))
    if path := find(NORMS):
        tasks.append(_norms(path, on_error))
    if needed and not tasks:
        wanted = [f"{name}/train.txt" for name in CONTEXT_PROBES] + [f"{name}_train.txt" for name in ASPECTS]
        raise FileNotFoundError(
            f"no probing task in {folder}: looked for {', '.join([*wanted, CONCRETENESS, NORMS])}, test.data.txt"
        )
    return tasks


def _context_probe(name: str, paths: Sequence[Path], on_error: OnError) -> SemanticTask:
    """Training and test rows, one after the other."""
    place = CONTEXT_PROBES[name] - 1
    rows: list[Row] = []
    counts: Counter[str] = Counter()
    for path in paths:
        found, its_counts = _read(path, _COMMAS, lambda fields: _context_row(fields, place), on_error)
        rows += [row._replace(is_test=path.name == "test.txt") for row in found]
        counts += its_counts
    return _task(name, "context", rows, counts)


def _context_row(fields: list[str], place: int) -> Row:
    sentence, label = _exactly(fields, ("sentence", "label"))
    spans = _words(sentence)
    if len(spans) != 5:
        raise _Bad(f"a sentence must have five words, as 'the horse lectured the sound', got {len(spans)}")
    return Row(sentence, spans, sentence[slice(*spans[place])].lower(), [_label(label)])


def _aspect_row(fields: list[str]) -> Row | None:
    """None where the target is no word."""
    _, text, verb, index, label = _exactly(fields, ("number", "text", "verb", "index", "label"))
    place, target = _index(index), _label(label)
    spans = _words(text)
    occurrences = [word for word, span in enumerate(spans) if text[slice(*span)] == verb]
    if not occurrences:
        raise _Bad(f"the text does not hold the verb {verb!r} as a word")
    if not any(character.isalpha() for character in verb):
        return None
    nearest = min(occurrences, key=lambda word: abs(word - place))
    return Row(text, [spans[nearest]], verb.lower(), [target], is_moved=nearest != place)


def _concreteness_row(fields: dict[str, str]) -> Row:
    spans, place = _words(fields["TEXT"]), _index(fields["INDEX"])
    if place >= len(spans):
        raise _Bad(f"INDEX must be below the number of words, {len(spans)}, got {place}")
    return Row(fields["TEXT"], [spans[place]], _filled(fields, "TARGET").lower(), [_rating(fields, "AVG")])


def _norms(path: Path, on_error: OnError) -> SemanticTask:
    """The words are looked for when all sentences of a word are known."""
    rows, counts = _read(path, _COMMAS, _norms_row, on_error, _NORMS_COLUMNS)
    shared: dict[str, set[str]] = {}
    for row in rows:
        words = {row.text[slice(*span)].lower() for span in row.spans}
        shared[row.type] = shared.get(row.type, words) & words
    found = []
    for row in rows:
        span = _form_of(row, shared[row.type])
        if span is not None:
            found.append(row._replace(spans=[span]))
        elif on_error == "fail":
            raise ValueError(f"{path}: no word of {row.text!r} is clearly a form of {row.type!r}")
        else:
            counts["bad rows left out"] += 1
    return _task("sensorimotor_norms", "norms", found, counts)


def _norms_row(fields: dict[str, str]) -> Row:
    ratings = [_rating(fields, f"{dimension}.M") for dimension in DIMENSIONS]
    return Row(fields["sentence"], _words(fields["sentence"], r"\w+"), _filled(fields, "word").lower(), ratings)


def _form_of(row: Row, in_all: set[str]) -> Span | None:
    """The word of the sentence that shares the longest beginning with the target; None where that leaves a choice."""
    ranks = []
    for span in row.spans:
        form = row.text[slice(*span)].lower()
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(form, row.type, strict=False))
        ranks.append((len(list(alike)), form == row.type, form in in_all))
    best = max(ranks, default=None)
    return row.spans[ranks.index(best)] if best is not None and best[0] and ranks.count(best) == 1 else None


def _read(
    path: Path,
    dialect: dict[str, Any],
    parse: Callable[[Any], Row | None],
    on_error: OnError,
    header: Sequence[str] = (),
) -> tuple[list[Row], Counter[str]]:
    """The rows of a file, in which a row is a line; `parse` is given its fields, by name where a header is wanted."""
    names: list[str] | None = None
    rows: list[Row] = []
    counts: Counter[str] = Counter()
    for number, line in text_lines(path):
        try:
            if isinstance(line, Fault):
                raise _Bad(line)
            fields = next(csv.reader([line], **dialect), [])
            if not "".join(fields).strip():
                continue
            if header and names is None:
                _check_header(fields, header)
                names = fields
                continue
            row = parse(dict(zip(names, _exactly(fields, names), strict=True)) if names else fields)
        except (_Bad, csv.Error) as error:
            if on_error == "fail" or (header and names is None):
                raise ValueError(f"{path}:{number}: {error}") from error
            counts["bad rows left out"] += 1
            continue
        if row is None:
            counts["targets that are no word left out"] += 1
        else:
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no labelled word stands in it")
    return rows, counts


def _check_header(fields: list[str], wanted: Sequence[str]) -> None:
    lacking = [name for name in wanted if fields.count(name) != 1]
    if lacking:
        raise _Bad(f"the header must have each of {', '.join(wanted)} once, which {', '.join(lacking)} is not")


def _exactly(fields: list[str], names: Sequence[str]) -> list[str]:
    if len(fields) != len(names):
        raise _Bad(f"{len(names)} fields are needed ({', '.join(names)}), got {len(fields)}")
    return fields


def _words(text: str, pattern: str = r"\S+") -> list[Span]:
    return [match.span() for match in re.finditer(pattern, text)]


def _label(value: str) -> int:
    if value not in ("0", "1"):
        raise _Bad(f"the label must be 0 or 1, got {value!r}")
    return int(value)


def _index(value: str) -> int:
    if not value.isdecimal():
        raise _Bad(f"the index must be a whole number from 0 on, got {value!r}")
    return int(value)


def _rating(fields: dict[str, str], name: str) -> float:
    try:
        rating = float(fields[name])
    except ValueError:
        rating = math.nan
    if not math.isfinite(rating):
        raise _Bad(f"{name} must be a number, got {fields[name]!r}")
    return rating


def _filled(fields: dict[str, str], name: str) -> str:
    if not fields[name].strip():
        raise _Bad(f"{name} is empty")
    return fields[name]


def _task(
    name: str, kind: Literal["context", "aspect", "concreteness", "norms"], rows: list[Row], counts: Counter[str]
) -> SemanticTask:
    num_classes = 2 if kind in ("context", "aspect") else 0
    targets = np.array([row.targets for row in rows], dtype=np.int64 if num_classes else np.float32).T
    counts["words found beside their index"] = sum(row.is_moved for row in rows)
    counts["rows that repeat another"] = len(rows) - len({(row.text, row.spans[0], *row.targets) for row in rows})
    return SemanticTask(
        name,
        kind,
        [row.text for row in rows],
        [row.spans for row in rows],
        np.array([row.type for row in rows]),
        targets,
        num_classes,
        np.array([row.is_test for row in rows]) if kind == "context" else None,
        {what: number for what, number in counts.items() if number},
    )
