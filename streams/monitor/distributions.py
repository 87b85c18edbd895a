"""Has a distribution moved? The population stability index of what comes now against what came before.

    PSI = sum over bins (q - p) ln(q / p)

with p the share of a bin before and q now. Below .1 is stable, above .25 has moved: a rule of thumb. Of n examples now
and m before, noise alone gives about (bins - 1) (1 / n + 1 / m), so at 10,000 and 20 bins .004.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

MOVED: Final = 0.25
MIN_WINDOW: Final = 10_000
"""Examples in a window."""
MIN_REFERENCE: Final = 30_000
"""Examples before anything is compared with them."""
MAX_BINS: Final = 20
MAX_VALUES: Final = 10_000
"""Distinct values of a feature that are counted one by one; more count together."""
FADING: Final = 0.97
"""What is kept of the reference when a window that has not moved joins it: it covers about the last thirty windows."""
_OTHER: Final = "\0other"


def psi(before: NDArray[np.float64], now: NDArray[np.float64]) -> float:
    """Return the index of two histograms over the same bins, half an example added to each bin.

    Example:
        >>> round(psi(np.array([500.0, 500.0]), np.array([300.0, 700.0])), 3)
        0.169
    """
    p = (before + 0.5) / (before.sum() + 0.5 * len(before))
    q = (now + 0.5) / (now.sum() + 0.5 * len(now))
    return float(((q - p) * np.log(q / p)).sum())


class Stability:
    """The index of one feature, window by window; windows that have not moved become part of the reference.

    The values are counted by name; a number that takes many values must be binned by the caller.
    """

    def __init__(self) -> None:
        self._reference: Counter[str] = Counter()
        self._window: Counter[str] = Counter()
        self._num_reference = 0.0
        self._num_window = 0
        self.index = math.nan
        """Of the last full window; nan before."""
        self.num_moved = 0
        """How many of the last full windows have moved, without one between them that has not."""

    def observe(self, counts: Mapping[str, int] | Iterable[tuple[str, int]]) -> bool:
        """Count values; return whether a window was closed."""
        for value, count in counts.items() if isinstance(counts, Mapping) else counts:
            known = value in self._window or len(self._window) < MAX_VALUES
            self._window[value if known else _OTHER] += count
            self._num_window += count
        if self._num_window < MIN_WINDOW:
            return False
        self._close()
        return True

    @property
    def is_moving(self) -> bool:
        """Whether the window that is not full yet looks moved, as soon as it is half full."""
        is_known = self._num_reference >= MIN_REFERENCE and self._num_window >= MIN_WINDOW // 2
        return is_known and self._compare() > MOVED

    def _close(self) -> None:
        if self._num_reference >= MIN_REFERENCE:
            self.index = self._compare()
        has_moved = self.index > MOVED
        self.num_moved = self.num_moved + 1 if has_moved else 0
        if not has_moved:
            self._absorb()
        self._window = Counter()
        self._num_window = 0

    def accept(self) -> None:
        """Take what comes now for usual: begin the reference anew."""
        self._reference.clear()
        self._num_reference = 0.0
        self.index, self.num_moved = math.nan, 0

    def _compare(self) -> float:
        # The bins are the most frequent values of before and of now: a new value must have one.
        half = MAX_BINS // 2
        names = dict.fromkeys(
            name for counts in (self._reference, self._window) for name, _ in counts.most_common(half)
        )
        before = np.array([self._reference[name] for name in names], np.float64)
        now = np.array([self._window[name] for name in names], np.float64)
        rest = self._num_reference - before.sum(), self._num_window - now.sum()
        return psi(np.append(before, rest[0]), np.append(now, rest[1]))

    def _absorb(self) -> None:
        kept = FADING if self._num_reference >= MIN_REFERENCE else 1.0
        faded = {name: kept * count for name, count in self._reference.items() if kept * count > 0.5}
        for name, count in self._window.items():
            faded[name] = faded.get(name, 0.0) + count
        self._reference = Counter(faded)
        self._num_reference = float(sum(faded.values()))
