"""The topic `updates` as the learner uses it: written by the lease's holder, read by whoever takes over from it."""

from __future__ import annotations

from kafka import KafkaProducer

from learner.updates import Update, effective
from streams.clients import assign_whole_topic, kafka_consumer, kafka_producer
from streams.contracts.settings import KafkaSettings
from streams.contracts.topics import UPDATES


class UpdateLog:
    """Appends updates, and reads back those of the learners before."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._producer: KafkaProducer = kafka_producer(settings)

    def append(self, update: Update) -> int:
        """Record an update and return the offset after it, when the brokers have it.

        Raises:
            KafkaError: If they do not take it; whether it is recorded is then unknown.
        """
        delivery = self._producer.send(UPDATES, update.model_dump_json().encode())
        return int(delivery.get(timeout=30).offset) + 1

    def since(self, offset: int, epoch: int) -> tuple[list[Update], int]:
        """Return the updates recorded at this offset and after it that count, and the offset that comes next.

        Args:
            offset: Where to begin.
            epoch: That of the newest update before it.
        """
        recorded, end = recorded_updates(self._settings, offset)
        return effective(recorded, epoch), end

    def close(self) -> None:
        """End the connection."""
        self._producer.close(timeout=2)


def recorded_updates(settings: KafkaSettings, since: int) -> tuple[list[Update], int]:
    """Return every update recorded at this offset of the topic and after it, and the offset that comes next.

    Raises:
        ValueError: If a record is none.
    """
    consumer = kafka_consumer(settings)
    try:
        (place,) = assign_whole_topic(consumer, UPDATES)
        begin, end = consumer.beginning_offsets([place])[place], consumer.end_offsets([place])[place]
        consumer.seek(place, max(since, begin))
        found: list[Update] = []
        while consumer.position(place) < end:
            found.extend(Update.from_bytes(record.value) for record in consumer.poll(timeout_ms=500).get(place, ()))
        return found, max(since, end)
    finally:
        consumer.close()
