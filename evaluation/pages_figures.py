"""Figures of one or several runs, their intervals, and the paired difference of two models."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from .report import ItemStatistic, Score, statistic_of
from .statistics import Difference, estimate, mean_of, paired_difference


class Interval(NamedTuple):
    low: float
    high: float


@dataclass
class Figure:
    """One score, or the mean of the scores of several runs."""

    runs: list[Score]

    @property
    def value(self) -> float:
        return float(np.mean([score.value for score in self.runs]))

    @cached_property
    def interval(self) -> Interval | None:
        """The score's own; of several runs that of their mean, on resamples of the items that they share."""
        if len(self.runs) > 1:
            found = self.statistic
            return None if found is None else Interval(*estimate(*found)[1:])
        (score,) = self.runs
        if score.low is None or score.high is None or np.isnan(score.low):
            return None
        return Interval(score.low, score.high)

    @cached_property
    def statistic(self) -> ItemStatistic | None:
        """The value as a function of resampled items; None where there are none, or the runs' are not the same."""
        found = [statistic_of(score.metric, score.items) for score in self.runs]
        first = found[0]
        if first is None or any(other is None or other.num_items != first.num_items for other in found):
            return None
        if any(score.items.get("cluster") != self.runs[0].items.get("cluster") for score in self.runs):
            return None
        return ItemStatistic(mean_of([each.statistic for each in found if each is not None]), first.num_items)


def difference(first: Figure, second: Figure) -> Difference | None:
    """Second minus first where both are of the same items; None else, and where both have the very same figures."""
    if [run.items for run in first.runs] == [run.items for run in second.runs]:
        return None
    if first.runs[0].items.get("cluster") != second.runs[0].items.get("cluster"):
        return None
    before, after = first.statistic, second.statistic
    if before is None or after is None or before.num_items != after.num_items:
        return None
    return paired_difference(before.statistic, after.statistic, before.num_items)
