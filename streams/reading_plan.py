"""Which partitions the joiner must not read at the moment.

Memory is bounded by reading less, never by deciding early. From half the limit on, both topics of a partition are read
at the same event time, for the one that is ahead would pile up; at the limit nothing is read but what holds the
watermark back, since only the watermark closes impressions. Mostly those are clicks. But a poll brings many records of
one topic, and when clicks alone have filled the memory, only their impressions free it: these are read until they take
the limit by themselves. With less in memory nothing is held: Faust takes up to a second to go on with a partition that
was. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from faust.types import TP

from streams.contracts.topics import CLICKS

TIGHT: Final = 0.5
"""Share of the memory limit from which the two topics keep together."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Where the reading of one partition of a topic stands."""

    place: TP
    lead_ms: int
    """How far its clock is ahead of the other topic's of the same partition, 0 if it is the older one."""
    other_is_at_end: bool
    """The other topic has no more to read: waiting for it would be waiting for ever."""
    is_behind: bool = False
    """Its clock is the older one, by whatever little."""


def places_to_hold(
    readings: Iterable[Reading],
    *,
    max_lead_ms: int,
    memory_share: float,
    is_stopped: bool,
    clicks_share: float = 0.0,
) -> frozenset[TP]:
    """Return the partitions to hold.

    Args:
        readings: All partitions of both topics.
        max_lead_ms: A topic further ahead of the other waits for it.
        memory_share: What is in memory, as a share of the limit.
        is_stopped: Nothing at all may be read.
        clicks_share: The part of it that clicks take which wait for their impressions.
    """
    held = set()
    for reading in readings:
        is_ahead = reading.lead_ms > max_lead_ms and not reading.other_is_at_end
        if reading.place.topic == CLICKS:
            may_help = reading.lead_ms == 0
        else:
            may_help = reading.is_behind and memory_share - clicks_share < 1.0
        if is_stopped or (memory_share >= TIGHT and is_ahead) or (memory_share >= 1.0 and not may_help):
            held.add(reading.place)
    return frozenset(held)
