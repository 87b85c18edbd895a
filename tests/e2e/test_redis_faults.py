"""A server under load whose Redis is killed, emptied, read-only, full, slow or silent: it decides all the same.

What learns here is the learner's publisher and lease, without a model. Everything else is real.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis

from genco.services import RedisServer
from learner.lease import LeaseKeeper
from learner.publisher import Fence, Outcome, Publisher
from serving.client import Client, ClientError
from streams.clients import redis_client
from streams.contracts.settings import RedisSettings
from tests.server_process import NOWHERE, environment, server, wait_until
from tests.snapshots import real_blob, snapshot
from tests.tcp_proxy import TcpProxy

logger = logging.getLogger(__name__)
PUBLISH_INTERVAL_S = 0.3
REFRESH_INTERVAL_S = 0.2
RECOVERY_S = 5.0
"""At most, on a busy machine, from the end of a fault until what was published after it is served. It is far less than
a third of the lease, after which a learner would take it again in any case."""
LEASE_MS = 60_000
REQUESTS = [
    {"product_id": "p1", "context": {"device": "ios"}, "candidates": {"title": ["t1", "t2"], "image": ["i1", "i2"]}}
] * 4
Version = tuple[int, int]


class Learner(threading.Thread):
    """Publishes the same weights again and again, as a worker does."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        settings = RedisSettings(redis_url=url)  # type: ignore[arg-type]
        self._client = redis_client(settings, timeout_s=2.0, retries=1)
        self._publisher = Publisher(self._client, "default", LEASE_MS, Fence())
        self._keeper = LeaseKeeper(self._publisher, model_id="default", lease_ms=LEASE_MS, clock=time.monotonic)
        self._stopping = threading.Event()
        self.published: Version = (0, 0)
        """Epoch and version of the newest snapshot that was published."""

    def run(self) -> None:
        blob, spec = real_blob()
        version = 0
        while not self._stopping.wait(PUBLISH_INTERVAL_S):
            self._keeper.keep()
            if not self._publisher.holds_lease:
                continue
            version += 1
            made = snapshot("default", self._publisher.fence.epoch, version, blob, spec.hash)
            try:
                self._publisher.show(made.manifest)
                if self._publisher.publish(made) is Outcome.PUBLISHED:
                    self.published = made.manifest.epoch, version
            except redis.RedisError:
                continue  # the next one follows

    def close(self) -> None:
        self._stopping.set()
        self.join(10)
        self._client.close()


@dataclass
class Answers:
    """What a client has seen since it was last asked."""

    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    sources: set[str] = field(default_factory=set)


class Load(threading.Thread):
    """One client that asks for cards all the time."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._client = Client(url, timeout_s=10.0)
        self._stopping = threading.Event()
        self._answers = Answers()
        self.serves: Version = (0, 0)

    def run(self) -> None:
        while not self._stopping.wait(0.004):
            answers, started = self._answers, time.monotonic()
            try:
                decisions = self._client.decide(REQUESTS)
            except ClientError as error:
                answers.failures.append(str(error))
                continue
            answers.seconds.append(time.monotonic() - started)
            answers.sources |= {decision["source"] for decision in decisions}
            self.serves = decisions[-1]["epoch"], decisions[-1]["policy_version"]

    def take(self) -> Answers:
        taken, self._answers = self._answers, Answers()
        return taken

    def close(self) -> None:
        self._stopping.set()
        self.join(10)
        self._client.close()


class Scene:
    """Redis, the way to it, a learner and a server with a client."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self.redis = stack.enter_context(RedisServer())
        where, _, port = self.redis.url.removesuffix("/0").rpartition(":")
        self.proxy = stack.enter_context(TcpProxy(int(port)))
        self._url = f"{where}:{self.proxy.port}/0"
        self.learner = Learner(self._url)
        self.learner.start()
        stack.callback(self.learner.close)
        self._server = ExitStack()
        stack.callback(self.kill_server)
        self.start_server()

    def start_server(self) -> None:
        settings = NOWHERE | {
            "GENCO_REDIS_URL": self._url,
            "GENCO_REFRESH_INTERVAL_MS": str(int(REFRESH_INTERVAL_S * 1000)),
        }
        _, self.url = self._server.enter_context(
            server(environment(self.directory, **settings), self.directory / "log")
        )
        self.load = Load(self.url)
        self.load.start()
        self._server.callback(self.load.close)

    def kill_server(self) -> None:
        self._server.close()

    def admin(self, *command: Any) -> None:
        """Send a command to Redis itself, past the proxy."""
        with redis.Redis.from_url(self.redis.url, socket_timeout=5.0) as client:
            client.execute_command(*command)

    def await_newest(self) -> float:
        """Wait until what is published from now on is served; return how long it took."""
        started, before = time.monotonic(), self.learner.published
        wait_until(lambda: self.load.serves > before, timeout_s=30.0)
        return time.monotonic() - started


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with ExitStack() as stack:
        made = Scene(tmp_path_factory.mktemp("scene"), stack)
        made.await_newest()
        yield made


Step = Callable[[Scene], None]
FAULTS: dict[str, tuple[Step, Step]] = {
    "killed": (lambda s: s.redis.kill(), lambda s: s.redis.start()),
    "flushed": (lambda s: s.admin("FLUSHALL"), lambda s: None),
    "read_only": (lambda s: s.admin("REPLICAOF", "127.0.0.1", "1"), lambda s: s.admin("REPLICAOF", "NO", "ONE")),
    "full": (
        lambda s: s.admin("CONFIG", "SET", "maxmemory", "1"),
        lambda s: s.admin("CONFIG", "SET", "maxmemory", "0"),
    ),
    "slow": (lambda s: setattr(s.proxy, "delay_s", 0.2), lambda s: setattr(s.proxy, "delay_s", 0.0)),
    "silent": (lambda s: s.proxy.is_open.clear(), lambda s: s.proxy.is_open.set()),
}


STOPS_PUBLICATION = {"killed", "read_only", "full", "silent"}


def suffer(scene: Scene, fault: str, seconds: float) -> None:
    """Decide before, under and after a fault, and compare."""
    begin, end = FAULTS[fault]
    scene.load.take()
    time.sleep(min(seconds / 2, 3.0))
    before = scene.load.take()
    begin(scene)
    try:
        time.sleep(0.1)  # what was under way
        published = scene.learner.published
        time.sleep(seconds)
        assert fault not in STOPS_PUBLICATION or scene.learner.published == published, "there was no fault"
    finally:
        end(scene)
    recovered_s = scene.await_newest()
    under = scene.load.take()
    assert under.failures == []
    assert under.sources == {"policy"}
    assert len(under.seconds) > 10
    medians = statistics.median(before.seconds), statistics.median(under.seconds)
    figures = f"median {medians[0]:.4f} s before, {medians[1]:.4f} s under, longest {max(under.seconds):.3f} s"
    logger.info("%s: %s; newest policy %.2f s after the end", fault, figures, recovered_s)
    assert medians[1] < 3 * medians[0] + 0.02, figures
    assert max(under.seconds) < 1.0, figures
    assert recovered_s < RECOVERY_S


@pytest.mark.parametrize("fault", FAULTS)
def test_server_decides_through_a_fault_of_redis_and_the_newest_policy_comes_back(scene: Scene, fault: str) -> None:
    suffer(scene, fault, 0.4)


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_server_decides_through_a_long_fault_of_redis(scene: Scene, fault: str) -> None:
    suffer(scene, fault, 20.0)


def test_server_killed_and_started_without_redis_serves_the_last_good_policy_from_disk(scene: Scene) -> None:
    scene.redis.kill()
    served = scene.load.serves
    scene.kill_server()
    scene.start_server()
    try:
        wait_until(lambda: scene.load.serves != (0, 0))
        assert scene.load.serves == served
        answers = scene.load.take()
        assert answers.sources == {"last_good"}
        assert answers.failures == []
    finally:
        scene.redis.start()
    assert scene.await_newest() < RECOVERY_S
