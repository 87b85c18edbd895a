"""The Kafka that a benchmark runs against, and what the benchmark itself does with it: fill, count, read, set offsets.

The clients are librdkafka's, so that filling and reading take seconds and little of the cores that are measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Literal, Self

from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition

from benchmarks.traffic import KafkaRecord
from genco.services import KafkaBroker, MockBroker, find_kafka_home
from genco.services.kafka_home import has_java
from streams.clients import COMPRESSION

KafkaKind = Literal["home", "embedded"]
Offsets = Mapping[int, int]
"""Of one topic, by partition."""

_TIMEOUT_S: Final = 30.0


class BenchmarkError(RuntimeError):
    """A benchmark cannot go on, or found something wrong; the message is for the user."""


def choose_kafka(wanted: KafkaKind | None) -> KafkaKind:
    """Return the broker to use: what is wanted, else a real Kafka if there is one."""
    if wanted is not None:
        return wanted
    return "home" if find_kafka_home() is not None and has_java() else "embedded"


class BenchmarkBroker:
    """A broker on loopback with topics of its own; everything of it is gone at the end.

    Args:
        kind: Apache Kafka, or the embedded broker, which keeps 5 MiB a partition.
        topics: Partition count of each topic.
    """

    def __init__(self, kind: KafkaKind, topics: Mapping[str, int]) -> None:
        self._topics = dict(topics)
        self._service = KafkaBroker(topics) if kind == "home" else MockBroker(topics)
        self._reader: Any = None

    def __enter__(self) -> Self:
        """Start it.

        Raises:
            ServiceError: If it does not start.
        """
        self._service.start()
        try:
            self._reader = self._consumer("benchmark")
        except BaseException:
            self._service.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._reader.close()
        finally:
            self._service.stop()

    @property
    def address(self) -> str:
        """Bootstrap server."""
        return self._service.bootstrap_servers

    def settings(self) -> dict[str, str]:
        """Return the environment variables that lead our processes here."""
        return self._service.client_settings()

    def fill(self, records: Iterable[KafkaRecord], **options: Any) -> None:
        """Send records as fast as they come, and return when all are acknowledged.

        Args:
            records: What to send; those of one partition keep their order.
            **options: Of librdkafka's producer, with `_` for `.`.

        Raises:
            BenchmarkError: If the broker does not take one.
        """
        refused: list[str] = []
        producer = Producer(
            {
                "bootstrap.servers": self.address,
                "enable.idempotence": True,
                "log_level": 0,  # What matters comes with the deliveries; at an end by a signal the broker goes first.
                "compression.type": COMPRESSION,
                "queue.buffering.max.kbytes": 128 * 1024,
                "delivery.timeout.ms": int(_TIMEOUT_S * 1000),
                **{name.replace("_", "."): value for name, value in options.items()},
            }
        )

        def note(error: Any, _: Any) -> None:
            if error is not None:
                refused.append(str(error))

        for record in records:
            _produce(producer, record, note)
            if refused:
                break
        waiting = producer.flush(2 * _TIMEOUT_S)
        if refused or waiting:
            raise BenchmarkError(f"the broker did not take the benchmark's records: {refused[:1] or 'no answer'}")

    def ends(self, topic: str) -> dict[int, int]:
        """Return the offset after the last record of each partition."""
        return {partition: end for partition, (_, end) in self._watermarks(topic).items()}

    def size(self, topic: str) -> int:
        """Return how many records a topic has had."""
        return sum(self.ends(topic).values())

    def require_kept(self, topic: str, start: Offsets) -> None:
        """Check that nothing from these offsets on is gone.

        Raises:
            BenchmarkError: If the broker has dropped some: the embedded one keeps 5 MiB a partition.
        """
        if any(first > start[partition] for partition, (first, _) in self._watermarks(topic).items()):
            raise BenchmarkError(f"{topic} does not fit the embedded broker; use fewer --impressions, or --kafka home")

    def begin_group(self, group: str, offsets: Mapping[str, Offsets]) -> None:
        """Let a new consumer group begin at these offsets of these topics."""
        places = [TopicPartition(topic, p, offset) for topic, by in offsets.items() for p, offset in by.items()]
        consumer = self._consumer(group)
        try:
            consumer.commit(offsets=places, asynchronous=False)
        except KafkaException as error:
            raise BenchmarkError(f"cannot set the offsets of group {group}: {error}") from error
        finally:
            consumer.close()

    def read(self, topic: str, start: Offsets) -> Iterator[bytes]:
        """Yield the values from these offsets to the present end.

        Raises:
            BenchmarkError: If they cannot be read.
        """
        self.require_kept(topic, start)
        left = {p: end for p, end in self.ends(topic).items() if end > start[p]}
        consumer = self._consumer("reader")
        try:
            consumer.assign([TopicPartition(topic, p, start[p]) for p in left])
            deadline = time.monotonic() + _TIMEOUT_S
            while left:
                for message in consumer.consume(100, timeout=0.5):
                    if message.error() is not None:
                        raise BenchmarkError(f"cannot read {topic}: {message.error()}")
                    if message.offset() + 1 >= left.get(message.partition(), 0):
                        left.pop(message.partition(), None)
                    deadline = time.monotonic() + _TIMEOUT_S
                    yield message.value() or b""
                if time.monotonic() > deadline:
                    raise BenchmarkError(f"reading {topic} came to no end: nothing for {_TIMEOUT_S:.0f} s")
        finally:
            consumer.close()

    def _watermarks(self, topic: str) -> dict[int, tuple[int, int]]:
        return {partition: self._watermark(topic, partition) for partition in range(self._topics[topic])}

    def _watermark(self, topic: str, partition: int) -> tuple[int, int]:
        """Return the first and the next offset of a partition; a new one may have no leader for a moment."""
        deadline = time.monotonic() + _TIMEOUT_S
        while True:
            try:
                found: tuple[int, int] = self._reader.get_watermark_offsets(
                    TopicPartition(topic, partition), timeout=_TIMEOUT_S
                )
                return found
            except KafkaException as error:
                if time.monotonic() > deadline:
                    raise BenchmarkError(f"cannot ask for the offsets of {topic}: {error}") from error
                time.sleep(0.1)

    def _consumer(self, group: str) -> Any:
        return Consumer(
            {
                "bootstrap.servers": self.address,
                "group.id": group,
                "enable.auto.commit": False,
                "auto.offset.reset": "error",
            }
        )


def _produce(producer: Any, record: KafkaRecord, note: Any) -> None:
    while True:
        try:
            producer.produce(
                record.topic,
                record.value,
                record.key,
                record.partition,
                on_delivery=note,
                timestamp=record.timestamp_ms,
                headers=list(record.headers),
            )
        except BufferError:
            producer.poll(0.1)
        else:
            producer.poll(0)
            return
