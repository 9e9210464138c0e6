"""Files of word pairs that people have scored, and contexts that fit into a model.

A folder's .txt, .tsv and .csv files, also with .gz behind, are a data set each; other files are ignored. What a file is
shows in its first row:

    old  new  1.58           two words and a score, between white space, tabs, or in a .csv commas
    word1 word2 score        the same with a header; then more columns may stand there (`SimLex999` is a score, too)
    1 w1 n w2 n ... 1.1 ...  18 columns between tabs, as SCWS's ratings.txt: id, word, part of speech, word, part of
                             speech, a context of each with the word in <b> </b>, the mean of ten ratings, the ten
"""

import csv
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..engine.encoder import Encoder
from ..engine.tokens import TextTokenizer
from ..texts.files import is_file
from ..texts.rows import Fault, RowError
from .bad_rows import OnError
from .states import Span, Words
from .text_lines import text_lines

EXTENSIONS = (".txt", ".tsv", ".csv")
CONTEXT_COLUMNS = 18
_SCORE_COLUMNS = ("score", "simlex999")
_MARKED = re.compile("(.*)<b>(.*)</b>(.*)", re.DOTALL)
_UNBOUNDED = 2**30  # tokens


class WordPairs(NamedTuple):
    """A data set.

    Attributes:
        first, second: words, n of each.
        gold: float64 `(n,)`, people's scores.
        contexts: of pairs in context, 2 n texts with the word's place in each: the first words', then the second ones'.
        num_left_out: rows that were bad.
    """

    name: str
    first: list[str]
    second: list[str]
    gold: np.ndarray
    contexts: Words | None
    num_left_out: int


class _Pair(NamedTuple):
    first: str
    second: str
    score: float
    contexts: tuple[tuple[str, Span], ...] = ()


def read_folder(folder: Path, on_error: OnError = "fail") -> list[WordPairs]:
    """Every data set in `folder`, sorted by name.

    Raises:
        FileNotFoundError: there is none; says which names were looked for.
        RowError: a row is bad and none may be left out, with its file and line.
        ValueError: a file cannot be read or holds no pair, or two are the same data set.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; --data is one that holds a task's files")
    paths: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        name = path.name.removesuffix(".gz")
        extension = next((extension for extension in EXTENSIONS if name.endswith(extension)), None)
        if extension is None or name.startswith(".") or not is_file(path):
            continue
        name = name.removesuffix(extension)
        name = folder.resolve().name if name == "ratings" else name
        other = paths.setdefault(name, path)
        if other is not path:
            raise ValueError(f"{other} and {path} are both the data set {name}")
    if not paths:
        names = ", ".join(f"*{extension}" for extension in EXTENSIONS)
        raise FileNotFoundError(f"no word pairs in {folder}: looked for {names}, also with .gz")
    return [_read(name, path, on_error) for name, path in sorted(paths.items())]


def _read(name: str, path: Path, on_error: OnError) -> WordPairs:
    pairs: list[_Pair] = []
    faults: list[RowError] = []
    for line, pair in _rows(path):
        if isinstance(pair, _Pair):
            pairs.append(pair)
            continue
        faults.append(RowError(f"{path}:{line}: {pair}"))
        if on_error == "fail":
            raise faults[0]
    if not pairs:
        raise ValueError(f"{path}: no pair of words stands in it" + (f", first: {faults[0]}" if faults else ""))
    if faults:
        warnings.warn(f"{len(faults)} bad rows of {path} are left out; the first: {faults[0]}", stacklevel=2)
    contexts = [context for side in zip(*(pair.contexts for pair in pairs), strict=True) for context in side]
    return WordPairs(
        name,
        [pair.first for pair in pairs],
        [pair.second for pair in pairs],
        np.array([pair.score for pair in pairs]),
        Words([text for text, _ in contexts], [[span] for _, span in contexts]) if contexts else None,
        len(faults),
    )


def _rows(path: Path) -> Iterator[tuple[int, _Pair | Fault]]:
    """Each row that is not blank, with its line; the first says how all are laid out."""
    rows = ((line, fields) for line, fields in _fields(path) if fields)
    first = next(rows, None)
    if first is None:
        return
    line, fields = first
    if not isinstance(fields, Fault) and len(fields) == CONTEXT_COLUMNS and _marked(fields[5]):
        yield line, _pair_in_context(fields)
        for line, fields in rows:
            yield line, fields if isinstance(fields, Fault) else _pair_in_context(fields)
        return
    columns = None if isinstance(fields, Fault) else _header(fields, f"{path}:{line}")
    width, places = (3, (0, 1, 2)) if columns is None else (len(fields), columns)
    if columns is None:
        yield line, fields if isinstance(fields, Fault) else _pair(fields, width, places)
    for line, fields in rows:
        yield line, fields if isinstance(fields, Fault) else _pair(fields, width, places)


def _fields(path: Path) -> Iterator[tuple[int, list[str] | Fault]]:
    """Each line's fields; none for one that is blank."""
    is_csv = path.name.removesuffix(".gz").endswith(".csv")
    for number, text in text_lines(path):
        if isinstance(text, Fault):
            yield number, text
        elif not text.strip():
            yield number, []
        elif is_csv:
            try:
                yield number, next(csv.reader([text], strict=True))
            except csv.Error as error:
                yield number, Fault(f"invalid CSV: {error}")
        else:
            yield number, text.split("\t") if "\t" in text else text.split()


def _header(fields: Sequence[str], place: str) -> tuple[int, int, int] | None:
    """The places of word, word and score where these fields are a header; "Word 1" is `word1`."""
    names = [re.sub(r"[\s_-]", "", field).lower() for field in fields]
    if "word1" not in names or "word2" not in names:
        return None
    scores = [names.index(name) for name in _SCORE_COLUMNS if name in names] or ([2] if len(names) == 3 else [])
    if not scores:
        raise ValueError(f"{place}: the header must name the scores, score or SimLex999, got {', '.join(fields)}")
    return names.index("word1"), names.index("word2"), scores[0]


def _pair(fields: Sequence[str], width: int, places: Sequence[int]) -> _Pair | Fault:
    if len(fields) != width:
        why = "" if width != 3 else " (word, word, score; a header with word1, word2 and score may name more)"
        return Fault(f"{width} fields are needed{why}, got {len(fields)}")
    first, second, score = (fields[place].strip() for place in places)
    if not (first and second):
        return Fault("a word is empty")
    number = _finite(score)
    return number if isinstance(number, Fault) else _Pair(first, second, number)


def _pair_in_context(fields: Sequence[str]) -> _Pair | Fault:
    if len(fields) != CONTEXT_COLUMNS:
        return Fault(f"{CONTEXT_COLUMNS} fields between tabs are needed, got {len(fields)}")
    contexts: list[tuple[str, Span]] = []
    for place, field in enumerate(fields[5:7], start=1):
        context = _marked(field)
        if context is None:
            return Fault(f"context {place} must hold one word in <b> </b>")
        contexts.append(context)
    first, second = fields[1].strip(), fields[3].strip()
    if not (first and second):
        return Fault("a word is empty")
    number = _finite(fields[7])
    return number if isinstance(number, Fault) else _Pair(first, second, number, tuple(contexts))


def _marked(context: str) -> tuple[str, Span] | None:
    """A context without its mark, and where the word stands that was marked; None without exactly one."""
    match = _MARKED.fullmatch(context.strip())
    if match is None or context.count("<b>") != 1 or context.count("</b>") != 1 or not match[2].strip():
        return None
    before, word, after = match.groups()
    return before + word.strip() + after, (len(before), len(before) + len(word.strip()))


def _finite(score: str) -> float | Fault:
    try:
        number = float(score)
    except ValueError:
        number = math.nan
    return number if math.isfinite(number) else Fault(f"the score must be a number, got {score!r}")


def fitted(encoder: Encoder, contexts: Words) -> tuple[Words, int]:
    """Contexts of one word each that the encoder takes whole, and how many had to be cut.

    What is longer than `max_length` tokens becomes the word with the words around it, as many on each side as fit.
    """
    counting = TextTokenizer(encoder.tokenizer, _UNBOUNDED)
    counts = [len(ids) for ids, _ in counting.with_offsets(contexts.texts)]
    rows = [row for row, count in enumerate(counts) if count > encoder.max_length]
    long = [(contexts.texts[row], contexts.spans[row][0]) for row in rows]
    # how many words on each side fit, and how many do not
    fits, fits_not = [0] * len(long), [len(text.split()) for text, _ in long]
    while any(bad - good > 1 for good, bad in zip(fits, fits_not, strict=True)):
        middles = [(good + bad) // 2 for good, bad in zip(fits, fits_not, strict=True)]
        tried = [_around(*context, middle)[0] for context, middle in zip(long, middles, strict=True)]
        for place, (ids, _) in enumerate(counting.with_offsets(tried)):
            (fits if len(ids) <= encoder.max_length else fits_not)[place] = middles[place]
    texts, spans = list(contexts.texts), list(contexts.spans)
    for row, context, width in zip(rows, long, fits, strict=True):
        text, span = _around(*context, width)
        texts[row], spans[row] = text, [span]
    return Words(texts, spans), len(rows)


def _around(text: str, span: Span, width: int) -> tuple[str, Span]:
    """The word at `span` with `width` words on each side, and its place there."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    its_own = [place for place, (begin, end) in enumerate(words) if begin < span[1] and end > span[0]]
    begin = words[max(0, its_own[0] - width)][0]
    end = words[min(len(words) - 1, its_own[-1] + width)][1]
    return text[begin:end], (span[0] - begin, span[1] - begin)
