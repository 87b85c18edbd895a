"""The topic `catalog` as the learner uses it: what changed between two offsets.

The vocabulary gives names their index in the order in which they are seen. So an update takes the changes before a
recorded offset all at once, however the broker happened to portion them.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Any

from kafka import KafkaConsumer, TopicPartition

from streams.clients import assign_whole_topic
from streams.contracts.catalog import Catalog
from streams.contracts.topics import CATALOG

logger = logging.getLogger(__name__)

READ_TIMEOUT_S = 30.0


class CatalogLog:
    """Reads the catalog from its beginning or from where a checkpoint left it."""

    def __init__(self, consumer: KafkaConsumer) -> None:
        """Take a consumer without a group; `close` closes it.

        Raises:
            ConfigurationError: If the topic does not exist.
        """
        self._consumer = consumer
        (self._place,) = assign_whole_topic(consumer, CATALOG)
        self._waiting: deque[tuple[int, bytes | None, bytes | None]] = deque()
        self.taken_until = 0
        """Offset of the first record that `take` has not covered."""

    def go_to(self, offset: int) -> None:
        """Continue there: what comes before is known."""
        self.taken_until = offset
        self._waiting.clear()
        self._consumer.seek(self._place, offset)

    def poll(self) -> int:
        """Read what has come, without waiting, and return the offset after it."""
        while self._fetch(0):
            pass
        return self._waiting[-1][0] + 1 if self._waiting else self.taken_until

    def take(self, until: int) -> Catalog:
        """Return the records from `taken_until` to before this offset: the newest of each name.

        Compaction may have removed some, and bad ones are logged and left out.

        Raises:
            TimeoutError: If the topic ends before this offset.
        """
        deadline = time.monotonic() + READ_TIMEOUT_S
        while self.taken_until < until and not (self._waiting and self._waiting[-1][0] >= until - 1):
            if not self._fetch(200) and time.monotonic() > deadline:
                raise TimeoutError(f"catalog: offset {until} was known once and cannot be read; is the topic intact?")
        changed = Catalog()
        while self._waiting and self._waiting[0][0] < until:
            offset, key, value = self._waiting.popleft()
            try:
                changed.apply(key, value)
            except ValueError as error:
                logger.error("catalog record left out", extra={"offset": offset, "error": str(error)})
        self.taken_until = max(self.taken_until, until)
        return changed

    def close(self) -> None:
        """Close the consumer."""
        self._consumer.close()

    def _fetch(self, timeout_ms: int) -> bool:
        """Keep the next records; False if none came."""
        found: dict[TopicPartition, list[Any]] = self._consumer.poll(timeout_ms=timeout_ms, max_records=500)
        records = found.get(self._place, [])
        self._waiting.extend((r.offset, r.key, r.value) for r in records if r.offset >= self.taken_until)
        return bool(records)
