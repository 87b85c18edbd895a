"""Join the impressions and clicks of one partition into labeled examples, in event time.

A click within the attribution window of its impression makes it positive. An impression leaves once when the watermark
passes its time + label wait, and a second time as a late positive if its click comes after that. Positives never leave
before the negatives of the same moment: a stream in which clicks come first would make every new element look like a
winner until its negatives arrive.

The Kafka log is the state store. Records are given back for acknowledgement in the order of their offsets, and only
when every decision in them has left the attribution window and the examples made from them are acknowledged by the
broker. After a crash the next owner reads the same records again and makes the same examples, or stronger ones.

Nothing here knows Kafka, Faust or the wall clock, so the tests feed it lists.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Literal

from streams.contracts.codec import END_OF_LOG_MS, BadEvent, Decoded, encode_event
from streams.contracts.decision_ids import InvalidDecisionIdError, issued_at_ms
from streams.contracts.events import Click, Impression
from streams.contracts.examples import LabelKind
from streams.contracts.settings import JoinSettings
from streams.contracts.topics import CLICKS, IMPRESSIONS

JoinTopic = Literal["impressions", "clicks"]
JOIN_TOPICS: Final[tuple[JoinTopic, JoinTopic]] = (IMPRESSIONS, CLICKS)
AFTER_END_MS: Final = END_OF_LOG_MS + 1
IMPRESSION_BUCKETS: Final = ("joined", "expired", "pending", "duplicate", "dead_letter")
CLICK_BUCKETS: Final = ("joined", "pending", "late", "duplicate", "orphan", "dead_letter")


@dataclass(frozen=True, slots=True)
class Record:
    """One Kafka record of `impressions` or `clicks`, decoded."""

    topic: JoinTopic
    offset: int
    timestamp_ms: int
    """The record's own time, as its producer set it."""
    batch: Decoded[Impression] | Decoded[Click]
    mark_ms: int | None = None
    """Not None: a mark, see `streams.contracts.codec`."""


@dataclass(frozen=True, slots=True)
class LabeledImpression:
    """What the joiner has decided about an impression."""

    impression: Impression
    kind: LabelKind
    click: Click | None

    @property
    def delay_ms(self) -> int | None:
        """Click time - impression time; None without a click."""
        return None if self.click is None else self.click.occurred_at_ms - self.impression.occurred_at_ms


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An event that could not be used, and where it stood."""

    topic: JoinTopic
    offset: int
    bad: BadEvent


@dataclass(slots=True)
class Output:
    """What is to be written to Kafka before anything that led to it may be acknowledged."""

    number: int
    examples: list[LabeledImpression]
    dead_letters: list[DeadLetter]


@dataclass(slots=True)
class Ledger:
    """Where the events of one partition went since it was taken. Every event is in exactly one bucket."""

    impressions: Counter[str] = field(default_factory=Counter)
    clicks: Counter[str] = field(default_factory=Counter)
    consumed_impressions: int = 0
    consumed_clicks: int = 0

    @property
    def imbalance(self) -> int:
        """Return how many events are missing from the buckets, or stand in two."""
        return abs(self.consumed_impressions - self.impressions.total()) + abs(
            self.consumed_clicks - self.clicks.total()
        )


class EventClock:
    """The watermark of one partition over its two topics: no event before it is still expected.

    A topic's own clock is the newest time seen in it. While a topic has more to read, its clock holds the watermark
    back. Once both have been read to their ends, the newest clock goes on with the wall clock, and a topic that has
    been read to its end trails it by `idle_timeout_ms` at most: so an idle partition, or one with rare clicks, delays
    no label, and an event may be that late on its way before it counts as late. With `idle_timeout_ms` 0 the watermark
    moves by events and marks alone: a replay then gives the same labels at any speed.
    """

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
            now_ms: The wall clock.
        """
        self._clock_ms[topic] = max(time_ms, self._clock_ms.get(topic, time_ms))
        self._read_at_ms = now_ms

    def advance(self, now_ms: int, caught_up: frozenset[JoinTopic]) -> int | None:
        """Return the watermark, which never goes back; None while it is unknown.

        Args:
            now_ms: The wall clock.
            caught_up: Topics of which everything there is has been read.
        """
        if not self._clock_ms or self._read_at_ms is None:
            return None
        newest = max(self._clock_ms.values())
        trails: int | None = None
        if self._idle_timeout_ms:
            if len(caught_up) == len(JOIN_TOPICS):
                newest += now_ms - self._read_at_ms
            trails = newest - self._idle_timeout_ms
        clocks: list[int] = []
        for topic in JOIN_TOPICS:
            clock = self._clock_ms.get(topic)
            if trails is not None and topic in caught_up:
                clock = trails if clock is None else max(clock, trails)
            if clock is None:
                return self.watermark_ms
            clocks.append(clock)
        self.watermark_ms = max(min(clocks), self.watermark_ms if self.watermark_ms is not None else min(clocks))
        return self.watermark_ms

    def reset(self) -> None:
        """Forget everything: another log begins."""
        self._clock_ms.clear()
        self.watermark_ms = None


class _HeldRecord:
    """A record that is not handed back yet."""

    __slots__ = ("offset", "release_ms")

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.release_ms = -1
        """When the watermark is beyond this, all decisions of the record have left the window."""


class _Open:
    """An impression inside its attribution window."""

    __slots__ = ("click", "emitted", "impression")

    def __init__(self, impression: Impression) -> None:
        self.impression = impression
        self.click: Click | None = None
        self.emitted = False


class PartitionJoiner:
    """Joins one partition.

    Call `add` for each record in the order of its topic, `advance` now and then, write what `take_output` returns, and
    call `acknowledge` when the broker has it; that returns what may be acknowledged to Kafka.
    """

    def __init__(self, settings: JoinSettings) -> None:
        self._window_ms = settings.attribution_window_ms
        self._wait_ms = settings.label_wait_ms
        self._max_skew_ms = settings.max_future_skew_ms
        self._clock = EventClock(settings.idle_timeout_ms)
        self._open: dict[str, _Open] = {}
        self._waiting: dict[str, list[tuple[Click, _HeldRecord]]] = {}
        self._sequence = 0
        self._to_emit: list[tuple[int, int, str]] = []
        self._to_close: list[tuple[int, int, str]] = []
        self._clicks_to_close: list[tuple[int, int, str]] = []
        self._examples: list[LabeledImpression] = []
        self._dead_letters: list[DeadLetter] = []
        self._number = 0
        self._acknowledged = 0
        # In the order of offsets.
        self._records: dict[JoinTopic, deque[_HeldRecord]] = {topic: deque() for topic in JOIN_TOPICS}
        # (offset, output that must be acknowledged first)
        self._done: dict[JoinTopic, deque[tuple[int, int]]] = {topic: deque() for topic in JOIN_TOPICS}
        self._ended: set[JoinTopic] = set()
        self._held: list[tuple[Record, int]] = []
        self._ledger = Ledger()

    @property
    def watermark_ms(self) -> int | None:
        """Event time up to which the partition is complete."""
        return self._clock.watermark_ms

    @property
    def num_open(self) -> int:
        """Number of impressions and waiting clicks in memory."""
        return len(self._open) + self._num_waiting

    def ledger(self) -> Ledger:
        """Return where every event went, `pending` counted from the state itself."""
        pending = len(self._to_emit)
        held = Counter(record.topic for record, _ in self._held for _ in (*record.batch.events, *record.batch.bad))
        return Ledger(
            self._ledger.impressions + Counter(pending=pending + held[IMPRESSIONS]),
            self._ledger.clicks + Counter(pending=self._num_waiting + held[CLICKS]),
            self._ledger.consumed_impressions + held[IMPRESSIONS],
            self._ledger.consumed_clicks + held[CLICKS],
        )

    @property
    def _num_waiting(self) -> int:
        return sum(len(clicks) for clicks in self._waiting.values())

    def add(self, record: Record, now_ms: int) -> None:
        """Take the next record of a topic.

        Args:
            record: Offsets of one topic must increase.
            now_ms: The wall clock.
        """
        if record.topic in self._ended:
            # The other topic's end-of-log mark is still to come: what follows belongs to the next log.
            self._held.append((record, now_ms))
            return
        held = _HeldRecord(record.offset)
        self._records[record.topic].append(held)
        self._apply(record, held, now_ms)
        if record.mark_ms is not None and record.mark_ms >= END_OF_LOG_MS:
            self._end(record.topic)

    def advance(self, now_ms: int, caught_up: Iterable[JoinTopic] = ()) -> None:
        """Move the watermark on and decide what has become decidable.

        Args:
            now_ms: The wall clock.
            caught_up: Topics of which everything there is has been read.
        """
        watermark = self._clock.advance(now_ms, frozenset(caught_up))
        if watermark is not None:
            self._settle(watermark)
        self._finish(0 if watermark is None else watermark)

    def take_output(self) -> Output | None:
        """Return the examples and dead letters to write, or None if there are none."""
        if not self._examples and not self._dead_letters:
            return None
        self._number += 1
        output = Output(self._number, self._examples, self._dead_letters)
        self._examples, self._dead_letters = [], []
        return output

    def acknowledge(self, number: int) -> None:
        """Note that the broker has this output and all before it."""
        self._acknowledged = max(self._acknowledged, number)

    def take_finished(self) -> list[tuple[JoinTopic, int]]:
        """Return the records that nothing in here needs any more, in the order of their offsets for each topic."""
        finished: list[tuple[JoinTopic, int]] = []
        for topic, done in self._done.items():
            while done and done[0][1] <= self._acknowledged:
                finished.append((topic, done.popleft()[0]))
        return finished

    def _apply(self, record: Record, held: _HeldRecord, now_ms: int) -> None:
        if record.mark_ms is not None:
            self._clock.observe(record.topic, min(record.mark_ms, END_OF_LOG_MS), now_ms)
            return
        is_impression = record.topic == IMPRESSIONS
        num_bad = len(record.batch.bad)
        for bad in record.batch.bad:
            self._dead_letters.append(DeadLetter(record.topic, record.offset, bad))
        latest_ms = record.timestamp_ms + self._max_skew_ms
        newest_ms = -1
        for event in record.batch.events:
            time_ms = event.occurred_at_ms
            if time_ms > latest_ms:
                num_bad += 1
                reason = f"occurred_at_ms: {time_ms} is {time_ms - record.timestamp_ms} ms after its record was written"
                self._dead_letters.append(DeadLetter(record.topic, record.offset, BadEvent(-1, reason, _line(event))))
                continue
            newest_ms = max(newest_ms, time_ms)
            if isinstance(event, Impression):
                self._impression(event)
            else:
                self._click(event, held)
        num_events = len(record.batch.events) + len(record.batch.bad)
        if is_impression:
            self._ledger.consumed_impressions += num_events
            self._ledger.impressions["dead_letter"] += num_bad
        else:
            self._ledger.consumed_clicks += num_events
            self._ledger.clicks["dead_letter"] += num_bad
        if newest_ms >= 0:
            self._clock.observe(record.topic, newest_ms, now_ms)
            held.release_ms = max(held.release_ms, newest_ms + self._window_ms)

    def _impression(self, impression: Impression) -> None:
        decision_id = impression.decision_id
        if decision_id in self._open:
            self._ledger.impressions["duplicate"] += 1
            return
        opened = self._open[decision_id] = _Open(impression)
        self._sequence += 1
        time_ms = impression.occurred_at_ms
        heapq.heappush(self._to_emit, (time_ms + self._wait_ms, self._sequence, decision_id))
        heapq.heappush(self._to_close, (time_ms + self._window_ms, self._sequence, decision_id))
        for click, held in self._waiting.pop(decision_id, ()):
            # It is needed as long as the impression is open, which may be longer than a window after the click.
            held.release_ms = max(held.release_ms, time_ms + self._window_ms)
            self._match(opened, click)

    def _click(self, click: Click, held: _HeldRecord) -> None:
        decision_id = click.decision_id
        opened = self._open.get(decision_id)
        if opened is not None:
            held.release_ms = max(held.release_ms, opened.impression.occurred_at_ms + self._window_ms)
            self._match(opened, click)
            return
        self._waiting.setdefault(decision_id, []).append((click, held))
        self._sequence += 1
        heapq.heappush(self._clicks_to_close, (click.occurred_at_ms + self._window_ms, self._sequence, decision_id))

    def _match(self, opened: _Open, click: Click) -> None:
        if click.occurred_at_ms - opened.impression.occurred_at_ms > self._window_ms:
            self._ledger.clicks["late"] += 1
        elif opened.click is not None:
            self._ledger.clicks["duplicate"] += 1
        else:
            self._ledger.clicks["joined"] += 1
            opened.click = click
            if opened.emitted:
                self._ledger.impressions["expired"] -= 1
                self._ledger.impressions["joined"] += 1
                self._examples.append(LabeledImpression(opened.impression, LabelKind.LATE_POSITIVE, click))

    def _give_up(self, decision_id: str, watermark_ms: int) -> None:
        """Count clicks that have waited a window for their impression: it has left, or there was none."""
        waiting = self._waiting.pop(decision_id, [])
        try:
            decided_ms: int | None = issued_at_ms(decision_id)
        except InvalidDecisionIdError:
            decided_ms = None
        for click, held in waiting:
            if click.occurred_at_ms + self._window_ms >= watermark_ms:
                self._waiting.setdefault(decision_id, []).append((click, held))
                continue
            is_late = decided_ms is not None and click.occurred_at_ms - decided_ms > self._window_ms
            self._ledger.clicks["late" if is_late else "orphan"] += 1

    def _settle(self, watermark_ms: int) -> None:
        while self._to_emit and self._to_emit[0][0] <= watermark_ms:
            opened = self._open[heapq.heappop(self._to_emit)[2]]
            opened.emitted = True
            certain = opened.click is not None or self._wait_ms >= self._window_ms
            kind = LabelKind.FINAL if certain else LabelKind.PROVISIONAL
            self._ledger.impressions["joined" if opened.click is not None else "expired"] += 1
            self._examples.append(LabeledImpression(opened.impression, kind, opened.click))
        # The watermark itself may still be the time of an event to come, so what lasts until then is not over yet.
        while self._to_close and self._to_close[0][0] < watermark_ms:
            del self._open[heapq.heappop(self._to_close)[2]]
        while self._clicks_to_close and self._clicks_to_close[0][0] < watermark_ms:
            self._give_up(heapq.heappop(self._clicks_to_close)[2], watermark_ms)

    def _finish(self, watermark_ms: int) -> None:
        # Everything decided so far leaves with the output of this number. So this must follow `_settle` at the same
        # watermark, or a record would count as finished before its examples are made.
        last = self._number + (1 if self._examples or self._dead_letters else 0)
        for topic, records in self._records.items():
            while records and records[0].release_ms < watermark_ms:
                self._done[topic].append((records.popleft().offset, last))

    def _end(self, topic: JoinTopic) -> None:
        self._ended.add(topic)
        if len(self._ended) < len(JOIN_TOPICS):
            # Whoever owns the partition after a crash must find this mark again, or it would join the next log to it.
            self._records[topic][-1].release_ms = AFTER_END_MS
            return
        self._settle(AFTER_END_MS)
        self._finish(AFTER_END_MS + 1)
        self._ended.clear()
        self._clock.reset()
        held, self._held = self._held, []
        for record, read_at_ms in held:
            self.add(record, read_at_ms)


def _line(event: Impression | Click) -> bytes:
    return encode_event(event)
