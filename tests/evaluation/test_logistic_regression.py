"""The logistic regression: scikit-learn's optimum on dense and sparse features, from any start, at any tolerance."""

import numpy as np
import pytest
import scipy.sparse
from sklearn.linear_model import LogisticRegression as ScikitLearns

from bivec.evaluation.logistic_regression import TOLERANCE, LogisticRegression

STRENGTHS = (0.01, 1.0, 100.0)


def problem(num_classes: int, sparse: bool = False, n: int = 300, size: int = 20, seed: int = 0):
    """Correlated features, some much larger than others, and targets that they tell in part."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(n, size)) @ generator.normal(size=(size, size)) * np.logspace(-1, 1, size)
    outputs = features @ generator.normal(size=(size, num_classes)) / 10
    targets = (outputs + generator.gumbel(size=outputs.shape) * outputs.std()).argmax(axis=1)
    targets[:num_classes] = np.arange(num_classes)
    if sparse:
        features = scipy.sparse.csr_matrix(features * (generator.random(features.shape) < 0.3))
    return features, targets


def gradient(classifier, features, targets, strength):
    """Of the mean loss in the features' own coordinates, by the textbook."""
    outputs = features @ classifier.weights + classifier.intercepts
    if outputs.shape[1] == 1:
        residuals = 1 / (1 + np.exp(-outputs)) - targets[:, None]
    else:
        shares = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        residuals = shares / shares.sum(axis=1, keepdims=True) - np.eye(outputs.shape[1])[targets]
    slopes = features.T @ residuals / len(targets) + classifier.weights / (strength * len(targets))
    return np.concatenate([np.asarray(slopes).ravel(), residuals.mean(axis=0)])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_it_ends_where_scikit_learn_does(num_classes, sparse):
    features, targets = problem(num_classes, sparse)
    for strength, found in zip(STRENGTHS, LogisticRegression(1e-9).path(features, targets, STRENGTHS), strict=True):
        reference = ScikitLearns(C=strength, solver="newton-cg", tol=1e-10, max_iter=10_000).fit(features, targets)
        np.testing.assert_allclose(found.weights.T, reference.coef_, atol=1e-4 * np.abs(reference.coef_).max())
        np.testing.assert_array_equal(found.predict(features), reference.predict(features))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_it_has_converged(num_classes, sparse):
    """At its own tolerance: the gradient is nothing beside that at the beginning, and finer ones predict the same."""
    features, targets = problem(num_classes, sparse)
    unseen, _ = problem(num_classes, sparse, seed=1)
    finer = LogisticRegression(TOLERANCE / 1000).path(features, targets, STRENGTHS)
    for strength, found, exact in zip(
        STRENGTHS, LogisticRegression().path(features, targets, STRENGTHS), finer, strict=True
    ):
        nothing = found._replace(weights=0 * found.weights, intercepts=0 * found.intercepts)
        left, before = (np.abs(gradient(one, features, targets, strength)).max() for one in (found, nothing))
        assert left < 1e-4 * before
        assert np.abs(gradient(exact, features, targets, strength)).max() < 1e-7 * before
        np.testing.assert_array_equal(found.predict(unseen), exact.predict(unseen))


def test_where_it_starts_is_nothing_to_the_end():
    """Neither the strengths before, nor that another fit's covariance gave the coordinates."""
    features, targets = problem(3, n=600)
    regression = LogisticRegression(1e-8)
    list(regression.path(features[300:], targets[300:], [1.0]))
    features, targets = features[:300], targets[:300]
    (alone,) = LogisticRegression(1e-8).path(features, targets, [100.0])
    *_, last = regression.path(features, targets, STRENGTHS)
    outputs = features @ alone.weights
    np.testing.assert_allclose(features @ last.weights, outputs, atol=1e-4 * np.abs(outputs).max())


def test_separable_and_constant_features_are_no_trouble():
    features = np.stack([np.repeat([0.0, 1.0], 20), np.ones(40), np.zeros(40)], axis=1)
    for found in LogisticRegression().path(features, np.repeat([0, 1], 20), (0.001, 1e6)):
        assert (found.predict(features) == np.repeat([0, 1], 20)).all()
        assert np.isfinite(found.weights).all()


def test_what_has_not_converged_is_told(monkeypatch):
    monkeypatch.setattr("bivec.evaluation.logistic_regression._MOST_STEPS", 2)
    features, targets = problem(4)
    with pytest.warns(UserWarning, match="the logistic regression with C = 1 has not converged: gradient .*e-"):
        list(LogisticRegression().path(features, targets, [1.0]))
