"""Means over data sets and the model's lead over its baselines, against bootstraps made by hand."""

from dataclasses import replace

import numpy as np
import pytest

from bivec.evaluation.comparison import compare
from bivec.evaluation.report import Report, Score
from bivec.evaluation.summary import summarized


def accuracy(dataset: str, system: str, share: float, n: int = 400, seed: int = 0, metric: str = "accuracy") -> Score:
    correct = np.random.default_rng(seed).random(n) < share
    return Score.of_items(dataset, "test", system, metric, {"correct": correct.astype(float)})


def found(scores, means=True) -> dict:
    return {(score.dataset, score.system, score.metric): score for score in summarized(scores, means=means)}


def test_a_mean_has_the_interval_of_sets_that_are_resampled_on_their_own():
    scores = [
        accuracy("a", "model", 0.6, 900, 1),
        accuracy("b", "model", 0.9, 100, 2),
        accuracy("c", "model", 0.5, 400, 3),
    ]
    mean = found(scores)["mean of 3", "model", "accuracy"]
    assert mean.value == pytest.approx(np.mean([score.value for score in scores]))
    assert (mean.n, mean.split, list(mean.details["data sets"])) == (1400, "test", ["a", "b", "c"])
    # of independent binomials, each of a third's weight
    deviation = np.sqrt(sum(score.value * (1 - score.value) / score.n for score in scores)) / 3
    assert [mean.low - mean.value, mean.high - mean.value] == pytest.approx(
        [-1.96 * deviation, 1.96 * deviation], rel=0.05
    )


def test_sets_of_one_size_are_resampled_on_their_own_too():
    scores = [accuracy(name, "model", 0.6) for name in "abcd"]
    mean = found(scores)["mean of 4", "model", "accuracy"]
    assert mean.high - mean.low == pytest.approx((scores[0].high - scores[0].low) / 2, rel=0.1)


def test_a_mean_is_of_one_metric_and_system_over_several_sets():
    scores = [accuracy(name, system, 0.7) for name in "ab" for system in ("model", "tfidf-words")]
    scores += [accuracy("a", "model", 0.7, metric="f1"), accuracy("a", "other", 0.7)]
    means = [score for score in summarized(scores, means=True) if score.dataset == "mean of 2"]
    assert [(score.system, score.metric) for score in means] == [("model", "accuracy"), ("tfidf-words", "accuracy")]
    assert not [score for score in summarized(scores, means=False) if score.dataset == "mean of 2"]
    assert summarized(scores[:1], means=True) == scores[:1]


def test_the_lead_is_paired():
    """The baseline errs where the model does, and on every tenth item more: paired, that is no matter of chance."""
    model = accuracy("a", "model", 0.7, 500)
    right = np.array(model.items["correct"])
    right[::10] = 0.0
    baseline = Score.of_items("a", "test", "token average", "accuracy", {"correct": right})
    lead = found([model, baseline])["a", "token average", "accuracy"].lead
    assert lead.value == pytest.approx(model.value - baseline.value)
    worse = np.array(model.items["correct"]) - right
    deviation = worse.std() / np.sqrt(500)
    assert [lead.low, lead.high] == pytest.approx(
        [lead.value - 1.96 * deviation, lead.value + 1.96 * deviation], rel=0.1
    )
    assert lead.low > 0
    assert lead.p_value < 0.001
    assert baseline.high > model.low  # as intervals of their own would not have shown


def test_the_lead_of_a_mean_is_of_the_same_sets():
    scores = [
        accuracy(name, system, share, seed=place)
        for place, name in enumerate("ab")
        for system, share in (("model", 0.8), ("tfidf-words", 0.7))
    ]
    lead = found(scores)["mean of 2", "tfidf-words", "accuracy"].lead
    each = [found(scores)[name, "tfidf-words", "accuracy"].lead for name in "ab"]
    assert lead.value == pytest.approx(np.mean([one.value for one in each]))
    assert lead.high - lead.low < min(one.high - one.low for one in each)
    assert found(scores[:3])["a", "tfidf-words", "accuracy"].lead is not None
    others = [*scores[:3], accuracy("c", "tfidf-words", 0.7)]
    assert found(others)["mean of 2", "tfidf-words", "accuracy"].lead is None
    assert found([*scores, accuracy("c", "model", 0.5)])["mean of 2", "tfidf-words", "accuracy"].lead is None


@pytest.mark.parametrize("control", ["shuffled labels", "majority"])
def test_a_control_is_no_baseline(control):
    assert found([accuracy("a", "model", 0.8), accuracy("a", control, 0.5)])["a", control, "accuracy"].lead is None


def test_other_items_have_no_lead():
    scores = [accuracy("a", "model", 0.8), accuracy("a", "tfidf-words", 0.7, n=300)]
    assert found(scores)["a", "tfidf-words", "accuracy"].lead is None
    assert found(scores[1:])["a", "tfidf-words", "accuracy"].lead is None


def test_means_are_compared_on_their_sets_items():
    def report(shares, names="ab"):
        scores = [accuracy(name, "model", share, seed=9) for name, share in zip(names, shares, strict=True)]
        return Report("classification", {}, {}, dict.fromkeys(names, "same"), summarized(scores, means=True))

    first, second = report([0.6, 0.7]), report([0.65, 0.9])
    rows = {row.known.dataset: row.difference for row in compare(first, second).rows}
    assert rows["mean of 2"].value == pytest.approx((rows["a"].value + rows["b"].value) / 2)
    assert rows["mean of 2"].low > 0
    other = replace(report([0.6, 0.7], "ac"), data={"a": "same", "c": "same"})
    assert {row.known.dataset: row.difference is None for row in compare(first, other).rows} == {
        "a": True,  # the same items twice
        "mean of 2": True,
    }
