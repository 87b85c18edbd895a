"""Join the impressions and clicks of one partition into labeled examples, in event time.

A click within the attribution window of its impression makes it positive. An impression leaves once when the watermark
passes its time + label wait, and a second time as a late positive if its click comes after that. Positives never leave
before the negatives of the same moment: a stream in which clicks come first would make every new element look like a
winner until its negatives arrive. What comes behind the watermark (from a server that was cut off for a while, or whose
clock is behind) leaves at once, and waits for its click, or its impression, as long as if it had come in time.

The Kafka log is the state store. Records are given back for acknowledgement in the order of their offsets, and only
when every decision in them has left the attribution window and the examples made from them are acknowledged by the
broker. After a crash the next owner reads the same records again and makes the same examples, or stronger ones.

Ids are compared by a 64-bit hash with a secret of the process: with ten million open impressions, one new one in 10^12
is taken for a duplicate. Nothing here knows Kafka, Faust or the wall clock, so the tests feed it lists.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from streams.contracts.codec import END_OF_LOG_MS, BadEvent
from streams.contracts.decision_ids import InvalidDecisionIdError, issued_at_ms
from streams.contracts.events import Click
from streams.contracts.examples import LabelKind
from streams.contracts.settings import JoinSettings
from streams.contracts.topics import CLICKS, IMPRESSIONS
from streams.event_clock import JOIN_TOPICS, EventClock, JoinTopic
from streams.example_records import EXAMPLES_PER_RECORD, INDEX_BYTES, RECORD_BYTES, ExampleRecord, LatePositives, Part
from streams.impressions import ImpressionBatch
from streams.join_guard import PartitionWatch
from streams.join_hold import Gate

AFTER_END_MS: Final = END_OF_LOG_MS + 1
IMPRESSION_BUCKETS: Final = ("joined", "expired", "pending", "duplicate", "dead_letter")
CLICK_BUCKETS: Final = ("joined", "pending", "late", "duplicate", "orphan", "dead_letter")
CLICK_BYTES: Final = 600
"""About what a click that waits for its impression costs in memory."""


@dataclass(frozen=True, slots=True)
class Record:
    """One Kafka record of `impressions` or `clicks`, decoded."""

    offset: int
    timestamp_ms: int
    """The record's own time: the broker's, or its producer's."""
    events: ImpressionBatch | Sequence[Click]
    """The topic is `impressions` if it is the former."""
    bad: Sequence[BadEvent] = ()
    mark_ms: int | None = None
    """Not None: a mark, see `streams.contracts.codec`."""

    @property
    def topic(self) -> JoinTopic:
        """Where it was read."""
        return IMPRESSIONS if isinstance(self.events, ImpressionBatch) else CLICKS

    @property
    def num_events(self) -> int:
        """Lines in it, good and bad."""
        return len(self.events) + len(self.bad)


@dataclass(frozen=True, slots=True)
class BadLine:
    """An event that could not be used, and where it stood."""

    topic: JoinTopic
    offset: int
    event: BadEvent


@dataclass(slots=True)
class Output:
    """What is to be written to Kafka before anything that led to it may be acknowledged."""

    number: int
    records: list[ExampleRecord]
    late: LatePositives
    bad: list[BadLine]


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


class _HeldRecord:
    """A record that is not handed back yet."""

    __slots__ = ("offset", "release_ms")

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.release_ms = -1
        """When the watermark is beyond this, all decisions of the record have left the window."""


class _Waiting:
    """Impressions of one record that have not left yet, in the order of their times."""

    __slots__ = ("clicks", "close_ms", "columns", "keys", "num_bytes", "start", "times_ms")

    def __init__(self, batch: ImpressionBatch, keys: NDArray[np.int64], close_ms: int) -> None:
        self.columns = batch.columns
        self.times_ms = batch.times_ms
        self.keys = keys
        self.close_ms = close_ms
        self.clicks: dict[int, Click] = {}
        self.start = 0
        """Rows before this one have left."""
        self.num_bytes = batch.columns.num_bytes + INDEX_BYTES * len(batch)

    def row_of(self, key: int) -> int:
        return int(np.flatnonzero(self.keys == key)[0])

    @property
    def clicked(self) -> Mapping[int, Click]:
        return self.clicks


@dataclass(slots=True)
class _Leaving:
    """Rows [first, last) of a batch, about to leave."""

    waiting: _Waiting
    first: int
    last: int


class PartitionJoiner:
    """Joins one partition.

    Call `add` for each record in the order of its topic, `advance` now and then, write what `take_output` returns, and
    call `acknowledge` when the broker has it; that returns what may be acknowledged to Kafka.

    `watch` is told of impressions and of the clicks that meet them; `gate` may hold the watermark.
    """

    def __init__(self, settings: JoinSettings, watch: PartitionWatch | None = None, gate: Gate | None = None) -> None:
        self._window_ms = settings.attribution_window_ms
        self._wait_ms = settings.label_wait_ms
        self._kind_without_click = LabelKind.FINAL if self._wait_ms >= self._window_ms else LabelKind.PROVISIONAL
        self._clock = EventClock(settings.idle_timeout_ms)
        self._watch = watch
        self._gate = gate or Gate(self._window_ms, self._wait_ms)
        self._decided_ms: int | None = None
        # Key of an open impression -> where its row is: among those that wait, or in the record it left with.
        self._open: dict[int, _Waiting | ExampleRecord] = {}
        self._to_emit: list[tuple[int, int, _Waiting]] = []
        self._num_pending = 0
        self._to_close: deque[ExampleRecord] = deque()
        self._clicks: dict[str, list[tuple[Click, int, _HeldRecord]]] = {}
        self._num_clicks = 0
        self._clicks_to_close: list[tuple[int, int, str]] = []
        self._sequence = 0
        self._output = Output(1, [], LatePositives(), [])
        self._unacknowledged: deque[Output] = deque()
        self._acknowledged = 0
        self._bytes = 0
        # In the order of offsets.
        self._records: dict[JoinTopic, deque[_HeldRecord]] = {topic: deque() for topic in JOIN_TOPICS}
        # (offset, output that must be acknowledged first)
        self._done: dict[JoinTopic, deque[tuple[int, int]]] = {topic: deque() for topic in JOIN_TOPICS}
        self._ended: set[JoinTopic] = set()
        self._next_log: list[tuple[Record, int]] = []
        self._ledger = Ledger()

    @property
    def watermark_ms(self) -> int | None:
        """Event time up to which everything has been decided."""
        return self._decided_ms

    @property
    def num_open(self) -> int:
        """Number of impressions inside their window and of clicks that wait, in memory."""
        return len(self._open) + self._num_clicks

    @property
    def num_bytes(self) -> int:
        """About how much memory they take."""
        return self._bytes + self.num_click_bytes

    @property
    def num_click_bytes(self) -> int:
        """The part of it that clicks take which wait for their impressions."""
        return CLICK_BYTES * self._num_clicks

    def lead_ms(self, topic: JoinTopic) -> int:
        """Return how far a topic has been read ahead of the other, in event time."""
        return self._clock.lead_ms(topic)

    def ledger(self) -> Ledger:
        """Return where every event went, `pending` counted from the state itself."""
        held = Counter[str]()
        for record, _ in self._next_log:
            held[record.topic] += record.num_events
        return Ledger(
            self._ledger.impressions + Counter(pending=self._num_pending + held[IMPRESSIONS]),
            self._ledger.clicks + Counter(pending=self._num_clicks + held[CLICKS]),
            self._ledger.consumed_impressions + held[IMPRESSIONS],
            self._ledger.consumed_clicks + held[CLICKS],
        )

    def add(self, record: Record, now_ms: int) -> None:
        """Take the next record of a topic.

        Args:
            record: Offsets of one topic must increase.
            now_ms: A clock that only goes forward.
        """
        topic = record.topic
        if topic in self._ended:
            # The other topic's end-of-log mark is still to come: what follows belongs to the next log.
            self._next_log.append((record, now_ms))
            return
        held = _HeldRecord(record.offset)
        self._records[topic].append(held)
        if record.mark_ms is None:
            self._apply(record, held, now_ms)
            return
        self._clock.observe(topic, min(record.mark_ms, END_OF_LOG_MS), now_ms)
        if record.mark_ms >= END_OF_LOG_MS:
            self._end(topic)

    def advance(self, read_until_ms: Mapping[JoinTopic, int]) -> None:
        """Move the watermark on and decide what has become decidable.

        Args:
            read_until_ms: See `EventClock.advance`.
        """
        clock_ms = self.read_clock(read_until_ms)
        if clock_ms is not None:
            for watermark, is_known in self._gate.steps(clock_ms):
                self._settle(watermark, is_known=is_known)
                self._decided_ms = max(watermark, self._decided_ms or watermark)
        self._finish(self._decided_ms or 0)

    def read_clock(self, read_until_ms: Mapping[JoinTopic, int]) -> int | None:
        """Move the clock on and return it: up to there everything has been read. Decide nothing yet."""
        return self._clock.advance(read_until_ms)

    def take_output(self) -> Output | None:
        """Return what is to be written, or None if there is nothing."""
        output = self._output
        if not (output.records or output.late or output.bad):
            return None
        self._output = Output(output.number + 1, [], LatePositives(), [])
        self._unacknowledged.append(output)
        return output

    def acknowledge(self, number: int) -> None:
        """Note that the broker has this output and all before it."""
        self._acknowledged = max(self._acknowledged, number)
        while self._unacknowledged and self._unacknowledged[0].number <= number:
            for record in self._unacknowledged.popleft().records:
                if not record.is_closed:  # encoded by now, and smaller
                    self._bytes += record.num_bytes - record.counted_bytes
                    record.counted_bytes = record.num_bytes

    def take_finished(self) -> dict[JoinTopic, int]:
        """Return for each topic the last record, if there is one, that it and all before it are needed no more."""
        finished: dict[JoinTopic, int] = {}
        for topic, done in self._done.items():
            while done and done[0][1] <= self._acknowledged:
                finished[topic] = done.popleft()[0]
        return finished

    # -- what comes in -----------------------------------------------------------------------------

    def _apply(self, record: Record, held: _HeldRecord, now_ms: int) -> None:
        topic, events = record.topic, record.events
        self._output.bad.extend(BadLine(topic, record.offset, bad) for bad in record.bad)
        newest_ms = -1
        if isinstance(events, ImpressionBatch):
            self._ledger.consumed_impressions += record.num_events
            self._ledger.impressions["dead_letter"] += len(record.bad)
            if len(events):
                newest_ms = int(events.times_ms.max())
                held.release_ms = self._closes_at(newest_ms)
                self._impressions(events, held.release_ms)
        else:
            self._ledger.consumed_clicks += record.num_events
            self._ledger.clicks["dead_letter"] += len(record.bad)
            for click in events:
                newest_ms = max(newest_ms, click.occurred_at_ms)
                held.release_ms = max(held.release_ms, self._closes_at(click.occurred_at_ms))
                self._click(click, held)
        if newest_ms >= 0:
            # An event may be ahead of its record by a little; one wrong clock must not take everybody's time away.
            self._clock.observe(topic, min(newest_ms, record.timestamp_ms), now_ms)

    def _closes_at(self, time_ms: int) -> int:
        """Return until when an event is kept: a window after its time, or after its arrival if it came late."""
        return max(time_ms, self._clock.watermark_ms or 0) + self._window_ms

    def _impressions(self, batch: ImpressionBatch, close_ms: int) -> None:
        keys = list(map(hash, batch.ids))
        if len(set(keys)) < len(keys) or not self._open.keys().isdisjoint(keys):
            batch, keys = self._without_duplicates(batch, keys)
            if not keys:
                return
        index = np.array(keys, np.int64)
        times_ms = batch.times_ms
        if len(keys) > 1 and not bool((times_ms[1:] >= times_ms[:-1]).all()):
            order = np.argsort(times_ms, kind="stable")
            batch, index = batch.take(order), index[order]
        waiting = _Waiting(batch, index, close_ms)
        self._bytes += waiting.num_bytes
        self._num_pending += len(keys)
        self._open.update(dict.fromkeys(keys, waiting))
        self._push(waiting)
        if self._watch is not None:
            self._watch.shown(waiting.times_ms)
        if self._clicks and not self._clicks.keys().isdisjoint(batch.ids):
            for decision_id in batch.ids:
                for click, _, held in self._clicks.pop(decision_id, ()):
                    self._num_clicks -= 1
                    self._match(waiting, hash(decision_id), click, held)

    def _without_duplicates(self, batch: ImpressionBatch, keys: list[int]) -> tuple[ImpressionBatch, list[int]]:
        seen: set[int] = set()
        rows = []
        for row, key in enumerate(keys):
            if key not in self._open and key not in seen:
                seen.add(key)
                rows.append(row)
        self._ledger.impressions["duplicate"] += len(keys) - len(rows)
        return batch.take(rows), [keys[row] for row in rows]

    def _push(self, waiting: _Waiting) -> None:
        self._sequence += 1
        due_ms = int(waiting.times_ms[waiting.start]) + self._wait_ms
        heapq.heappush(self._to_emit, (due_ms, self._sequence, waiting))

    def _click(self, click: Click, held: _HeldRecord) -> None:
        decision_id = click.decision_id
        key = hash(decision_id)
        opened = self._open.get(key)
        if opened is not None:
            self._match(opened, key, click, held)
            return
        close_ms = self._closes_at(click.occurred_at_ms)
        self._clicks.setdefault(decision_id, []).append((click, close_ms, held))
        self._num_clicks += 1
        self._sequence += 1
        heapq.heappush(self._clicks_to_close, (close_ms, self._sequence, decision_id))

    def _match(self, opened: _Waiting | ExampleRecord, key: int, click: Click, held: _HeldRecord) -> None:
        # It is needed as long as the impression is open, which may be longer than a window after the click.
        held.release_ms = max(held.release_ms, opened.close_ms)
        row = opened.row_of(key)
        if click.occurred_at_ms - int(opened.times_ms[row]) > self._window_ms:
            self._ledger.clicks["late"] += 1
        elif row in opened.clicked:
            self._ledger.clicks["duplicate"] += 1
        else:
            self._ledger.clicks["joined"] += 1
            if self._watch is not None:
                self._watch.clicked(int(opened.times_ms[row]), click.occurred_at_ms)
            if isinstance(opened, _Waiting):
                opened.clicks[row] = click
                return
            opened.clicked.add(row)
            self._ledger.impressions["expired"] -= 1
            self._ledger.impressions["joined"] += 1
            self._output.late.add(opened, row, click)

    # -- what goes out -----------------------------------------------------------------------------

    def _settle(self, watermark_ms: int, *, is_known: bool = True) -> None:
        self._emit(watermark_ms, self._kind_without_click if is_known else LabelKind.UNKNOWN)
        # The watermark itself may still be the time of an event to come, so what lasts until then is not over yet.
        while self._to_close and self._to_close[0].close_ms < watermark_ms:
            record = self._to_close.popleft()
            record.is_closed = True
            self._bytes -= record.counted_bytes
            for key in record.keys.tolist():
                del self._open[key]
        while self._clicks_to_close and self._clicks_to_close[0][0] < watermark_ms:
            self._give_up(heapq.heappop(self._clicks_to_close)[2], watermark_ms)

    def _emit(self, watermark_ms: int, kind: LabelKind) -> None:
        """Let go, in order of time, what was shown a label wait ago."""
        leaving: list[_Leaving] = []
        num_rows = num_bytes = 0
        while self._to_emit and self._to_emit[0][0] <= watermark_ms:
            waiting = heapq.heappop(self._to_emit)[2]
            first = waiting.start
            due = int(np.searchsorted(waiting.times_ms, watermark_ms - self._wait_ms, side="right"))
            waiting.start = due
            columns = waiting.columns
            while first < due:
                most = min(due, first + EXAMPLES_PER_RECORD - num_rows)
                last = columns.fitting(first, most, RECORD_BYTES - num_bytes)
                if last == first and leaving:
                    self._leave(leaving, kind)
                    leaving, num_rows, num_bytes = [], 0, 0
                    continue
                last = max(last, first + 1)
                leaving.append(_Leaving(waiting, first, last))
                num_rows += last - first
                num_bytes += columns.bytes_of(first, last)
                first = last
                if num_rows >= EXAMPLES_PER_RECORD:
                    self._leave(leaving, kind)
                    leaving, num_rows, num_bytes = [], 0, 0
            if due < len(waiting.times_ms):
                self._push(waiting)
            else:
                self._bytes -= waiting.num_bytes
        if leaving:
            self._leave(leaving, kind)

    def _leave(self, leaving: Sequence[_Leaving], kind: LabelKind) -> None:
        """Make one record of these rows, and let their keys lead to it; `kind` is that of a row without a click."""
        clicks: dict[int, Click] = {}
        num_rows = 0
        for part in leaving:
            if part.waiting.clicks:
                start = num_rows - part.first
                clicks |= {start + row: c for row, c in part.waiting.clicks.items() if part.first <= row < part.last}
            num_rows += part.last - part.first
        record = ExampleRecord(
            parts=[Part(part.waiting.columns, part.first, part.last) for part in leaving],
            keys=np.concatenate([part.waiting.keys[part.first : part.last] for part in leaving]),
            times_ms=np.concatenate([part.waiting.times_ms[part.first : part.last] for part in leaving]),
            clicks=clicks,
            # One after the other: nothing closes before what left earlier.
            close_ms=max(
                max(part.waiting.close_ms for part in leaving), self._to_close[-1].close_ms if self._to_close else 0
            ),
            kind_without_click=kind,
        )
        self._open.update(dict.fromkeys(record.keys.tolist(), record))
        self._to_close.append(record)
        self._output.records.append(record)
        self._bytes += record.counted_bytes
        self._num_pending -= len(record)
        self._ledger.impressions["joined"] += len(clicks)
        self._ledger.impressions["expired"] += len(record) - len(clicks)

    def _give_up(self, decision_id: str, watermark_ms: int) -> None:
        """Count clicks that have waited a window for their impression: it has left, or there was none."""
        try:
            decided_ms: int | None = issued_at_ms(decision_id)
        except InvalidDecisionIdError:
            decided_ms = None
        for click, close_ms, held in self._clicks.pop(decision_id, ()):
            if close_ms >= watermark_ms:
                self._clicks.setdefault(decision_id, []).append((click, close_ms, held))
                continue
            self._num_clicks -= 1
            is_late = decided_ms is not None and click.occurred_at_ms - decided_ms > self._window_ms
            self._ledger.clicks["late" if is_late else "orphan"] += 1

    def _finish(self, watermark_ms: int) -> None:
        # Everything decided so far leaves with the output of this number. So this must follow `_settle` at the same
        # watermark, or a record would count as finished before its examples are made.
        output = self._output
        last = output.number if output.records or output.late or output.bad else output.number - 1
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
        self._decided_ms = None
        next_log, self._next_log = self._next_log, []
        for record, read_at_ms in next_log:
            self.add(record, read_at_ms)
