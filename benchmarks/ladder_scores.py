"""A ladder's figures from the reports of its models: each seed's, their mean, and paired differences with intervals.

A row is one figure of one rung: `value`, `low` and `high` of the mean over its seeds, and those of each. Below `over`
stand the same of the differences of the model's last layer, and whether they have one sign in all seeds. A difference
is on the same bootstrap resamples of the same items, to

- the untrained model under both masks,
- the rung that it stands on,
- the other rungs of the same recipe: the same stage without the rung before, on another, under another mask,
- the baselines and controls of the same report.

What a rung has in common with the untrained model (its embeddings' figures, TF-IDF's) stands in the latter's rows.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..evaluation.report import Report, Score, aligned, fingerprint, statistic_of
from ..evaluation.statistics import Bootstrap, Difference, Estimate, Statistic, bootstrap, mean_of_sets
from ..evaluation.summary import DATA_SETS, parts_of
from ..evaluation.tagging import SPAN_F1
from .ladder_evaluation import Window

DIGITS = 6  # behind the point, of a figure in a row
UNTRAINED: dict[str, Window] = {
    "untrained-causal": "causal",
    "untrained-bidirectional": "bidirectional",
}  # rungs, by their mask
_CONTROLS = "untrained-bidirectional"  # whose rows hold what no rung changes
MEAN = "mean of "  # how the data set of a mean is called
_FIELDS = ("dataset", "split", "system", "metric", "layer", "read_out", "probe", "n")

Key = tuple  # of a score


class Sample(NamedTuple):
    """A figure in all resamples, and which items it is of: figures of the same can be paired."""

    values: Bootstrap
    items: tuple[str, ...]


class Figures:
    """All scores of one report and means over its data sets; those of the last layer, or of none, in all resamples."""

    def __init__(self, report: Report):
        known = {score.key: score for score in _with_means(report.scores)}
        last = max((score.layer for score in known.values() if score.layer is not None), default=None)
        compared = {key: parts_of(score, known) for key, score in known.items() if score.layer in (None, last)}
        self.samples = _samples(compared)
        self.scores = {key: replace(score, items={}) for key, score in known.items()}
        for key, sample in self.samples.items():  # the intervals of means that the report has not
            if self.scores[key].low is None:
                self.scores[key] = replace(self.scores[key], **sample.values.estimate()._asdict())

    def controls(self, score: Score) -> dict[str, Key]:
        """What else was scored beside the model's score, by system: of its layer, probe and read-out or of none."""
        return {
            other.system: key
            for key, other in self.scores.items()
            if other.system != score.system
            and (other.dataset, other.split, other.metric) == (score.dataset, score.split, score.metric)
            and all(getattr(other, name) in (None, getattr(score, name)) for name in ("layer", "read_out", "probe"))
        }


Runs = Mapping[int | None, Figures]  # of one rung by seed; the untrained model's only seed is None


def rows(ladder: Mapping[str, Runs], compared: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Any]]:
    """All rows of one evaluation.

    Args:
        ladder: every rung's runs, the untrained model's among them.
        compared: the rungs that each one's differences are to.
    """
    untrained = ladder[_CONTROLS][None].scores
    for rung, runs in ladder.items():
        for key, score in next(iter(runs.values())).scores.items():
            is_own = rung == _CONTROLS or (score.system == "model" and score.layer != 0)
            if not is_own and all(_is_same(figures.scores.get(key), untrained.get(key)) for figures in runs.values()):
                continue
            row = {"rung": rung} | {name: getattr(score, name) for name in _FIELDS} | _over_seeds(runs, key)
            if score.system == "model":
                others = [(name, ladder[name], key) for name in compared[rung] if name in ladder]
                others += [
                    (system, runs, its_key) for system, its_key in next(iter(runs.values())).controls(score).items()
                ]
                found = {name: _difference(runs, key, other, its_key) for name, other, its_key in others}
                row["over"] = {name: difference for name, difference in found.items() if difference}
            yield row


def table(rows: Sequence[dict[str, Any]], stands_on: Mapping[str, str]) -> Iterator[str]:
    """Lines for a reader: of each main figure a row a rung and control, with the difference to what the rung stands on.

    Args:
        rows: of one evaluation.
        stands_on: which of a row's differences is shown, by rung.
    """
    for (dataset, metric, probe, read_out), found in _main_figures(rows).items():
        of = ", ".join(part for part in (metric, probe, read_out) if part)
        yield f"\n{dataset}: {of}; n = {found[0]['n'] or 'unknown'}"
        cells = [("", "value", "95 % interval", "difference", "95 % interval", "to", "sign in all seeds")]
        for row in found:
            other = stands_on.get(row["rung"], "")
            name = row["rung"] if row["system"] == "model" else row["system"]
            cells.append((name, *_estimate_cells(row), *_difference_cells(row.get("over", {}).get(other), other)))
        yield from aligned(cells)


def _main_figures(rows: Sequence[dict[str, Any]]) -> dict[tuple, list[dict[str, Any]]]:
    """The rows of the first metric (or of spans) and probe, of the last layer or none, a group a read-out: of the mean
    over data sets where there is one. The controls follow the model's own.
    """
    last = max((row["layer"] for row in rows if row["layer"] is not None), default=None)
    rows = [row for row in rows if row["layer"] in (None, last)]
    first = next(row for row in rows if row["system"] == "model")
    metrics = {row["metric"] for row in rows}
    metric = SPAN_F1 if SPAN_F1 in metrics else first["metric"]  # most words are in no span: accuracy tells little
    rows = [row for row in rows if row["metric"] == metric]
    means = [row for row in rows if row["dataset"].startswith(MEAN)]
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in means or rows:
        if row["system"] == "model" and row["probe"] == first["probe"]:
            groups.setdefault(tuple(row[name] for name in ("dataset", "metric", "probe", "read_out")), []).append(row)
    for (dataset, _, probe, read_out), found in groups.items():
        found += [
            row
            for row in means or rows
            if row["system"] != "model"
            and (row["rung"], row["dataset"]) == (_CONTROLS, dataset)
            and row["probe"] in (None, probe)
            and row["read_out"] in (None, read_out)
        ]
    return groups


def _estimate_cells(found: Mapping[str, Any], form: str = "") -> tuple[str, str]:
    value, low, high = (found[name] for name in Estimate._fields)
    if value is None:
        return "undefined", ""
    form = form or (".4f" if abs(value) < 10 else ".4g")
    return f"{value:{form}}", "" if low is None else f"{low:{form}} to {high:{form}}"


def _difference_cells(difference: Mapping[str, Any] | None, other: str) -> tuple[str, str, str, str]:
    if difference is None:
        return "", "", "", ""
    sign = {None: "", True: "the same", False: "not the same"}[difference.get("same_sign")]
    return *_estimate_cells(difference, "+.4f"), other, sign


def _with_means(scores: Sequence[Score]) -> list[Score]:
    """The scores and, where the report has none, each system's mean of one metric over several data sets."""
    found = list(scores)
    groups: dict[tuple, list[Score]] = defaultdict(list)
    if not any(DATA_SETS in score.details for score in scores):
        for score in scores:
            groups[score.metric, score.layer, score.read_out, score.probe, score.system].append(score)
    for parts in groups.values():
        splits = {part.dataset: part.split for part in parts}
        if len(parts) == len(splits) > 1:
            whole: dict[str, Any] = {
                "dataset": f"{MEAN}{len(parts)}",
                "split": ", ".join(sorted(set(splits.values()))),
                "value": float(np.mean([part.value for part in parts])),
                "n": sum(part.n or 0 for part in parts) or None,
            }
            found.append(replace(parts[0], **whole, low=None, high=None, items={}, details={DATA_SETS: splits}))
    return found


def _samples(parts: Mapping[Key, Sequence[Score]]) -> dict[Key, Sample]:
    """Of figures that are each the mean of some scores, where these have items."""
    statistics: dict[tuple[int, int], list[tuple[Key, Statistic]]] = defaultdict(list)
    items: dict[Key, tuple[str, ...]] = {}
    for key, scores in parts.items():
        found = [statistic_of(score.metric, score.items) for score in scores]
        known = [statistic for statistic in found if statistic is not None]
        if len(known) < len(scores):
            continue
        items[key] = tuple(
            fingerprint(score.items.get("cluster", [statistic.num_items]))
            for score, statistic in zip(scores, known, strict=True)
        )
        for place, (statistic, num_items) in enumerate(known):
            statistics[num_items, place].append((key, statistic))
    values: dict[Key, list[Bootstrap]] = defaultdict(list)
    # each set of a mean is resampled on its own, and all figures of as many items share the resamples
    for (num_items, place), entries in statistics.items():
        drawn = bootstrap([statistic for _, statistic in entries], num_items, seed=place)
        for (key, _), its_values in zip(entries, drawn, strict=True):
            values[key].append(its_values)
    return {key: Sample(mean_of_sets(its_values), items[key]) for key, its_values in values.items()}


def _is_same(first: Score | None, second: Score | None) -> bool:
    """Whether two figures are one, as those of what training does not change."""
    return first is not None and second is not None and _estimate(first) == _estimate(second)


def _estimate(found: Score | Estimate | Difference) -> dict[str, float | None]:
    return {name: _rounded(getattr(found, name)) for name in Estimate._fields}


def _rounded(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else round(value, DIGITS)


def _over_seeds(runs: Runs, key: Key) -> dict[str, Any]:
    """The mean over seeds with its interval, and each seed's own."""
    scores = {seed: figures.scores[key] for seed, figures in runs.items()}
    if len(scores) == 1:
        (score,) = scores.values()
        return _estimate(score) | ({} if None in scores else {"seeds": _by_seed(scores)})
    samples = [figures.samples.get(key) for figures in runs.values()]
    known = [sample for sample in samples if sample is not None]
    if len(known) == len(samples) and len({sample.items for sample in known}) == 1:
        mean = _estimate(mean_of_sets([sample.values for sample in known]).estimate())
    else:
        mean = {
            "value": _rounded(float(np.mean([score.value for score in scores.values()]))),
            "low": None,
            "high": None,
        }
    return mean | {"seeds": _by_seed(scores)}


def _by_seed(found: Mapping[int | None, Score]) -> dict[str, dict[str, float | None]]:
    return {str(seed): _estimate(each) for seed, each in found.items()}


def _difference(runs: Runs, key: Key, other: Runs, other_key: Key) -> dict[str, Any] | None:
    """Of a figure to another, seed by seed and in the mean; None where these are not of the same items."""
    pairs = []
    for seed, figures in runs.items():
        others = other.get(seed, other.get(None))
        if others is None or key not in figures.samples or other_key not in others.samples:
            return None
        pairs.append((figures.samples[key], others.samples[other_key]))
    if len({sample.items for pair in pairs for sample in pair}) > 1:
        return None
    ours, theirs = (mean_of_sets([sample.values for sample in samples]) for samples in zip(*pairs, strict=True))
    found = _estimate(ours.over(theirs))
    if len(runs) == 1:
        return found
    each = {
        str(seed): _rounded(one.values.over(its.values).value) for seed, (one, its) in zip(runs, pairs, strict=True)
    }
    signs = {np.sign(difference or 0.0) for difference in each.values()}
    return found | {"seeds": each, "same_sign": len(signs) == 1}
