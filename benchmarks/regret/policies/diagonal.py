"""Bayesian logistic regression with independent Gaussian coefficients, learned one example after the other.

Each example is an extended Kalman step: with logit variance v = sum x^2 var, p the probability at the mean and
w = p (1 - p), the mean moves by var x (y - p) / (1 + w v) and the variance by -(var x)^2 w / (1 + w v). An example is a
list of distinct column numbers and their values.

Shapes: N examples, J features of an example, D coefficients, M draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numba import njit
from numpy.typing import ArrayLike

from benchmarks.regret.policies.base import Floats, Floats32, Ints

Part = tuple[Ints, ArrayLike]
"""Columns (N, ...), or (1, ...) where all rows have the same, and the values of N rows that they are broadcast to."""


class DiagonalLogistic:
    """Means and variances of named groups of coefficients; a group `bias` of one is the first."""

    def __init__(self, groups: Mapping[str, tuple[Sequence[int], float]], bias_mean: float = -3.3) -> None:
        """Begin at the prior.

        Args:
            groups: Name -> shape and prior standard deviation of its coefficients.
            bias_mean: Prior mean of the bias; the default is a click rate of 3.6 %.
        """
        sizes = [int(np.prod(shape)) for shape, _ in groups.values()]
        ends = np.cumsum(sizes).tolist()
        self.columns: dict[str, Ints] = {
            name: np.arange(end - size, end).reshape(tuple(shape))
            for (name, (shape, _)), size, end in zip(groups.items(), sizes, ends, strict=True)
        }
        """Name -> column numbers, in the shape of the group."""
        self.prior_mean_D = np.zeros(ends[-1])
        self.prior_mean_D[0] = bias_mean
        self.prior_variance_D: Floats = np.repeat([sd**2 for _, sd in groups.values()], sizes)
        self.mean_D, self.variance_D = self.prior_mean_D.copy(), self.prior_variance_D.copy()

    def forget(self, share: float) -> None:
        """Go back towards the prior, the variances by a share and the means by half of it."""
        self.variance_D += share * (self.prior_variance_D - self.variance_D)
        self.mean_D += share / 2 * (self.prior_mean_D - self.mean_D)

    def learn(self, parts: Sequence[Part], label_N: Ints, weight_N: Floats) -> None:
        """Learn N examples in order, the features of each being those of all parts."""
        n = len(label_N)
        values = [np.asarray(value, np.float32) for _, value in parts]
        columns = [np.broadcast_to(column, v.shape) for (column, _), v in zip(parts, values, strict=True)]
        column_NJ = np.concatenate([column.reshape(n, -1) for column in columns], axis=1)
        value_NJ = np.concatenate([value.reshape(n, -1) for value in values], axis=1)
        _learn(self.mean_D, self.variance_D, column_NJ, value_NJ, label_N.astype(np.float64), weight_N)

    def draw(self, num_draws: int, scale: float, rng: np.random.Generator) -> dict[str, Floats32]:
        """Return name -> (M, ...) posterior draws with `scale` times the posterior standard deviation."""
        theta_MD = rng.standard_normal((num_draws, len(self.mean_D)), dtype=np.float32)
        theta_MD *= (scale * np.sqrt(self.variance_D)).astype(np.float32)
        theta_MD += self.mean_D.astype(np.float32)
        ends = np.cumsum([columns.size for columns in self.columns.values()])
        parts = np.split(theta_MD, ends[:-1], axis=1)
        return {
            name: part.reshape(num_draws, *columns.shape)
            for (name, columns), part in zip(self.columns.items(), parts, strict=True)
        }


@njit(cache=True, fastmath=True)
def _learn(mean_D, variance_D, column_NJ, value_NJ, label_N, weight_N):  # type: ignore[no-untyped-def]
    num_examples, num_features = column_NJ.shape
    for i in range(num_examples):
        logit, variance = 0.0, 0.0
        for j in range(num_features):
            d, x = column_NJ[i, j], value_NJ[i, j]
            logit += mean_D[d] * x
            variance += variance_D[d] * x * x
        p = 1 / (1 + np.exp(-logit))
        w = weight_N[i] * p * (1 - p)
        step = weight_N[i] * (label_N[i] - p) / (1 + w * variance)
        shrink = w / (1 + w * variance)
        for j in range(num_features):
            d, x = column_NJ[i, j], value_NJ[i, j]
            k = variance_D[d] * x
            mean_D[d] += k * step
            variance_D[d] -= k * k * shrink
