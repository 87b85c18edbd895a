"""The whole loop as processes on embedded services, with simulated shoppers, as `genco demo` runs it."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from genco.demo import Watch, loop_options
from genco.loop import KafkaKind, Loop

RATE = 400.0


@contextmanager
def running_demo(directory: Path, kafka: KafkaKind = "embedded") -> Iterator[Watch]:
    with Loop(loop_options(kafka=kafka, rate=RATE, directory=directory)) as loop:
        watch = Watch(loop, rate=RATE, seed=1, should_stop=lambda: False)
        try:
            watch.start(Console(quiet=True))
            yield watch
        finally:
            watch.close()


def wait_for(watch: Watch, happened: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert watch.broken is None, watch.broken
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.25)
        watch.look()


def served_version(watch: Watch) -> tuple[int, int]:
    manifest = watch.policy.get("manifest") or {"epoch": 0, "version": 0}
    return manifest["epoch"], manifest["version"]


def finish(watch: Watch) -> dict[str, Any]:
    watch.drain()
    return watch.report()


def run_and_check(tmp_path: Path, kafka: KafkaKind) -> None:
    with running_demo(tmp_path, kafka) as watch:
        wait_for(watch, lambda: watch.status.get("decisions", 0) >= 9_000, "9,000 decisions")
        report = finish(watch)
    assert report["errors"] == 0, report
    assert report["ledger"]["imbalance"] == 0
    assert report["ledger"]["impressions"]["pending"] == 0
    assert report["impressions"] == report["decisions"]
    assert report["ledger"]["clicks"]["joined"] > 100
    assert report["policy_versions"] >= 5
    assert report["freshness_seconds"]["p95"] is not None
    # From true click rates, so no luck of clicks is in it: play that has learned nothing stays within .02 of 1, what is
    # seen here is about .6.
    last = report["ctr_last_20pct"]
    assert report["regret"]["last_20pct"] < 0.9, last


def test_loop_on_embedded_broker_learns_and_balances(tmp_path: Path) -> None:
    run_and_check(tmp_path, "embedded")


@pytest.mark.kafka
def test_loop_on_apache_kafka_learns_and_balances(tmp_path: Path, apache_kafka: KafkaKind) -> None:
    run_and_check(tmp_path, apache_kafka)


@pytest.mark.docker
def test_loop_on_kafka_container_learns_and_balances(tmp_path: Path, containerized_kafka: KafkaKind) -> None:
    run_and_check(tmp_path, containerized_kafka)


@pytest.mark.long
def test_processes_killed_are_restarted_and_nothing_is_lost(tmp_path: Path) -> None:
    with running_demo(tmp_path) as watch:
        supervisor = watch.loop.supervisor
        wait_for(watch, lambda: served_version(watch)[1] >= 3, "three policy versions")
        for role in ("join", "learn", "serve"):
            os.kill(supervisor.pid(role), signal.SIGKILL)
            wait_for(watch, lambda role=role: supervisor.restarts[role] == 1, f"the restart of {role}")
            _, before = served_version(watch)
            wait_for(watch, lambda before=before: served_version(watch)[1] > before + 2, f"policies after {role}")
        decided = watch.status["decisions"]
        wait_for(watch, lambda: watch.status["decisions"] > decided + 500, "decisions going on")
        report = finish(watch)
    assert report["ledger"]["imbalance"] == 0, report["ledger"]
    assert report["ledger"]["impressions"]["pending"] == 0
    assert report["errors_by_kind"]["restarts"] == 3
    assert report["errors_by_kind"]["dead_letters"] == 0
    # What the killed server had not sent yet is gone: its decisions were never logged, their clicks are orphans.
    assert 0 <= report["decisions"] - report["impressions"] < RATE * 5
    assert report["ledger"]["clicks"]["orphan"] <= report["decisions"] - report["impressions"]
    assert served_version(watch)[0] == 2, "a learner that comes back publishes under a new epoch"
