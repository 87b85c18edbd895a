"""Reads the audited topics in a thread of its own and feeds the audit."""

from __future__ import annotations

import threading
from typing import Any

from kafka import KafkaConsumer, TopicPartition

from genco.audit import AUDITED, Audit
from streams.clients import kafka_consumer
from streams.contracts.settings import JoinSettings
from streams.contracts.topics import EXAMPLES


class Follower:
    """Follows the topics from their present end (a fresh loop: their beginning) until it is closed."""

    def __init__(self, settings: JoinSettings, *, from_beginning: bool) -> None:
        self.audit = Audit(
            settings.attribution_window_ms,
            settings.label_wait_ms,
            settings.max_future_skew_ms,
            settings.max_event_age_ms,
        )
        self.lock = threading.Lock()
        """Hold it while reading the audit."""
        self.failure: Exception | None = None
        self._consumer: KafkaConsumer = kafka_consumer(settings, max_poll_records=200)
        places = [TopicPartition(topic, p) for topic in AUDITED for p in range(settings.partitions)]
        self._consumer.assign(places)
        if from_beginning:
            self._consumer.seek_to_beginning(*places)
        else:
            for place, end in self._consumer.end_offsets(places).items():
                self._consumer.seek(place, end)
        self.examples_until: dict[int, int] = {}
        """For each partition of `examples`, the offset after the last record read."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        self._thread.join(10)
        self._consumer.close()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                found: dict[TopicPartition, list[Any]] = self._consumer.poll(timeout_ms=200)
                with self.lock:
                    for place, records in found.items():
                        for record in records:
                            self.audit.feed(
                                place.topic,
                                place.partition,
                                record.offset,
                                record.value,
                                record.headers,
                                record.timestamp,
                            )
                            if place.topic == EXAMPLES:
                                self.examples_until[place.partition] = record.offset + 1
        except Exception as error:  # noqa: BLE001 - shown by whoever reads the audit
            self.failure = error
