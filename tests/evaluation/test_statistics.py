"""Correlations against scipy, on data and on resamples of it; intervals that cover as often as they say."""

import numpy as np
import pytest
import scipy.stats

from bivec.evaluation import statistics
from bivec.evaluation.statistics import estimate, paired_difference, pearson, perplexity, ratio, resample, spearman


def tied_pairs(count: int, seed: int = 0, slope: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """Two related variables; the first has many ties, as scores that people give do."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=count)
    return np.round(2 * x) / 2, slope * x + generator.normal(size=count)


@pytest.mark.parametrize("count", [3, 10, 501])
def test_correlations_agree_with_scipy(count):
    x, y = tied_pairs(count)
    ones = np.ones((1, count))
    assert spearman(x, y)(ones)[0] == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)
    assert pearson(x, y)(ones)[0] == pytest.approx(scipy.stats.pearsonr(x, y).statistic, abs=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_a_resample_is_what_scipy_finds_on_the_repeated_items(offset):
    x, y = tied_pairs(40)
    x = x + offset
    (weights,) = resample(40, 20, seed=3)
    assert (weights.sum(axis=1) == 40).all()
    repeated = [np.repeat(np.arange(40), row.astype(int)) for row in weights]
    expected = [scipy.stats.spearmanr(x[rows], y[rows]).statistic for rows in repeated]
    np.testing.assert_allclose(spearman(x, y)(weights), expected, atol=1e-12)
    expected = [scipy.stats.pearsonr(x[rows], y[rows]).statistic for rows in repeated]
    np.testing.assert_allclose(pearson(x, y)(weights), expected, atol=1e-8)


def test_ratios_and_perplexity():
    weights = np.array([[1.0, 1.0, 1.0], [0.0, 3.0, 0.0], [2.0, 0.0, 1.0]])
    losses, tokens = [2.0, 9.0, 5.0], [4.0, 3.0, 1.0]
    np.testing.assert_allclose(ratio(losses, tokens)(weights), [16 / 8, 3.0, 9 / 9])
    np.testing.assert_allclose(ratio(losses)(weights), [16 / 3, 9.0, 3.0])
    np.testing.assert_allclose(perplexity(losses, tokens)(weights), np.exp([2.0, 3.0, 1.0]))


@pytest.mark.parametrize("correlation", [spearman, pearson])
@pytest.mark.parametrize("constant", [0.0, 0.1, 1e9])
def test_a_constant_has_no_correlation(correlation, constant):
    assert np.isnan(estimate(correlation(np.full(12, constant), np.arange(12.0)), 12, resamples=50)).all()


def test_intervals_are_scipys():
    x, y = tied_pairs(80)
    for ours, theirs in ((spearman, scipy.stats.spearmanr), (pearson, scipy.stats.pearsonr)):
        found = estimate(ours(x, y), 80)
        expected = scipy.stats.bootstrap(
            (x, y),
            lambda a, b, theirs=theirs: theirs(a, b).statistic,
            paired=True,
            vectorized=False,
            n_resamples=2000,
            method="percentile",
            rng=1,
        ).confidence_interval
        assert found[1:] == pytest.approx((expected.low, expected.high), abs=0.02)
        assert found.low < found.value < found.high


def test_intervals_cover_as_often_as_they_say():
    """The true Pearson correlation of normal pairs, and the mean of a coin, within 95 % intervals."""
    generator = np.random.default_rng(5)
    covers = []
    for trial in range(300):
        x = generator.normal(size=60)
        y = 0.6 * x + 0.8 * generator.normal(size=60)
        coin = generator.random(60) < 0.7
        for statistic, truth in ((pearson(x, y), 0.6), (ratio(coin), 0.7)):
            found = estimate(statistic, 60, resamples=400, seed=trial)
            covers.append(found.low <= truth <= found.high)
    assert 0.91 <= np.mean(covers) <= 0.975


def test_the_same_seed_gives_the_same_interval_however_it_is_cut(monkeypatch):
    x, y = tied_pairs(30)
    whole = estimate(spearman(x, y), 30, resamples=100, seed=4)
    monkeypatch.setattr(statistics, "_CHUNK_ELEMENTS", 7 * 30)
    assert estimate(spearman(x, y), 30, resamples=100, seed=4) == pytest.approx(whole, abs=1e-12)
    assert estimate(spearman(x, y), 30, resamples=100, seed=5)[1:] != whole[1:]


def test_paired_differences():
    gold, first = tied_pairs(200)
    better = first + 0.5 * gold
    found = paired_difference(spearman(gold, first), spearman(gold, better), 200)
    expected = scipy.stats.spearmanr(gold, better).statistic - scipy.stats.spearmanr(gold, first).statistic
    assert found.value == pytest.approx(expected)
    assert 0 < found.low < found.value < found.high
    assert found.p_value == pytest.approx(2 / 10_001)
    # two systems that differ on a few items are told apart by pairing, which their own intervals would not do
    alone = [estimate(spearman(gold, values), 200) for values in (first, better)]
    assert found.high - found.low < alone[0].high - alone[0].low
    nothing = paired_difference(spearman(gold, first), spearman(gold, first), 200, resamples=100)
    assert nothing == (0.0, 0.0, 0.0, 1.0)
    undefined = paired_difference(spearman(gold, np.ones(200)), spearman(gold, first), 200, resamples=100)
    assert np.isnan(undefined).all()


def test_equal_systems_are_seldom_told_apart():
    generator = np.random.default_rng(6)
    significant = 0
    for trial in range(200):
        first, second = (generator.random(80) < 0.6 for _ in range(2))
        significant += paired_difference(ratio(first), ratio(second), 80, resamples=400, seed=trial).p_value < 0.05
    assert 1 <= significant <= 22


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([1.0, 2.0], [1.0], r"\(2,\) and \(1,\)"),
        ([], [], r"n > 0, got \(0,\)"),
        ([1.0, np.nan], [1.0, 2.0], "finite"),
    ],
)
def test_what_is_no_pair_of_variables_is_refused(first, second, message):
    with pytest.raises(ValueError, match=message):
        spearman(first, second)


def test_statistics_on_the_same_resamples_are_those_of_each():
    x, y = tied_pairs(90)
    found = statistics.bootstrap([spearman(x, y), pearson(x, y), ratio(y)], 90)
    assert found[0].estimate() == estimate(spearman(x, y), 90)
    assert found[2].estimate() == estimate(ratio(y), 90)
    assert found[1].over(found[0]) == paired_difference(spearman(x, y), pearson(x, y), 90)
    assert found[1].over(found[0]).value == found[1].value - found[0].value != 0
