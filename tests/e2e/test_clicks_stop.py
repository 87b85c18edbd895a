"""Clicks cease in the running loop, and come back: the drill of `docs/runbook/JoinRateDrop.md`."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from genco.demo import Watch, loop_options
from genco.loop import KafkaKind, Loop
from streams.clients import assign_whole_topic, kafka_consumer, redis_client
from streams.contracts.alerts import Alert
from streams.contracts.settings import KafkaSettings, RedisSettings
from streams.contracts.topics import ALERTS
from streams.registry import Registry

RATE, BEGIN_S, LASTING_S = 400.0, 18.0, 20.0
HELD_WITHIN_S = 6.0
"""Of event time: 58 clicks at some 20 a second."""
SEEN_WITHIN_S = 12.0
"""On a busy machine."""


class Drill:
    """A demo whose shoppers follow a scenario, its alerts and its registry."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        settings = watch.loop.settings(RedisSettings)
        self.registry = Registry(redis_client(settings, timeout_s=5.0, retries=1), settings.model_id)
        self._consumer = kafka_consumer(watch.loop.settings(KafkaSettings))
        assign_whole_topic(self._consumer, ALERTS)
        self.alerts: list[tuple[float, Alert]] = []
        """With the seconds since the shoppers came."""

    def close(self) -> None:
        self._consumer.close()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.watch.started

    def wait_for(self, happened: Callable[[], Any], what: str, until_s: float) -> None:
        while not happened():
            assert self.watch.broken is None, self.watch.broken
            assert self.seconds < until_s, f"{what}: not within {until_s} s; alerts: {self.alerts}"
            for records in self._consumer.poll(timeout_ms=100).values():
                self.alerts += [(self.seconds, Alert.from_bytes(record.value)) for record in records]
            self.watch.look()

    def state(self, state: str) -> list[tuple[float, Alert]]:
        return [(at, alert) for at, alert in self.alerts if alert.state == state]


@contextmanager
def drill(directory: Path, scenario: str, kafka: KafkaKind = "embedded") -> Iterator[Drill]:
    argv = ["--scenario", scenario, "--at", str(BEGIN_S), "--lasting", str(LASTING_S)]
    with Loop(loop_options(kafka=kafka, rate=RATE, directory=directory)) as loop:
        watch = Watch(loop, rate=RATE, seed=1, should_stop=lambda: False, shoppers=argv)
        found = None
        try:
            watch.start(Console(quiet=True))
            found = Drill(watch)
            yield found
        finally:
            if found is not None:
                found.close()
            watch.close()


@pytest.mark.long
@pytest.mark.parametrize("scenario", ["clicks-stop", "clicks-lost"])
def test_clicks_that_cease_are_noticed_held_and_mended(tmp_path: Path, scenario: str) -> None:
    with drill(tmp_path, scenario) as scene:
        watch = scene.watch
        scene.wait_for(lambda: scene.seconds > BEGIN_S, "the outage", BEGIN_S + 5)
        assert scene.alerts == [], "healthy traffic raises nothing"
        scene.wait_for(lambda: scene.state("firing"), "the alert", BEGIN_S + SEEN_WITHIN_S)
        fired_s, alert = scene.state("firing")[0]
        assert (alert.name, alert.cause) == ("JoinRateDrop", "join broken")
        evidence = {name: value for name, value in alert.evidence.items() if isinstance(value, float)}
        assert evidence["held_at_seconds"] - evidence["clicks_ceased_at_seconds"] <= HELD_WITHIN_S
        assert evidence["false_negatives_at_most"] < 60
        scene.wait_for(lambda: scene.registry.state().learning_frozen, "the freeze of learning", fired_s + 5)
        scene.wait_for(lambda: len(scene.state("firing")) > 1, "what was done", fired_s + 8)
        assert any(action.startswith("freeze-learning; undo: ") for action in scene.state("firing")[1][1].actions)
        scene.wait_for(lambda: scene.seconds > fired_s + 6, "the update that was under way", fired_s + 10)
        state, decided = scene.registry.state(), watch._follower.audit.num_decided
        scene.wait_for(lambda: scene.seconds > BEGIN_S + LASTING_S, "the end of the outage", BEGIN_S + LASTING_S + 5)
        assert scene.registry.state() == state, "no model was published"
        assert watch._follower.audit.num_decided == decided, "no impression was decided"
        scene.wait_for(lambda: scene.state("resolved"), "the end of the alert", BEGIN_S + LASTING_S + 20)
        _, resolved = scene.state("resolved")[0]
        assert resolved.alert_id == alert.alert_id
        until_s = BEGIN_S + LASTING_S + 40
        scene.wait_for(lambda: not scene.registry.state().learning_frozen, "learning going on", until_s)
        scene.wait_for(lambda: scene.registry.state().revision > state.revision + 2, "new models", until_s)
        actions = [record.what for record in scene.registry.audit(10)]
        watch.drain()
        report = watch.report()
    assert actions == ["unfreeze-learning", "freeze-learning"]
    assert report["ledger"]["imbalance"] == 0, report["ledger"]
    assert report["ledger"]["impressions"]["pending"] == 0
    assert report["errors_by_kind"]["restarts"] == 0
    kinds = report["label_kinds"]
    if scenario == "clicks-stop":
        assert kinds.get("unknown", 0) == 0
        assert report["ledger"]["clicks"]["joined"] >= 0.98 * report["clicks"]
    else:
        assert kinds["unknown"] >= 0.8 * RATE * (LASTING_S - SEEN_WITHIN_S)


@pytest.mark.long
@pytest.mark.parametrize("scenario", ["world-drift", "mix-shift"])
def test_what_the_world_does_is_no_broken_join(tmp_path: Path, scenario: str) -> None:
    with drill(tmp_path, scenario) as scene:
        scene.wait_for(lambda: scene.seconds > BEGIN_S + LASTING_S, "the end of it", BEGIN_S + LASTING_S + 5)
        assert scene.alerts == []
        revision = scene.registry.state().revision
        scene.wait_for(
            lambda: scene.registry.state().revision > revision, "learning going on", BEGIN_S + LASTING_S + 20
        )


@pytest.mark.long
@pytest.mark.kafka
def test_clicks_with_wrong_clocks_are_a_broken_join(tmp_path: Path, apache_kafka: KafkaKind) -> None:
    """On a broker that gives records its own time, which the embedded one does not."""
    with drill(tmp_path, "clock-skew", apache_kafka) as scene:
        scene.wait_for(lambda: scene.state("firing"), "the alert", BEGIN_S + SEEN_WITHIN_S)
        assert scene.state("firing")[0][1].cause == "join broken"
        scene.wait_for(lambda: scene.state("resolved"), "the end of the alert", BEGIN_S + LASTING_S + 30)
