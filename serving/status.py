"""What a server says about itself: its policy, its swaps, its counters, and whether it is ready. Pure."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from serving.metrics import ServingMetrics, totals
from serving.policy_holder import PolicyHolder, Swap
from streams.contracts.events import Source
from streams.contracts.topics import CATALOG, CLICKS, IMPRESSIONS


class EventCounts(Struct, frozen=True, kw_only=True):
    """What became of the events of one topic."""

    accepted: int
    acknowledged: int
    dropped: dict[str, int]
    """Cause -> events."""


class Counters(Struct, frozen=True, kw_only=True):
    """Since the start of the process."""

    decisions: dict[str, int]
    """Rung -> decisions."""
    policy_errors: int
    events: dict[str, EventCounts]
    """Topic -> counts."""
    events_waiting: int
    freshness_observed: int


class PolicyStatus(Struct, frozen=True, kw_only=True):
    """Answer of GET /v1/policy."""

    source: Source
    revision: int
    manifest: dict[str, Any] | None
    """Without its signature; null on the uniform rung."""
    gate: dict[str, Any] | None
    swaps: list[Swap]
    """Oldest first."""
    counters: Counters
    exploration: float
    """Share of the decisions beside the uniform ones that the posterior draws make; the rest plays the best known."""
    registry_fault: str | None
    """Why Redis could not be read, or its snapshot was refused, last time."""


class Check(Struct, frozen=True, kw_only=True):
    """One thing that must be there."""

    ok: bool
    detail: str


class Readiness(Struct, frozen=True, kw_only=True):
    """Answer of GET /readyz."""

    ready: bool
    missing: list[str]
    checks: dict[str, Check]


def policy_status(
    holder: PolicyHolder,
    metrics: ServingMetrics,
    *,
    num_swaps: int,
    events_waiting: int,
    registry_fault: str | None,
) -> PolicyStatus:
    """Return what serves now, and how it came to that."""
    loaded = holder.current
    manifest = None if loaded.manifest is None else loaded.manifest.model_dump(mode="json", exclude={"hmac"})
    return PolicyStatus(
        source=loaded.rung,
        revision=loaded.revision,
        exploration=loaded.exploration,
        manifest=manifest,
        gate=None if manifest is None else manifest["gate"],
        swaps=holder.swaps(num_swaps),
        counters=_counters(metrics, events_waiting),
        registry_fault=registry_fault,
    )


def _counters(metrics: ServingMetrics, events_waiting: int) -> Counters:
    accepted, acknowledged = totals(metrics.events_accepted), totals(metrics.events_acknowledged)
    dropped = totals(metrics.events_dropped)
    freshness = [
        sample.value
        for family in metrics.freshness.collect()
        for sample in family.samples
        if sample.name.endswith("_count")
    ]
    return Counters(
        decisions={source: number for (source,), number in totals(metrics.decisions).items()},
        policy_errors=sum(totals(metrics.policy_errors).values()),
        events={
            topic: EventCounts(
                accepted=accepted.get((topic,), 0),
                acknowledged=acknowledged.get((topic,), 0),
                dropped={cause: number for (name, cause), number in dropped.items() if name == topic},
            )
            for topic in (IMPRESSIONS, CLICKS, CATALOG)
        },
        events_waiting=events_waiting,
        freshness_observed=int(sum(freshness)),
    )


def readiness(
    *,
    rung: Source,
    allow_cold_start: bool,
    registry_fault: str | None,
    event_log_fault: str | None,
    catalog_fault: str | None,
) -> Readiness:
    """Return whether traffic should come, and what is missing.

    Redis is not among the conditions: with a policy in memory, or none yet, the server decides without it.
    """
    has_policy = rung != "uniform" or allow_cold_start
    checks = {
        "policy": Check(ok=has_policy, detail=rung if registry_fault is None else f"{rung}; {registry_fault}"),
        "event_log": Check(ok=event_log_fault is None, detail=event_log_fault or "connected"),
        "catalog": Check(ok=catalog_fault is None, detail=catalog_fault or "read"),
    }
    missing = [name for name, check in checks.items() if not check.ok]
    return Readiness(ready=not missing, missing=missing, checks=checks)
