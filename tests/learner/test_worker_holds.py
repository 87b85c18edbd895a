"""A learner whose snapshots an operator keeps from service: it says so once, counts it, and keeps nothing for it."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from learner import worker_metrics as metrics
from learner.publisher import Outcome
from streams.contracts.snapshot import GateVerdict, PolicySnapshot, SnapshotManifest
from tests.learner.scene import Kafka, Scene

SNAPSHOT = PolicySnapshot(
    SnapshotManifest(
        model_id="default",
        epoch=1,
        version=1,
        sha256="s",
        num_bytes=0,
        feature_spec_hash="f",
        gate=GateVerdict(accepted=True),
        created_at_ms=0,
    ),
    b"",
)


def value_of(metric: Any) -> float:
    return float(metric._value.get())


def test_held_snapshots_are_told_once_counted_and_do_not_pile_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes = [
        Outcome.PUBLISHED,
        Outcome.FROZEN,
        Outcome.FROZEN,
        Outcome.PINNED,
        Outcome.NOT_NEWER,
        Outcome.PUBLISHED,
    ]
    gauges: list[tuple[float, float]] = []
    waiting: list[int] = []
    worker: Any = Scene(tmp_path, Kafka.filled(0)).worker()
    worker._publisher.acquire()
    worker._snapshot = lambda: SNAPSHOT
    counted = value_of(metrics.published.labels("frozen"))
    with caplog.at_level(logging.INFO, "learner.worker"):
        for outcome in outcomes:
            worker._due_ms.append(np.zeros(1, np.int64))
            worker._publisher.publish = lambda _, outcome=outcome: outcome
            worker._publish()
            waiting.append(len(worker._due_ms))
            gauges.append((value_of(metrics.held.labels("pinned")), value_of(metrics.held.labels("frozen"))))
    assert waiting == [0, 0, 0, 0, 1, 0], "what is stored waits for nothing"
    assert gauges == [(0, 0), (0, 1), (0, 1), (1, 0), (0, 0), (0, 0)]
    assert value_of(metrics.published.labels("frozen")) == counted + 2
    assert [(r.message, getattr(r, "outcome", None)) for r in caplog.records if "served" in r.message] == [
        ("snapshots are stored and not served; learning goes on", "frozen"),
        ("snapshots are stored and not served; learning goes on", "pinned"),
        ("snapshots are served again", None),
    ]
