"""The learner's thread on an embedded broker and a real Redis, fed by the test instead of Faust."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from genco.services import MockBroker, RedisServer
from learner.feed import InboxRecord
from learner.lease import LeaseHeldError
from learner.online import LearnerSettings, OnlineLearner
from learner.update_log import recorded_updates
from learner.updates import Update, in_order
from learner.worker import Connections, Worker
from streams.clients import redis_client
from streams.contracts.examples import ExampleBatch, decode_examples
from streams.contracts.registry import candidate_key, current_key
from streams.contracts.settings import LearnSettings
from streams.contracts.snapshot import SnapshotManifest
from streams.contracts.topics import partition_counts
from tests.learner.scene import PARTITIONS, record


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[LearnSettings]:
    with MockBroker(partition_counts(PARTITIONS)) as broker, RedisServer() as redis_server:
        yield LearnSettings(
            kafka_bootstrap_servers=broker.bootstrap_servers,
            kafka_api_version="2.1",
            kafka_fetch_max_wait_ms=50,
            redis_url=redis_server.url,
            signing_key="k" * 32,
            checkpoint_dir=tmp_path / "checkpoints",
            checkpoint_interval_ms=3_600_000,
            update_interval_ms=100,
            update_max_examples=150,
            particles=4,
        )


def feed(worker: Worker, first: int, last: int, acknowledged: list[tuple[int, int]] | None = None) -> None:
    for offset in range(first, last):
        for partition in range(PARTITIONS):

            def acknowledge(place: tuple[int, int] = (partition, offset)) -> None:
                if acknowledged is not None:
                    acknowledged.append(place)

            worker.feed.put(InboxRecord(partition, offset, record(partition, offset), acknowledge))


def wait_until(happened: Callable[[], bool], worker: Worker, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert worker.failure is None, worker.failure
        assert time.monotonic() < deadline
        time.sleep(0.02)


def started(settings: LearnSettings) -> Worker:
    worker = Worker(
        settings, lambda: OnlineLearner(LearnerSettings.from_settings(settings)), Connections.open(settings)
    )
    worker.start()
    return worker


def crash(worker: Worker) -> None:
    """End the thread as a kill would: no last checkpoint, the lease stays taken."""
    worker._checkpoint = lambda: None  # type: ignore[method-assign]
    worker._publisher.holds_lease = False
    worker.stop()


def newest(settings: LearnSettings) -> SnapshotManifest | None:
    client = redis_client(settings, timeout_s=2, retries=0)
    text = client.get(candidate_key(settings.model_id))
    client.close()
    return None if text is None else SnapshotManifest.model_validate_json(text)


def learned_through(settings: LearnSettings, offset: int) -> bool:
    manifest = newest(settings)
    return manifest is not None and manifest.trained_through == {str(p): offset for p in range(PARTITIONS)}


def replayed(settings: LearnSettings, updates: list[Update]) -> dict[int, str]:
    """Apply recorded updates to a new learner, without Kafka or Redis; return the sha256 after each."""
    learner = OnlineLearner(LearnerSettings.from_settings(settings))
    done = dict.fromkeys(range(PARTITIONS), 0)
    shas: dict[int, str] = {}
    parent = None
    for update in updates:
        places = [(p, o) for p, until in sorted(update.until.items()) for o in range(done[p], until)]
        learner.update(in_order(ExampleBatch.concat([decode_examples(record(*place)) for place in places])))
        done |= update.until
        snapshot = learner.snapshot(
            model_id=settings.model_id,
            epoch=0,
            version=update.number,
            parent_sha256=parent,
            trained_through={},
            due_ms_quantiles=[],
            created_at_ms=0,
            signing_key=settings.signing_key_bytes(),
        )
        parent = shas[update.number] = snapshot.manifest.sha256
    return shas


def test_worker_publishes_what_it_learned_and_checkpoints_at_the_end(settings: LearnSettings) -> None:
    worker = started(settings)
    acknowledged: list[tuple[int, int]] = []
    feed(worker, 0, 6, acknowledged)
    wait_until(lambda: learned_through(settings, 6), worker)
    assert not worker.feed.acknowledgements, "nothing may be committed before a checkpoint holds it"
    worker.stop()
    assert worker.failure is None
    for acknowledge in worker.feed.acknowledgements:
        acknowledge()
    assert sorted(acknowledged) == [(p, o) for p in range(PARTITIONS) for o in range(6)]
    client = redis_client(settings, timeout_s=2, retries=0)
    assert client.hgetall(current_key("default"))[b"epoch"] == b"1"
    client.close()


@pytest.mark.long
def test_worker_after_a_crash_repeats_the_recorded_updates_bit_for_bit(settings: LearnSettings) -> None:
    first = started(settings)
    feed(first, 0, 5)
    wait_until(lambda: learned_through(settings, 5), first)
    first._checkpoint()
    feed(first, 5, 12)
    wait_until(lambda: learned_through(settings, 12), first)
    before = newest(settings)
    crash(first)

    # All records come again from the last committed offset, and more arrive at once, in other portions than before.
    second = started(settings)
    assert second._number < before.version, "the checkpoint is older than the crash"
    feed(second, 0, 20)
    wait_until(lambda: learned_through(settings, 20), second)
    crash(second)

    # A learner without any crash over the same recorded updates gives the same bytes.
    updates, _ = recorded_updates(settings, 0)
    assert [u.number for u in updates] == list(range(1, len(updates) + 1))
    shas = replayed(settings, updates)
    assert shas[before.version] == before.sha256
    assert shas[newest(settings).version] == newest(settings).sha256


def test_worker_asks_for_records_that_its_checkpoint_needs(settings: LearnSettings) -> None:
    first = started(settings)
    feed(first, 0, 3)
    wait_until(lambda: learned_through(settings, 3), first)
    first.stop()
    second = started(settings)
    feed(second, 5, 6)
    wait_until(lambda: bool(second.feed.seeks), second)
    assert {(s.partition, s.offset) for s in second.feed.seeks} <= {(p, 3) for p in range(PARTITIONS)}
    crash(second)


def test_worker_leaves_out_a_record_that_is_no_arrow_and_goes_on(settings: LearnSettings) -> None:
    worker = started(settings)
    feed(worker, 0, 1)
    for partition in range(PARTITIONS):
        worker.feed.put(InboxRecord(partition, 1, b"not arrow", lambda: None))
    feed(worker, 2, 4)
    wait_until(lambda: learned_through(settings, 4), worker)
    worker.stop()
    assert newest(settings).metrics["num_examples"] == 3 * PARTITIONS * 50


def test_second_learner_of_a_model_neither_learns_nor_stays(settings: LearnSettings) -> None:
    short = settings.model_copy(update={"lease_ms": 1_000})
    first = started(short)
    feed(first, 0, 3)
    wait_until(lambda: learned_through(settings, 3), first)
    second = started(short.model_copy(update={"checkpoint_dir": short.checkpoint_dir / "second"}))
    feed(second, 0, 3)
    deadline = time.monotonic() + 20
    while second.failure is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert isinstance(second.failure, LeaseHeldError)
    assert first.failure is None
    updates, _ = recorded_updates(settings, 0)
    assert len({u.number for u in updates}) == len(updates)
    second.stop()
    first.stop()
