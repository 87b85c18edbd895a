"""The watermark of one partition over its two topics: no event before it is still expected.

A topic's own clock is the newest time seen in it. While a topic has more to read, its clock holds the watermark back.
Once both have been read to their ends, the newest clock goes on with the wall clock, up to the moment at which the
broker last said that there is nothing more: when it is silent the watermark stands still, for the clicks that nobody
can read yet are not late. A topic that has been read to its end trails the newest clock by `idle_timeout_ms` at most,
so an idle partition, or one with rare clicks, delays no label; an event may be that late on its way before it counts as
late. It trails by the age of the broker's answer besides: while impressions are read again in bulk after a restart, an
answer of some seconds ago says nothing of the clicks of these seconds. With `idle_timeout_ms` 0 the watermark moves by
events and marks alone: a replay then gives the same labels at any speed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from streams.contracts.topics import CLICKS, IMPRESSIONS

JoinTopic = Literal["impressions", "clicks"]
JOIN_TOPICS: Final[tuple[JoinTopic, JoinTopic]] = (IMPRESSIONS, CLICKS)


class EventClock:
    """Moves the watermark; see the module."""

    def __init__(self, idle_timeout_ms: int) -> None:
        self._idle_timeout_ms = idle_timeout_ms
        self._clock_ms: dict[JoinTopic, int] = {}
        self._read_at_ms: int | None = None
        self.watermark_ms: int | None = None

    def observe(self, topic: JoinTopic, time_ms: int, now_ms: int) -> None:
        """Note an event or a mark.

        Args:
            topic: Where it was read.
            time_ms: Its event time.
            now_ms: A clock that only goes forward, in milliseconds.
        """
        self._clock_ms[topic] = max(time_ms, self._clock_ms.get(topic, time_ms))
        self._read_at_ms = now_ms

    def advance(self, read_until_ms: Mapping[JoinTopic, int]) -> int | None:
        """Return the watermark, which never goes back; None while it is unknown.

        Args:
            read_until_ms: For each topic of which everything had been read, the moment at which that was so, by the
                clock of `observe`. A topic with more to read is left out.
        """
        if not self._clock_ms or self._read_at_ms is None:
            return None
        newest = max(self._clock_ms.values())
        if self._idle_timeout_ms and len(read_until_ms) == len(JOIN_TOPICS):
            newest += max(0, min(read_until_ms.values()) - self._read_at_ms)
        clocks: list[int] = []
        for topic in JOIN_TOPICS:
            clock = self._clock_ms.get(topic)
            if self._idle_timeout_ms and topic in read_until_ms:
                age_ms = max(0, self._read_at_ms - read_until_ms[topic])
                trails = newest - self._idle_timeout_ms - age_ms
                clock = trails if clock is None else max(clock, trails)
            if clock is None:
                return self.watermark_ms
            clocks.append(clock)
        self.watermark_ms = max(min(clocks), self.watermark_ms if self.watermark_ms is not None else min(clocks))
        return self.watermark_ms

    def lead_ms(self, topic: JoinTopic) -> int:
        """Return how far a topic's clock is ahead of the other's: 0 if it is behind, much if the other is unknown."""
        clock = self._clock_ms.get(topic)
        if clock is None:
            return 0
        return max(0, clock - min(self._clock_ms.get(other, 0) for other in JOIN_TOPICS))

    def reset(self) -> None:
        """Forget everything: another log begins."""
        self._clock_ms.clear()
        self.watermark_ms = None
