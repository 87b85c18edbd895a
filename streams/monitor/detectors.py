"""Generic drift detectors on numbers that come once a minute, and what chance alone would do.

They are river's, annotate and never page: at a click rate of 2 % they are slow. This is the only module that imports
river, which brings scipy into the process.

References:
    Bifet and Gavaldà (2007), Learning from Time-Changing Data with Adaptive Windowing. Page (1954), Continuous
    Inspection Schemes.
"""

from __future__ import annotations

import math

from river.base import DriftDetector
from river.drift import ADWIN, PageHinkley


def drift_detectors() -> dict[str, Scored]:
    """Return a new one of each kind, by name, for numbers in standard errors."""
    return {
        # Minutes are few: it looks at each number, not only at every 32nd.
        "adwin": Scored(ADWIN(delta=0.002, clock=1)),
        "page_hinkley": Scored(PageHinkley(min_instances=30, delta=0.5, threshold=12.0)),
    }


class Scored:
    """A detector, how often it has spoken, and how often chance would have spoken in its place."""

    def __init__(self, detector: DriftDetector) -> None:
        self._detector = detector
        self.num_looks = 0
        self.num_alarms = 0

    def update(self, value: float) -> bool:
        """Pass a number on; return whether it makes the detector see a drift, after which that begins anew."""
        self.num_looks += 1
        self._detector.update(value)
        self.num_alarms += self._detector.drift_detected
        return self._detector.drift_detected

    @property
    def rate(self) -> float:
        """Alarms for each look."""
        return self.num_alarms / self.num_looks if self.num_looks else 0.0


def chance_of_alarm(rate: float, num_looks: float) -> float:
    """Return how likely random alarms of this rate fall at least once into so many looks: what a detector must beat.

    Example:
        >>> round(chance_of_alarm(rate=0.01, num_looks=60), 3)
        0.453
    """
    return 1.0 - math.pow(1.0 - rate, num_looks)
