"""The topic `control`: written at every operator action and every lease, read when Redis is found empty.

Both are rare, so each call makes its own connection, and no process keeps one open for them.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Final

from kafka.errors import KafkaError

from streams.clients import UnreachableError, assign_whole_topic, kafka_consumer, kafka_producer
from streams.contracts.control import ControlRecord, newest
from streams.contracts.settings import KafkaSettings
from streams.contracts.topics import CONTROL

logger = logging.getLogger(__name__)

_TIMEOUT_S: Final = 10.0
_POLL_MS: Final = 200


class ControlLog:
    """Appends records, and finds the one that counts."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings

    def append(self, record: ControlRecord) -> None:
        """Write a record; return when the brokers have it.

        Raises:
            UnreachableError: If they did not take it in time; whether they have it is then unknown.
        """
        with self._answers():
            producer = kafka_producer(self._settings, max_block_ms=int(_TIMEOUT_S * 1000))
            try:
                delivery = producer.send(CONTROL, key=record.model_id.encode(), value=record.model_dump_json().encode())
                delivery.get(timeout=_TIMEOUT_S)
            finally:
                producer.close(timeout=1)

    def newest(self, model_id: str) -> ControlRecord | None:
        """Return the record that counts for a model, None if there is none; what is no record is told and left out.

        Raises:
            UnreachableError: If the topic cannot be read to its end.
            ConfigurationError: If there is no such topic.
        """
        with self._answers():
            return newest(record for record in self._records() if record.model_id == model_id)

    def _records(self) -> Iterator[ControlRecord]:
        consumer = kafka_consumer(self._settings)
        try:
            (place,) = assign_whole_topic(consumer, CONTROL)
            end = consumer.end_offsets([place])[place]
            deadline = time.monotonic() + _TIMEOUT_S
            while consumer.position(place) < end:
                found = consumer.poll(timeout_ms=_POLL_MS).get(place, ())
                if found:
                    deadline = time.monotonic() + _TIMEOUT_S
                elif time.monotonic() > deadline:
                    raise UnreachableError(
                        f"the topic {CONTROL} ends at offset {end}, but nothing comes after "
                        f"{consumer.position(place)}; check the broker"
                    )
                for record in found:
                    try:
                        yield ControlRecord.from_bytes(record.value or b"")
                    except ValueError as error:
                        logger.error("control record left out", extra={"offset": record.offset, "error": str(error)})
        finally:
            consumer.close()

    @contextlib.contextmanager
    def _answers(self) -> Iterator[None]:
        try:
            yield
        except KafkaError as error:
            raise UnreachableError(
                f"the Kafka broker at {self._settings.kafka_bootstrap_servers} does not take or give records of the "
                f"topic {CONTROL} ({type(error).__name__}: {error}); check it, and that the topic exists: genco topics"
            ) from error
