"""`genco replay`: a recorded log through Kafka, the joiner and the learner, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from genco.follow import Follower
from genco.loop import KafkaKind, Loop, LoopOptions
from streams.clients import kafka_producer, redis_client
from streams.contracts.registry import candidate_key
from streams.contracts.settings import LearnSettings
from streams.contracts.snapshot import SnapshotManifest
from streams.replay import ReplaySummary, log_files, send_log

MAX_IN_FLIGHT: Final = 4_000
"""Impressions sent and not yet labeled. The embedded broker keeps 5 MiB a partition, so the joiner must keep up."""


class ReplayError(RuntimeError):
    """The log could not be replayed to its end; the message is for the user."""


def run(
    log: Path,
    *,
    kafka: KafkaKind,
    partitions: int,
    attribution_window_ms: int,
    label_wait_ms: int,
    timeout_s: float,
    console: Console,
) -> dict[str, Any]:
    """Replay a log and return the report: `sent`, `skipped`, `ledger`, `label_kinds`, `policy`.

    Raises:
        ValueError: If there is no log.
        ReplayError: If joiner or learner do not come to the end of it in time.
    """
    log_files(log)
    options = LoopOptions(
        roles=("join", "learn"),
        kafka=kafka,
        partitions=partitions,
        attribution_window_ms=attribution_window_ms,
        label_wait_ms=label_wait_ms,
        # The log's clock goes on by its marks alone, so that the labels do not depend on the speed of this machine.
        settings={"GENCO_IDLE_TIMEOUT_MS": "0", "GENCO_MAX_EVENT_AGE_MS": "0"},
    )
    with Loop(options) as loop:
        settings = loop.join_settings()
        follower = Follower(settings, from_beginning=True)
        producer = kafka_producer(settings)
        wait = _Waiter(loop, follower, timeout_s)
        try:
            console.print(f"replaying {log} through {loop.kafka_name}")
            started = time.monotonic()

            def make_room(summary: ReplaySummary) -> None:
                wait.until(lambda: summary.impressions - follower.audit.num_decided < MAX_IN_FLIGHT, "the joiner")

            summary = send_log(log, producer, settings.partitions, after_chunk=make_room)
            if not summary.impressions:
                raise ReplayError(
                    f"{log} holds no impression that can be read; first line left out: {summary.first_skipped}"
                )
            wait.until(lambda: follower.audit.num_decided >= summary.impressions, "the joiner")
            manifest = _trained_manifest(loop, follower, wait)
            seconds = time.monotonic() - started
            with follower.lock:
                ledger = follower.audit.ledger(drained=True)
                kinds = dict(follower.audit.label_kinds)
        finally:
            producer.close(timeout=5)
            follower.close()
    report = {
        "sent": {"impressions": summary.impressions, "clicks": summary.clicks, "catalog": summary.catalog},
        "skipped": dict(summary.skipped),
        "seconds": round(seconds, 2),
        "ledger": ledger,
        "label_kinds": kinds,
        "policy": {
            "version": manifest.version,
            "epoch": manifest.epoch,
            "sha256": manifest.sha256,
            "trained_through": manifest.trained_through,
            "metrics": manifest.metrics,
            "gate": manifest.gate.model_dump(mode="json"),
        },
    }
    _show(report, summary, console)
    return report


class _Waiter:
    """Waits for the processes, and gives up when one of them cannot go on."""

    def __init__(self, loop: Loop, follower: Follower, timeout_s: float) -> None:
        self._loop = loop
        self._follower = follower
        self._timeout_s = timeout_s

    def until(self, is_done: Callable[[], bool], whom: str) -> None:
        """Return when it is done; the time allowed starts again whenever the topics move."""
        audit = self._follower.audit
        seen = -1
        while True:
            with self._follower.lock:
                if is_done():
                    return
                consumed = audit.consumed.total()
            if consumed != seen:
                seen = consumed
                deadline = time.monotonic() + self._timeout_s
            if self._follower.failure is not None:
                raise ReplayError(f"reading the topics failed: {self._follower.failure}")
            if failure := self._loop.supervisor.failure:
                raise ReplayError(failure)
            if time.monotonic() > deadline:
                raise ReplayError(f"{whom} made no progress for {self._timeout_s:.0f} s; see --timeout")
            time.sleep(0.05)


def _trained_manifest(loop: Loop, follower: Follower, wait: _Waiter) -> SnapshotManifest:
    """Return the manifest of the snapshot that is trained through the whole log."""
    settings = loop.settings(LearnSettings)
    client = redis_client(settings, timeout_s=2.0, retries=3)
    newest: list[SnapshotManifest] = []

    def is_trained() -> bool:
        text: Any = client.get(candidate_key(settings.model_id))
        if text is None:
            return False
        newest[:] = [SnapshotManifest.model_validate_json(text)]
        through = newest[0].trained_through
        return all(through.get(str(p), 0) >= until for p, until in follower.examples_until.items())

    try:
        wait.until(is_trained, "the learner")
    finally:
        client.close()
    return newest[0]


def _show(report: dict[str, Any], summary: ReplaySummary, console: Console) -> None:
    table = Table("", "impressions", "clicks", title="ledger")
    buckets = report["ledger"]
    table.add_row("sent", str(summary.impressions), str(summary.clicks))
    for bucket in ("joined", "expired", "pending", "late", "duplicate", "orphan", "dead_letter"):
        cells = [str(buckets[topic].get(bucket, "")) for topic in ("impressions", "clicks")]
        table.add_row(bucket, *cells)
    table.add_row("imbalance", str(buckets["imbalance"]), "")
    console.print(table)
    if summary.skipped:
        console.print(f"left out: {dict(summary.skipped)}; first: {summary.first_skipped}")
    policy = report["policy"]
    verdict = "accepted" if policy["gate"]["accepted"] else "refused"
    console.print(f"policy version {policy['version']} ({policy['sha256'][:12]}): the gate {verdict} it")
    for reason in policy["gate"]["reasons"]:
        console.print(f"  {reason}")
    for name, value in sorted({**policy["metrics"], **policy["gate"]["numbers"]}.items()):
        console.print(f"  {name} {value:.5g}")
    console.print(f"{summary.impressions / report['seconds']:.0f} impressions a second")
