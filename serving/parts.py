"""The parts that decide and log, wired together: `genco serve` puts them behind HTTP, `serving.embedded` behind calls.

Everything starts and decides without Redis and without Kafka, and connects in threads of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from prometheus_client import CollectorRegistry

from serving.catalog_view import CatalogView
from serving.decisions import Decider
from serving.event_log import EventLog, Producer
from serving.metrics import ServingMetrics
from serving.policy_holder import PolicyHolder
from serving.refresher import Refresher
from serving.snapshot_store import LastGood, SnapshotStore
from streams.clients import kafka_consumer, kafka_producer, redis_client
from streams.contracts.settings import ServeSettings
from streams.telemetry import now_ms

REDIS_TIMEOUT_S: Final = 0.5
_THREADS_S: Final = 1.0
_CONNECT_MS: Final = 5_000
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What decides, and what it needs; nothing of it has been started."""

    decider: Decider
    holder: PolicyHolder
    refresher: Refresher
    catalog: CatalogView
    event_log: EventLog
    metrics: ServingMetrics
    signing_key: bytes
    attribution_window_ms: int

    def start(self) -> None:
        """Start the threads; returns at once, whether or not anything answers."""
        self.refresher.start()
        self.catalog.start()
        self.event_log.start()

    def stop(self, timeout_s: float) -> int:
        """Stop the threads, the event log last; return how many events were lost."""
        deadline = time.monotonic() + timeout_s
        self.refresher.stop(_THREADS_S)
        lost = self.event_log.close(max(0.5, deadline - time.monotonic() - _THREADS_S))
        self.catalog.stop(_THREADS_S)
        return lost


def build(settings: ServeSettings, registry: CollectorRegistry) -> Parts:
    """Make the parts; connects to nothing."""
    key = settings.signing_key_bytes()
    metrics = ServingMetrics(registry)
    holder = PolicyHolder()
    first, last = (int(part) for part in settings.routes.split("-"))
    writing, reading = _Credentials(settings), _Credentials(settings)
    event_log = EventLog(
        connect=writing.connecting(lambda: _producer(settings)),
        is_stale=writing.is_stale,
        routes=range(first, last + 1),
        queue_size=settings.event_queue_size,
        linger_ms=settings.event_linger_ms,
        batch_size=settings.event_batch_size,
        metrics=metrics,
        rng=np.random.default_rng(),
    )
    catalog = CatalogView(reading.connecting(lambda: kafka_consumer(settings)), metrics, reading.is_stale)
    return Parts(
        decider=Decider(
            holder=holder,
            catalog=catalog,
            log=event_log,
            signing_key=key,
            model_id=settings.model_id,
            rng=np.random.default_rng(settings.uniform_seed),
            metrics=metrics,
        ),
        holder=holder,
        refresher=Refresher(
            store=SnapshotStore(redis_client(settings, timeout_s=REDIS_TIMEOUT_S, retries=0), settings.model_id, key),
            holder=holder,
            last_good=LastGood(settings.last_good_dir, settings.model_id, key),
            listen_client=redis_client(settings, timeout_s=REDIS_TIMEOUT_S, retries=0),
            model_id=settings.model_id,
            interval_s=settings.refresh_interval_ms / 1000,
            metrics=metrics,
            now_ms=now_ms,
        ),
        catalog=catalog,
        event_log=event_log,
        metrics=metrics,
        signing_key=key,
        attribution_window_ms=settings.attribution_window_ms,
    )


class _Credentials:
    """Tells when the password of Kafka is another one than when the last client was made."""

    def __init__(self, settings: ServeSettings) -> None:
        self._file = settings.file_of("kafka_sasl_password")

    def connecting(self, connect: Callable[[], T]) -> Callable[[], T]:
        """Return `connect` that first takes note of the password's file."""

        def noting() -> T:
            if self._file is not None:
                self._file.read()
            return connect()

        return noting

    def is_stale(self) -> bool:
        """Return whether the file is another one now."""
        return self._file is not None and self._file.has_changed()


def _producer(settings: ServeSettings) -> Producer:
    # Short, as a shutdown must not wait for it. And a missing topic is an error: a broker that creates it by itself
    # gives it a partition count of its own.
    producer: Producer = kafka_producer(
        settings, bootstrap_timeout_ms=_CONNECT_MS, max_block_ms=_CONNECT_MS, allow_auto_create_topics=False
    )
    return producer
