"""What the tests of the server share: signed snapshots, a producer that is no Kafka, a server without a network."""

from __future__ import annotations

import asyncio
import hashlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import redis
from prometheus_client import CollectorRegistry

with warnings.catch_warnings():
    # kafka-python 3.0 reads its schemas through importlib.resources.read_text, deprecated in Python 3.11.
    warnings.simplefilter("ignore", DeprecationWarning)
    from kafka.errors import KafkaTimeoutError

from genco.services.redis_server import RedisServer
from serving.api import ServerState, create_app
from serving.auth import Authenticator
from serving.catalog_view import CatalogView
from serving.decisions import Decider
from serving.event_log import EventLog
from serving.metrics import ServingMetrics
from serving.policy_holder import PolicyHolder
from serving.refresher import Refresher
from serving.snapshot_store import LastGood, SnapshotStore
from streams.contracts.moves import Move, sign_move
from streams.contracts.registry import Version, blob_key, current_key, manifest_key, published_channel
from streams.contracts.snapshot import GateVerdict, SnapshotManifest, sign

KEY = b"k" * 32
NOW_MS = 1_764_000_000_000


@pytest.fixture
def signing_key() -> bytes:
    return KEY


@pytest.fixture
def metrics() -> ServingMetrics:
    return ServingMetrics(CollectorRegistry())


def make_snapshot(
    version: int, epoch: int = 1, blob: bytes | None = None, **fields: Any
) -> tuple[SnapshotManifest, bytes]:
    """A signed manifest over bytes that only a test's builder reads."""
    blob = b"weights of %d" % version if blob is None else blob
    manifest = SnapshotManifest(
        **{
            "model_id": "default",
            "epoch": epoch,
            "version": version,
            "sha256": hashlib.sha256(blob).hexdigest(),
            "num_bytes": len(blob),
            "feature_spec_hash": "f" * 64,
            "trained_through": {"0": 10 * version},
            "due_ms_quantiles": (NOW_MS - 1500.0, NOW_MS - 500.0),
            "gate": GateVerdict(accepted=True),
            "created_at_ms": NOW_MS,
        }
        | fields
    )
    return sign(manifest, KEY), blob


@pytest.fixture(name="make_snapshot")
def _make_snapshot() -> Callable[..., tuple[SnapshotManifest, bytes]]:
    return make_snapshot


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis_db(redis_server: RedisServer) -> Iterator[redis.Redis]:
    client = redis.Redis.from_url(redis_server.url, socket_timeout=2.0)
    client.flushall()
    yield client
    client.close()


def publish(
    client: redis.Redis, manifest: SnapshotManifest, blob: bytes, revision: int, rollback_of: str = "", key: bytes = KEY
) -> None:
    """What the learner does, or, with what it goes back from, an operator who has the key; without their scripts."""
    where = manifest.model_id, manifest.epoch, manifest.version
    client.set(blob_key(*where), blob)
    client.set(manifest_key(*where), manifest.model_dump_json())
    move = Move(where[0], Version(*where[1:]), manifest.sha256, revision, rollback_of)
    pointer = {
        "epoch": where[1],
        "version": where[2],
        "revision": revision,
        "sha256": manifest.sha256,
        "rollback_of": rollback_of,
        "signature": sign_move(move, key) if rollback_of else "",
    }
    client.hset(current_key(manifest.model_id), mapping=pointer)
    client.publish(published_channel(manifest.model_id), str(revision))


@pytest.fixture(name="publish")
def _publish() -> Callable[..., None]:
    return publish


class FakeFuture:
    """Resolves when its producer is told to, as kafka-python's do on the sender's thread."""

    def __init__(self) -> None:
        self.callbacks: list[Callable[[Any], None]] = []
        self.errbacks: list[Callable[[Any], None]] = []
        self.outcome: tuple[bool, Any] | None = None

    def add_callback(self, function: Callable[..., None], *args: Any) -> None:
        self.callbacks.append(lambda value: function(*args, value))
        if self.outcome and self.outcome[0]:
            self.callbacks[-1](self.outcome[1])

    def add_errback(self, function: Callable[..., None], *args: Any) -> None:
        self.errbacks.append(lambda error: function(*args, error))
        if self.outcome and not self.outcome[0]:
            self.errbacks[-1](self.outcome[1])

    def get(self, timeout: float | None = None) -> None:
        if self.outcome is None:
            raise KafkaTimeoutError("not acknowledged")

    def resolve(self, error: Exception | None = None) -> None:
        self.outcome = (error is None, error)
        for function in self.callbacks if error is None else self.errbacks:
            function(error)


class FakeProducer:
    """Keeps what is sent; acknowledges at once unless `acknowledges` is off."""

    def __init__(self, partitions: dict[str, int] | None = None) -> None:
        self.partitions = defaultdict(lambda: 4, partitions or {})
        self.sent: list[dict[str, Any]] = []
        self.futures: list[FakeFuture] = []
        self.acknowledges = True
        self.failure: Exception | None = None
        self.send_failure: Exception | None = None
        self.closed = False

    def partitions_for(self, topic: str) -> set[int]:
        return set(range(self.partitions[topic]))

    def send(self, topic: str, value: bytes | None = None, key: bytes | None = None, **options: Any) -> FakeFuture:
        if self.send_failure is not None:
            raise self.send_failure
        future = FakeFuture()
        self.sent.append({"topic": topic, "value": value, "key": key} | options)
        self.futures.append(future)
        if self.acknowledges:
            future.resolve(self.failure)
        return future

    def close(self, timeout: float | None = None) -> None:
        self.closed = True


@pytest.fixture
def producer() -> FakeProducer:
    return FakeProducer()


@pytest.fixture
def make_event_log(producer: FakeProducer, metrics: ServingMetrics) -> Iterator[Callable[..., EventLog]]:
    made = []

    def make(**options: Any) -> EventLog:
        log = EventLog(
            **{
                "connect": lambda: producer,
                "routes": range(0, 8),
                "queue_size": 1000,
                "linger_ms": 5,
                "batch_size": 10,
                "metrics": metrics,
                "rng": np.random.default_rng(1),
            }
            | options
        )
        made.append(log)
        return log

    yield make
    for log in made:
        log.close(0.5)


@pytest.fixture
def make_state(
    make_event_log: Callable[..., EventLog], metrics: ServingMetrics, tmp_path: Path
) -> Callable[..., ServerState]:
    """A server whose threads do not run: requests are answered all the same, as they touch no network."""

    def make(**options: Any) -> ServerState:
        holder = PolicyHolder()
        catalog = CatalogView(lambda: None, metrics)
        event_log = options.pop("event_log", None) or make_event_log()
        client = redis.Redis(port=1, socket_timeout=0.1)
        refresher = Refresher(
            store=SnapshotStore(client, "default", KEY),
            holder=holder,
            last_good=LastGood(tmp_path, "default", KEY),
            listen_client=None,
            model_id="default",
            interval_s=60.0,
            metrics=metrics,
            now_ms=lambda: NOW_MS,
        )
        decider = Decider(
            holder=holder,
            catalog=catalog,
            log=event_log,
            signing_key=KEY,
            model_id="default",
            rng=np.random.default_rng(7),
            metrics=metrics,
        )
        return ServerState(
            **{
                "decider": decider,
                "holder": holder,
                "refresher": refresher,
                "catalog": catalog,
                "event_log": event_log,
                "authenticator": Authenticator(None),
                "metrics": metrics,
                "signing_key": KEY,
                "attribution_window_ms": 600_000,
                "now_ms": lambda: NOW_MS,
            }
            | options
        )

    return make


class Api:
    """Calls the application without a socket. (Starlette's own test client warns that it will leave httpx.)"""

    def __init__(self, state: ServerState) -> None:
        self.state = state
        self.app = create_app(state)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await client.request(method, path, **options)

        return asyncio.run(call())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """Send bytes as they are, with the header of JSON, and anything else as JSON."""
        if isinstance(body, bytes):
            return self.request(
                "POST", path, content=body, **({"headers": {"Content-Type": "application/json"}} | options)
            )
        return self.request("POST", path, json=body, **options)


@pytest.fixture
def make_api(make_state: Callable[..., ServerState]) -> Callable[..., Api]:
    return lambda **options: Api(make_state(**options))


@pytest.fixture
def api(make_api: Callable[..., Api]) -> Api:
    return make_api()
