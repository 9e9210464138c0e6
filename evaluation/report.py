"""What an evaluation found: a JSON file, and a table of it."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import numpy as np

from .statistics import Difference, Statistic, clustered, correlation, estimate, mean_of, perplexity, ranks, ratio


@dataclass(frozen=True)
class Score:
    """One figure, with its 95 % interval where it has one.

    Attributes:
        dataset, split: what was scored.
        system: `model`, or the name of what stands beside it for comparison.
        metric: `spearman`, `accuracy`, `perplexity`, …
        low, high: bounds of the interval; None without one.
        layer: for figures of a layer; 0 is the embeddings.
        n: how many items the figure is of.
        read_out: for figures of words: `token`, `previous` or `both`.
        probe: what was trained on frozen states: `linear` or `mlp`.
        items: what a paired comparison needs of each item, by name, all of one length; `cluster` numbers the items that
            are resampled together.
        details: what else belongs to it.
        lead: how far the model is ahead of this, a baseline's figure, on the same items.
    """

    dataset: str
    split: str
    system: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    layer: int | None = None
    n: int | None = None
    read_out: str | None = None
    probe: str | None = None
    items: dict[str, list[float]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    lead: Difference | None = None

    @classmethod
    def of_items(
        cls,
        dataset: str,
        split: str,
        system: str,
        metric: str,
        items: Mapping[str, Sequence[float] | np.ndarray],
        **rest: Any,
    ) -> "Score":
        """The figure that the items give, as `statistic_of` says, with its interval; `n` is their number."""
        columns = {name: np.asarray(column).tolist() for name, column in items.items()}
        found = statistic_of(metric, columns)
        if found is None:
            raise ValueError(f"items must be those of a figure, got {', '.join(columns)}")
        rest = {"n": len(next(iter(columns.values())))} | rest
        return cls(dataset, split, system, metric, *estimate(*found), items=columns, **rest)

    @property
    def key(self) -> tuple:
        return self.dataset, self.split, self.system, self.metric, self.layer, self.read_out, self.probe

    @property
    def what(self) -> str:
        """The metric, and of which probe, read-out and layer it is."""
        parts = [self.metric, self.probe, self.read_out, None if self.layer is None else f"layer {self.layer}"]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Report:
    """All figures of one evaluation.

    Attributes:
        task: as `bivec evaluate` calls it: `sts`, `classification`, `words`, …
        model: what was evaluated, from `Encoder.describe`; `identity` is all that its vectors depend on.
        settings: what the figures depend on beside the model and the data.
        data: SHA-256 of each data set as it was used.
        checks: statements that were verified, and how that came out.
        notes: what a reader must know beside the figures, such as how many rows were left out.
    """

    task: str
    model: dict[str, Any]
    settings: dict[str, Any]
    data: dict[str, str]
    scores: list[Score]
    checks: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def origin(self) -> dict[str, Any]:
        """All that the figures come from, as JSON has it: reports of one origin are the same."""
        model = self.model.get("identity")
        return json.loads(json.dumps({"task": self.task, "model": model, "settings": self.settings, "data": self.data}))

    def to_json(self) -> bytes:
        """The file's content; undefined figures are null."""
        text = json.dumps(finite(asdict(self)), indent=1, ensure_ascii=False, allow_nan=False)
        return f"{text}\n".encode()

    @classmethod
    def read(cls, path: Path) -> "Report":
        """The report of a file; raises ValueError naming the file where it is none."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            _check_kinds(values, _REPORT_KINDS)
            return cls(**values | {"scores": [read_score(score) for score in values["scores"]]})
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} must be what `bivec evaluate --output` wrote: {reason}") from error


# of a report's model: what makes it the same one, in whatever dtype
MODEL_NAMES = ("name", "base", "adapters", "mask")

_REPORT_KINDS = {"task": str, "model": dict, "settings": dict, "data": dict, "scores": list}
_SCORE_KINDS = {"dataset": str, "split": str, "system": str, "metric": str, "value": (int, float, NoneType)}
_SCORE_KINDS_OR_ABSENT = {
    "low": (int, float, NoneType),
    "high": (int, float, NoneType),
    "layer": (int, NoneType),
    "n": (int, NoneType),
    "read_out": (str, NoneType),
    "probe": (str, NoneType),
}


def read_score(values: dict[str, Any]) -> Score:
    """A score as it stands in a file; raises ValueError or TypeError where it is none."""
    _check_kinds(values, _SCORE_KINDS | {name: kind for name, kind in _SCORE_KINDS_OR_ABSENT.items() if name in values})
    items = {name: [_number(item) for item in column] for name, column in values.get("items", {}).items()}
    if items and len({0, *map(len, items.values())}) != 2:
        raise ValueError(f"items {', '.join(items)} must be of one length")
    lead = values.get("lead")
    if lead is not None:
        lead = Difference(**{name: _number(value) for name, value in lead.items()})
    return Score(**values | {"value": _number(values["value"]), "items": items, "lead": lead})


def _check_kinds(values: dict[str, Any], kinds: dict[str, Any]) -> None:
    for name, kind in kinds.items():
        if not isinstance(values[name], kind):
            raise TypeError(f"{name!r} must not be {type(values[name]).__name__}")


class ItemStatistic(NamedTuple):
    """A figure as a function of weights `(B, n)` of its items, or of clusters of them, and how many these are."""

    statistic: Statistic
    num_items: int


def statistic_of(metric: str, items: dict[str, list[float]]) -> ItemStatistic | None:
    """How a figure comes from its items, with `cluster` from clusters of them; None where it has no such items."""
    match items:
        case {"gold": gold, "similarity": similarity}:
            found = correlation(metric, gold, similarity)
        case {"gold": gold, "predicted 0": _}:  # by each seed's probe
            columns = [column for name, column in items.items() if name.startswith("predicted ")]
            found = mean_of([correlation(metric, gold, predicted) for predicted in columns])
        case {"over 0": _, "under 0": _}:
            seeds = [name.removeprefix("over ") for name in items if name.startswith("over ")]
            found = mean_of([ratio(items[f"over {seed}"], items[f"under {seed}"]) for seed in seeds])
        case _ if any(name.startswith("gold ") for name in items):
            found = mean_of(list(_of_several_targets(metric, items)))
        case {"loss": loss, "tokens": tokens}:
            found = perplexity(loss, tokens)
        case {"bits": over, "characters": under} | {"over": over, "under": under}:
            found = ratio(over, under)
        case {"correct": share} | {"share": share}:
            found = ratio(share)
        case _:
            return None
    if "cluster" in items:
        return ItemStatistic(*clustered(found, items["cluster"]))
    return ItemStatistic(found, len(next(iter(items.values()))))


def _of_several_targets(metric: str, items: dict[str, list[float]]) -> Iterator[Statistic]:
    """The correlation of `gold NAME` with each seed's `predicted SEED NAME`, of all names.

    Spearman's is Pearson's of ranks among all items: to rank them anew in each resample takes minutes for some dozens
    of columns. It moves the bounds of 300 items by less than a hundredth, those of 30 by up to 0.06.
    """
    columns = {name: ranks(column) if metric == "spearman" else column for name, column in items.items()}
    for name, predicted in columns.items():
        if name.startswith("predicted "):
            _, _, target = name.split(" ", 2)
            yield correlation("pearson", columns[f"gold {target}"], predicted)


def dtype_labels(reports: Sequence[Report]) -> list[str]:
    """What stands behind a report's name: ` (int8+bfloat16)` where another is of the same model in another dtype."""
    models = [tuple(str(report.model.get(name)) for name in MODEL_NAMES) for report in reports]
    dtypes = [report.model.get("dtype") for report in reports]
    found = set(zip(models, dtypes, strict=True))
    several = {model for model in models if sum(model == other for other, _ in found) > 1}
    return [f" ({dtype})" if dtype and model in several else "" for model, dtype in zip(models, dtypes, strict=True)]


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
    """Lines: a row a figure, with the model's lead over it where it is a baseline's; then checks and notes."""
    with_leads = any(score.lead for score in report.scores)
    rows = [("data", "split", "n", "system", "metric", "value", "95 % interval")]
    leads = [("model's lead", "95 % interval", "p")]
    for score in report.scores:
        count = "" if score.n is None else f"{score.n:,}"
        value = number(score.value)
        rows.append((score.dataset, score.split, count, score.system, score.what, value, interval(score)))
        leads.append(difference_cells(score.lead))
    yield from aligned([(*row, *lead) for row, lead in zip(rows, leads, strict=True)] if with_leads else rows)
    for check, passed in report.checks.items():
        yield f"{check}: {'yes' if passed else 'NO'}"
    yield from report.notes


def difference_cells(difference: Difference | None) -> tuple[str, str, str]:
    """The difference with its sign, its interval and its p-value; empty without one."""
    if difference is None:
        return "", "", ""
    value, low, high, p_value = difference
    return f"{value:+.4f}", f"{low:+.4f} to {high:+.4f}", f"{p_value:.4f}"


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


def finite(value: Any) -> Any:
    """The value as JSON has it: None for numbers that are not finite, an object for a difference."""
    if isinstance(value, Difference):
        return finite(value._asdict())
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
