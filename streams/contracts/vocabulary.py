"""Names of one kind and the rows they own: no two names share a row, and a row outlives its name.

A name gets a row when it was seen often enough, at once if a catalog holds it. A name that was not seen for long gives
its row back, and the next new name takes the lowest free one, so memory is bounded by `limit` rows however many names
pass by. Whoever keeps numbers by row resets those of the rows that `expire` returns.

A flood of junk names waits in a table of bounded size; if that is full, every count in it falls by one (Misra and Gries
1982: with m places, a name that is more than one in m + 1 of those waiting gets through). Names that have a row keep it
while they are seen, whatever else arrives.

Everything follows from the order of the calls and their arguments; there is no clock.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Name = TypeVar("Name", bound=Hashable)
IntArray = NDArray[np.int64]

UNKNOWN = -1


class Vocabulary(Generic[Name]):
    """Rows of names, at most `limit`.

    Example:
        >>> names = Vocabulary[str](limit=2)
        >>> [names.row(name, now_ms=0) for name in ("a", "b", "a", "c")]
        [0, 1, 0, -1]
        >>> names.row("b", now_ms=9)
        1
        >>> names.expire(before_ms=5), names.row("c", now_ms=9)
        ([0], 0)
    """

    def __init__(self, limit: int, *, min_seen: int = 1) -> None:
        """Start empty.

        Args:
            limit: Rows there can be, at least 1.
            min_seen: How often a name must be seen before it gets a row, at least 1.

        Raises:
            ValueError: If one of them is below 1.
        """
        if limit < 1 or min_seen < 1:
            raise ValueError(f"limit is {limit} and min_seen {min_seen} of a vocabulary; both must be at least 1")
        self.limit, self.min_seen = limit, min_seen
        self.unknown: Counter[str] = Counter()
        """Sightings of names without a row: `rare`, or the vocabulary was `full`."""
        self.version = 0
        """Changes whenever a row changes its name."""
        self._rows: dict[Name, int] = {}
        self._names: list[Name | None] = []
        self._free: list[int] = []
        self._seen_ms: IntArray = np.zeros(limit, np.int64)
        self._pinned: NDArray[np.bool_] = np.zeros(limit, np.bool_)
        self._waiting: dict[Name, int] = {}

    def __len__(self) -> int:
        """Return how many names have a row."""
        return len(self._rows)

    @property
    def names(self) -> tuple[Name | None, ...]:
        """Name of each row; None where a row is free. It never gets shorter."""
        return tuple(self._names)

    def get(self, name: Name) -> int:
        """Return the row of a name, -1 if it has none; nothing changes."""
        return self._rows.get(name, UNKNOWN)

    def row(self, name: Name, now_ms: int, *, seen: int = 1) -> int:
        """Return the row of a name that was seen `seen` times, or -1 if it has none and gets none."""
        row = self._rows.get(name)
        if row is None:
            if not self._often_enough(name, seen):
                self.unknown["rare"] += seen
                return UNKNOWN
            row = self._take(name)
            if row == UNKNOWN:
                self.unknown["full"] += seen
                return UNKNOWN
        if now_ms > self._seen_ms[row]:
            self._seen_ms[row] = now_ms
        return row

    def touch(self, rows: IntArray, now_ms: int) -> None:
        """Say that the names of these rows, (N,), were seen; -1 and free rows may be among them."""
        rows = rows[(rows >= 0) & (rows < len(self._names))]
        self._seen_ms[rows] = np.maximum(self._seen_ms[rows], now_ms)

    def pin(self, names: Iterable[Name], now_ms: int) -> None:
        """Say what a catalog holds now: those names get rows at once and keep them; the others may expire from here on.

        Names that find the vocabulary full are counted, and may get a row when they are pinned or seen again.
        """
        # What the catalog has just dropped was in use until now.
        self._seen_ms[self._pinned] = np.maximum(self._seen_ms[self._pinned], now_ms)
        self._pinned[:] = False
        for name in names:
            row = self._rows.get(name, UNKNOWN)
            if row == UNKNOWN:
                row = self._take(name)
            if row == UNKNOWN:
                self.unknown["full"] += 1
            else:
                self._pinned[row] = True
                self._seen_ms[row] = max(now_ms, int(self._seen_ms[row]))

    def expire(self, before_ms: int, keep: Iterable[int] = ()) -> list[int]:
        """Free the rows of names last seen before a time, pinned ones and those to `keep` apart; return the rows."""
        old = ~self._pinned & (self._seen_ms < before_ms)
        old[list(keep)] = False
        freed = [row for row in np.flatnonzero(old[: len(self._names)]).tolist() if self._names[row] is not None]
        for row in freed:
            name = self._names[row]
            assert name is not None  # noqa: S101 - for the type checker; chosen so above
            del self._rows[name]
            self._names[row] = None
            heapq.heappush(self._free, row)
        self.version += len(freed)
        return freed

    def _often_enough(self, name: Name, seen: int) -> bool:
        if self.min_seen == 1:
            return True
        count = self._waiting.pop(name, 0) + seen
        if count >= self.min_seen:
            return True
        if len(self._waiting) >= self.limit:
            self._waiting = {other: n - 1 for other, n in self._waiting.items() if n > 1}
            if len(self._waiting) >= self.limit:
                return False
        self._waiting[name] = count
        return False

    def _take(self, name: Name) -> int:
        if self._free:
            row = heapq.heappop(self._free)
            self._names[row] = name
        elif len(self._names) < self.limit:
            row = len(self._names)
            self._names.append(name)
        else:
            return UNKNOWN
        self._waiting.pop(name, None)
        self._rows[name] = row
        self.version += 1
        self._seen_ms[row], self._pinned[row] = 0, False
        return row

    def state(self) -> dict[str, object]:
        """Return all of it; JSON-able if the names are."""
        size = len(self._names)
        return {
            "names": list(self._names),
            "seen_ms": self._seen_ms[:size].tolist(),
            "pinned": np.flatnonzero(self._pinned).tolist(),
            "waiting": [[name, count] for name, count in self._waiting.items()],
            "unknown": dict(self.unknown),
        }

    def restore(
        self,
        *,
        names: Sequence[Name | None],
        seen_ms: Sequence[int],
        pinned: Sequence[int],
        waiting: Sequence[tuple[Name, int]],
        unknown: dict[str, int],
    ) -> None:
        """Take the place of the vocabulary that `state` described.

        Raises:
            ValueError: If it has more rows than this one's limit.
        """
        if len(names) > self.limit:
            raise ValueError(f"a stored vocabulary has {len(names)} rows; the limit is {self.limit} now, raise it")
        self.version += 1
        self._names = list(names)
        self._rows = {name: row for row, name in enumerate(names) if name is not None}
        self._free = [row for row, name in enumerate(names) if name is None]  # ascending, so a heap
        self._seen_ms = np.zeros(self.limit, np.int64)
        self._seen_ms[: len(seen_ms)] = seen_ms
        self._pinned = np.zeros(self.limit, np.bool_)
        self._pinned[list(pinned)] = True
        self._waiting = {name: count for name, count in waiting}  # noqa: C416 - pairs may be lists
        self.unknown = Counter(unknown)
