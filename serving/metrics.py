"""The server's metrics, in one place. The registry is an argument, so that each test has its own."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

_FRESHNESS_SECONDS = (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10, 15, 30, 60, 120, 300, 900, 3600)
_DECISION_SECONDS = (50e-6, 100e-6, 200e-6, 400e-6, 800e-6, 1.2e-3, 2e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.5)


class ServingMetrics:
    """Counters, gauges and histograms of one server process."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.registry = registry
        self.decisions = Counter("genco_decisions", "Decisions by rung of the ladder.", ["source"], registry=registry)
        self.decision_seconds = Histogram(
            "genco_decision_duration_seconds", "Time of one decide call.", buckets=_DECISION_SECONDS, registry=registry
        )
        self.policy_errors = Counter(
            "genco_policy_errors", "Calls that the policy failed and the uniform rung answered.", registry=registry
        )
        self.http_requests = Counter(
            "genco_http_requests", "Answers by route and status.", ["route", "code"], registry=registry
        )
        self.http_errors = Counter("genco_http_errors", "Calls that ended in a bug.", ["route"], registry=registry)
        self.events_accepted = Counter(
            "genco_events_accepted", "Events taken into the queue.", ["topic"], registry=registry
        )
        self.events_acknowledged = Counter(
            "genco_events_acknowledged", "Events that Kafka has acknowledged.", ["topic"], registry=registry
        )
        self.events_dropped = Counter(
            "genco_events_dropped",
            "Events lost, by cause: overload (sampled, its probability written on the survivors), full, delivery, "
            "too_large, shutdown.",
            ["topic", "cause"],
            registry=registry,
        )
        self.events_rejected = Counter(
            "genco_events_rejected", "Clicks and tokens refused, by field.", ["topic", "field"], registry=registry
        )
        self.event_queue = Gauge(
            "genco_event_queue_events", "Events that wait for Kafka's acknowledgement.", registry=registry
        )
        self.catalog_rejected = Counter(
            "genco_catalog_rejected", "Records of the topic catalog that could not be read.", registry=registry
        )
        self.catalog_records = Gauge("genco_catalog_records", "Known elements, products.", ["kind"], registry=registry)
        self.model_rejected = Counter(
            "genco_model_rejected", "Snapshots that were not loaded.", ["reason"], registry=registry
        )
        self.model_fetched = Counter(
            "genco_model_fetched", "Snapshots loaded from Redis: full, delta.", ["how"], registry=registry
        )
        self.registry_errors = Counter(
            "genco_registry_errors", "Polls of Redis that failed, by cause.", ["cause"], registry=registry
        )
        self.model_revision = Gauge("genco_model_revision", "Revision of the policy that serves.", registry=registry)
        self.model_max_event = Gauge(
            "genco_model_max_event_timestamp_seconds", "Newest impression that the policy learned.", registry=registry
        )
        self.freshness = Histogram(
            "genco_freshness_seconds",
            "Swap to a snapshot, minus impression time and label wait of what it learned.",
            buckets=_FRESHNESS_SECONDS,
            registry=registry,
        )


def totals(counter: Counter) -> dict[tuple[str, ...], int]:
    """Return what a counter has counted, by its label values."""
    return {
        tuple(sample.labels.values()): int(sample.value)
        for family in counter.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    }
