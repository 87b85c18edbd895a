"""How far a new owner of partitions is with reading again what its predecessor had in memory.

The log is the state: after a start or a rebalance everything since the last acknowledged offsets, one attribution
window, is read again before anything new. This tells how long that takes. Pure: offsets and times are arguments.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """Where the reading stands."""

    num_read: int
    """Records."""
    num_records: int
    seconds: float
    """Since it began."""
    seconds_left: float | None
    """None before anything was read."""

    @property
    def is_complete(self) -> bool:
        """Whether everything is read that there was at the start."""
        return self.num_read >= self.num_records


class Rereading:
    """Follows the partitions of one assignment.

    Args:
        now_s: A clock that only goes forward, in seconds.
    """

    def __init__(self, now_s: float) -> None:
        self._started_s = now_s
        self._places: dict[Hashable, list[int]] = {}

    def begin(self, place: Hashable, offset: int, end_offset: int) -> None:
        """Note where reading of a partition begins, and where its log ended then. Later calls change nothing."""
        self._places.setdefault(place, [offset, max(offset, end_offset), offset])

    def read(self, place: Hashable, next_offset: int) -> None:
        """Note that everything before an offset has been read."""
        found = self._places.get(place)
        if found is not None:
            found[2] = min(found[1], next_offset)

    def progress(self, now_s: float) -> Progress:
        """Return where it stands."""
        num_records = sum(end - begin for begin, end, _ in self._places.values())
        num_read = sum(position - begin for begin, _, position in self._places.values())
        seconds = now_s - self._started_s
        left = seconds * (num_records - num_read) / num_read if num_read else None
        return Progress(num_read, num_records, seconds, 0.0 if num_read == num_records else left)
