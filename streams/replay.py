"""Send a recorded log through Kafka, in event time.

A log is NDJSON, one record a line with a `type`: `element` and `product` go to the catalog, `impression` and `click` to
their topics. Events are sorted by time. After each chunk every partition gets a mark, so that the clocks go on
together, and each partition ends with an end-of-log mark, so that nothing stays pending. The records carry the time of
sending, not of the events: Kafka's retention would remove an old log as soon as it is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import msgspec
from kafka import KafkaProducer
from pydantic import ValidationError

from streams.contracts.catalog import Element, Product, catalog_key
from streams.contracts.codec import (
    END_OF_LOG_MS,
    MAX_LINE_BYTES,
    EventDecoder,
    encode_batch,
    encode_mark,
    split_to_fit,
)
from streams.contracts.decision_ids import InvalidDecisionIdError, route_of
from streams.contracts.events import Click, Impression
from streams.contracts.topics import CATALOG, CLICKS, IMPRESSIONS

CHUNK: Final = 1_000
BATCH: Final = 256


@dataclass(slots=True)
class ReplaySummary:
    """What was sent, and what was not."""

    impressions: int = 0
    clicks: int = 0
    catalog: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Lines left out, by reason."""
    first_skipped: str = ""
    """The first of them, with its line number."""


class _Head(msgspec.Struct):
    type: str = ""


_head = msgspec.json.Decoder(_Head)
_impressions = EventDecoder(Impression)
_clicks = EventDecoder(Click)


def log_files(path: Path) -> list[Path]:
    """Return the files of a log: the file itself, or the `*.ndjson` of a folder, sorted by name.

    Raises:
        ValueError: If there is none.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.ndjson"))
    if not files:
        raise ValueError(f"{path}: no such log; expected an .ndjson file or a folder of them (genco import makes one)")
    return files


def read_log(path: Path, summary: ReplaySummary) -> Iterator[Element | Product | Impression | Click]:
    """Yield the records of one file in its order; what cannot be read is counted in `summary`."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                yield _record(line.strip())
            except ValueError as error:
                reason = str(error)
                summary.skipped[reason.partition(":")[0]] += 1
                summary.first_skipped = summary.first_skipped or f"{path.name} line {number}: {reason}"


def _record(line: bytes) -> Element | Product | Impression | Click:
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"line: {len(line)} bytes; at most {MAX_LINE_BYTES}")
    try:
        kind = _head.decode(line).type
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"line: not a JSON object with a type ({error})") from None
    if kind in ("element", "product"):
        try:
            return (Element if kind == "element" else Product).model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{kind}.{'.'.join(str(p) for p in first['loc'])}: {first['msg']}") from None
    if kind not in ("impression", "click"):
        raise ValueError(f"type: {kind!r}; expected element, product, impression or click")
    decoded = _impressions.decode_batch(line) if kind == "impression" else _clicks.decode_batch(line)
    if decoded.bad:
        raise ValueError(decoded.bad[0].reason)
    return decoded.events[0]


def send_log(
    path: Path,
    producer: KafkaProducer,
    partitions: int,
    *,
    after_chunk: Callable[[ReplaySummary], None] = lambda summary: None,
) -> ReplaySummary:
    """Send a log as fast as `after_chunk` lets it.

    Args:
        path: A file or a folder of files, sent one after the other, each a log of its own.
        producer: From `streams.clients.kafka_producer`.
        partitions: Of `impressions` and `clicks`.
        after_chunk: Called with what has been sent so far; it may wait, so that a broker with little room keeps up.

    Raises:
        ValueError: If there is no log.
        KafkaError: If the broker does not take a record.
    """
    summary = ReplaySummary()
    for file in log_files(path):
        sender = _Sender(producer, partitions, summary)
        for record in read_log(file, summary):
            sender.add(record)
            if sender.num_waiting >= CHUNK:
                sender.flush()
                after_chunk(summary)
        sender.flush()
        sender.mark(END_OF_LOG_MS)
        after_chunk(summary)
    return summary


class _Sender:
    """Collects events into records by partition."""

    def __init__(self, producer: KafkaProducer, partitions: int, summary: ReplaySummary) -> None:
        self._producer = producer
        self._partitions = partitions
        self._summary = summary
        self._waiting: dict[tuple[str, int], list[Impression | Click]] = {}
        self._deliveries: list[Any] = []
        self._newest_ms = 0
        self.num_waiting = 0

    def add(self, record: Element | Product | Impression | Click) -> None:
        if isinstance(record, Element | Product):
            value = record.model_dump_json().encode()
            key = catalog_key(record)
            self._deliveries.append(self._producer.send(CATALOG, key=key, value=value, partition=0))
            self._summary.catalog += 1
            return
        try:
            partition = route_of(record.decision_id) % self._partitions
        except InvalidDecisionIdError:
            # Ids of another system: any spread will do, if it is the same for an impression and its click.
            partition = _stable_hash(record.decision_id) % self._partitions
        if isinstance(record, Impression):
            self._summary.impressions += 1
            place = (IMPRESSIONS, partition)
        else:
            self._summary.clicks += 1
            place = (CLICKS, partition)
        self._waiting.setdefault(place, []).append(record)
        self._newest_ms = max(self._newest_ms, record.occurred_at_ms)
        self.num_waiting += 1

    def flush(self) -> None:
        """Send what waits, and let every partition know how far the log has come."""
        for (topic, partition), events in self._waiting.items():
            for start in range(0, len(events), BATCH):
                for _, value in split_to_fit(events[start : start + BATCH], encode_batch):
                    self._deliveries.append(self._producer.send(topic, value=value, partition=partition))
        self._deliver()
        if self.num_waiting:
            self.mark(self._newest_ms)
        self._waiting.clear()
        self.num_waiting = 0

    def mark(self, complete_until_ms: int) -> None:
        value, headers = encode_mark(complete_until_ms)
        for topic in (IMPRESSIONS, CLICKS):
            for partition in range(self._partitions):
                self._deliveries.append(
                    self._producer.send(topic, value=value, headers=list(headers), partition=partition)
                )
        self._deliver()

    def _deliver(self) -> None:
        """Wait until the broker has everything; raise what it refused."""
        self._producer.flush()
        for delivery in self._deliveries:
            delivery.get(timeout=60)
        self._deliveries.clear()


def _stable_hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
