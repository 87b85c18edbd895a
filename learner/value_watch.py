"""Whether what is learned would earn less than what was shown, watched at every publication. No policy, no clock.

Impressions come with the weight w = pi(shown) / propensity of a policy that had not learned them, and their label y. As
w has the mean 1, y w - b (w - 1) has the policy's click rate as its mean, whatever b is; b is the click rate that was
logged so far. So creatives that the policy would show and the log does not hold count as average ones, and not as ones
that nobody clicks: where policy and log have little in common, nothing is said. (It is the doubly robust estimate with
a constant for its model.) If the policies' mean click rate is at least c times the logged one, then

    d = y w - b (w - 1) - c y

has a mean of at least 0. The upper end of an asymptotic confidence sequence says whether that can still be so: its
bound holds at all sizes at once, so that looking after every update, and stopping at the first that looks bad, does not
spoil it as it spoils a fixed-n interval. The policies may change from one impression to the next; the statement is
about their mean.

What is watched begins anew after BLOCK impressions: a model that was good for a week may go bad within a minute. The
share of false alarms holds for one block.

References:
    Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas (2024), Time-uniform central limit theory and asymptotic confidence
    sequences, Annals of Statistics 52 (theorem 2.2; the two-sided bound, of which one side is used).
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

ALPHA: Final = 0.001
"""Share of the blocks with a false alarm at most, were the policies exactly at the bound."""
BLOCK: Final = 20_000
TIGHTEST_AT: Final = 2_000
"""Impressions at which the sequence is narrowest."""
MIN_CLICKS: Final = 200
"""Clicks below which nothing is said: the sequence is asymptotic, and few clicks are far from normal."""
_RHO2: Final = (-2.0 * math.log(ALPHA) + math.log(-2.0 * math.log(ALPHA)) + 1.0) / TIGHTEST_AT


def half_width(num: int, deviation: float) -> float:
    """Return how far the mean of `num` values with this standard deviation may be from the truth, at all sizes at once.

    Example:
        >>> round(half_width(2_000, 1.0) * 2_000**0.5, 2)  # in standard errors; a fixed-n interval has 3.29
        4.21
    """
    scale = num * _RHO2 + 1.0
    return deviation * math.sqrt(2.0 * scale / (num * num * _RHO2) * math.log(math.sqrt(scale) / ALPHA))


class ValueWatch:
    """Counts one block.

    Args:
        least: c, the share of the logged click rate that the policies must reach, in (0, 1].
        min_effective_size: Effective sample size of the weights below which nothing is said.
    """

    def __init__(self, least: float, min_effective_size: float) -> None:
        self._least, self._min_effective_size = least, min_effective_size
        self._forget()

    def _forget(self) -> None:
        self._num = 0
        self._clicks = self._earned = self._weight = self._weight2 = self._d = self._d2 = 0.0

    def add(self, weight_N: NDArray[np.float64], label_N: NDArray[np.float64]) -> None:
        """Count impressions: w >= 0, and y in {0, 1}."""
        if self._num >= BLOCK:
            self._forget()
        average = self._clicks / self._num if self._num else 0.0
        earned_N = label_N * weight_N - average * (weight_N - 1.0)
        d_N = earned_N - self._least * label_N
        self._num += len(d_N)
        self._clicks += float(label_N.sum())
        self._earned += float(earned_N.sum())
        self._weight += float(weight_N.sum())
        self._weight2 += float((weight_N**2).sum())
        self._d += float(d_N.sum())
        self._d2 += float((d_N**2).sum())

    def numbers(self) -> dict[str, float]:
        """Return what is known: sizes, the logged and the estimated click rate, and the upper bound of the latter."""
        if not self._num:
            return {}
        mean = self._d / self._num
        deviation = math.sqrt(max(0.0, self._d2 / self._num - mean**2))
        logged = self._clicks / self._num
        return {
            "value_num": float(self._num),
            "value_effective_size": self._weight**2 / self._weight2 if self._weight2 else 0.0,
            "value_logged": logged,
            "value": self._earned / self._num,
            "value_at_most": mean + half_width(self._num, deviation) + self._least * logged,
        }

    def reason(self) -> str | None:
        """Return why the policies are too bad to be served, None if they may be good enough."""
        found = self.numbers()
        if self._clicks < MIN_CLICKS or found["value_effective_size"] < self._min_effective_size:
            return None
        least = self._least * found["value_logged"]
        if found["value_at_most"] >= least:
            return None
        return f"estimated click rate is at most {found['value_at_most']:.3g}; expected at least {least:.3g}"
