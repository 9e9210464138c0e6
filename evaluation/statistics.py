"""Correlations and means with bootstrap intervals, and the paired difference of two systems.

A resample of n items with replacement is how often each item stands in it: weights `(B, n)` of whole numbers, each row
with sum n. A statistic takes them and gives its value in each resample, so that 10,000 resamples are a few matrix
products; on weights of one it gives the plain value. Intervals are percentile intervals (Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, chapter 13).

Shapes: n items, B resamples.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]  # weights (B, n) -> values (B,), nan where undefined

RESAMPLES = 10_000
CONFIDENCE = 0.95
_CHUNK_ELEMENTS = 2**17  # of weights that are worked on together: what a core's cache holds


class Estimate(NamedTuple):
    """A statistic's value and its bootstrap interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """Second minus first, its interval, and the two-sided bootstrap p-value of no difference."""

    value: float
    low: float
    high: float
    p_value: float


def pearson(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> Statistic:
    """Pearson's correlation of `(n,)` and `(n,)`."""
    x, y = (_centred(values) for values in _pair(first, second))
    sums = np.stack([x, y, x * x, y * y, x * y], axis=1)

    def statistic(weights: np.ndarray) -> np.ndarray:
        return _correlation(*(weights @ sums / weights.sum(axis=1, keepdims=True)).T)

    return statistic


def spearman(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> Statistic:
    """Spearman's correlation of `(n,)` and `(n,)`: Pearson's of the ranks within each resample, ties sharing theirs."""
    ranks = [_Ranks(values) for values in _pair(first, second)]

    def statistic(weights: np.ndarray) -> np.ndarray:
        size = weights.sum(axis=1)
        middle = (size[:, None] + 1) / 2  # the mean rank of any resample
        x, y = (rank(weights) - middle for rank in ranks)
        weighted_x, weighted_y = weights * x, weights * y
        zero = np.zeros(len(weights))
        products = (weighted_x, x), (weighted_y, y), (weighted_x, y)
        return _correlation(zero, zero, *(np.einsum("bn,bn->b", *pair) / size for pair in products))

    return statistic


def ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Ranks from 1 on, float64 `(n,)`; ties share theirs."""
    return _Ranks(np.asarray(values, dtype=np.float64))(np.ones((1, len(values))))[0]


def correlation(metric: str, first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> Statistic:
    """The correlation that `metric`, `spearman` or `pearson`, names."""
    return {"spearman": spearman, "pearson": pearson}[metric](first, second)


def mean_of(statistics: Sequence[Statistic]) -> Statistic:
    """The mean of several figures of the same items, as of several seeds."""
    return lambda weights: np.mean([statistic(weights) for statistic in statistics], axis=0)


def ratio(
    numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray | None = None
) -> Statistic:
    """Sum of `numerators` over sum of `denominators`, both `(n,)`; a mean where there are none."""
    over = np.asarray(numerators, dtype=np.float64)
    under = np.ones_like(over) if denominators is None else np.asarray(denominators, dtype=np.float64)
    over, under = _pair(over, under)

    def statistic(weights: np.ndarray) -> np.ndarray:
        return _quotient(weights @ over, weights @ under)

    return statistic


def perplexity(losses: Sequence[float] | np.ndarray, tokens: Sequence[float] | np.ndarray) -> Statistic:
    """Exponential of the mean loss a token, from each item's summed loss in nats and its tokens, both `(n,)`."""
    mean_loss = ratio(losses, tokens)
    return lambda weights: np.exp(mean_loss(weights))


def clustered(statistic: Statistic, clusters: Sequence[float] | np.ndarray) -> tuple[Statistic, int]:
    """The statistic over clusters instead of items, for items that are not independent (of one word type, one text).

    Args:
        clusters: `(n,)`, which cluster each item belongs to, by any whole number.
    Returns:
        a function of weights `(B, K)` of the K clusters, whose items are all in a resample or none; and K.
    """
    names, owner = np.unique(np.asarray(clusters), return_inverse=True)
    return (lambda weights: statistic(np.take(weights, owner, axis=1))), len(names)


class Bootstrap(NamedTuple):
    """A statistic's value, and its values `(B,)` in resamples, the same for every statistic of as many items."""

    value: float
    resampled: np.ndarray

    def estimate(self) -> Estimate:
        """The value and the percentile interval of `CONFIDENCE`."""
        return Estimate(self.value, *_interval(self.resampled))

    def over(self, other: "Bootstrap") -> Difference:
        """This minus another of the same items; the p-value is twice the share of resamples on the far side of zero,
        never below 2 / (B + 1).
        """
        values = self.resampled - other.resampled
        values = values[~np.isnan(values)]
        if not values.size:
            return Difference(np.nan, np.nan, np.nan, np.nan)
        smaller = min(np.count_nonzero(values <= 0), np.count_nonzero(values >= 0))
        p_value = min(1.0, 2 * (smaller + 1) / (len(values) + 1))
        return Difference(self.value - other.value, *_interval(values), p_value)


def mean_of_sets(sets: Sequence[Bootstrap]) -> Bootstrap:
    """The plain mean of several sets' figures, each of which was resampled on its own, with a seed of its own."""
    value = float(np.mean([one.value for one in sets]))
    return Bootstrap(value, np.mean([one.resampled for one in sets], axis=0))


def bootstrap(
    statistics: Sequence[Statistic], num_items: int, *, resamples: int = RESAMPLES, seed: int = 0
) -> list[Bootstrap]:
    """Statistics of the same number of items, all on the same resamples, which are drawn once."""
    values = [[statistic(weights) for statistic in statistics] for weights in resample(num_items, resamples, seed)]
    plain = [float(statistic(np.ones((1, num_items)))[0]) for statistic in statistics]
    return [Bootstrap(*found) for found in zip(plain, map(np.concatenate, zip(*values, strict=True)), strict=True)]


def estimate(statistic: Statistic, num_items: int, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """The statistic and its percentile interval of `CONFIDENCE`; the same seed gives the same interval."""
    (found,) = bootstrap([statistic], num_items, resamples=resamples, seed=seed)
    return found.estimate()


def paired_difference(
    first: Statistic, second: Statistic, num_items: int, *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """`second` minus `first` over the same items, both on the same resamples; the p-value as of `Bootstrap.over`."""
    before, after = bootstrap([first, second], num_items, resamples=resamples, seed=seed)
    return after.over(before)


def resample(num_items: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Weights `(b, n)` float64 of `resamples` resamples in chunks; independent of how they are cut into chunks."""
    if num_items < 1:
        raise ValueError(f"num_items must be at least 1, got {num_items}")
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK_ELEMENTS // num_items)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = generator.integers(num_items, size=(count, num_items))
        drawn += np.arange(count)[:, None] * num_items
        yield np.bincount(drawn.ravel(), minlength=count * num_items).reshape(count, num_items).astype(np.float64)


class _Ranks:
    """Ranks of `values` within a resample, from how often each stands in it: no resample is sorted."""

    def __init__(self, values: np.ndarray):
        self.order = np.argsort(values, kind="stable")
        ordered = values[self.order]
        is_first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
        self.starts = np.flatnonzero(is_first)  # of each run of ties
        self.run = np.empty(len(values), dtype=np.intp)
        self.run[self.order] = np.cumsum(is_first) - 1

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """`(B, n)`; that of an item that is not in the resample means nothing."""
        counts = np.take(weights, self.order, axis=1)
        if len(self.starts) < len(self.order):
            counts = np.add.reduceat(counts, self.starts, axis=1)
        return np.take(counts.cumsum(axis=1) - (counts - 1) / 2, self.run, axis=1)


def _pair(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or not x.size:
        raise ValueError(f"two values an item are needed, (n,) and (n,) with n > 0, got {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("values must be finite, got NaN or infinity")
    return x, y


def _centred(values: np.ndarray) -> np.ndarray:
    """Less their mean, so that sums of squares keep their digits; exact zeros where all are equal."""
    return values - values.mean() if np.ptp(values) else np.zeros_like(values)


def _correlation(x: np.ndarray, y: np.ndarray, xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """From means of the values, of their squares and of their product, each `(B,)`."""
    variances = np.stack([xx - x * x, yy - y * y])
    variances[variances <= 1e-12 * np.stack([xx, yy])] = 0.0  # what rounding leaves of a constant's
    return _quotient(xy - x * y, np.sqrt(variances[0] * variances[1])).clip(-1.0, 1.0)


def _quotient(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    return np.divide(over, under, out=np.full(over.shape, np.nan), where=under != 0)


def _interval(values: np.ndarray) -> tuple[float, float]:
    defined = values[~np.isnan(values)]
    if not defined.size:
        return np.nan, np.nan
    low, high = np.quantile(defined, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
