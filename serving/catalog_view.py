"""The catalog as the server knows it: a thread that reads the compacted topic `catalog` into memory.

Requests that bring no candidates get the product's slots from here. A lost broker leaves the last known catalog in
place. After a reconnect the topic is read anew into a fresh catalog, which replaces the old one when it is complete:
what was retired in between may have left no trace in a compacted topic.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Final

from kafka.errors import KafkaError

from serving.metrics import ServingMetrics
from streams.clients import assign_whole_topic
from streams.contracts.catalog import Catalog
from streams.contracts.settings import ConfigurationError
from streams.contracts.topics import CATALOG

logger = logging.getLogger(__name__)

_POLL_MS: Final = 200
_MAX_BACKOFF_S: Final = 5.0


class CatalogView:
    """Follows the topic `catalog`.

    Args:
        connect: Makes a kafka-python consumer without topics; may fail, and is tried again.
        metrics: Counts records that could not be read.
        is_stale: Whether a consumer made now would have other credentials than the one that reads.
    """

    def __init__(
        self, connect: Callable[[], Any], metrics: ServingMetrics, is_stale: Callable[[], bool] = lambda: False
    ) -> None:
        self._connect = connect
        self._is_stale = is_stale
        self._metrics = metrics
        self._catalog = Catalog()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="genco-catalog", daemon=True)
        self.fault: str | None = "the topic was not read to its end yet"
        """Why the catalog is incomplete or not followed at the moment, or None."""

    @property
    def catalog(self) -> Catalog:
        """The newest catalog; read it once for each call."""
        return self._catalog

    def start(self) -> None:
        """Connect and read from a thread; returns at once."""
        self._thread.start()

    def stop(self, timeout_s: float = 2.0) -> None:
        """End the thread."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        backoff_s = 0.2
        while not self._stopping.is_set():
            consumer = None
            try:
                consumer = self._connect()
                self._follow(consumer)
                backoff_s = 0.2
            except (KafkaError, OSError, ConfigurationError) as error:
                self.fault = f"{type(error).__name__}: {error}"
                logger.warning("catalog is not followed; trying again", extra={"cause": str(error)})
            except Exception as error:
                # A bug, ours or the library's: the last known catalog goes on serving, readiness tells.
                self.fault = f"{type(error).__name__}: {error}"
                logger.exception("reading the catalog failed; connecting anew")
            finally:
                if consumer is not None:
                    consumer.close(timeout_ms=500)
            self._stopping.wait(backoff_s)
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    def _follow(self, consumer: Any) -> None:
        assignment = assign_whole_topic(consumer, CATALOG)
        ends = consumer.end_offsets(assignment, timeout_ms=5_000)
        fresh, is_complete = Catalog(), False
        while not self._stopping.is_set() and not self._is_stale():
            for batch in consumer.poll(timeout_ms=_POLL_MS).values():
                for record in batch:
                    self._apply(fresh, record)
            if not is_complete and all(consumer.position(part) >= ends[part] for part in assignment):
                self._catalog, self.fault, is_complete = fresh, None, True
                logger.info("catalog read", extra={"elements": len(fresh.elements), "products": len(fresh.products)})
            self._metrics.catalog_records.labels("element").set(len(self._catalog.elements))
            self._metrics.catalog_records.labels("product").set(len(self._catalog.products))

    def _apply(self, catalog: Catalog, record: Any) -> None:
        try:
            catalog.apply(record.key, record.value)
        except ValueError as error:
            self._metrics.catalog_rejected.inc()
            logger.warning(
                "catalog record was not read",
                extra={"partition": record.partition, "offset": record.offset, "cause": str(error)},
            )
