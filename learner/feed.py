"""What the learner's thread and the event loop that reads Kafka hand to each other.

The loop puts records in; the thread takes them into the backlog in the order of their offsets, asks for those that are
missing, and gives offsets back when a checkpoint holds what was learned from them. When the thread falls behind,
`is_full` asks the loop to read no further: nothing is skipped, Kafka keeps what waits.
"""

from __future__ import annotations

import logging
import queue
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from learner import worker_metrics as metrics
from learner.updates import Backlog, PendingRecord
from streams.contracts.examples import ExampleBatch, decode_examples

logger = logging.getLogger(__name__)

MAX_UNREAD: Final = 200
"""Records between the loop and the thread, encoded still."""
ASK_AGAIN_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class InboxRecord:
    """A record of `examples` as the consumer read it."""

    partition: int
    offset: int
    value: bytes
    acknowledge: Callable[[], Any]
    """Lets the offset be committed; called on the event loop."""


@dataclass(frozen=True, slots=True)
class Rebalanced:
    """Partitions were taken away: everything that no checkpoint holds comes again."""


@dataclass(frozen=True, slots=True)
class RecordsLost:
    """The records of a partition before this offset exist no more."""

    partition: int
    earliest: int


@dataclass(frozen=True, slots=True)
class SeekRequest:
    """The thread needs a partition from this offset on."""

    partition: int
    offset: int


class Feed:
    """The records between the event loop and the learner's thread. The loop uses `put` and what is public below."""

    def __init__(self, max_waiting: int, clock: Callable[[], float]) -> None:
        """Begin with nothing learned.

        Args:
            max_waiting: Examples in the backlog beyond which no more are taken.
            clock: Seconds, only forward.
        """
        self._inbox: queue.SimpleQueue[InboxRecord | Rebalanced | RecordsLost] = queue.SimpleQueue()
        self.acknowledgements: deque[Callable[[], Any]] = deque()
        """Offsets that may be committed; the event loop empties it."""
        self.seeks: deque[SeekRequest] = deque()
        """Where the event loop must read again; it empties it."""
        self.backlog = Backlog({})
        self.needs: Mapping[int, int] | None = None
        """Bounds of a recorded update whose records must all come, however many wait already."""
        self._max_waiting = max_waiting
        self._clock = clock
        self._learned_until: dict[int, int] = {}
        self._unacknowledged: deque[tuple[int, int, Callable[[], Any]]] = deque()
        self._asked_at: dict[int, float] = {}

    @property
    def is_full(self) -> bool:
        """Whether the event loop should wait before it reads on."""
        return self._has_enough or self._inbox.qsize() > MAX_UNREAD

    @property
    def _has_enough(self) -> bool:
        if self.backlog.num_examples <= self._max_waiting:
            return False
        return self.needs is None or self.backlog.holds(self.needs)

    def put(self, item: InboxRecord | Rebalanced | RecordsLost) -> None:
        """Hand something to the thread."""
        self._inbox.put(item)

    def restart(self, learned_until: Mapping[int, int]) -> None:
        """Forget what waits and begin at these offsets; partitions that are not named begin at 0."""
        known = self.backlog.next_offset.keys() | learned_until.keys()
        self._learned_until = dict(learned_until)
        self.backlog.clear(dict.fromkeys(known, 0) | self._learned_until)
        self._unacknowledged.clear()
        self._asked_at.clear()

    def ask_again(self) -> None:
        """Ask for every known partition from where the backlog ends, before a record that comes shows the gap."""
        for partition, offset in sorted(self.backlog.next_offset.items()):
            self._ask(partition, offset)

    def receive(self, timeout_s: float) -> None:
        """Take in what has come, up to the limit; wait a moment if nothing has."""
        try:
            self._take_in(self._inbox.get(timeout=timeout_s))
            while not self._has_enough:
                self._take_in(self._inbox.get_nowait())
        except queue.Empty:
            pass
        metrics.backlog.set(self.backlog.num_examples)

    def learned(self, until: Mapping[int, int]) -> None:
        """Note what the model has learned."""
        self._learned_until |= until

    def release(self, saved_until: Mapping[int, int]) -> None:
        """Let the offsets before these be committed: a checkpoint holds what was learned from them."""
        waiting: deque[tuple[int, int, Callable[[], Any]]] = deque()
        for partition, offset, acknowledge in self._unacknowledged:
            if offset < saved_until.get(partition, 0):
                self.acknowledgements.append(acknowledge)
            else:
                waiting.append((partition, offset, acknowledge))
        self._unacknowledged = waiting

    def _take_in(self, item: InboxRecord | Rebalanced | RecordsLost) -> None:
        match item:
            case Rebalanced():
                self.restart(self._learned_until)
            case RecordsLost():
                self._skip(item)
            case InboxRecord():
                self._take_record(item)

    def _take_record(self, record: InboxRecord) -> None:
        expected = self.backlog.next_offset.setdefault(record.partition, 0)
        if record.offset > expected:
            if self._clock() - self._asked_at.get(record.partition, -ASK_AGAIN_S) >= ASK_AGAIN_S:
                self._ask(record.partition, expected)
            return
        if record.offset < expected:
            # Learned before, or waiting already. It comes again, so it may have to be acknowledged again.
            self._unacknowledged.append((record.partition, record.offset, record.acknowledge))
            return
        self.backlog.add(PendingRecord(record.partition, record.offset, _examples(record)))
        self._unacknowledged.append((record.partition, record.offset, record.acknowledge))

    def _ask(self, partition: int, offset: int) -> None:
        self._asked_at[partition] = self._clock()
        self.seeks.append(SeekRequest(partition, offset))

    def _skip(self, lost: RecordsLost) -> None:
        expected = self.backlog.next_offset.get(lost.partition, 0)
        if lost.earliest <= expected:
            return
        if self.backlog.next_offset.get(lost.partition) or self.needs is not None:
            metrics.lost.labels("retention").inc(lost.earliest - expected)
            logger.error(
                "records of examples were removed by retention before they were learned",
                extra={"partition": lost.partition, "first": expected, "count": lost.earliest - expected},
            )
        self.backlog.skip_to(lost.partition, lost.earliest)


def _examples(record: InboxRecord) -> ExampleBatch:
    try:
        return decode_examples(record.value)
    except ValueError as error:
        metrics.skipped.labels("unreadable").inc()
        logger.error(
            "record of examples cannot be read and is left out",
            extra={"partition": record.partition, "offset": record.offset, "error": str(error)},
        )
        return ExampleBatch.empty()
