"""From the bytes of a Kafka record to what the join takes: good events, and bad lines with their reason.

Bad is also an event whose time cannot be: one ahead of its record (its clock would take everybody's label wait away),
or older by weeks (a time in seconds, or a clock that was never set). Times are compared with the record's own, which
our topics take from the broker, so the same bytes are judged the same whenever they are read.
"""

from __future__ import annotations

import numpy as np

from streams.attribution import Record
from streams.contracts.codec import BadEvent, EventDecoder, lines_of
from streams.contracts.events import Click
from streams.contracts.settings import JoinSettings
from streams.contracts.topics import IMPRESSIONS
from streams.event_clock import JoinTopic
from streams.impressions import ImpressionBatch, ImpressionDecoder


class RecordDecoder:
    """Decodes records of `impressions` and `clicks`. Keep one: it holds compiled schemas and a cache."""

    def __init__(self, settings: JoinSettings) -> None:
        self._max_skew_ms = settings.max_future_skew_ms
        self._max_age_ms = settings.max_event_age_ms
        self._impressions = ImpressionDecoder()
        self._clicks = EventDecoder(Click)

    def decode(
        self, topic: JoinTopic, offset: int, timestamp_ms: int, value: bytes, mark_ms: int | None = None
    ) -> Record:
        """Read one record. Never raises on bad bytes.

        Args:
            topic: Where it was read.
            offset: Its offset.
            timestamp_ms: Its own time.
            value: Its bytes.
            mark_ms: Time of a mark, if it is one.
        """
        if topic == IMPRESSIONS:
            if mark_ms is not None:
                return Record(offset, timestamp_ms, ImpressionBatch.empty(), [], mark_ms)
            return Record(offset, timestamp_ms, *self._timely(*self._impressions.decode(value), value, timestamp_ms))
        if mark_ms is not None:
            return Record(offset, timestamp_ms, [], [], mark_ms)
        decoded = self._clicks.decode_batch(value)
        return Record(offset, timestamp_ms, *self._timely_clicks(decoded.events, decoded.bad, value, timestamp_ms))

    def _timely(
        self, batch: ImpressionBatch, bad: list[BadEvent], value: bytes, timestamp_ms: int
    ) -> tuple[ImpressionBatch, list[BadEvent]]:
        latest, earliest = self._bounds(timestamp_ms)
        times_ms = batch.times_ms
        wrong = np.flatnonzero((times_ms > latest) | (times_ms < earliest)).tolist()
        if not wrong:
            return batch, bad
        lines = lines_of(value)
        bad = [
            *bad,
            *(self._bad(batch.lines[row], int(times_ms[row]), timestamp_ms, lines[batch.lines[row]]) for row in wrong),
        ]
        return batch.take(np.setdiff1d(np.arange(len(batch)), wrong)), bad

    def _timely_clicks(
        self, clicks: list[Click], bad: list[BadEvent], value: bytes, timestamp_ms: int
    ) -> tuple[list[Click], list[BadEvent]]:
        latest, earliest = self._bounds(timestamp_ms)
        if all(earliest <= click.occurred_at_ms <= latest for click in clicks):
            return clicks, bad
        lines = lines_of(value)
        places = [place for place in range(len(lines)) if place not in {event.index for event in bad}]
        good: list[Click] = []
        bad = list(bad)
        for place, click in zip(places, clicks, strict=True):
            if earliest <= click.occurred_at_ms <= latest:
                good.append(click)
            else:
                bad.append(self._bad(place, click.occurred_at_ms, timestamp_ms, lines[place]))
        return good, bad

    def _bounds(self, timestamp_ms: int) -> tuple[int, int]:
        """Return the latest and the earliest time that is believed."""
        return timestamp_ms + self._max_skew_ms, timestamp_ms - self._max_age_ms if self._max_age_ms else 0

    def _bad(self, place: int, time_ms: int, timestamp_ms: int, line: bytes) -> BadEvent:
        if time_ms > timestamp_ms:
            limit = f"at most {self._max_skew_ms} (GENCO_MAX_FUTURE_SKEW_MS)"
            reason = f"occurred_at_ms: {time_ms} is {time_ms - timestamp_ms} ms after its record was written; {limit}"
        else:
            hint = "in seconds? " if time_ms < 10**11 else ""
            limit = f"at most {self._max_age_ms} (GENCO_MAX_EVENT_AGE_MS)"
            reason = (
                f"occurred_at_ms: {hint}{time_ms} is {timestamp_ms - time_ms} ms before its record was written; {limit}"
            )
        return BadEvent(place, reason, line)
