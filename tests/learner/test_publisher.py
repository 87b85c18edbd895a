"""Publication against a real Redis: the pointer only moves on, one learner at a time, and outlives `FLUSHALL`."""

import itertools
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from genco.services import RedisServer
from learner.publisher import Fence, Outcome, Publisher
from streams.contracts.registry import (
    CANDIDATE_TTL_S,
    HISTORY_LENGTH,
    Version,
    blob_key,
    candidate_key,
    current_key,
    epoch_key,
    freeze_key,
    history_key,
    lease_key,
    manifest_key,
    pin_key,
    published_channel,
)
from streams.contracts.snapshot import GateVerdict, SnapshotManifest
from tests.snapshots import snapshot

LEASE_MS = 60_000


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as started:
        yield started


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url, socket_timeout=5.0) as connected:
        connected.flushall()
        yield connected


@pytest.fixture
def model() -> str:
    return f"model-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def publisher(client: redis.Redis, model: str) -> Publisher:
    made = Publisher(client, model, LEASE_MS, Fence())
    assert made.acquire()
    return made


def current(client: redis.Redis, model: str) -> dict[str, Any]:
    raw: Any = client.hgetall(current_key(model))
    numbers = {b"epoch", b"version", b"revision"}
    return {name.decode(): int(v) if name in numbers else v.decode() for name, v in raw.items() if v}


def stored(client: redis.Redis, model: str) -> set[str]:
    """Return the epoch:version of every blob, which must each have a manifest."""
    blobs: Any = client.keys(f"blob:{model}:*")
    manifests: Any = client.keys(f"manifest:{model}:*")
    names = {key.decode().split(":", 2)[2] for key in blobs}
    assert names == {key.decode().split(":", 2)[2] for key in manifests}
    return names


# -- the pointer -------------------------------------------------------------------------------------------------------


def test_published_snapshot_is_what_the_pointer_names(client: redis.Redis, publisher: Publisher, model: str) -> None:
    sent = snapshot(model, 1, 1)
    assert publisher.publish(sent) is Outcome.PUBLISHED
    assert current(client, model) == {"epoch": 1, "version": 1, "revision": 1, "sha256": sent.manifest.sha256}
    assert client.get(blob_key(model, 1, 1)) == sent.blob
    manifest: Any = client.get(manifest_key(model, 1, 1))
    assert SnapshotManifest.model_validate_json(manifest) == sent.manifest
    assert client.lrange(history_key(model), 0, -1) == [b"1:1"]
    assert publisher.fence == Fence(epoch=1, revision=1)


def test_revision_increases_with_every_move(client: redis.Redis, publisher: Publisher, model: str) -> None:
    for version in (1, 2, 5):
        assert publisher.publish(snapshot(model, 1, version)) is Outcome.PUBLISHED
    assert current(client, model)["revision"] == 3 == publisher.fence.revision
    assert client.lrange(history_key(model), 0, -1) == [b"1:5", b"1:2", b"1:1"]


@pytest.mark.parametrize(("epoch", "version"), [(1, 9), (1, 1), (0, 99)])
def test_pointer_never_goes_back(
    client: redis.Redis, publisher: Publisher, model: str, epoch: int, version: int
) -> None:
    publisher.publish(snapshot(model, 1, 10))
    before = current(client, model)
    assert publisher.publish(snapshot(model, epoch, version)) is Outcome.NOT_NEWER
    assert current(client, model) == before
    assert publisher.holds_lease
    assert publisher.fence.revision == 1


def test_versions_are_compared_as_numbers(client: redis.Redis, publisher: Publisher, model: str) -> None:
    for epoch, version in ((1, 9), (1, 10), (2, 1), (10, 1), (10, 100)):
        assert publisher.publish(snapshot(model, epoch, version)) is Outcome.PUBLISHED
    assert publisher.publish(snapshot(model, 9, 999)) is Outcome.NOT_NEWER
    assert (current(client, model)["epoch"], current(client, model)["version"]) == (10, 100)


def test_refused_blob_is_not_left_behind(client: redis.Redis, publisher: Publisher, model: str) -> None:
    publisher.publish(snapshot(model, 1, 10))
    assert publisher.publish(snapshot(model, 1, 9)) is Outcome.NOT_NEWER
    assert stored(client, model) == {"1:10"}
    client.set(lease_key(model), "somebody else")
    assert publisher.publish(snapshot(model, 1, 11)) is Outcome.NOT_HOLDER
    assert stored(client, model) == {"1:10"}
    assert client.lrange(history_key(model), 0, -1) == [b"1:10"]


def test_move_is_announced_on_the_channel(client: redis.Redis, publisher: Publisher, model: str) -> None:
    pubsub = client.pubsub(ignore_subscribe_messages=True)
    pubsub.subscribe(published_channel(model))
    pubsub.get_message(timeout=2)
    try:
        publisher.publish(snapshot(model, 1, 1))
        publisher.publish(snapshot(model, 1, 1))  # refused: no message
        client.set(pin_key(model), "1")
        publisher.publish(snapshot(model, 1, 2))  # pinned: no message
        client.delete(pin_key(model))
        publisher.publish(snapshot(model, 1, 3))
        got = [pubsub.get_message(timeout=2) for _ in range(2)]
        assert [message and message["data"] for message in got] == [b"1", b"2"]
        assert pubsub.get_message(timeout=0.1) is None
    finally:
        pubsub.close()


def test_models_do_not_meet(client: redis.Redis, publisher: Publisher, model: str) -> None:
    other = Publisher(client, f"{model}-b", LEASE_MS, Fence())
    assert other.acquire()
    assert publisher.publish(snapshot(model, 1, 1)) is Outcome.PUBLISHED
    assert other.publish(snapshot(f"{model}-b", 1, 7)) is Outcome.PUBLISHED
    assert (current(client, model)["version"], current(client, f"{model}-b")["version"]) == (1, 7)


def test_candidate_is_shown_whatever_its_verdict(client: redis.Redis, publisher: Publisher, model: str) -> None:
    refused = snapshot(model, 1, 1).manifest.model_copy(
        update={"gate": GateVerdict(accepted=False, reasons=("calibration",))}
    )
    publisher.show(refused)
    raw: Any = client.get(candidate_key(model))
    assert SnapshotManifest.model_validate_json(raw) == refused
    assert current(client, model) == {}


# -- lease and fencing -------------------------------------------------------------------------------------------------


def test_second_learner_gets_no_lease_until_the_first_gives_it_back(client: redis.Redis, model: str) -> None:
    first, second = (Publisher(client, model, LEASE_MS, Fence()) for _ in range(2))
    assert first.acquire()
    assert not second.acquire()
    assert (first.holds_lease, second.holds_lease) == (True, False)
    assert second.fence == Fence(epoch=0)
    assert not second.renew()
    second.release()  # not its own: nothing happens
    assert first.renew()
    first.release()
    assert not first.holds_lease
    assert second.acquire()
    assert second.fence.epoch == 2


def test_learner_without_the_lease_publishes_nothing(client: redis.Redis, publisher: Publisher, model: str) -> None:
    publisher.publish(snapshot(model, 1, 1))
    intruder = Publisher(client, model, LEASE_MS, Fence(epoch=9))
    assert intruder.publish(snapshot(model, 9, 9)) is Outcome.NOT_HOLDER
    assert (current(client, model)["epoch"], stored(client, model)) == (1, {"1:1"})


def test_learner_that_was_paused_cannot_publish_after_another_took_over(client: redis.Redis, model: str) -> None:
    paused = Publisher(client, model, 50, Fence())
    assert paused.acquire()
    assert paused.publish(snapshot(model, paused.fence.epoch, 1)) is Outcome.PUBLISHED
    time.sleep(0.1)  # longer than its lease
    successor = Publisher(client, model, LEASE_MS, Fence())
    assert successor.acquire()
    assert successor.fence.epoch > paused.fence.epoch
    # Before and after the successor's first publication, and even with a version beyond every other.
    assert paused.publish(snapshot(model, paused.fence.epoch, 1000)) is Outcome.NOT_HOLDER
    assert not paused.holds_lease
    assert successor.publish(snapshot(model, successor.fence.epoch, 2)) is Outcome.PUBLISHED
    assert paused.publish(snapshot(model, 10**6, 1000)) is Outcome.NOT_HOLDER
    assert not paused.renew()
    assert not paused.acquire()
    assert current(client, model)["epoch"] == successor.fence.epoch
    assert stored(client, model) == {"1:1", "2:2"}


def test_lease_that_ran_out_lets_nothing_through_even_without_a_successor(client: redis.Redis, model: str) -> None:
    alone = Publisher(client, model, 50, Fence())
    assert alone.acquire()
    time.sleep(0.1)
    assert alone.publish(snapshot(model, 1, 1)) is Outcome.NOT_HOLDER
    assert not alone.renew()
    assert alone.acquire()
    assert alone.fence.epoch == 2


def test_renewal_prolongs_the_lease(client: redis.Redis, model: str) -> None:
    owner = Publisher(client, model, 300, Fence())
    assert owner.acquire()
    for _ in range(4):
        time.sleep(0.1)
        assert owner.renew()
    assert not Publisher(client, model, 300, Fence()).acquire()
    remaining: Any = client.pttl(lease_key(model))
    assert 0 < remaining <= 300


def test_epochs_increase_with_every_acquisition(client: redis.Redis, model: str) -> None:
    epochs = []
    for _ in range(3):
        owner = Publisher(client, model, LEASE_MS, Fence())
        assert owner.acquire()
        epochs.append(owner.fence.epoch)
        owner.release()
    assert epochs == [1, 2, 3]
    assert client.get(epoch_key(model)) == b"3"


# -- pin ---------------------------------------------------------------------------------------------------------------


def test_pin_keeps_the_pointer_and_stores_what_comes(client: redis.Redis, publisher: Publisher, model: str) -> None:
    publisher.publish(snapshot(model, 1, 1))
    client.set(pin_key(model), "1:1")
    before = current(client, model)
    for version in (2, 3):
        assert publisher.publish(snapshot(model, 1, version)) is Outcome.PINNED
    assert current(client, model) == before
    assert stored(client, model) == {"1:1", "1:2", "1:3"}
    assert publisher.holds_lease
    assert publisher.fence.revision == 1
    client.delete(pin_key(model))
    assert publisher.publish(snapshot(model, 1, 4)) is Outcome.PUBLISHED
    assert (current(client, model)["version"], current(client, model)["revision"]) == (4, 2)
    assert client.lrange(history_key(model), 0, -1) == [b"1:4", b"1:3", b"1:2", b"1:1"]


def test_freeze_keeps_the_pointer_and_a_pin_comes_first(client: redis.Redis, publisher: Publisher, model: str) -> None:
    publisher.publish(snapshot(model, 1, 1))
    client.set(freeze_key(model), "1")
    before = current(client, model)
    assert publisher.publish(snapshot(model, 1, 2)) is Outcome.FROZEN
    assert publisher.publish(snapshot(model, 1, 2)) is Outcome.FROZEN, "as when the answer was lost"
    client.set(pin_key(model), "1:1")
    assert publisher.publish(snapshot(model, 1, 3)) is Outcome.PINNED
    assert current(client, model) == before
    assert stored(client, model) == {"1:1", "1:2", "1:3"}
    client.delete(freeze_key(model), pin_key(model))
    assert publisher.publish(snapshot(model, 1, 4)) is Outcome.PUBLISHED


def test_newer_means_newer_than_everything_stored(client: redis.Redis, publisher: Publisher, model: str) -> None:
    publisher.publish(snapshot(model, 1, 1))
    client.set(pin_key(model), "1:1")
    publisher.publish(snapshot(model, 1, 5))
    client.delete(pin_key(model))
    for version in (4, 5):
        assert publisher.publish(snapshot(model, 1, version)) is Outcome.NOT_NEWER
    assert publisher.publish(snapshot(model, 1, 6)) is Outcome.PUBLISHED


def test_candidate_expires_and_snapshots_do_not(client: redis.Redis, publisher: Publisher, model: str) -> None:
    sent = snapshot(model, 1, 1)
    publisher.show(sent.manifest)
    publisher.publish(sent)
    left: Any = client.ttl(candidate_key(model))
    assert CANDIDATE_TTL_S - 60 < left <= CANDIDATE_TTL_S
    for key in (blob_key(model, 1, 1), manifest_key(model, 1, 1), current_key(model), history_key(model)):
        assert client.ttl(key) == -1


# -- an empty Redis ----------------------------------------------------------------------------------------------------


def test_after_flushall_epoch_and_revision_go_on(client: redis.Redis, publisher: Publisher, model: str) -> None:
    for version in range(1, 6):
        publisher.publish(snapshot(model, 1, version))
    client.flushall()
    assert publisher.publish(snapshot(model, 1, 6)) is Outcome.NOT_HOLDER
    assert publisher.acquire()
    assert publisher.fence.epoch == 2
    assert publisher.publish(snapshot(model, 2, 6)) is Outcome.PUBLISHED
    assert current(client, model)["revision"] == 6 > 5
    assert current(client, model)["epoch"] == 2 > 1


def test_new_process_with_the_fence_of_its_checkpoint_goes_on_after_flushall(client: redis.Redis, model: str) -> None:
    owner = Publisher(client, model, LEASE_MS, Fence(epoch=41, revision=900))
    assert owner.acquire()
    assert owner.fence.epoch == 42
    assert owner.publish(snapshot(model, 42, 1)) is Outcome.PUBLISHED
    assert current(client, model)["revision"] == 901


def test_redis_that_knows_more_than_the_fence_wins(client: redis.Redis, publisher: Publisher, model: str) -> None:
    for version in (1, 2, 3):
        publisher.publish(snapshot(model, 1, version))
    publisher.release()
    restarted = Publisher(client, model, LEASE_MS, Fence())  # its checkpoint was lost
    assert restarted.acquire()
    assert restarted.fence.epoch == 2
    assert restarted.publish(snapshot(model, 2, 1)) is Outcome.PUBLISHED
    assert current(client, model)["revision"] == 4 == restarted.fence.revision


# -- history -----------------------------------------------------------------------------------------------------------


def test_history_gets_sparser_with_age_and_what_leaves_it_is_deleted(
    client: redis.Redis, publisher: Publisher, model: str
) -> None:
    num = 600
    for version in range(1, num + 1):
        assert publisher.publish(snapshot(model, 1, version)) is Outcome.PUBLISHED
    history = [Version.parse(name).key for name in names(client, model)]
    assert stored(client, model) == set(history)
    versions = [Version.parse(name).number for name in history]
    assert len(versions) == HISTORY_LENGTH
    assert versions[:12] == list(range(num, num - 12, -1))
    assert versions[-1] < num / 10, "most of the time is covered"
    for later, earlier in itertools.pairwise(versions):
        assert later - earlier <= max(2, 0.2 * (num - earlier)), "whatever the age, something near it is there"


def test_history_spans_a_learner_that_counts_from_one_again(
    client: redis.Redis, publisher: Publisher, model: str
) -> None:
    for version in range(1, 301):
        publisher.publish(snapshot(model, 1, version))
    publisher.release()
    assert publisher.acquire()
    for version in range(1, 151):
        publisher.publish(snapshot(model, 2, version))
    kept = [Version.parse(name) for name in names(client, model)]
    assert len(kept) == HISTORY_LENGTH
    assert kept == sorted(kept, reverse=True)
    ages = [150 - number if epoch == 2 else 150 + 300 - number for epoch, number in kept]
    assert all(older - newer <= max(2, 0.2 * older) for newer, older in itertools.pairwise(ages))
    assert ages[-1] > 400


def names(client: redis.Redis, model: str) -> list[str]:
    history: Any = client.lrange(history_key(model), 0, -1)
    return [name.decode() for name in history]


def test_versions_under_pointer_and_pin_are_not_deleted_however_old(
    client: redis.Redis, publisher: Publisher, model: str
) -> None:
    publisher.publish(snapshot(model, 1, 1))
    publisher.publish(snapshot(model, 1, 2))
    client.set(pin_key(model), "1:1")
    for version in range(3, HISTORY_LENGTH + 5):
        assert publisher.publish(snapshot(model, 1, version)) is Outcome.PINNED
    assert {"1:1", "1:2"} < stored(client, model)
    history: Any = client.lrange(history_key(model), 0, -1)
    assert {name.decode() for name in history} == stored(client, model)
    assert len(history) == HISTORY_LENGTH


def test_redis_that_is_gone_raises_and_loses_nothing(model: str) -> None:
    with RedisServer() as server, redis.Redis.from_url(server.url, socket_timeout=1.0, retry=None) as client:
        publisher = Publisher(client, model, LEASE_MS, Fence())
        assert publisher.acquire()
        publisher.publish(snapshot(model, 1, 1))
        server.stop()
        for call in (publisher.acquire, publisher.renew, lambda: publisher.publish(snapshot(model, 1, 2))):
            with pytest.raises(redis.RedisError):
                call()
        assert publisher.fence == Fence(epoch=1, revision=1)


# -- known gaps --------------------------------------------------------------------------------------------------------


def test_publishing_the_same_version_again_keeps_what_the_pointer_names(
    client: redis.Redis, publisher: Publisher, model: str
) -> None:
    # As when the answer to the first try was lost: redis-py itself sends the script again (retries=1).
    assert publisher.publish(snapshot(model, 1, 1)) is Outcome.PUBLISHED
    publisher.publish(snapshot(model, 1, 1))
    assert stored(client, model) == {"1:1"}


def test_blob_of_a_published_version_is_immutable(client: redis.Redis, publisher: Publisher, model: str) -> None:
    publisher.publish(snapshot(model, 1, 1))
    client.set(lease_key(model), "somebody else")
    publisher.publish(snapshot(model, 1, 1, blob=b"other weights"))
    assert client.get(blob_key(model, 1, 1)) == snapshot(model, 1, 1).blob


def test_revision_of_a_rollback_is_not_given_again_after_flushall(
    client: redis.Redis, publisher: Publisher, model: str
) -> None:
    for version in (1, 2):
        publisher.publish(snapshot(model, 1, version))
    # What a rollback does: the pointer goes back, the revision on.
    client.hset(current_key(model), mapping={"version": 1, "revision": 7})
    assert publisher.renew()
    client.flushall()
    assert publisher.acquire()
    publisher.publish(snapshot(model, 2, 3))
    assert current(client, model)["revision"] > 7
