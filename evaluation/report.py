"""What an evaluation found: a JSON file, and a table of it."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Score:
    """One figure, with its 95 % interval where it has one.

    Attributes:
        dataset, split: what was scored.
        system: `model`, or the name of what stands beside it for comparison.
        metric: `spearman`, `accuracy`, `perplexity`, …
        low, high: bounds of the interval; None without one.
        layer: for figures of a layer; 0 is the embeddings.
        items: what a paired comparison needs of each item, by name, all of one length.
        details: what else belongs to it.
    """

    dataset: str
    split: str
    system: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    layer: int | None = None
    items: dict[str, list[float]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple:
        return self.dataset, self.split, self.system, self.metric, self.layer


@dataclass(frozen=True)
class Report:
    """All figures of one evaluation.

    Attributes:
        task: `sts`, `classification`, `generation` or `anisotropy`.
        model: what was evaluated, from `Encoder.describe`.
        settings: what the figures depend on beside the model and the data.
        data: SHA-256 of each data set as it was used.
        checks: statements that were verified, and how that came out.
    """

    task: str
    model: dict[str, Any]
    settings: dict[str, Any]
    data: dict[str, str]
    scores: list[Score]
    checks: dict[str, bool] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """The file's content; undefined figures are null."""
        text = json.dumps(_finite(asdict(self)), indent=1, ensure_ascii=False, allow_nan=False)
        return f"{text}\n".encode()

    @classmethod
    def read(cls, path: Path) -> "Report":
        """The report of a file; raises ValueError naming the file where it is none."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            _check_kinds(values, _REPORT_KINDS)
            return cls(**values | {"scores": [_score(score) for score in values["scores"]]})
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} must be what `bivec evaluate --output` wrote: {reason}") from error


_REPORT_KINDS = {"task": str, "model": dict, "settings": dict, "data": dict, "scores": list}
_SCORE_KINDS = {"dataset": str, "split": str, "system": str, "metric": str, "value": (int, float, NoneType)}
_SCORE_KINDS_OR_ABSENT = {"low": (int, float, NoneType), "high": (int, float, NoneType), "layer": (int, NoneType)}


def _score(values: dict[str, Any]) -> Score:
    """A score as it stands in a file; raises ValueError or TypeError where it is none."""
    _check_kinds(values, _SCORE_KINDS | {name: kind for name, kind in _SCORE_KINDS_OR_ABSENT.items() if name in values})
    items = {name: [_number(item) for item in column] for name, column in values.get("items", {}).items()}
    if items and len({0, *map(len, items.values())}) != 2:
        raise ValueError(f"items {', '.join(items)} must be of one length")
    return Score(**values | {"value": _number(values["value"]), "items": items})


def _check_kinds(values: dict[str, Any], kinds: dict[str, Any]) -> None:
    for name, kind in kinds.items():
        if not isinstance(values[name], kind):
            raise TypeError(f"{name!r} must not be {type(values[name]).__name__}")


def is_report(path: Path) -> bool:
    """Whether a file is what `bivec evaluate --output` wrote."""
    try:
        Report.read(path)
    except ValueError:
        return False
    return True


def fingerprint(*columns: Iterable) -> str:
    """SHA-256 of columns of texts or numbers."""
    content = json.dumps([[_plain(value) for value in column] for column in columns])
    return hashlib.sha256(content.encode()).hexdigest()


def table(report: Report) -> Iterator[str]:
    """Lines: a row a figure, a column of layers where any has one."""
    rows = [("data", "split", "system", "metric", "value", "95 % interval")]
    for score in report.scores:
        metric = score.metric if score.layer is None else f"{score.metric}, layer {score.layer}"
        rows.append((score.dataset, score.split, score.system, metric, number(score.value), interval(score)))
    yield from aligned(rows)
    for check, passed in report.checks.items():
        yield f"{check}: {'yes' if passed else 'NO'}"


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows of cells as lines with straight columns; a line feed in a cell, from a file's name, is shown as `\\n`."""
    rows = [[cell.replace("\n", "\\n") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def number(value: float) -> str:
    return "undefined" if np.isnan(value) else f"{value:.4g}" if abs(value) >= 10 else f"{value:.4f}"


def interval(score: Score) -> str:
    if score.low is None or score.high is None or np.isnan(score.low):
        return ""
    return f"{number(score.low)} to {number(score.high)}"


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
