"""Reads the topic `dead_letters`: which letters there are, which of them were replayed, and what their causes are.

A partition is read twice, first for the marks, then for the letters, so that memory holds one bit for each offset and
never the letters themselves. A letter that a crash made the joiner write again counts once.

Nothing here prints, sends or judges a line; `streams.dead_letter_replay` sends letters back.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from kafka import KafkaConsumer, TopicPartition

from streams.clients import UnreachableError, assign_whole_topic
from streams.contracts.dead_letters import CUT_BYTES, DeadLetter, replayed_of
from streams.contracts.topics import DEAD_LETTERS

STALL_S: Final = 30.0
"""A broker that gives nothing for so long, though there is more, has gone."""
REMEMBERED_ORIGINS: Final = 100_000
"""Repeated letters lie within one reading of the joiner, so a bounded memory of the last ones finds them."""
MAX_GROUPS: Final = 200
OTHER_CAUSES: Final = "(other causes)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which letters are wanted: those that every given field admits."""

    topic: str | None = None
    reason: str | None = None
    """Part of the reason's text."""
    partition: int | None = None
    since_ms: int | None = None
    """Not written before; times are those at which the joiner wrote the letter."""
    until_ms: int | None = None
    """Written before."""
    limit: int | None = None
    """At most so many, in the order of partitions and offsets."""
    is_replayed: bool | None = None
    """None: whether replayed or not."""

    @property
    def is_narrowed(self) -> bool:
        """Whether somebody chose anything."""
        chosen = (self.topic, self.reason, self.partition, self.since_ms, self.until_ms, self.limit)
        return any(value is not None for value in chosen)

    def admits(self, found: Found) -> bool:
        """Whether a letter is wanted, leaving `limit` and `is_replayed` aside."""
        letter = found.letter
        return (
            self.topic in (None, letter.topic)
            and (self.reason is None or self.reason in letter.reason)
            and self.partition in (None, letter.partition)
            and (self.since_ms is None or found.time_ms >= self.since_ms)
            and (self.until_ms is None or found.time_ms < self.until_ms)
        )


@dataclass(frozen=True, slots=True)
class Found:
    """A letter and its own place: `offset` in the partition of `dead_letters` that has its number."""

    letter: DeadLetter
    offset: int
    time_ms: int
    is_replayed: bool


class Scan:
    """Reads the topic up to the ends that it has at the start.

    Raises:
        ConfigurationError: If the topic does not exist.
        KafkaError: If the broker refuses.
    """

    def __init__(self, consumer: KafkaConsumer) -> None:
        self._consumer = consumer
        self._places: list[TopicPartition] = assign_whole_topic(consumer, DEAD_LETTERS)
        self._first: dict[TopicPartition, int] = consumer.beginning_offsets(self._places)
        self._end: dict[TopicPartition, int] = consumer.end_offsets(self._places)
        self.num_passed_over = 0
        """Letters that were wanted but for `is_replayed`."""
        self.num_strangers = 0
        """Records that are neither letter nor mark."""
        self.first_stranger = ""

    def letters(self, selection: Selection) -> Iterator[Found]:
        """Yield the wanted letters, partition by partition, in the order of their offsets.

        Raises:
            ValueError: If the selection names a partition that does not exist.
            UnreachableError: If the broker gives nothing any more.
        """
        num_partitions = len(self._places)
        if selection.partition is not None and not 0 <= selection.partition < num_partitions:
            raise ValueError(
                f"partition {selection.partition}: {DEAD_LETTERS} has {num_partitions}, 0 to {num_partitions - 1}"
            )
        num_left = selection.limit
        if num_left == 0:
            return
        for place in self._places:
            if selection.partition not in (None, place.partition):
                continue
            for found in self._partition(place):
                if not selection.admits(found):
                    continue
                if selection.is_replayed not in (None, found.is_replayed):
                    self.num_passed_over += 1
                    continue
                yield found
                if num_left is not None:
                    num_left -= 1
                    if num_left == 0:
                        return

    def _partition(self, place: TopicPartition) -> Iterator[Found]:
        first, end = self._first[place], self._end[place]
        replayed = _Offsets(first, end)
        for record in _records(self._consumer, place, first, end):
            replayed.add(replayed_of(record.headers))
        seen = _Origins(REMEMBERED_ORIGINS)
        for record in _records(self._consumer, place, first, end):
            letter = self._letter(record)
            if letter is not None and seen.is_new(letter):
                yield Found(letter, record.offset, record.timestamp, record.offset in replayed)

    def _letter(self, record: Any) -> DeadLetter | None:
        if replayed_of(record.headers) is not None:
            return None
        try:
            letter = DeadLetter.decode(record.value, record.headers)
            if letter.partition != record.partition:
                raise ValueError(f"no dead letter: its header partition is {letter.partition}")
        except ValueError as error:
            self.num_strangers += 1
            self.first_stranger = self.first_stranger or f"partition {record.partition} offset {record.offset}: {error}"
            return None
        return letter


def _records(consumer: KafkaConsumer, place: TopicPartition, first: int, end: int) -> Iterator[Any]:
    """Yield the records of one partition from offset `first` up to `end`."""
    if first >= end:
        return
    consumer.assign([place])
    consumer.seek(place, first)
    deadline = time.monotonic() + STALL_S
    # The position, not the last record's offset: the last offsets may hold none.
    while (consumer.position(place) or 0) < end:
        records = consumer.poll(timeout_ms=500).get(place, ())
        for record in records:
            if record.offset >= end:
                return
            yield record
        if records:
            deadline = time.monotonic() + STALL_S
        elif time.monotonic() > deadline:
            raise UnreachableError(
                f"the Kafka broker gave nothing of {place.topic} partition {place.partition} for {STALL_S:.0f} s, "
                f"though it has records up to offset {end}; check the broker, then run the same command again"
            )


class _Offsets:
    """A set of offsets from a known range, one bit each."""

    def __init__(self, first: int, end: int) -> None:
        self._first = first
        self._end = end
        self._bits = bytearray((max(end - first, 0) + 7) // 8)

    def add(self, offset: int | None) -> None:
        if offset is not None and self._first <= offset < self._end:
            byte, bit = divmod(offset - self._first, 8)
            self._bits[byte] |= 1 << bit

    def __contains__(self, offset: int) -> bool:
        byte, bit = divmod(offset - self._first, 8)
        return bool(self._bits[byte] & 1 << bit)


class _Origins:
    """Tells whether a letter of this partition came before, as far as it remembers."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._order: deque[tuple[str, int, int, int]] = deque()
        self._known: set[tuple[str, int, int, int]] = set()

    def is_new(self, letter: DeadLetter) -> bool:
        # Lines without a place of their own differ by what they say.
        content = hash(letter.line[:CUT_BYTES]) if letter.index < 0 else 0
        origin = (letter.topic, letter.offset, letter.index, content)
        if origin in self._known:
            return False
        self._known.add(origin)
        self._order.append(origin)
        if len(self._order) > self._size:
            self._known.remove(self._order.popleft())
        return True


@dataclass(slots=True)
class Group:
    """Letters of one topic with the same cause."""

    topic: str
    cause: str
    first_ms: int
    last_ms: int
    example: bytes
    """The line of the first of them."""
    num_letters: int = 0
    num_replayed: int = 0


# What differs between two lines with the same fault: values in quotes, lists, places, times, sizes. Bounds stay.
_DIFFERS: Final = re.compile(
    r"""
    (?P<quoted> '(?:[^'\\]|\\.)*' | "(?:[^"\\]|\\.)*" )
    | (?P<list> \[[^\]]*\] )
    | (?<= \bbyte\ ) \d+
    | (?<! [<>]=\ ) -? (?<![\w.]) (?: \d+\.\d+(?:e[+-]?\d+)? | \d+e[+-]?\d+ | \d{3,} )
    """,
    re.VERBOSE,
)


def cause_of(reason: str) -> str:
    """Return a reason without what differs between two lines with the same fault."""

    def replace(match: re.Match[str]) -> str:
        if match["quoted"]:
            return "'...'"
        return "[...]" if match["list"] else "N"

    return _DIFFERS.sub(replace, reason)


def group_letters(letters: Iterable[Found]) -> list[Group]:
    """Count letters by topic and cause, most frequent first; rare causes beyond `MAX_GROUPS` are one group a topic."""
    groups: dict[tuple[str, str], Group] = {}
    for found in letters:
        letter = found.letter
        key = (letter.topic, cause_of(letter.reason))
        if key not in groups and len(groups) >= MAX_GROUPS:
            key = (letter.topic, OTHER_CAUSES)
        group = groups.get(key)
        if group is None:
            group = groups[key] = Group(*key, first_ms=found.time_ms, last_ms=found.time_ms, example=letter.line)
        group.first_ms = min(group.first_ms, found.time_ms)
        group.last_ms = max(group.last_ms, found.time_ms)
        group.num_letters += 1
        group.num_replayed += found.is_replayed
    return sorted(groups.values(), key=lambda group: -group.num_letters)
