"""Generic drift detectors on numbers that come once a minute, and what chance alone would do.

They annotate and never page: at a click rate of 2 % they are slow. ADWIN and Page-Hinkley follow river 0.26 (BSD); the
package itself would bring pandas and scipy into the process. Minutes are few, so ADWIN here looks at every cut of its
window instead of at exponential buckets.

References:
    Bifet and Gavaldà (2007), Learning from Time-Changing Data with Adaptive Windowing. Page (1954).
"""

from __future__ import annotations

import math
from typing import Final, Protocol

import numpy as np

MAX_MINUTES: Final = 1_440
"""ADWIN looks back a day."""


class Detector(Protocol):
    """Takes a number at a time."""

    def update(self, value: float) -> bool:
        """Return whether the number makes it see a drift."""
        ...


class Adwin:
    """A window that is cut where the means of its two parts differ by more than chance.

    The bound of Bifet and Gavaldà: false alarms in at most `delta` of the looks, on numbers that are independent.
    """

    def __init__(self, delta: float = 0.002, min_part: int = 5) -> None:
        self._delta = delta
        self._min_part = min_part
        self._window: list[float] = []

    def update(self, value: float) -> bool:
        """Take a number; return whether the window was cut."""
        self._window = [*self._window, value][-MAX_MINUTES:]
        cut = self._cut()
        if cut is not None:
            self._window = self._window[cut:]
        return cut is not None

    def _cut(self) -> int | None:
        """Return the cut with the clearest difference, if one is clear."""
        total, least = len(self._window), self._min_part
        if total < 2 * least:
            return None
        values = np.array(self._window)
        before = np.arange(least, total - least + 1)
        sums = np.cumsum(values)[before - 1]
        difference = np.abs(sums / before - (values.sum() - sums) / (total - before))
        harmonic = 1.0 / (1.0 / (before - least + 1) + 1.0 / (total - before - least + 1))
        confidence = math.log(2.0 * math.log(total) / self._delta)
        bound = np.sqrt(2.0 / harmonic * values.var() * confidence) + 2.0 / 3.0 / harmonic * confidence
        clear = difference - bound
        best = int(clear.argmax())
        return int(before[best]) if clear[best] > 0 else None


class PageHinkley:
    """The sum of deviations from the mean so far, in either direction, against its smallest value."""

    def __init__(self, min_instances: int = 30, delta: float = 0.005, threshold: float = 50.0) -> None:
        self._min_instances, self._delta, self._threshold = min_instances, delta, threshold
        self._reset()

    def _reset(self) -> None:
        self._num = 0
        self._mean = self._up = self._down = 0.0
        self._least_up, self._most_down = math.inf, -math.inf

    def update(self, value: float) -> bool:
        """Take a number; begin anew after a drift."""
        self._num += 1
        self._mean += (value - self._mean) / self._num
        deviation = value - self._mean
        self._up = 0.9999 * self._up + deviation - self._delta
        self._down = 0.9999 * self._down + deviation + self._delta
        self._least_up = min(self._least_up, self._up)
        self._most_down = max(self._most_down, self._down)
        is_far = max(self._up - self._least_up, self._most_down - self._down) > self._threshold
        if self._num < self._min_instances or not is_far:
            return False
        self._reset()
        return True


class Scored:
    """A detector, how often it has spoken, and how often chance would have spoken in its place."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector
        self.num_looks = 0
        self.num_alarms = 0

    def update(self, value: float) -> bool:
        """Pass a number on."""
        self.num_looks += 1
        spoke = self._detector.update(value)
        self.num_alarms += spoke
        return spoke

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
