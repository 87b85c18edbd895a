"""Bayesian logistic regression with independent Gaussian coefficients, learned one example after the other.

Each example is an extended Kalman step: with logit variance v = sum x^2 var, p the probability at the mean and
w = p (1 - p), the mean moves by var x (y - p) / (1 + w v) and the variance by -(var x)^2 w / (1 + w v). An example is a
list of column numbers and values; a column may stand in it more than once, as if its values were added only if each
stands for a feature of its own, so callers keep them distinct.

Shapes: N examples, J features of an example, D coefficients, M draws.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from benchmarks.regret.policies.base import Floats, Floats32, Ints


class DiagonalLogistic:
    """Means and variances of the coefficients."""

    def __init__(self, prior_sd_D: Floats, bias_mean: float = -3.3) -> None:
        """Begin at the prior; coefficient 0 is the bias, whose prior mean is `bias_mean`, a click rate of 3.6 %."""
        self.prior_mean_D = np.zeros(len(prior_sd_D))
        self.prior_mean_D[0] = bias_mean
        self.prior_variance_D = np.asarray(prior_sd_D, np.float64) ** 2
        self.mean_D, self.variance_D = self.prior_mean_D.copy(), self.prior_variance_D.copy()

    def forget(self, share: float) -> None:
        """Go back towards the prior, the variances by a share and the means by half of it."""
        self.variance_D += share * (self.prior_variance_D - self.variance_D)
        self.mean_D += share / 2 * (self.prior_mean_D - self.mean_D)

    def learn(self, column_NJ: Ints, value_NJ: Floats32, label_N: Ints, weight_N: Floats) -> None:
        """Learn N examples in order."""
        _learn(self.mean_D, self.variance_D, column_NJ, value_NJ, label_N.astype(np.float64), weight_N)

    def draw(self, num_draws: int, scale: float, rng: np.random.Generator) -> Floats32:
        """Return (M, D) posterior draws with `scale` times the posterior standard deviation."""
        noise_MD = rng.standard_normal((num_draws, len(self.mean_D)), dtype=np.float32)
        noise_MD *= (scale * np.sqrt(self.variance_D)).astype(np.float32)
        noise_MD += self.mean_D.astype(np.float32)
        return noise_MD


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
