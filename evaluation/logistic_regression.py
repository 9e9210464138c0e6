"""Logistic regression with an L2 penalty, converged: the optimum that scikit-learn's `LogisticRegression` looks for.

    sum of losses + |weights|^2 / (2 C), the intercept without a penalty

L-BFGS runs in coordinates in which the Hessian is about the identity. Where nothing is known but the classes' shares p,
it is the Kronecker product of the features' covariance with diag(p) - p p^T, plus 1 / (C n): along the eigenvectors of
both, scaled, two classes need five steps where in the features' own coordinates they need hundreds. Sparse features
keep their own, of one scale. The coordinates change how fast the optimum is found and not where it is; scikit-learn's
solvers, which have none, take ten times as long to the same tolerance (TREC, six strengths: 44 s instead of 4.5).

Shapes: n rows, E features, K outputs (1 of two classes, else as many as classes).
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .extras import needed

# of the mean loss's gradient in these coordinates: half its square is about what the loss has above its minimum
TOLERANCE = 1e-6
_MOST_STEPS = 10_000
_MEMORY = 20  # steps from which L-BFGS estimates the curvature


class Classifier(NamedTuple):
    """Weights float64 `(E, K)` and intercepts `(K,)`."""

    weights: np.ndarray
    intercepts: np.ndarray

    def predict(self, features: Any) -> np.ndarray:
        """Classes, int64 `(n,)`, of dense or sparse features `(n, E)`."""
        outputs = features @ self.weights + self.intercepts
        return (outputs[:, 0] > 0).astype(np.int64) if outputs.shape[1] == 1 else outputs.argmax(axis=1)


class LogisticRegression:
    """Fits classifiers; to be used for the same features on various rows, whose covariance is taken once."""

    def __init__(self, tolerance: float = TOLERANCE):
        self._tolerance = tolerance
        self._variances, self._vectors = np.empty(0), np.empty((0, 0))

    def path(self, features: Any, targets: np.ndarray, strengths: Sequence[float]) -> Iterator[Classifier]:
        """A classifier for each C, which begins where the last one ended; ascending ones are the fastest.

        Args:
            features: float64 `(n, E)`, dense, or a scipy matrix in CSR.
            targets: int64 `(n,)`, classes from 0, each of which occurs.
        Warns:
            UserWarning: the gradient stayed above the tolerance.
        """
        optimize = needed("scipy.optimize", "scipy", "classification")
        counts = np.bincount(targets)
        wanted = np.eye(len(counts))[targets] if len(counts) > 2 else targets[:, None].astype(np.float64)
        problem = _Problem(features, wanted, *self._basis(features))
        weights, intercepts = np.zeros((features.shape[1], wanted.shape[1])), np.zeros(wanted.shape[1])
        for strength in strengths:
            problem.set_strength(strength)
            found = optimize.minimize(
                problem.loss_and_gradient,
                problem.coordinates(weights, intercepts),
                jac=True,
                method="L-BFGS-B",
                options={
                    "maxcor": _MEMORY,
                    "maxiter": _MOST_STEPS,
                    "maxfun": 2 * _MOST_STEPS,
                    "ftol": 0,
                    "gtol": self._tolerance,
                },
            )
            largest = np.abs(found.jac).max()
            if largest > 10 * self._tolerance:  # rounding may end it a little above
                warnings.warn(
                    f"the logistic regression with C = {strength:g} has not converged: gradient {largest:.0e}, "
                    f"tolerance {self._tolerance:.0e}",
                    stacklevel=2,
                )
            weights, intercepts = problem.parameters(found.x)
            yield Classifier(weights, intercepts)

    def _basis(self, features: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """Variances `(E,)` along the columns of orthonormal `(E, E)`; of sparse features the largest, and None."""
        if not isinstance(features, np.ndarray):
            variances = np.asarray(features.multiply(features).mean(axis=0)).ravel()
            return np.full_like(variances, variances.max()), None
        if len(self._variances) != features.shape[1]:
            variances, self._vectors = np.linalg.eigh(features.T @ features / len(features))
            self._variances = variances.clip(min=0.0)
        return self._variances, self._vectors


class _Problem:
    """The mean loss in scaled coordinates, `(E + 1, K)` in one row, of which the last row are the intercepts."""

    def __init__(self, features: Any, wanted: np.ndarray, variances: np.ndarray, vectors: np.ndarray | None):
        self._features, self._wanted, self._variances, self._vectors = features, wanted, variances, vectors
        shares = wanted.mean(axis=0)
        coupling = np.diag(shares) - np.outer(shares, shares)  # of one output p (1 - p)
        curvatures, self._outputs = np.linalg.eigh(coupling)
        self._curvatures = curvatures.clip(min=0.0)
        # outputs that all grow alike change nothing: along them there is no curvature, and never a gradient
        self._intercept_scale = np.where(curvatures > 1e-12, curvatures.clip(min=1e-12), 1.0) ** -0.5

    def set_strength(self, strength: float) -> None:
        self._penalty = 1 / (strength * len(self._wanted))
        self._scale = (self._variances[:, None] * self._curvatures + self._penalty) ** -0.5

    def coordinates(self, weights: np.ndarray, intercepts: np.ndarray) -> np.ndarray:
        turned = self._turned(weights) / self._scale
        return np.concatenate([turned, (intercepts @ self._outputs)[None] / self._intercept_scale]).ravel()

    def parameters(self, coordinates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = coordinates.reshape(-1, self._wanted.shape[1])
        scaled = values[:-1] * self._scale
        if self._vectors is not None:
            scaled = self._vectors @ scaled
        return scaled @ self._outputs.T, (values[-1] * self._intercept_scale) @ self._outputs.T

    def loss_and_gradient(self, coordinates: np.ndarray) -> tuple[float, np.ndarray]:
        weights, intercepts = self.parameters(coordinates)
        loss, residuals = _loss_and_residuals(self._features @ weights + intercepts, self._wanted)
        slopes = self._turned(self._features.T @ residuals / len(residuals) + self._penalty * weights)
        intercept_slopes = residuals.mean(axis=0) @ self._outputs
        gradient = np.concatenate([slopes * self._scale, intercept_slopes[None] * self._intercept_scale])
        return loss + self._penalty / 2 * float((weights**2).sum()), gradient.ravel()

    def _turned(self, weights: np.ndarray) -> np.ndarray:
        return (weights if self._vectors is None else self._vectors.T @ weights) @ self._outputs


def _loss_and_residuals(outputs: np.ndarray, wanted: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean cross-entropy, and its derivatives `(n, K)` by the outputs, before the mean."""
    if outputs.shape[1] == 1:
        losses = np.logaddexp(0.0, outputs) - wanted * outputs
        return float(losses.mean()), 0.5 + 0.5 * np.tanh(outputs / 2) - wanted  # the sigmoid, which cannot overflow
    outputs = outputs - outputs.max(axis=1, keepdims=True)
    shares = np.exp(outputs)
    sums = shares.sum(axis=1, keepdims=True)
    losses = np.log(sums)[:, 0] - (outputs * wanted).sum(axis=1)
    return float(losses.mean()), shares / sums - wanted
