"""What can be said without labels, or of the delays of clicks: the mix, the policy's propensities, clocks and lateness.

Windows close at a number of impressions, not at a time, so that their noise is the same at any rate of traffic.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from streams.monitor.distributions import MOVED, Stability, psi
from streams.monitor.reading import Arrivals
from streams.monitor.tallies import DELAY_BINS_MS

POLICY_WINDOW: Final = 2_000
"""Impressions in a window of the policy's entropy."""
POLICY_HISTORY: Final = 720
COLLAPSE: Final = 0.2
"""Of the median entropy so far, in two windows after each other."""
AUDIT_WINDOW: Final = 20_000
AUDIT_PICKS: Final = 200
"""A window of the audit has so many picks of the uniform share, or its mean says nothing."""
AUDIT_LIMIT: Final = 6.0
"""Standard errors, in two windows after each other: by chance less than once in 10^8 windows, were they normal."""
DELAY_WINDOW: Final = 200
"""Clicks in a window of the delays."""
SKEWED_SHARE: Final = 0.05
"""Of the clicks before their impressions, or of the impressions from the future."""
CLOCK_TOLERANCE_MS: Final = 2_000
MAX_FEATURES: Final = 32


class Mix:
    """Whether other products or contexts are asked for: the stability of each feature."""

    def __init__(self) -> None:
        self.features: dict[str, Stability] = {"product": Stability()}

    def observe(self, products: Mapping[str, int], fields: Mapping[str, Mapping[str, int]]) -> None:
        """Take impressions, counted by product, and by field of the context and its value."""
        self.features["product"].observe(products)
        for name, counts in fields.items():
            key = f"context.{name}"
            if key in self.features or len(self.features) < MAX_FEATURES:
                self.features.setdefault(key, Stability()).observe(counts)

    @property
    def moved(self) -> dict[str, float]:
        """Features that have moved for two windows, and their index."""
        return {name: each.index for name, each in self.features.items() if each.num_moved >= 2}

    @property
    def is_suspected(self) -> bool:
        """Whether one has moved in the last window, or moves in this one."""
        return any(each.num_moved or each.is_moving for each in self.features.values())

    def accept(self) -> None:
        """Take what comes now for usual."""
        for each in self.features.values():
            each.accept()


class PolicyHealth:
    """Entropy, least propensity and audit of the logged propensities."""

    def __init__(self) -> None:
        self._window = Arrivals()
        self._audit = Arrivals()
        self._is_shrunk = False
        self._ratios: deque[float] = deque(maxlen=POLICY_HISTORY)
        self.entropy_ratio = math.nan
        self.usual_entropy_ratio = math.nan
        self.num_collapsed = 0
        """Windows after each other whose entropy is too small."""
        self.min_scaled = math.nan
        self.is_below_floor = False
        self.effective_ratio = math.nan
        self.audit_mean = math.nan
        self.audit_by_slot: dict[str, float] = {}
        self.num_audits_failed = 0
        self.num_inconsistent = 0
        """In the last window."""

    def observe(self, arrivals: Arrivals, epsilon: float, *, is_shrunk: bool = False) -> None:
        """Take impressions.

        Args:
            arrivals: Their sums.
            epsilon: Uniform share with which they were decided.
            is_shrunk: Some of them may have been decided while somebody let only a share of the traffic explore: their
                entropy is neither judged nor usual.
        """
        self._is_shrunk |= is_shrunk
        self._window.add(arrivals)
        self._audit.add(arrivals)
        if self._window.num >= POLICY_WINDOW:
            self._close_window(epsilon)
        if self._audit.num >= max(AUDIT_WINDOW, AUDIT_PICKS / epsilon):
            self._close_audit()

    def _close_window(self, epsilon: float) -> None:
        window, self._window = self._window, Arrivals()
        is_shrunk, self._is_shrunk = self._is_shrunk, False
        self.entropy_ratio, self.min_scaled = window.entropy_ratio, window.min_scaled
        self.effective_ratio, self.num_inconsistent = window.effective_ratio, window.num_inconsistent
        # Rounding in slot propensities must not look like a missing floor.
        self.is_below_floor = window.min_scaled < 0.99 * epsilon
        is_known = len(self._ratios) >= 10 and not is_shrunk
        is_low = is_known and self.entropy_ratio < COLLAPSE * self.usual_entropy_ratio
        self.num_collapsed = self.num_collapsed + 1 if is_low else 0
        if not is_low and not is_shrunk and math.isfinite(self.entropy_ratio):
            self._ratios.append(self.entropy_ratio)
            self.usual_entropy_ratio = statistics.median(self._ratios)

    def _close_audit(self) -> None:
        audit, self._audit = self._audit, Arrivals()
        self.audit_mean = audit.weight / audit.num
        self.audit_by_slot = {slot: audit.slot_weight[slot] / num for slot, num in audit.slot_num.items() if num}
        variance = audit.weight_square / audit.num - self.audit_mean**2
        error = math.sqrt(max(variance, 1e-12) / audit.num)
        has_failed = abs(self.audit_mean - 1.0) > AUDIT_LIMIT * error and abs(self.audit_mean - 1.0) > 0.2
        self.num_audits_failed = self.num_audits_failed + 1 if has_failed else 0


class Delays:
    """How long clicks take, against before."""

    def __init__(self) -> None:
        self._reference: NDArray[np.float64] = np.zeros(len(DELAY_BINS_MS) + 1)
        self._window = np.zeros_like(self._reference)
        self.index = math.nan
        self.num_moved = 0
        self.negative_share = 0.0
        self.median_bin = self.usual_median_bin = 0

    def observe(self, delays: NDArray[np.float64]) -> None:
        """Take clicks by delay, binned by `DELAY_BINS_MS`."""
        self._window = self._window + delays
        if self._window.sum() < DELAY_WINDOW:
            return
        window, self._window = self._window, np.zeros_like(self._window)
        self.negative_share = float(window[0] / window.sum())
        self.median_bin = _median_bin(window)
        is_known = self._reference.sum() >= 2 * DELAY_WINDOW
        self.index = psi(self._reference, window) if is_known else math.nan
        has_moved = self.index > MOVED or self.negative_share > SKEWED_SHARE
        self.num_moved = self.num_moved + 1 if has_moved else 0
        if not has_moved:
            self.usual_median_bin = self.median_bin
            self._reference = (0.97 if is_known else 1.0) * self._reference + window

    @property
    def has_shifted(self) -> bool:
        """Whether delays are not what they were: twice in a row, or clicks come before their impressions."""
        return self.num_moved >= 2 or self.negative_share > SKEWED_SHARE


def _median_bin(histogram: NDArray[np.float64]) -> int:
    return int(np.searchsorted(np.cumsum(histogram), histogram.sum() / 2))


def delay_name(place: int) -> str:
    """Return the range of a bin of delays, in seconds."""
    edges = [f"{edge / 1000:g}" for edge in DELAY_BINS_MS.tolist()]
    if place == 0:
        return f"below {edges[0]} s"
    return f"{edges[place - 1]} to {edges[place]} s" if place < len(edges) else f"above {edges[-1]} s"


class Lateness:
    """How late examples are written, and how many come from the future.

    An example is due when the label wait has passed since its impression, and is late by what its record was written
    after that. Whose clock is ahead makes it early.
    """

    def __init__(self, label_wait_ms: int) -> None:
        self._label_wait_ms = label_wait_ms
        self._late_ms: list[float] = []
        self._num = self._num_early = 0
        self._shares: deque[float] = deque([0.0], maxlen=6)
        self.seconds = math.nan
        """Median over the last step, nan before the first."""

    def observe(self, age_ms: NDArray[np.int64]) -> None:
        """Take how long after their impressions examples were written, without late positives."""
        late_ms = age_ms - self._label_wait_ms
        self._late_ms.append(float(np.median(late_ms)))
        self._num += len(late_ms)
        self._num_early += int((late_ms < -CLOCK_TOLERANCE_MS).sum())

    def tick(self) -> None:
        """End a step."""
        if self._num:
            self.seconds = statistics.median(self._late_ms) / 1000
            self._shares.append(self._num_early / self._num)
        self._late_ms = []
        self._num = self._num_early = 0

    @property
    def early_share(self) -> float:
        """Share of the examples of the last steps that came before they were due."""
        return sum(self._shares) / len(self._shares)
