"""Files of labelled texts, or pairs of texts, and which of them are the splits of a data set.

stsa.binary.train    a label, a space and a text a line (SentEval's layout; `.all` or `.txt` may stand behind)
stsa.binary.dev
stsa.binary.test
rt-polarity.all      a data set without splits
tree_depth.txt       `tr`, `va` or `te`, a tab, a label, a tab and a text a line: all splits of one of SentEval's
                     probing tasks; may be gzipped
msr_paraphrase_train.txt    MRPC's pairs under its header, five columns with tabs and no quotes; also GLUE's train.tsv
msr_paraphrase_test.txt     and dev.tsv, whose test.tsv has no labels
"""

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..texts.files import is_file
from ..texts.formats import refuse_wide_characters
from ..texts.rows import Unreadable
from .bad_rows import BadRows
from .splits import Split, find_splits, looked_for

EXTENSIONS = (".all", ".txt", ".tsv", "")
_PROBING_EXTENSIONS = (".txt", ".txt.gz")
_PROBING_SPLITS: dict[str, Split] = {"tr": "train", "va": "dev", "te": "test"}
_PROBING_LINE = re.compile(rb"(tr|va|te)\t[^\t]+\t")
_PAIRS_HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
_UNLABELLED_HEADER = "index\t#1 ID\t#2 ID\t#1 String\t#2 String"


class Row(NamedTuple):
    """A label and its text; `second` is a pair's second text, else empty."""

    label: str
    text: str
    second: str = ""


class DataSet(NamedTuple):
    """Rows of each split, and the file that they are from; a data set without splits has only `train`."""

    name: str
    is_pairs: bool
    rows: dict[str, list[Row]]
    paths: dict[str, Path]


def read_folder(folder: Path, split: Split, bad_rows: Callable[[str], BadRows]) -> Iterator[DataSet]:
    """Every data set in `folder` that can be scored on `split`, with the splits that this needs.

    Args:
        bad_rows: gives what counts those of a data set, by its name.
    Raises:
        FileNotFoundError: there is none, or one has no training split; says which names were looked for.
        ValueError: a file or, if none may be left out, a line is malformed; says which.
    """
    splits = find_splits(folder, EXTENSIONS)
    taken = {path for files in splits.values() for path in files.values()}
    free = [
        path
        for path in sorted(folder.iterdir())
        if path not in taken and path.name.endswith((".all", *_PROBING_EXTENSIONS))
    ]
    free = [path for path in free if is_file(path)]
    readers: dict[str, Callable[[BadRows], DataSet]] = {}
    for name, files in splits.items():
        if split == "test" and "test" not in files:
            continue
        if "train" not in files:
            wanted = looked_for(name, "train", EXTENSIONS)
            raise FileNotFoundError(f"no training split beside {next(iter(files.values()))}: looked for {wanted}")
        used = {part: path for part, path in files.items() if part in ("train", "dev", split)}
        readers[name] = partial(_of_files, name, used)
    for path in free:
        name = path.name.removesuffix(".gz").removesuffix(".txt").removesuffix(".all")
        if name in readers:
            raise ValueError(f"{path}: another file of {folder} is the data set {name}, too")
        if path.suffix == ".all":
            readers[name] = partial(_of_files, name, {"train": path})
        elif _is_probing(path):
            readers[name] = partial(_probing, name, path, split)
    if not readers:
        wanted = looked_for("*", split, EXTENSIONS)
        raise FileNotFoundError(
            f"no labelled texts in {folder}: looked for {wanted} with their training split, *.all, and *.txt or "
            "*.txt.gz of lines that begin with tr, va or te and a tab"
        )
    for name in sorted(readers):
        yield readers[name](bad_rows(name))


def read_labelled(path: Path, bad_rows: BadRows) -> tuple[bool, list[Row]]:
    """The rows of one file, in UTF-8 or, where it is not that, in Latin-1; and whether they are pairs.

    Raises:
        ValueError: the file is empty or in UTF-16 or UTF-32, or a line is not a label, a space and a text, nor below
            MRPC's header a pair, and none may be left out.
    """
    lines = _lines(path)
    is_pairs = lines[0] == _PAIRS_HEADER
    if lines[0] == _UNLABELLED_HEADER:
        raise ValueError(f"{path}: this split's labels are kept back, --split dev scores the other")
    if path.suffix == ".tsv" and not is_pairs:
        raise ValueError(f"{path}: a .tsv must begin with the header {_PAIRS_HEADER!r}, got {lines[0][:60]!r}")
    rows = []
    for number, line in list(enumerate(lines, start=1))[is_pairs:]:
        row = _pair(line) if is_pairs else _labelled(line)
        if isinstance(row, Row):
            rows.append(row)
        else:
            bad_rows.add(f"{path}:{number}: {row}")
    if not rows:
        raise ValueError(f"{path}: no labelled text stands in it")
    return is_pairs, rows


def _of_files(name: str, files: dict[str, Path], bad_rows: BadRows) -> DataSet:
    found = {split: read_labelled(path, bad_rows) for split, path in files.items()}
    kinds = {is_pairs for is_pairs, _ in found.values()}
    if len(kinds) > 1:
        raise ValueError(f"{', '.join(map(str, files.values()))}: all must be of pairs or of texts")
    return DataSet(name, kinds.pop(), {split: rows for split, (_, rows) in found.items()}, files)


def _probing(name: str, path: Path, split: Split, bad_rows: BadRows) -> DataSet:
    rows: dict[str, list[Row]] = {"train": [], "dev": [], split: []}
    for number, line in enumerate(_lines(path), start=1):
        mark, _, rest = line.partition("\t")
        label, _, text = rest.partition("\t")
        if mark not in _PROBING_SPLITS or not label or not text.strip():
            bad_rows.add(
                f"{path}:{number}: a line must be tr, va or te, a label and a text with tabs, got {line[:40]!r}"
            )
        elif _PROBING_SPLITS[mark] in rows:
            rows[_PROBING_SPLITS[mark]].append(Row(label, text))
    absent = [part for part in rows if not rows[part]]
    if absent:
        raise ValueError(f"{path}: no line is of the {absent[0]} split")
    return DataSet(name, False, rows, dict.fromkeys(rows, path))


def _is_probing(path: Path) -> bool:
    """Whether one of its first lines is a probing task's."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return any(_PROBING_LINE.match(file.readline(10_000)) for _ in range(5))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: the file cannot be read: {error}") from error


def _lines(path: Path) -> list[str]:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        refuse_wide_characters(content.partition(b"\n")[0])  # which would pass for Latin-1
    except (Unreadable, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        decoded = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        decoded = content.decode("latin-1")  # as two of SentEval's files are
    return [line.removesuffix("\r") for line in decoded.removesuffix("\n").split("\n")]


def _labelled(line: str) -> Row | str:
    """A row, or why it is none."""
    label, _, text = line.partition(" ")
    if label and text.strip():
        return Row(label, text)
    return f"a line must be a label, a space and a text, got {line[:40]!r}"


def _pair(line: str) -> Row | str:
    fields = line.split("\t")
    if len(fields) != 5:
        return f"5 columns with tabs are needed, as in the header, got {len(fields)}"
    label, _, _, first, second = fields
    if label not in ("0", "1"):
        return f"the quality must be 0 or 1, got {label!r}"
    return Row(label, first, second) if first.strip() and second.strip() else "a sentence is empty"
