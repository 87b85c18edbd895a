"""The parts that decide and log, wired together: `genco serve` puts them behind HTTP, `serving.embedded` behind calls.

Everything starts and decides without Redis and without Kafka, and connects in threads of its own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

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
    event_log = EventLog(
        connect=lambda: _producer(settings),
        routes=range(first, last + 1),
        queue_size=settings.event_queue_size,
        linger_ms=settings.event_linger_ms,
        batch_size=settings.event_batch_size,
        metrics=metrics,
        rng=np.random.default_rng(),
    )
    catalog = CatalogView(lambda: kafka_consumer(settings), metrics)
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


def _producer(settings: ServeSettings) -> Producer:
    # Short, as a shutdown must not wait for it. And a missing topic is an error: a broker that creates it by itself
    # gives it a partition count of its own.
    producer: Producer = kafka_producer(
        settings, bootstrap_timeout_ms=_CONNECT_MS, max_block_ms=_CONNECT_MS, allow_auto_create_topics=False
    )
    return producer
