"""Sequential tests that may be looked at any time, with a stated rate of false alarms.

Each is an e-detector: at step t it multiplies what it has by a factor whose expectation, given the past, is at most 1
while nothing has changed, and begins anew where it would fall below 1 (CUSUM):

    M_t = max(M_{t-1}, 1) F_t,        alarm when M_t >= e^h

M_t is at most the sum of all products F_j ... F_t over the beginnings j <= t, whose expectation is at most t. So under
no change the mean time to a false alarm is at least e^h steps (Shin, Ramdas and Rinaldo 2022, theorem 2.4), for any
dependence between the examples and whenever one looks. Averages of such processes over several alternatives are one
again. At h = 14 and a step every ten seconds that is at least 139 days for each detector; the bound is loose, so in
fact longer.

References:
    Shin, Ramdas and Rinaldo (2022), E-detectors: a nonparametric framework for online changepoint detection.
    Page (1954), Continuous Inspection Schemes. Ville (1939).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

THRESHOLD: Final = 14.0
"""h in nats: at least 1.2 million steps between false alarms."""
MIN_EXAMPLES: Final = 1_000
MIN_CLICKS: Final = 50.0
"""Below so many examples and expected clicks since its last beginning no detector speaks."""

FloatArray = NDArray[np.float64]


@dataclass(slots=True)
class Counts:
    """Examples of one step, or of many, added up."""

    num: float = 0.0
    clicks: float = 0.0
    expected: float = 0.0
    """Sum of the predicted click probabilities."""

    def add(self, other: Counts, sign: float = 1.0) -> None:
        """Add another step, or take it away again with the sign -1."""
        self.num += sign * other.num
        self.clicks += sign * other.clicks
        self.expected += sign * other.expected

    @property
    def ratio(self) -> float:
        """Clicks / expected clicks, nan without any expected."""
        return self.clicks / self.expected if self.expected > 0.0 else math.nan


class EDetector:
    """The average of CUSUM processes, one for each alternative, on log factors that are handed in."""

    def __init__(self, num_alternatives: int, threshold: float = THRESHOLD) -> None:
        self.threshold = threshold
        self.num_alarms = 0
        self._log_A: FloatArray = np.zeros(num_alternatives)
        self._since = Counts()
        self.evidence = 0.0
        """The logarithm of M_t, at least 0."""
        self.alarmed = Counts()
        """What led to the last alarm."""

    @property
    def is_suspicious(self) -> bool:
        """Whether half of the way to an alarm is gone."""
        return self.evidence > self.threshold / 2

    def observe(self, log_factor_A: FloatArray, counts: Counts) -> bool:
        """Take a step and return whether it raises an alarm; the detector begins anew after one.

        Args:
            log_factor_A: ln F_t for each alternative.
            counts: Examples in the step.
        """
        if self.evidence == 0.0:
            self._since = Counts()
        self._since.add(counts)
        self._log_A = np.maximum(self._log_A, 0.0) + log_factor_A
        top = float(self._log_A.max())
        self.evidence = max(0.0, top + math.log(float(np.exp(self._log_A - top).mean())))
        is_enough = self._since.num >= MIN_EXAMPLES and max(self._since.expected, self._since.clicks) >= MIN_CLICKS
        if self.evidence < self.threshold or not is_enough:
            return False
        self.num_alarms += 1
        self.alarmed = self._since
        self.reset()
        return True

    def reset(self) -> None:
        """Begin anew."""
        self._log_A[:] = 0.0
        self._since = Counts()
        self.evidence = 0.0


class CalibrationTest:
    """Do more (or fewer) clicks come than `bound` times the predicted ones?

    With y the click, p its prediction, c the bound and r > c an alternative, the factor of an example is

        F = (r / c)^y exp(-(r - c) p)

    With m the true click probability its expectation is at most exp(m (r - c) / c - (r - c) p), which is at most 1
    whenever m <= c p; for r < c whenever m >= c p. So only the sums of y and p are needed.
    """

    def __init__(self, side: Literal["above", "below"], threshold: float = THRESHOLD) -> None:
        steps: Sequence[float] = (1.08, 1.25, 2.0, 4.0) if side == "above" else (0.92, 0.8, 0.5, 0.1)
        self._steps_A = np.array(steps)
        self.detector = EDetector(len(steps), threshold)

    def observe(self, counts: Counts, bound: float) -> bool:
        """Take a step and return whether it raises an alarm.

        Args:
            counts: Of examples that were predicted before their labels were known.
            bound: c, which may follow from earlier steps.
        """
        gained_A = counts.clicks * np.log(self._steps_A) - (self._steps_A - 1.0) * bound * counts.expected
        return self.detector.observe(gained_A, counts)


class RivalTest:
    """Does a rival predict better than the model, by more than a margin?

    The factor of an example is P_rival(y) / P_model(y) exp(-margin): its expectation is at most 1 while the model is
    right, whatever the rival says.
    """

    def __init__(self, margin: float, threshold: float = THRESHOLD) -> None:
        self.margin = margin
        self.detector = EDetector(1, threshold)

    def observe(self, log_ratio: float, entropy: float, counts: Counts) -> bool:
        """Take a step and return whether it raises an alarm.

        Args:
            log_ratio: Sum of ln P_rival(y) - ln P_model(y) over the examples.
            entropy: Sum of the entropies of the base rate, in nats; the margin is a share of it.
            counts: Of the model.
        """
        return self.detector.observe(np.array([log_ratio - self.margin * entropy]), counts)


class ArmsTest:
    """Does the policy earn less than the uniform hold-out?

    Given the clicks of both in a step, those of the hold-out are binomial, with a share of at most its share of the
    impressions while the policy earns at least as much (clicks are rare: Poisson). The alternatives are that the
    hold-out earns `ratios` times as much.
    """

    def __init__(self, ratios: Sequence[float] = (1.3, 2.0, 4.0), threshold: float = THRESHOLD) -> None:
        self._ratios_A = np.array(ratios)
        self.detector = EDetector(len(ratios), threshold)

    def observe(self, policy: Counts, holdout: Counts) -> bool:
        """Take a step and return whether it raises an alarm."""
        if not policy.num or not holdout.num:
            return False
        share = holdout.num / (holdout.num + policy.num)
        other_A = self._ratios_A * share / (self._ratios_A * share + 1.0 - share)
        log_A = holdout.clicks * np.log(other_A / share) + policy.clicks * np.log((1.0 - other_A) / (1.0 - share))
        return self.detector.observe(log_A, policy)


def wilson(clicks: float, num: float, z: float = 1.96) -> tuple[float, float]:
    """Return the interval of a click rate (Wilson 1927), (0, 1) without impressions.

    Example:
        >>> low, high = wilson(20, 1000)
        >>> round(low, 4), round(high, 4)
        (0.013, 0.0307)
    """
    if num <= 0:
        return 0.0, 1.0
    rate, square = clicks / num, z * z / num
    middle = (rate + square / 2) / (1 + square)
    half = z * math.sqrt(max(0.0, rate * (1 - rate) / num + square / (4 * num))) / (1 + square)
    return middle - half, middle + half
