"""Sends dead letters back to the topic and partition that they came from.

Two steps. `prepare` completes, edits and judges every selected line and keeps the good ones in temporary files, so that
whoever asked sees what will happen before anything is sent, and memory holds one chunk. `send` sends them, impressions
before clicks, and marks each letter when the broker has its line. To the joiner they are late events like any other.

A crash between the two leaves letters that were sent and not marked. They are sent again the next time, and the joiner
drops the second as a duplicate by its decision id while the attribution window lasts.
"""

from __future__ import annotations

import struct
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Final, NoReturn, Self

from kafka import KafkaProducer
from kafka.errors import KafkaError

from streams.contracts.codec import split_to_fit
from streams.contracts.dead_letters import encode_replayed
from streams.contracts.topics import CLICKS, DEAD_LETTERS, IMPRESSIONS
from streams.dead_letter_lines import Edit, Judge, WholeLine, unedited
from streams.dead_letters import Found, cause_of

CHUNK: Final = 1_000
CHUNK_BYTES: Final = 8 * 2**20
BATCH: Final = 256
"""Events in one record."""
RECORDS_IN_FLIGHT: Final = 32
ORDER: Final = (IMPRESSIONS, CLICKS)


@dataclass(frozen=True, slots=True)
class Ready:
    """A line that can be sent, and the letter that it stands for."""

    partition: int
    letter_offset: int
    line: bytes


class Spool:
    """Lines of one topic on disk, in order, while they wait to be sent."""

    _HEAD: Final = struct.Struct(">IQI")

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="genco-")  # noqa: SIM115 - `close` closes it

    def close(self) -> None:
        """Remove the file."""
        self._file.close()

    def append(self, ready: Ready) -> None:
        """Keep a line."""
        self._file.write(self._HEAD.pack(ready.partition, ready.letter_offset, len(ready.line)) + ready.line)

    def batches(self) -> Iterator[list[Ready]]:
        """Yield lines of one partition together, at most `BATCH`."""
        batch: list[Ready] = []
        for ready in self._read():
            if batch and (len(batch) == BATCH or batch[0].partition != ready.partition):
                yield batch
                batch = []
            batch.append(ready)
        if batch:
            yield batch

    def _read(self) -> Iterator[Ready]:
        self._file.seek(0)
        while head := self._file.read(self._HEAD.size):
            partition, letter_offset, length = self._HEAD.unpack(head)
            yield Ready(partition, letter_offset, self._file.read(length))


@dataclass(slots=True)
class Plan:
    """What `send` will do. A context manager: the lines are gone after it."""

    num_selected: int = 0
    ready: Counter[str] = field(default_factory=Counter)
    """By topic."""
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By topic and cause."""
    first_refused: dict[tuple[str, str], str] = field(default_factory=dict)
    """Place of the first of them in `dead_letters`."""
    num_forced: int = 0
    """Lines that will be dead letters again, and are sent nevertheless."""
    num_beyond_window: int = 0
    """Events older than the attribution window: their clicks cannot be joined for certain any more."""
    spools: dict[str, Spool] = field(default_factory=lambda: {topic: Spool() for topic in ORDER})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for spool in self.spools.values():
            spool.close()

    def refuse(self, found: Found, reason: str) -> None:
        """Leave a letter out."""
        key = (found.letter.topic, cause_of(reason))
        self.refused[key] += 1
        self.first_refused.setdefault(key, f"partition {found.letter.partition} offset {found.offset}")


def prepare(
    letters: Iterable[Found],
    *,
    judge: Judge,
    whole_line: WholeLine,
    edit: Edit = unedited,
    force: bool = False,
) -> Plan:
    """Complete, edit and judge the letters; nothing is sent.

    Args:
        letters: In the order of their partitions.
        judge: Says which lines would be dead letters again; those are left out.
        whole_line: Completes a letter that was cut.
        edit: Gives a line for each line, in the same order.
        force: Leave no line out for what the judge says.

    Raises:
        ValueError: If the edit fails.
        KafkaError: If the broker refuses.
    """
    plan = Plan()
    try:
        for chunk in _chunks(letters):
            _prepare_chunk(plan, chunk, judge, whole_line, edit, force=force)
    except BaseException:
        plan.__exit__()
        raise
    return plan


def _prepare_chunk(
    plan: Plan, chunk: Sequence[Found], judge: Judge, whole_line: WholeLine, edit: Edit, *, force: bool
) -> None:
    kept, lines = [], []
    for found in chunk:
        plan.num_selected += 1
        try:
            lines.append(whole_line(found.letter))
        except LookupError as error:
            plan.refuse(found, str(error))
        else:
            kept.append(found)
    for found, line in zip(kept, edit(lines), strict=True):
        topic = found.letter.topic
        fault, is_beyond_window = judge.fault(topic, line)
        if fault is not None and not force:
            plan.refuse(found, fault)
            continue
        plan.num_forced += fault is not None
        plan.num_beyond_window += is_beyond_window
        plan.ready[topic] += 1
        plan.spools[topic].append(Ready(found.letter.partition, found.offset, line))


def _chunks(letters: Iterable[Found]) -> Iterator[list[Found]]:
    chunk: list[Found] = []
    size = 0
    for found in letters:
        chunk.append(found)
        size += found.letter.length
        if len(chunk) == CHUNK or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def send(plan: Plan, producer: KafkaProducer) -> Counter[str]:
    """Send what is ready and mark it; return the number of letters by topic.

    Raises:
        RuntimeError: If the broker does not take everything. What it took before is marked.
    """
    sender = _Sender(producer)
    for topic in ORDER:
        for batch in plan.spools[topic].batches():
            sender.add(topic, batch)
        # All impressions are there before the first click.
        sender.settle()
    return sender.sent


class _Sender:
    """Sends records, waits for the broker, then marks their letters."""

    def __init__(self, producer: KafkaProducer) -> None:
        self._producer = producer
        self._in_flight: list[tuple[Sequence[Ready], Any]] = []
        self._topic = ""
        self.sent: Counter[str] = Counter()

    def add(self, topic: str, batch: Sequence[Ready]) -> None:
        self._topic = topic
        for lines, value in split_to_fit(batch, _encode):
            try:
                delivery = self._producer.send(topic, value=value, partition=batch[0].partition)
            except KafkaError as error:
                self.settle()
                self._give_up(error)
            self._in_flight.append((lines, delivery))
        if len(self._in_flight) >= RECORDS_IN_FLIGHT:
            self.settle()

    def settle(self) -> None:
        """Wait for what was sent, and mark what the broker has, whatever became of the rest."""
        in_flight, self._in_flight = self._in_flight, []
        failure: KafkaError | None = None
        taken: list[Ready] = []
        self._producer.flush()
        for lines, delivery in in_flight:
            try:
                delivery.get(timeout=60)
            except KafkaError as error:
                failure = failure or error
            else:
                taken += lines
        self._mark(taken)
        self.sent[self._topic] += len(taken)
        if failure is not None:
            self._give_up(failure)

    def _mark(self, taken: Sequence[Ready]) -> None:
        try:
            marks = []
            for ready in taken:
                value, headers = encode_replayed(ready.letter_offset)
                marks.append(self._producer.send(DEAD_LETTERS, value=value, headers=headers, partition=ready.partition))
            self._producer.flush()
            for mark in marks:
                mark.get(timeout=60)
        except KafkaError as error:
            raise RuntimeError(
                f"the broker took {len(taken)} lines and not all their marks ({_name(error)}); the next replay sends "
                "some of them again, which the joiner drops as duplicates within its window"
            ) from error

    def _give_up(self, error: KafkaError) -> NoReturn:
        raise RuntimeError(
            f"the broker took and has marked {self.sent.total()} letters, and refused others ({_name(error)}); "
            "mend the cause, then run the same command again"
        ) from error


def _encode(lines: Sequence[Ready]) -> bytes:
    return b"\n".join(ready.line for ready in lines)


def _name(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
