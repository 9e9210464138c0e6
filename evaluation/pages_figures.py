"""Figures of one or several runs, their intervals, and the paired difference of two models."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from .report import ItemStatistic, Score, statistic_of
from .statistics import Bootstrap, Difference, bootstrap, mean_of, mean_of_sets
from .summary import DATA_SETS


class Interval(NamedTuple):
    low: float
    high: float


@dataclass
class Figure:
    """One score, or the mean of the scores of several runs.

    Attributes:
        runs: the scores.
        parts: of each run, the data sets' scores that its score is the mean of; the score itself where it is none.
    """

    runs: list[Score]
    parts: list[list[Score]]

    @property
    def value(self) -> float:
        return float(np.mean([score.value for score in self.runs]))

    @property
    def is_of_one(self) -> bool:
        """Whether it is of a single run."""
        return len(self.runs) == 1

    @property
    def is_mean(self) -> bool:
        """Whether it is over several data sets."""
        return any(DATA_SETS in score.details for score in self.runs)

    @cached_property
    def interval(self) -> Interval | None:
        """The score's own; of several runs that of their mean, on resamples of the items that they share."""
        if len(self.runs) > 1:
            found = _resampled(self)
            return None if found is None else Interval(*found[0].estimate()[1:])
        (score,) = self.runs
        if score.low is None or score.high is None or np.isnan(score.low):
            return None
        return Interval(score.low, score.high)


def seeds_of(figure: Figure) -> list[float]:
    """What each seed gave where a single score is the mean over several."""
    each = figure.runs[0].details.get(f"{figure.runs[0].metric} of each seed", []) if len(figure.runs) == 1 else []
    return each if len(each) > 1 and all(isinstance(value, float) for value in each) else []


def difference(first: Figure | None, second: Figure | None) -> Difference | None:
    """Second minus first where both are of the same items; None else, and where both have the very same items."""
    if first is None or second is None:
        return None
    if [score.items for run in first.parts for score in run] == [score.items for run in second.parts for score in run]:
        return None
    found = _resampled(first, second)
    return None if found is None else found[1].over(found[0])


def lead(control: Figure | None, model: Figure | None) -> Difference | None:
    """How far a model is ahead of a control; None where no result says so."""
    if control is None or any(score.lead is None for score in control.runs):
        return None
    return control.runs[0].lead if len(control.runs) == 1 else difference(control, model)


def _resampled(*figures: Figure) -> list[Bootstrap] | None:
    """Figures on the same resamples of each data set; None where these are not the same items in all runs of all."""
    sets: list[list[Bootstrap]] = []
    num_sets = {len(run) for figure in figures for run in figure.parts}
    if len(num_sets) > 1:
        return None
    for place in range(num_sets.pop()):
        statistics: list[list[ItemStatistic]] = []
        clusters = []
        for figure in figures:
            scores = [run[place] for run in figure.parts]
            clusters += [(score.dataset, score.split, score.items.get("cluster")) for score in scores]
            statistics.append([found for score in scores if (found := statistic_of(score.metric, score.items))])
        counts = {found.num_items for its in statistics for found in its}
        if len(counts) != 1 or sum(map(len, statistics)) < len(clusters) or any(it != clusters[0] for it in clusters):
            return None
        means = [mean_of([found.statistic for found in its]) for its in statistics]
        sets.append(bootstrap(means, counts.pop(), seed=place))
    return [mean_of_sets(each) for each in zip(*sets, strict=True)]
