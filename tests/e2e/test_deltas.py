"""Deltas from the learner's publisher to a server: what is taken, and what a server with a gap does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from prometheus_client import CollectorRegistry

from genco.services import RedisServer
from learner.publisher import Fence, Outcome, Publisher
from serving.metrics import ServingMetrics, totals
from serving.policy_holder import PolicyHolder
from serving.refresher import Refresher
from serving.snapshot_store import LastGood, SnapshotStore
from streams.contracts.registry import DELTA_TTL_S, delta_key
from streams.contracts.snapshot import PolicySnapshot, sign
from tests.serving.test_policy import blob_of, manifest_of, tensors_of

KEY = b"k" * 32
MODEL = "default"


def snapshot(version: int, parent: PolicySnapshot | None) -> PolicySnapshot:
    """Like the one before, but for one number."""
    tensors = tensors_of()
    tensors["mean.bias"] = tensors["mean.bias"] + version
    blob = blob_of(tensors)
    manifest = manifest_of(
        model_id=MODEL,
        epoch=1,
        version=version,
        sha256=hashlib.sha256(blob).hexdigest(),
        num_bytes=len(blob),
        parent_sha256=parent.manifest.sha256 if parent else "",
    )
    return PolicySnapshot(sign(manifest, KEY), blob)


class Scene:
    """A publisher, and a server that looks when it is told to."""

    def __init__(self, client: redis.Redis, directory: Path) -> None:
        self.client = client
        self.publisher = Publisher(client, MODEL, 60_000, Fence())
        assert self.publisher.acquire()
        self.metrics = ServingMetrics(CollectorRegistry())
        self.holder = PolicyHolder()
        self.refresher = Refresher(
            store=SnapshotStore(client, MODEL, KEY),
            holder=self.holder,
            last_good=LastGood(directory, MODEL, KEY),
            listen_client=None,
            model_id=MODEL,
            interval_s=60.0,
            metrics=self.metrics,
            now_ms=lambda: 0,
        )
        self.last: PolicySnapshot | None = None

    def publish(self, version: int) -> PolicySnapshot:
        self.last = snapshot(version, self.last)
        assert self.publisher.publish(self.last) is Outcome.PUBLISHED
        return self.last

    def refresh(self) -> dict[str, int]:
        """Return how snapshots have come so far, after the newest has."""
        assert self.refresher.refresh()
        fetched = self.refresher._last_good.load()
        assert fetched is not None
        assert self.last is not None
        assert fetched.blob == self.last.blob, "bit for bit"
        return {how: number for (how,), number in totals(self.metrics.model_fetched).items()}


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as started:
        yield started


@pytest.fixture
def scene(server: RedisServer, tmp_path: Path) -> Iterator[Scene]:
    with redis.Redis.from_url(server.url, socket_timeout=5.0) as client:
        client.flushall()
        yield Scene(client, tmp_path)


def test_server_that_keeps_up_fetches_deltas(scene: Scene) -> None:
    scene.publish(1)
    assert scene.refresh() == {"full": 1}
    for version in (2, 3, 4):
        scene.publish(version)
        # The full one is not needed.
        scene.client.delete(f"blob:{MODEL}:1:{version}")
        assert scene.refresh() == {"full": 1, "delta": version - 1}


def test_delta_is_small_and_expires(scene: Scene) -> None:
    scene.publish(1)
    assert not scene.client.exists(delta_key(MODEL, 1, 1))
    whole = scene.publish(2)
    assert scene.client.strlen(delta_key(MODEL, 1, 2)) < 0.1 * len(whole.blob)
    assert 0 < scene.client.ttl(delta_key(MODEL, 1, 2)) <= DELTA_TTL_S


def spoil(key: str, value: bytes) -> Callable[[Scene], Any]:
    return lambda scene: scene.client.set(key, value)


@pytest.mark.parametrize(
    "gap",
    [
        lambda scene: (scene.publish(3), scene.client.delete(delta_key(MODEL, 1, 2))),
        lambda scene: scene.client.delete(delta_key(MODEL, 1, 2)),
        lambda scene: scene.client.copy(delta_key(MODEL, 1, 2), delta_key(MODEL, 1, 3)) and scene.publish(3),
        spoil(delta_key(MODEL, 1, 2), b"no delta"),
        spoil(delta_key(MODEL, 1, 2), b"x" * 10_000_000),
        lambda scene: scene.client.setrange(delta_key(MODEL, 1, 2), 300, b"\x7f"),
    ],
    ids=["missed one", "expired", "missed and stale", "no delta", "too large", "flipped"],
)
def test_server_with_a_gap_fetches_the_full_snapshot(scene: Scene, gap: Callable[[Scene], Any]) -> None:
    scene.publish(1)
    scene.refresh()
    scene.publish(2)
    gap(scene)
    assert scene.refresh() == {"full": 2}
    assert scene.refresher.fault is None
    scene.publish(9)
    assert scene.refresh() == {"full": 2, "delta": 1}, "and follows the deltas again"


def test_snapshot_that_differs_in_everything_has_no_delta(scene: Scene) -> None:
    first = scene.publish(1)
    blob = blob_of(tensors_of(seed=5))
    manifest = snapshot(2, first).manifest.model_copy(
        update={"sha256": hashlib.sha256(blob).hexdigest(), "num_bytes": len(blob)}
    )
    assert scene.publisher.publish(PolicySnapshot(sign(manifest, KEY), blob)) is Outcome.PUBLISHED
    assert not scene.client.exists(delta_key(MODEL, 1, 2))
