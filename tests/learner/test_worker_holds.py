"""A learner whose snapshots an operator keeps from service: it learns on, says so once, and keeps nothing for it."""

import logging
from pathlib import Path
from typing import Any

import pytest

from learner import worker_metrics as metrics
from learner.feed import InboxRecord
from learner.publisher import Outcome
from tests.learner.scene import PARTITIONS, Kafka, Scene, record


def held(by: str) -> float:
    return float(metrics.held.labels(by)._value.get())


def test_held_snapshots_are_told_once_counted_and_do_not_pile_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes = [Outcome.PUBLISHED, Outcome.FROZEN, Outcome.FROZEN, Outcome.PINNED, Outcome.PUBLISHED]
    gauges: list[tuple[float, float]] = []
    waiting: list[int] = []
    scene = Scene(tmp_path, Kafka.filled(len(outcomes)), update_max_examples=100)
    worker: Any = scene.worker()

    def publish(_: Any) -> Outcome:
        waiting.append(len(worker._due_ms))
        return outcomes[len(waiting) - 1]

    worker._publisher.publish = publish
    counted = metrics.published.labels("frozen")._value.get()
    with caplog.at_level(logging.INFO, "learner.worker"):
        for offset in range(len(outcomes)):
            for partition in range(PARTITIONS):
                worker.feed.put(InboxRecord(partition, offset, record(partition, offset), lambda: None))
            worker.turn()
            gauges.append((held("pinned"), held("frozen")))
    assert waiting == [1] * len(outcomes)
    assert gauges == [(0, 0), (0, 1), (0, 1), (1, 0), (0, 0)]
    assert metrics.published.labels("frozen")._value.get() == counted + 2
    told = [(r.message, getattr(r, "outcome", None)) for r in caplog.records if "served" in r.message]
    assert told == [
        ("snapshots are stored and not served; learning goes on", "frozen"),
        ("snapshots are stored and not served; learning goes on", "pinned"),
        ("snapshots are served again", None),
    ]
    assert worker._number == len(outcomes)
