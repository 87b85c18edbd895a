"""Holds examples until their labels are final, and then gives each decision once, with its strongest label.

Rows are kept in buckets of event time as they come. When the attribution window of a whole bucket has passed, its rows
are sorted once: of one decision's rows a positive wins. So duplicates, re-emission after a crash and late positives
need no look-up, and a decision costs about 100 bytes while it waits.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Final

import numpy as np

from streams.monitor.reading import Rows

BUCKET_MS: Final = 10_000
IDLE_MS: Final = 60_000
"""A partition without a record for so long holds the clock back no more."""


class PartitionClocks:
    """The event time that all partitions have reached."""

    def __init__(self) -> None:
        self._reached: dict[int, tuple[int, int]] = {}

    def note(self, partition: int, time_ms: int, now_ms: int) -> None:
        """Take the newest impression of a record that came now."""
        before, _ = self._reached.get(partition, (0, 0))
        self._reached[partition] = max(before, time_ms), now_ms

    def reached_ms(self, now_ms: int) -> int:
        """Return the time; partitions that are idle do not count, unless all are."""
        live = [time for time, seen_ms in self._reached.values() if now_ms - seen_ms <= IDLE_MS]
        return min(live) if live else max((time for time, _ in self._reached.values()), default=0)

    def assign(self, partitions: set[int], now_ms: int) -> None:
        """Wait for these partitions, one that has not spoken yet included, and forget the others."""
        self._reached = {p: (self._reached.get(p, (0, 0))[0], now_ms) for p in partitions}


class Maturing:
    """Rows whose labels may still change."""

    def __init__(self, window_ms: int, max_rows: int = 4_000_000) -> None:
        self._window_ms = window_ms
        self._max_rows = max_rows
        self._buckets: defaultdict[int, list[Rows]] = defaultdict(list)
        self._first = 0
        """Number of the oldest bucket that is not matured."""
        self.num_waiting = 0
        self.num_too_late = 0
        """Rows that came when their bucket had matured; they count nowhere else."""
        self.num_dropped = 0
        """Rows for which there was no room."""
        self.num_unmatched = 0
        """Matured late positives whose negative never came."""
        self._begun_ms: int | None = None
        """Of impressions after this the negative must have been seen."""

    def begin(self) -> None:
        """Begin to read at another place: late positives of impressions that were read before it are nothing wrong."""
        self._begun_ms = None

    def add(self, rows: Rows) -> None:
        """Take rows in any order."""
        if not len(rows):
            return
        if self._begun_ms is None:
            # The first record may hold late positives of impressions that were in the records before it.
            self._begun_ms = int(rows.time_ms.max()) + self._window_ms
        number_N = rows.time_ms // BUCKET_MS
        for number in np.unique(number_N).tolist():
            part = rows.take(number_N == number)
            if number < self._first:
                self.num_too_late += len(part)
            elif self.num_waiting + len(part) > self._max_rows:
                self.num_dropped += len(part)
            else:
                self._buckets[number].append(part)
                self.num_waiting += len(part)

    def matured(self, reached_ms: int) -> Rows | None:
        """Return the decisions whose windows have passed at this event time, or None."""
        first = (reached_ms - self._window_ms) // BUCKET_MS
        ready = sorted(number for number in self._buckets if number < first)
        self._first = max(self._first, first)
        found = [self._settled(self._buckets.pop(number)) for number in ready]
        return Rows.concat(found) if found else None

    def _settled(self, parts: list[Rows]) -> Rows:
        rows = Rows.concat(parts)
        self.num_waiting -= len(rows)
        # Of equal keys the first in this order stays: a positive, and of the positives the first that came.
        order = np.lexsort((~rows.is_click, rows.key))
        rows = rows.take(order)
        is_first = np.append(True, rows.key[1:] != rows.key[:-1])
        starts = np.flatnonzero(is_first)
        has_negative = np.add.reduceat(~rows.is_late, starts) > 0
        kept = rows.take(starts)
        if self._begun_ms is not None:
            self.num_unmatched += int((~has_negative & (kept.time_ms > self._begun_ms)).sum())
        return kept
