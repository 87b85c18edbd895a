"""The whole server as a process: with its services, and with none of them."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from genco.services.mock_broker import MockBroker
from genco.services.redis_server import RedisServer
from serving.client import Client
from serving.main import _listen
from streams.clients import assign_whole_topic, kafka_consumer
from streams.contracts.codec import EventDecoder
from streams.contracts.events import Click, Impression
from streams.contracts.settings import ServeSettings
from streams.contracts.topics import partition_counts
from tests.server_process import NOWHERE, environment, readiness, server, wait_until

REQUEST = {"product_id": "p1", "context": {"device": "ios"}, "candidates": {"title": ["t1", "t2"]}}


def read_topic(settings: ServeSettings, topic: str, kind: type[Any], expected: int) -> list[Any]:
    consumer = kafka_consumer(settings)
    try:
        assign_whole_topic(consumer, topic)
        found: list[Any] = []
        deadline = time.monotonic() + 15
        while len(found) < expected and time.monotonic() < deadline:
            for records in consumer.poll(timeout_ms=200).values():
                for record in records:
                    decoded = EventDecoder(kind).decode_batch(record.value)
                    assert not decoded.bad
                    assert record.timestamp == max(event.occurred_at_ms for event in decoded.events)
                    found += [(record.partition, event) for event in decoded.events]
        return found
    finally:
        consumer.close()


def test_server_with_its_services_serves_a_snapshot_and_delivers_events(
    tmp_path: Path, redis_db: redis.Redis, redis_server: RedisServer, make_snapshot: Any, publish: Any
) -> None:
    with MockBroker(partition_counts(4)) as broker:
        services = broker.client_settings() | redis_server.client_settings()
        env = environment(tmp_path, **services)
        with server(env, tmp_path / "log") as (process, url), Client(url) as client:
            wait_until(lambda: readiness(url)["ready"])
            decisions = [d for _ in range(5) for d in client.decide([REQUEST] * 20)]
            assert client.click([{"decision_id": d["decision_id"]} for d in decisions[:30]])["accepted"] == 30
            # What is published is refused, as it holds no weights, and the server goes on.
            publish(redis_db, *make_snapshot(1), revision=1)
            wait_until(lambda: "header" in (client.policy()["registry_fault"] or ""))
            assert client.decide([REQUEST])[0]["source"] == "uniform"
            process.send_signal(signal.SIGTERM)
            assert process.wait(12) == 0
        settings = ServeSettings(
            **{name.removeprefix("GENCO_").lower(): value for name, value in env.items() if name.startswith("GENCO_")}
        )
        impressions = read_topic(settings, "impressions", Impression, 101)
        clicks = read_topic(settings, "clicks", Click, 30)
    assert len(impressions) == 101
    place = {event.decision_id: partition for partition, event in impressions}
    assert [place[event.decision_id] for _, event in clicks] == [partition for partition, _ in clicks]
    assert len(clicks) == 30


def test_server_without_any_service_decides_says_so_and_stops_in_time(tmp_path: Path) -> None:
    with server(environment(tmp_path, **NOWHERE), tmp_path / "log") as (process, url), Client(url) as client:
        assert client.decide([REQUEST])[0]["source"] == "uniform"
        assert readiness(url)["missing"] == ["event_log", "catalog"]
        wait_until(lambda: "no Kafka broker answers" in readiness(url)["checks"]["event_log"]["detail"])
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(12) == 1  # an event was lost
        assert time.monotonic() - started < 10.0
    log = (tmp_path / "log").read_text()
    assert "events were not delivered before the shutdown" in log
    assert "Traceback" not in log
    assert "kafka.net" not in log


def test_answers_do_not_wait_for_nagle() -> None:
    """asyncio sets TCP_NODELAY only where the listener names its protocol; else each answer takes 40 ms."""
    listener = _listen("127.0.0.1", 0)
    try:
        assert listener.proto == socket.IPPROTO_TCP
    finally:
        listener.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"GENCO_HTTP_HOST": "0.0.0.0"}, "GENCO_API_TOKENS"),  # noqa: S104
        ({"GENCO_API_TOKENS": "decide:notahash"}, "sha256sum"),
        ({"GENCO_HTTP_HOST": "192.0.2.1", "GENCO_API_TOKENS": f"decide:{'0' * 64}"}, "cannot listen"),
        ({"GENCO_SIGNING_KEY": ""}, "GENCO_SIGNING_KEY"),
    ],
)
def test_wrong_settings_stop_the_start_with_one_line(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "serving.main"],
        env=environment(tmp_path, **NOWHERE | settings),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert found.returncode == 78
    assert message in found.stderr
    assert found.stderr.count("\n") == 1
    assert found.stdout == ""
