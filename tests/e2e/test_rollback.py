"""Servers follow an operator: back, forth, and through a Redis that loses everything."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis
from prometheus_client import CollectorRegistry

from genco.services import MockBroker, RedisServer
from learner.publisher import Fence, Outcome, Publisher
from serving.metrics import ServingMetrics
from serving.policy_holder import PolicyHolder
from serving.refresher import Refresher
from serving.snapshot_store import LastGood, SnapshotStore
from streams.contracts.registry import Version
from streams.contracts.settings import KafkaSettings
from streams.contracts.topics import CONTROL
from streams.control_log import ControlLog
from streams.registry import Registry
from streams.registry_actions import Operator, Order
from streams.telemetry import now_ms
from tests.snapshots import KEY, snapshot

MODEL = "default"


class FakePolicy:
    def choose(self, requests: Any) -> list[Any]:
        return [None for _ in requests]


class Server:
    """What a server's refresher is, with policies that are mere names."""

    def __init__(self, client: redis.Redis, directory: Path) -> None:
        self.holder = PolicyHolder()
        self.refresher = Refresher(
            store=SnapshotStore(client, MODEL, KEY),
            holder=self.holder,
            last_good=LastGood(directory, MODEL, KEY),
            listen_client=client,
            model_id=MODEL,
            interval_s=0.1,
            metrics=ServingMetrics(CollectorRegistry()),
            now_ms=now_ms,
            build=lambda blob, manifest: FakePolicy(),
            describe=lambda blob: {},
        )
        self.refresher.start()

    @property
    def serves(self) -> tuple[str, int]:
        manifest = self.holder.current.manifest
        return ("" if manifest is None else f"{manifest.epoch}.{manifest.version}"), self.holder.current.revision

    def await_serving(self, version: str, revision: int) -> None:
        deadline = time.monotonic() + 10
        while self.serves != (version, revision):
            assert time.monotonic() < deadline, self.serves
            time.sleep(0.01)

    def close(self) -> None:
        self.refresher.stop()


@pytest.fixture
def control() -> Iterator[ControlLog]:
    with MockBroker({CONTROL: 1}) as broker:
        yield ControlLog(
            KafkaSettings(
                kafka_bootstrap_servers=broker.bootstrap_servers, kafka_api_version="2.1", kafka_fetch_max_wait_ms=50
            )
        )


@pytest.fixture
def client() -> Iterator[redis.Redis]:
    with RedisServer() as server, redis.Redis.from_url(server.url, socket_timeout=5.0) as connected:
        yield connected


@pytest.fixture
def make_server(client: redis.Redis, tmp_path: Path) -> Callable[[], Server]:
    return lambda: Server(client, tmp_path)


def test_servers_follow_rollback_pin_and_their_end_and_a_pin_outlives_redis(
    client: redis.Redis, control: ControlLog, make_server: Callable[[], Server]
) -> None:
    learner = Publisher(client, MODEL, 60_000, Fence(), control=control)
    assert learner.acquire()
    operator = Operator(Registry(client, MODEL), client, control.append, signing_key=KEY)

    def order() -> Order:
        return Order(who="ann", when_ms=now_ms())

    with closing(make_server()) as server:
        for version in (1, 2, 3):
            learner.publish(snapshot(MODEL, 1, version))
        server.await_serving("1.3", 3)
        operator.rollback(None, order())
        server.await_serving("1.2", 4)
        assert learner.publish(snapshot(MODEL, 1, 4)) is Outcome.FROZEN
        operator.unfreeze(order())
        time.sleep(0.3)
        assert server.serves == ("1.2", 4), "until the next publication"
        assert learner.publish(snapshot(MODEL, 1, 5)) is Outcome.PUBLISHED
        server.await_serving("1.5", 5)
        operator.pin(Version(1, 1), order())
        server.await_serving("1.1", 6)

        client.flushall()
        assert learner.publish(snapshot(MODEL, 1, 6)) is Outcome.NOT_HOLDER
        assert learner.acquire()
        assert learner.publish(snapshot(MODEL, 2, 7)) is Outcome.PINNED
        time.sleep(0.3)
        assert server.serves == ("1.1", 6), "what it has, as the pin says"

    # A server that starts now has the copy on its disk; a learner that starts now has lost its checkpoint.
    learner.release()
    with closing(make_server()) as restarted:
        restarted.await_serving("1.1", 6)
        client.flushall()
        successor = Publisher(client, MODEL, 60_000, Fence(), control=control)
        assert successor.acquire()
        assert successor.fence.epoch == 3
        assert successor.publish(snapshot(MODEL, 3, 8)) is Outcome.PINNED
        operator.unpin(order())
        assert successor.publish(snapshot(MODEL, 3, 9)) is Outcome.PUBLISHED
        restarted.await_serving("3.9", successor.fence.revision)
        assert successor.fence.revision > 6
