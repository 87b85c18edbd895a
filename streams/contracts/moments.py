"""Mean and spread of a stream of numbers, one by one or a batch at a time."""

from __future__ import annotations

import math

import msgspec
import numpy as np
from numpy.typing import ArrayLike

MAX_NUMBER = 1e12
"""Numbers beyond it are not counted: one wild value must not decide how all later ones are read."""


class Moments(msgspec.Struct, frozen=True, kw_only=True):
    """Count, mean and sum of squared deviations of the numbers so far.

    Merging is exact up to rounding, so a stream may be cut into batches anywhere; to get the same bits again, cut it
    alike.

    References:
        Chan, Golub and LeVeque (1983), Algorithms for Computing the Sample Variance (the merge; for one number it is
        Welford's).
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @staticmethod
    def of(values: ArrayLike) -> Moments:
        """Return the moments of numbers, (N,); those that are not finite or beyond `MAX_NUMBER` are left out.

        Example:
            >>> Moments.of([1.0, 3.0, float("nan")])
            Moments(count=2, mean=2.0, squares=2.0)
        """
        value_N = np.asarray(values, np.float64)
        value_N = value_N[np.abs(value_N) <= MAX_NUMBER]
        if not len(value_N):
            return Moments()
        mean = float(value_N.mean())
        return Moments(count=len(value_N), mean=mean, squares=float(((value_N - mean) ** 2).sum()))

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both streams together."""
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        step = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + step * (other.count / count),
            squares=self.squares + other.squares + step * step * (self.count * (other.count / count)),
        )

    @property
    def sd(self) -> float:
        """Standard deviation; 1 while it is too small to divide by."""
        sd = math.sqrt(self.squares / self.count) if self.count else 0.0
        return sd if sd > 1e-9 * max(1.0, abs(self.mean)) else 1.0
