"""From Redis or disk to the policy that serves: what is accepted, what is refused, and what goes on serving."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from genco.services.redis_server import RedisServer
from serving.metrics import ServingMetrics, totals
from serving.policy import DecisionRequest, Policy
from serving.policy_holder import PolicyHolder
from serving.refresher import Refresher, described_elements
from serving.snapshot_store import Fetched, LastGood, SnapshotStore
from streams.contracts.registry import blob_key, current_key, manifest_key, switches_key
from streams.contracts.snapshot import GateVerdict, SnapshotError
from tests.serving.test_policy import policy_of, request_of
from tests.snapshots import real_blob

KEY = b"k" * 32
NOW_MS = 1_764_000_000_000
Make = Callable[..., Any]


class FakePolicy:
    """Remembers its bytes."""

    def __init__(self, blob: bytes) -> None:
        self.blob = blob

    def choose(self, requests: Any) -> list[Any]:
        return [self.blob for _ in requests]


def wait_until(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


@pytest.fixture
def no_redis() -> Iterator[redis.Redis]:
    """A client as the server's, of a Redis that is not there."""
    with redis.Redis(port=1, socket_timeout=0.1, socket_connect_timeout=0.1, retry=Retry(NoBackoff(), 0)) as client:
        yield client


@pytest.fixture
def store(redis_db: redis.Redis) -> SnapshotStore:
    return SnapshotStore(redis_db, "default", KEY)


@pytest.fixture
def make_refresher(tmp_path: Path, metrics: ServingMetrics) -> Iterator[Make]:
    made: list[Refresher] = []

    def make(client: redis.Redis, listen: redis.Redis | None = None, **options: Any) -> tuple[Refresher, PolicyHolder]:
        holder = PolicyHolder()
        refresher = Refresher(
            **{
                "store": SnapshotStore(client, "default", KEY),
                "holder": holder,
                "last_good": LastGood(tmp_path / "good", "default", KEY),
                "listen_client": listen,
                "model_id": "default",
                "interval_s": 0.02,
                "metrics": metrics,
                "now_ms": lambda: NOW_MS,
                "build": lambda blob, manifest: FakePolicy(blob),
                "describe": lambda blob: {},
            }
            | options
        )
        made.append(refresher)
        return refresher, holder

    yield make
    for refresher in made:
        refresher.stop()


# -- the registry ----------------------------------------------------------------------------------


def test_empty_registry_gives_nothing(store: SnapshotStore) -> None:
    assert store.fetch_current(None) is None


def test_only_a_larger_revision_is_fetched(
    store: SnapshotStore, redis_db: redis.Redis, make_snapshot: Make, publish: Make
) -> None:
    manifest, blob = make_snapshot(3)
    publish(redis_db, manifest, blob, revision=7)
    assert store.fetch_current(None) == Fetched(7, manifest, blob)
    assert store.fetch_current(6) == Fetched(7, manifest, blob)
    assert store.fetch_current(7) is None
    assert store.fetch_current(8) is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda db: db.setrange(blob_key("default", 1, 3), 4, b"X"), "sha256"),
        (lambda db: db.set(blob_key("default", 1, 3), b"short"), "length"),
        (lambda db: db.set(blob_key("default", 1, 3), b"x" * 1000), "size"),
        (lambda db: db.delete(blob_key("default", 1, 3)), "missing"),
        (lambda db: db.delete(manifest_key("default", 1, 3)), "missing"),
        (lambda db: db.set(manifest_key("default", 1, 3), b"{}"), "manifest"),
        (lambda db: db.set(manifest_key("default", 1, 3), b"\xff\x00"), "manifest"),
        (lambda db: db.set(manifest_key("default", 1, 3), b"x" * 2**21), "size"),
        (lambda db: db.hset(current_key("default"), "sha256", "0" * 64), "pointer"),
        (lambda db: db.hset(current_key("default"), "revision", "many"), "pointer"),
        (lambda db: db.hdel(current_key("default"), "epoch"), "pointer"),
    ],
)
def test_damaged_registry_is_refused_with_the_reason(
    store: SnapshotStore, redis_db: redis.Redis, make_snapshot: Make, publish: Make, damage: Make, reason: str
) -> None:
    publish(redis_db, *make_snapshot(3), revision=7)
    damage(redis_db)
    with pytest.raises(SnapshotError) as caught:
        store.fetch_current(None)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_id": "other"}, "model"),
        ({"gate": GateVerdict(accepted=False, reasons=("entropy",))}, "gate"),
        ({"created_at_ms": NOW_MS + 1, "epoch": 2}, "pointer"),
    ],
)
def test_signed_snapshot_in_the_wrong_place_is_refused(
    store: SnapshotStore, redis_db: redis.Redis, make_snapshot: Make, publish: Make, fields: dict[str, Any], reason: str
) -> None:
    publish(redis_db, *make_snapshot(3), revision=7)
    other, _ = make_snapshot(3, **fields)
    redis_db.set(manifest_key("default", 1, 3), other.model_dump_json())
    with pytest.raises(SnapshotError) as caught:
        store.fetch_current(None)
    assert caught.value.reason == reason


def test_manifest_of_another_key_is_refused(redis_db: redis.Redis, make_snapshot: Make, publish: Make) -> None:
    publish(redis_db, *make_snapshot(3), revision=7)
    with pytest.raises(SnapshotError) as caught:
        SnapshotStore(redis_db, "default", b"x" * 32).fetch_current(None)
    assert caught.value.reason == "hmac"


# -- the disk --------------------------------------------------------------------------------------


def test_last_good_comes_back_as_it_was_saved(tmp_path: Path, make_snapshot: Make) -> None:
    last_good = LastGood(tmp_path / "new" / "dir", "default", KEY)
    assert last_good.load() is None
    for version in (1, 2):
        fetched = Fetched(version, *make_snapshot(version, blob=b"\n\x00genco" * version))
        last_good.save(fetched)
        assert last_good.load() == fetched
    assert [path.name for path in last_good.path.parent.iterdir()] == ["default.snapshot"]


def test_failed_save_leaves_the_old_file(tmp_path: Path, make_snapshot: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    last_good = LastGood(tmp_path, "default", KEY)
    old = Fetched(1, *make_snapshot(1))
    last_good.save(old)

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("serving.snapshot_store.os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        last_good.save(Fetched(2, *make_snapshot(2)))
    assert last_good.load() == old
    assert [path.name for path in tmp_path.iterdir()] == ["default.snapshot"]


def test_no_flipped_or_missing_byte_changes_what_is_served(tmp_path: Path, make_snapshot: Make) -> None:
    last_good = LastGood(tmp_path, "default", KEY)
    good = Fetched(1, *make_snapshot(1))
    last_good.save(good)
    raw = last_good.path.read_bytes()
    harmless = 0
    for place in range(len(raw)):
        last_good.path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        try:
            found = last_good.load()
        except SnapshotError:
            continue
        # The revision, and the name of a field that holds its default, are not signed.
        assert found is not None
        assert (found.manifest, found.blob) == (good.manifest, good.blob)
        harmless += 1
    assert harmless < 20
    for end in (0, 5, len(raw) // 2, len(raw) - 1):
        last_good.path.write_bytes(raw[:end])
        with pytest.raises(SnapshotError):
            last_good.load()


# -- the refresher ---------------------------------------------------------------------------------


def test_swap_follows_publication_and_keeps_its_history(
    redis_db: redis.Redis, make_refresher: Make, make_snapshot: Make, publish: Make, metrics: ServingMetrics
) -> None:
    refresher, holder = make_refresher(redis_db)
    for version in (1, 2):
        publish(redis_db, *make_snapshot(version), revision=version)
        assert refresher.refresh()
        assert not refresher.refresh()
    assert holder.current.rung == "policy"
    assert holder.current.policy.blob == b"weights of 2"
    assert [(s.version, s.epoch, s.revision, s.trained_through, s.swapped_at_ms) for s in holder.swaps()] == [
        (1, 1, 1, {"0": 10}, NOW_MS),
        (2, 1, 2, {"0": 20}, NOW_MS),
    ]
    assert [s.version for s in holder.swaps(1)] == [2]
    assert holder.swaps(0) == []
    samples = {s.name: s.value for s in next(iter(metrics.freshness.collect())).samples if not s.labels}
    assert samples["genco_freshness_seconds_count"] == 4
    assert samples["genco_freshness_seconds_sum"] == pytest.approx(2 * (1.5 + 0.5))


def test_rollback_serves_the_older_version_and_says_nothing_about_freshness(
    redis_db: redis.Redis, make_refresher: Make, make_snapshot: Make, publish: Make, metrics: ServingMetrics
) -> None:
    refresher, holder = make_refresher(redis_db)
    publish(redis_db, *make_snapshot(2), revision=1)
    refresher.refresh()
    publish(redis_db, *make_snapshot(1), revision=2)
    assert refresher.refresh()
    assert holder.current.policy.blob == b"weights of 1"
    samples = {s.name: s.value for s in next(iter(metrics.freshness.collect())).samples if not s.labels}
    assert samples["genco_freshness_seconds_count"] == 2


def test_flushed_or_older_redis_never_moves_the_server_back(
    redis_db: redis.Redis, make_refresher: Make, make_snapshot: Make, publish: Make, metrics: ServingMetrics
) -> None:
    refresher, holder = make_refresher(redis_db)
    publish(redis_db, *make_snapshot(5), revision=9)
    refresher.refresh()
    redis_db.flushall()
    assert not refresher.refresh()
    publish(redis_db, *make_snapshot(6), revision=8)
    for _ in range(3):
        assert not refresher.refresh()
    assert holder.current.policy.blob == b"weights of 5"
    assert totals(metrics.model_rejected) == {("older_revision",): 2}
    publish(redis_db, *make_snapshot(7), revision=10)
    assert refresher.refresh()


def test_refused_snapshot_keeps_the_last_good_one_and_the_next_is_taken(
    redis_db: redis.Redis, make_refresher: Make, make_snapshot: Make, publish: Make, metrics: ServingMetrics
) -> None:
    refresher, holder = make_refresher(redis_db)
    publish(redis_db, *make_snapshot(1), revision=1)
    refresher.refresh()
    publish(redis_db, *make_snapshot(2), revision=2)
    redis_db.setrange(blob_key("default", 1, 2), 0, b"W")
    assert not refresher.refresh()
    assert holder.current.policy.blob == b"weights of 1"
    assert totals(metrics.model_rejected) == {("sha256",): 1}
    assert "sha256" in refresher.fault
    publish(redis_db, *make_snapshot(3), revision=3)
    assert refresher.refresh()
    assert refresher.fault is None
    assert holder.current.policy.blob == b"weights of 3"


def test_snapshot_that_cannot_be_built_is_refused(
    redis_db: redis.Redis, make_refresher: Make, make_snapshot: Make, publish: Make, metrics: ServingMetrics
) -> None:
    """The bytes are signed, but no safetensors; the real builder runs."""
    refresher, holder = make_refresher(redis_db, build=Policy.from_snapshot)
    publish(redis_db, *make_snapshot(1), revision=1)
    assert not refresher.refresh()
    assert holder.current.rung == "uniform"
    assert totals(metrics.model_rejected) == {("header",): 1}


def test_refused_snapshot_is_not_fetched_at_every_poll_but_again_later(
    redis_db: redis.Redis, make_refresher: Make, make_snapshot: Make, publish: Make, metrics: ServingMetrics
) -> None:
    refresher, holder = make_refresher(redis_db, interval_s=0.05)
    publish(redis_db, *make_snapshot(1), revision=1)
    redis_db.delete(blob_key("default", 1, 1))
    for _ in range(5):
        refresher.refresh()
    assert totals(metrics.model_rejected) == {("missing",): 1}
    redis_db.set(blob_key("default", 1, 1), b"weights of 1")
    wait_until(refresher.refresh)
    assert holder.current.rung == "policy"


def test_start_with_redis_down_serves_last_good_and_redis_confirms_it(
    redis_db: redis.Redis, no_redis: redis.Redis, make_refresher: Make, make_snapshot: Make, publish: Make
) -> None:
    publish(redis_db, *make_snapshot(4), revision=3)
    first, _ = make_refresher(redis_db)
    assert first.refresh()
    second, holder = make_refresher(no_redis)
    second.start()
    assert holder.current.rung == "last_good"
    assert holder.current.policy.blob == b"weights of 4"
    assert holder.current.revision == 3
    wait_until(lambda: "ConnectionError" in (second.fault or ""))
    assert holder.current.rung == "last_good"
    third, holder = make_refresher(redis_db)
    third.load_last_good()
    assert not third.refresh()
    assert holder.current.rung == "policy"


def test_outage_is_counted_at_every_poll_and_told_once_and_so_is_its_end(
    redis_db: redis.Redis, make_refresher: Make, metrics: ServingMetrics, caplog: pytest.LogCaptureFixture
) -> None:
    refresher, _ = make_refresher(redis_db)
    with caplog.at_level(logging.INFO, "serving.refresher"):
        for _ in range(2):
            redis_db.set(current_key("default"), "what is no hash")
            for _ in range(3):
                assert not refresher.refresh()
            assert "WRONGTYPE" in (refresher.fault or "")
            redis_db.delete(current_key("default"))
            assert not refresher.refresh()
            assert refresher.fault is None
    assert totals(metrics.registry_errors) == {("ResponseError",): 6}
    said = [record.message for record in caplog.records]
    assert said == ["Redis cannot be read; the policy in memory goes on serving", "Redis can be read again"] * 2


def test_start_from_disk_is_not_moved_back_by_an_older_redis(
    redis_db: redis.Redis, make_refresher: Make, make_snapshot: Make, publish: Make
) -> None:
    publish(redis_db, *make_snapshot(4), revision=3)
    make_refresher(redis_db)[0].refresh()
    publish(redis_db, *make_snapshot(1), revision=2)
    refresher, holder = make_refresher(redis_db)
    refresher.load_last_good()
    assert not refresher.refresh()
    assert holder.current.policy.blob == b"weights of 4"


def test_damaged_last_good_starts_uniform(
    tmp_path: Path, no_redis: redis.Redis, make_refresher: Make, make_snapshot: Make, metrics: ServingMetrics
) -> None:
    last_good = LastGood(tmp_path / "good", "default", KEY)
    last_good.save(Fetched(1, *make_snapshot(1)))
    last_good.path.write_bytes(last_good.path.read_bytes()[:-1] + b"X")
    refresher, holder = make_refresher(no_redis)
    assert not refresher.load_last_good()
    assert holder.current.rung == "uniform"
    assert totals(metrics.model_rejected) == {("sha256",): 1}


def test_full_disk_does_not_stop_the_swap(
    redis_db: redis.Redis, make_refresher: Make, make_snapshot: Make, publish: Make, tmp_path: Path
) -> None:
    (tmp_path / "good").write_text("a file where the directory should be")
    refresher, holder = make_refresher(redis_db)
    publish(redis_db, *make_snapshot(1), revision=1)
    assert refresher.refresh()
    assert holder.current.rung == "policy"


def test_announcement_is_followed_at_once(
    redis_server: RedisServer, redis_db: redis.Redis, make_refresher: Make, make_snapshot: Make, publish: Make
) -> None:
    listen = redis.Redis.from_url(redis_server.url, socket_timeout=0.5)
    refresher, holder = make_refresher(redis_db, listen, interval_s=60.0)
    refresher.start()
    wait_until(lambda: redis_db.pubsub_numsub("published:default")[0][1] == 1)
    for version in (1, 2):
        publish(redis_db, *make_snapshot(version), revision=version)
        started = time.monotonic()
        wait_until(lambda revision=version: holder.current.revision == revision)
        assert time.monotonic() - started < 2.0  # a poll would take a minute
    refresher.stop()
    listen.close()


def test_polling_finds_what_no_announcement_told(
    redis_db: redis.Redis, no_redis: redis.Redis, make_refresher: Make, make_snapshot: Make, publish: Make
) -> None:
    refresher, holder = make_refresher(redis_db, no_redis)
    refresher.start()
    publish(redis_db, *make_snapshot(1), revision=1)
    wait_until(lambda: holder.current.revision == 1)


def test_swaps_never_disturb_those_who_decide(
    redis_db: redis.Redis, make_refresher: Make, make_snapshot: Make, publish: Make
) -> None:
    refresher, holder = make_refresher(redis_db)
    publish(redis_db, *make_snapshot(1), revision=1)
    refresher.refresh()
    stop, seen, wrong = threading.Event(), set(), []

    def decide() -> None:
        while not stop.is_set():
            loaded = holder.current
            [blob] = loaded.policy.choose([None])
            seen.add(blob)
            if blob != b"weights of %d" % loaded.manifest.version or loaded.revision != loaded.manifest.version:
                wrong.append(blob)

    thread = threading.Thread(target=decide)
    thread.start()
    for version in range(2, 30):
        publish(redis_db, *make_snapshot(version), revision=version)
        assert refresher.refresh()
    stop.set()
    thread.join()
    assert not wrong
    assert len(seen) > 1


# -- a real snapshot -------------------------------------------------------------------------------


def test_server_explores_as_much_as_the_registry_says(
    redis_db: redis.Redis, make_refresher: Make, make_snapshot: Make, publish: Make
) -> None:
    publish(redis_db, *make_snapshot(1), revision=1)
    refresher, holder = make_refresher(redis_db, build=lambda blob, manifest: policy_of())
    refresher.refresh()
    requests = [request_of(seed) for seed in range(300)]

    def num_played() -> int:
        """Return how many creatives are chosen by more than the uniform share."""
        return len({tuple(c.creative.values()) for c in holder.current.policy.choose(requests) if not c.holdout})

    assert holder.current.exploration == 1.0
    assert num_played() > 1
    redis_db.hset(switches_key("default"), "exploration", "0")
    assert not refresher.refresh(), "no newer snapshot"
    assert (holder.current.exploration, num_played()) == (0.0, 1)
    assert len(holder.swaps()) == 1
    # Also the next snapshot; and what cannot be is not followed.
    redis_db.hset(switches_key("default"), "exploration", "nan")
    publish(redis_db, *make_snapshot(2), revision=2)
    assert refresher.refresh()
    assert (holder.current.exploration, num_played()) == (0.0, 1)
    redis_db.hset(switches_key("default"), "exploration", "")
    refresher.refresh()
    assert holder.current.exploration == 1.0
    assert num_played() > 1


def test_real_snapshot_is_published_loaded_and_decides(
    redis_db: redis.Redis, make_refresher: Make, make_snapshot: Make, publish: Make
) -> None:
    blob, spec = real_blob()
    publish(redis_db, *make_snapshot(1, blob=blob, feature_spec_hash=spec.hash), revision=1)
    refresher, holder = make_refresher(redis_db, build=Policy.from_snapshot, describe=described_elements)
    assert refresher.refresh()
    assert holder.current.described == {"title": frozenset({"t1"}), "image": frozenset({"i1"})}
    candidates = {"title": ["t1", "t2"], "image": ["i1", "new"]}
    choices = holder.current.policy.choose([DecisionRequest("p1", {}, candidates, {}, seed) for seed in range(50)])
    assert all(choice.creative[slot] in ids for choice in choices for slot, ids in candidates.items())
