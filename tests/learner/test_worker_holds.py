"""A learner that an operator holds.

Its snapshots are kept from service: it says so once, counts it, and keeps nothing for it. Or its learning is frozen: it
waits, and loses nothing.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from learner import worker_metrics as metrics
from learner.crash_points import CrashPoint
from learner.publisher import Outcome
from streams.contracts.snapshot import GateVerdict, PolicySnapshot, SnapshotManifest
from tests.learner.scene import CrashAt, Crashed, Kafka, Scene, state_of

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


def test_frozen_learning_waits_loses_nothing_and_goes_on(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "frozen", Kafka.filled(3))
    scene.registry.learning_frozen = True
    with pytest.raises(AssertionError, match="not done"):
        scene.run(turns=10)
    assert (scene.kafka.updates, scene.kafka.committed, scene.registry.published) == ([], {}, [])
    assert value_of(metrics.frozen) == 1
    scene.registry.learning_frozen = False
    worker = scene.run()
    assert value_of(metrics.frozen) == 0
    assert worker._learned_until == scene.ends()
    never = Scene(tmp_path / "never", Kafka.filled(3)).run()
    assert state_of(worker._learner) == state_of(never._learner)


def test_recorded_updates_are_repeated_also_while_learning_is_frozen(tmp_path: Path) -> None:
    """They were learned before: who starts again must become what he was."""
    scene = Scene(tmp_path, Kafka.filled(6))
    with pytest.raises(Crashed):
        scene.run(CrashAt(CrashPoint.UPDATE_LEARNED, 2))
    scene.registry.learning_frozen = True
    with pytest.raises(AssertionError, match="not done"):
        scene.run(turns=10)
    assert scene.worker()._number == 2
    assert len(scene.kafka.updates) == 2
