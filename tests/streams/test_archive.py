"""Every record is in the archive exactly once, wherever processes are stopped, paused or overtaken.

The archiver runs against a broker of a few lines and a file system that stops it before any operation. What is checked
is what a reader sees: the offsets in the files.
"""

import itertools
import json
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kafka import TopicPartition
from kafka.errors import CommitFailedError, KafkaError, KafkaTimeoutError, OffsetOutOfRangeError
from kafka.structs import OffsetAndMetadata

from streams import archive_folder
from streams.archive import Archiver
from streams.archive_chunk import END_OF_TIME_MS, HOUR_MS, RECORD_OVERHEAD, Chunk, Place
from streams.archive_folder import POSITIONS, STAGING, ArchiveFolder
from streams.archive_store import Store
from streams.contracts.examples import EXAMPLE_SCHEMA, decode_table, encode_examples
from streams.contracts.settings import ConfigurationError

HOUR = 1_764_000_000_000 // HOUR_MS
NOW_MS = 5_000.0
roots = itertools.count()


def record(*hours: int, name: str = "d") -> bytes:
    """A record with an example in each of these hours after `HOUR`."""
    rows: dict[str, list[Any]] = {f.name: [] for f in EXAMPLE_SCHEMA}
    for row, hour in enumerate(hours):
        example = {
            "decision_id": f"{name}-{row}",
            "occurred_at_ms": (HOUR + hour) * HOUR_MS + row,
            "product_id": "p1",
            "context": '{"device":"ios"}',
            "candidates": {"title": ["t1", "t2"], "image": ["i1"]},
            "creative": {"title": "t2", "image": "i1"},
            "slot_propensities": {"title": 0.25, "image": 1.0},
            "propensity": 0.25,
            "model_id": "default",
            "epoch": 3,
            "policy_version": 42,
            "source": "policy",
            "holdout": False,
            "seed": 7,
            "survival_probability": 1.0,
            "label": row % 2,
            "reward": float(row % 2),
            "label_kind": "final",
            "delay_ms": 900 if row % 2 else None,
        }
        for column, value in example.items():
            rows[column].append(value)
    return encode_examples(rows)


# -- a broker, and processes that stop where they are told -------------------------------------------------------------


class Killed(BaseException):
    """The process is gone."""


class Broker:
    """Logs of the partitions, committed offsets, and a group whose generation fences commits."""

    def __init__(self, *logs: list[bytes | None]) -> None:
        self.logs = dict(enumerate(logs))
        self.begins: dict[int, int] = defaultdict(int)
        self.committed: dict[int, OffsetAndMetadata] = {}
        self.generation = 0
        self.owners: dict[int, object] = {}

    def assign(self, owner: object, *partitions: int) -> None:
        self.generation += 1
        for partition in partitions or self.logs:
            self.owners[partition] = owner


class Consumer:
    """What the archiver uses of a `KafkaConsumer`. A new generation is seen in `poll` alone, as there."""

    def __init__(self, broker: Broker, step: Callable[[], None] = lambda: None, records_per_poll: int = 2) -> None:
        self.broker = broker
        self.step = step
        self.records_per_poll = records_per_poll
        self.generation = -1
        self.positions: dict[TopicPartition, int] = {}
        self.paused: set[TopicPartition] = set()
        self.listener: Any = None
        self.fail_commits: list[str] = []

    def subscribe(self, topics: list[str], listener: Any) -> None:
        assert topics == ["examples"]
        self.listener = listener

    def seek(self, place: TopicPartition, offset: int) -> None:
        self.positions[place] = offset

    def pause(self, *places: TopicPartition) -> None:
        self.paused |= set(places)

    def resume(self, *places: TopicPartition) -> None:
        self.paused -= set(places)

    def poll(self, timeout_ms: int) -> dict[TopicPartition, list[Any]]:
        self.step()
        if self.generation != self.broker.generation:
            self.listener.on_partitions_revoked(set(self.positions))
            self.generation = self.broker.generation
            self.positions, self.paused = {}, set()
            mine = {TopicPartition("examples", p) for p, owner in self.broker.owners.items() if owner is self}
            self.listener.on_partitions_assigned(mine)
            assert mine == set(self.positions), "a partition has no position, so that polling would fail"
        polled = {}
        for place, position in self.positions.items():
            if place in self.paused:
                continue
            log = self.broker.logs[place.partition]
            if not self.broker.begins[place.partition] <= position <= len(log):
                raise OffsetOutOfRangeError({place: position})
            offsets = range(position, min(position + self.records_per_poll, len(log)))
            if offsets:
                polled[place] = [SimpleNamespace(offset=o, value=log[o]) for o in offsets]
                self.positions[place] = offsets.stop
        return polled

    def committed(self, place: TopicPartition, metadata: bool, timeout_ms: int) -> OffsetAndMetadata | None:
        assert metadata
        self.step()
        return self.broker.committed.get(place.partition)

    def commit(self, offsets: dict[TopicPartition, OffsetAndMetadata], timeout_ms: int) -> None:
        self.step()
        fault = self.fail_commits.pop() if self.fail_commits else ""
        if self.generation != self.broker.generation:
            raise CommitFailedError
        if fault == "lost":
            raise KafkaTimeoutError
        for place, offset in offsets.items():
            assert len(offset.metadata) < 4096
            self.broker.committed[place.partition] = offset
        if fault:
            raise KafkaTimeoutError
        self.step()

    def beginning_offsets(self, places: list[TopicPartition], timeout_ms: int) -> dict[TopicPartition, int]:
        return {place: self.broker.begins[place.partition] for place in places}

    def end_offsets(self, places: list[TopicPartition], timeout_ms: int) -> dict[TopicPartition, int]:
        return {place: len(self.broker.logs[place.partition]) for place in places}


class SteppedFs:
    """A file system that tells before each operation."""

    def __init__(self, inner: Any, step: Callable[[], None]) -> None:
        self._inner = inner
        self._step = step

    def __getattr__(self, name: str) -> Any:
        inner = getattr(self._inner, name)
        if name in ("invalidate_cache", "makedirs"):
            return inner

        def call(*args: Any, **kwargs: Any) -> Any:
            self._step()
            return inner(*args, **kwargs)

        return call


def stepped_folder(url: str, step: Callable[[], None]) -> ArchiveFolder:
    store = Store(url)
    store._fs = SteppedFs(store._fs, step)
    return ArchiveFolder(store)


def turns(archiver: Archiver, count: int = 30) -> None:
    for _ in range(count):
        archiver.turn(NOW_MS)


def drain(broker: Broker, url: str) -> None:
    """A process that nobody disturbs archives the rest."""
    consumer = Consumer(broker)
    archiver = Archiver(consumer, ArchiveFolder(Store(url)), interval_ms=0, max_bytes=2**30)
    broker.assign(consumer)
    turns(archiver, max(len(log) for log in broker.logs.values()) + 3)


def archived(url: str) -> dict[int, list[int]]:
    """Offsets of all rows that a reader sees, by partition, in order; a record of two rows comes twice."""
    store = Store(url)
    rows: dict[int, list[int]] = defaultdict(list)
    for name in store.names(""):
        if name.endswith(".parquet"):
            with store._fs.open(store._path(name), "rb") as file:
                table = pq.read_table(file)
            assert Place.of_file(name) is not None
            for partition, offset in zip(table["partition"].to_pylist(), table["offset"].to_pylist(), strict=True):
                rows[partition].append(offset)
        elif name.startswith("_unreadable/"):
            partition, offset = (int(part) for part in name.removesuffix(".arrow").split("/p")[1].split("-"))
            rows[partition].append(offset)
    return {partition: sorted(offsets) for partition, offsets in rows.items()}


def leftovers(url: str) -> list[str]:
    return Store(url).names(STAGING)


@pytest.fixture
def url() -> Iterator[str]:
    root = f"memory://archive-{next(roots)}"
    yield root
    store = Store(root)
    for name in store.names(""):
        store.remove(name)


LOG: list[bytes | None] = [record(0, 1), record(0, 0), b"no arrow", record(2, 1), None, record(1, 2)]
ROWS = [0, 0, 1, 1, 2, 3, 3, 4, 5, 5]


# -- without faults ----------------------------------------------------------------------------------------------------


def test_records_are_archived_by_hour_with_their_place(url: str) -> None:
    broker = Broker([record(0, 1, 0, name="a"), record(1, 25, name="b")])
    drain(broker, url)
    store = Store(url)
    files = [name for name in store.names("") if name.endswith(".parquet")]
    assert files == [
        "date=2025-11-24/hour=16/examples-p00000-000000000000-000000000001.parquet",
        "date=2025-11-24/hour=17/examples-p00000-000000000000-000000000001.parquet",
        "date=2025-11-25/hour=17/examples-p00000-000000000000-000000000001.parquet",
    ]
    with store._fs.open(store._path(files[0]), "rb") as file:
        first = pq.read_table(file)
    assert first["decision_id"].to_pylist() == ["a-0", "a-2"]
    with store._fs.open(store._path(files[1]), "rb") as file:
        second = pq.read_table(file)
        assert pq.ParquetFile(file).metadata.row_group(0).column(0).compression == "ZSTD"
    assert second["decision_id"].to_pylist() == ["a-1", "b-0"]
    assert second["offset"].to_pylist() == [0, 1]
    assert second["candidates"].to_pylist()[0] == [("title", ["t1", "t2"]), ("image", ["i1"])]
    assert second.schema.metadata[b"genco.schema_version"] == b"1"
    assert leftovers(url) == []
    assert broker.committed[0].offset == 2


def test_unreadable_records_are_kept_as_they_came_and_the_rest_goes_on(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    cut = record(0)[:-200]
    beyond = record(END_OF_TIME_MS // HOUR_MS - HOUR)
    drain(Broker([record(0), b"no arrow", cut, None, beyond, record(0)]), url)
    store = Store(url)
    kept = {name: store.read(name) for name in store.names("_unreadable")}
    assert kept == {
        "_unreadable/p00000-000000000001.arrow": b"no arrow",
        "_unreadable/p00000-000000000002.arrow": cut,
        "_unreadable/p00000-000000000003.arrow": b"",
        "_unreadable/p00000-000000000004.arrow": beyond,
    }
    assert archived(url)[0] == [0, 1, 2, 3, 4, 5]
    faults = [r.__dict__ for r in caplog.records if "unreadable" in r.message]
    assert [(fault["partition"], fault["offset"]) for fault in faults] == [(0, 1), (0, 2), (0, 3), (0, 4)]


def test_last_moment_that_has_a_folder_is_archived(url: str) -> None:
    drain(Broker([record(END_OF_TIME_MS // HOUR_MS - HOUR - 1)]), url)
    assert any(name.startswith("date=9999-12-31/hour=23/") for name in Store(url).names(""))


def test_record_without_examples_moves_the_position_and_makes_no_file(url: str) -> None:
    broker = Broker([record(), record()])
    drain(broker, url)
    assert archived(url) == {}
    assert ArchiveFolder(Store(url)).position(0) == broker.committed[0].offset == 2


def test_chunk_is_written_when_it_is_old_enough_and_not_before(url: str) -> None:
    broker = Broker([record(0), record(0)])
    consumer = Consumer(broker)
    archiver = Archiver(consumer, ArchiveFolder(Store(url)), interval_ms=1_000, max_bytes=2**30)
    broker.assign(consumer)
    for now in (0, 100, 1_099):
        archiver.turn(now)
        assert broker.committed == {}
    archiver.turn(1_100)
    assert archived(url)[0] == [0, 1]


def test_fullest_partition_is_written_when_memory_is_full(url: str) -> None:
    large = record(*[0] * 300)
    broker = Broker([record(0)], [large] * 3)
    consumer = Consumer(broker, records_per_poll=1)
    limit = int(2.5 * (decode_table(large).nbytes + RECORD_OVERHEAD))
    archiver = Archiver(consumer, ArchiveFolder(Store(url)), interval_ms=1e9, max_bytes=limit)
    broker.assign(consumer)
    turns(archiver, 6)
    assert {partition: committed.offset for partition, committed in broker.committed.items()} == {1: 3}
    archiver.flush()
    assert archived(url) == {0: [0], 1: [offset for offset in range(3) for _ in range(300)]}


# -- faults ------------------------------------------------------------------------------------------------------------


def half_written(step: Callable[[], None]) -> Callable[[Any, Any], None]:
    """The writer of Parquet files, which can be stopped in the middle of a file."""
    write = archive_folder._write_parquet

    def halves(table: Any, file: Any) -> None:
        file.write(b"half")
        step()
        file.seek(0)
        write(table, file)

    return halves


def killed_at(number: int, url: str, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run a process that dies before its n-th operation; say whether it died."""
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        if count == number:
            raise Killed

    with monkeypatch.context() as patch:
        replace = os.replace

        def stepped_replace(source: Any, target: Any) -> None:
            step()
            replace(source, target)
            step()

        patch.setattr(os, "replace", stepped_replace)
        patch.setattr(archive_folder, "_write_parquet", half_written(step))
        consumer = Consumer(broker, step)
        archiver = Archiver(consumer, stepped_folder(url, step), interval_ms=0, max_bytes=2**30)
        broker.assign(consumer)
        try:
            turns(archiver, 6)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_process_killed_at_any_operation_loses_and_repeats_nothing(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = 0
    for number in itertools.count(1):
        place = str(tmp_path / f"{number}") if where == "disk" else f"memory://killed-{next(roots)}"
        broker = Broker(LOG)
        if not killed_at(number, place, broker, monkeypatch):
            break
        died += 1
        drain(broker, place)
        assert archived(place) == {0: ROWS}, f"killed before operation {number}"
        assert leftovers(place) == []
    assert died > 40


def test_process_killed_twice_at_any_operation_of_its_recovery_loses_and_repeats_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Ends of the first life: in the middle of staging, before and after the commit, in the middle of publishing.
    for first in range(3, 24):
        for second in range(1, 14):
            place = f"memory://twice-{next(roots)}"
            broker = Broker(LOG[:2])
            killed_at(first, place, broker, monkeypatch)
            killed_at(second, place, broker, monkeypatch)
            drain(broker, place)
            assert archived(place) == {0: [0, 0, 1, 1]}, (first, second)
            assert leftovers(place) == []


class ProcessThread(threading.Thread):
    step: Callable[[], None]


class Process:
    """An archiver in a thread that goes from one operation to the next when it is told to."""

    def __init__(self, broker: Broker, url: str) -> None:
        self.broker = broker
        self.url = url
        self.go = threading.Semaphore(0)
        self.stopped = threading.Semaphore(0)
        self.is_killed = False
        self.error: BaseException | None = None
        self.commit_faults: list[str] = []
        self.consumer: Consumer | None = None
        self.thread = ProcessThread(target=self._run, daemon=True)
        self.thread.step = self._wait
        self.thread.start()
        self.stopped.acquire()

    def _wait(self) -> None:
        self.stopped.release()
        self.go.acquire()
        if self.is_killed:
            raise Killed

    def _run(self) -> None:
        try:
            while True:
                self._be_member()
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001 - told in the test's own thread
            self.error = error
        finally:
            self.stopped.release()

    def _be_member(self) -> None:
        was_owner = [p for p, owner in self.broker.owners.items() if owner is self.consumer and self.consumer]
        consumer = self.consumer = Consumer(self.broker, self._wait)
        consumer.fail_commits = self.commit_faults
        if was_owner:
            self.broker.assign(consumer, *was_owner)
        archiver = Archiver(consumer, stepped_folder(self.url, self._wait), interval_ms=0, max_bytes=2**30)
        try:
            while True:
                archiver.turn(NOW_MS)
        except KafkaError:
            return

    def step(self) -> None:
        if self.thread.is_alive() and self.error is None:
            self.go.release()
            self.stopped.acquire()

    def kill(self) -> None:
        self.is_killed = True
        self.go.release()
        self.thread.join(10)
        assert not self.thread.is_alive()
        assert self.error is None, self.error


def write_offsets(table: Any, file: Any) -> None:
    """Instead of Parquet: fast, for the interleavings are many; a process can be stopped in the middle of a file."""
    content = json.dumps(table["offset"].to_pylist()).encode()
    file.write(content[:1])
    if isinstance(thread := threading.current_thread(), ProcessThread):
        thread.step()
    file.write(content[1:])


def archived_offsets(url: str) -> Counter[int]:
    store = Store(url)
    offsets: Counter[int] = Counter()
    for name in store.names(""):
        if name.endswith(".parquet"):
            offsets.update(json.loads(store.read(name)))
        elif name.startswith("_unreadable/"):
            offsets[int(name[-18:-6])] += 1
    return offsets


ACTIONS = ("step", "own", "kill", "commit answer lost", "commit lost")


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.sampled_from([0, 1]), st.sampled_from(ACTIONS), st.integers(1, 14)), min_size=4, max_size=40)
)
def test_two_processes_paused_overtaken_and_killed_anywhere_lose_and_repeat_nothing(
    schedule: list[tuple[int, str, int]],
) -> None:
    write = archive_folder._write_parquet
    archive_folder._write_parquet = write_offsets  # a fixture would live longer than one example
    place = f"memory://two-{next(roots)}"
    broker = Broker(LOG)
    processes = [Process(broker, place), Process(broker, place)]
    try:
        broker.assign(processes[0].consumer)
        for index, action, count in schedule:
            process = processes[index]
            if action == "step":
                for _ in range(count):
                    process.step()
            elif action == "own":
                broker.assign(process.consumer)
            elif action == "kill":
                process.kill()
                processes[index] = Process(broker, place)
                if count % 2:
                    broker.assign(processes[index].consumer)
            else:
                process.commit_faults[:] = ["lost" if action == "commit lost" else "answer lost"]
            assert process.error is None, process.error
        for process in processes:
            process.kill()
        drain(broker, place)
        assert archived_offsets(place) == Counter(ROWS)
        assert leftovers(place) == []
    finally:
        archive_folder._write_parquet = write
        for process in processes:
            if process.thread.is_alive():
                process.is_killed = True
                process.go.release()


@pytest.fixture
def fast_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_folder, "_write_parquet", write_offsets)


@pytest.mark.usefixtures("fast_files")
@pytest.mark.parametrize("ahead", [2, 5, *range(8, 18), 30])
def test_process_that_wakes_up_does_not_touch_the_files_of_its_successor(ahead: int) -> None:
    """The old owner stops at each of its operations; until it goes on, the new owner comes `ahead` operations far."""
    chunk = Chunk(0, 0, 0.0)
    chunk.add(0, record(0))
    for pause in range(1, 26):
        url = f"memory://paused-{next(roots)}"
        ArchiveFolder(Store(url)).stage(chunk)  # of an earlier owner that died, to be thrown away
        broker = Broker(LOG[:4])
        old, new = Process(broker, url), Process(broker, url)
        broker.assign(old.consumer)
        for _ in range(pause):
            old.step()
        broker.assign(new.consumer)
        for _ in range(ahead):
            new.step()
        for _ in range(20):
            old.step()
        for _ in range(60):
            new.step()
        old.kill()
        new.kill()
        drain(broker, url)
        assert archived_offsets(url) == Counter(ROWS[:7]), pause
        assert leftovers(url) == []


def test_chunk_that_is_staged_twice_shares_no_file_with_itself(url: str) -> None:
    """Or a process that wakes up would cut its successor's file short while it writes its own."""
    folder = ArchiveFolder(Store(url))
    chunk = Chunk(0, 0, 0.0)
    chunk.add(0, record(0))
    first, second = folder.stage(chunk), folder.stage(chunk)
    assert first.name != second.name
    assert first.files.keys().isdisjoint(second.files)


# -- where the archive goes on -----------------------------------------------------------------------------------------


def test_archive_goes_on_after_its_files_when_the_committed_offset_has_expired(url: str) -> None:
    broker = Broker(LOG[:3])
    drain(broker, url)
    broker.committed.clear()
    broker.logs[0] = list(LOG)
    drain(broker, url)
    assert archived(url) == {0: ROWS}


def test_archive_goes_on_after_the_names_of_its_files_when_its_positions_are_gone_too(url: str) -> None:
    broker = Broker(LOG[:2])
    drain(broker, url)
    broker.committed.clear()
    broker.logs[0] = list(LOG)
    Store(url).remove(f"{POSITIONS}/p00000.json")
    drain(broker, url)
    assert archived(url) == {0: ROWS}


def test_offset_that_was_set_back_repeats_nothing(url: str, caplog: pytest.LogCaptureFixture) -> None:
    broker = Broker(LOG)
    drain(broker, url)
    broker.committed[0] = OffsetAndMetadata(0, "", -1)
    drain(broker, url)
    assert archived(url) == {0: ROWS}
    assert "ahead of the committed offset" in caplog.text


def test_offset_that_was_set_forward_by_hand_is_followed(url: str) -> None:
    broker = Broker(LOG[:2])
    drain(broker, url)
    broker.logs[0] = list(LOG)
    broker.committed[0] = OffsetAndMetadata(5, "", -1)
    drain(broker, url)
    assert archived(url) == {0: [0, 0, 1, 1, 5, 5]}


def test_records_that_retention_removed_are_counted_once_and_logged(url: str, caplog: pytest.LogCaptureFixture) -> None:
    from streams.archive import _lost

    broker = Broker(LOG[:1])
    drain(broker, url)
    broker.logs[0] = list(LOG)
    broker.begins[0] = 3
    before = _lost._value.get()
    consumer = Consumer(broker)
    archiver = Archiver(consumer, ArchiveFolder(Store(url)), interval_ms=1e9, max_bytes=2**30)
    for _ in range(3):  # partitions come back again and again, and nothing has been written meanwhile
        broker.assign(consumer)
        turns(archiver, 3)
    assert _lost._value.get() - before == 2
    assert caplog.text.count("retention removed") == 1
    archiver.flush()
    assert archived(url) == {0: [0, 0, 3, 3, 4, 5, 5]}


def test_retention_that_overtakes_a_reader_ends_its_membership_and_is_counted_by_the_next(url: str) -> None:
    broker = Broker(LOG)
    consumer = Consumer(broker, records_per_poll=1)
    archiver = Archiver(consumer, ArchiveFolder(Store(url)), interval_ms=0, max_bytes=2**30)
    broker.assign(consumer)
    turns(archiver, 2)
    broker.begins[0] = 3
    with pytest.raises(OffsetOutOfRangeError):
        turns(archiver, 1)
    drain(broker, url)
    assert archived(url) == {0: [0, 0, 3, 3, 4, 5, 5]}


@pytest.mark.parametrize("has_offset", [True, False])
def test_topic_that_was_created_anew_is_refused(url: str, has_offset: bool) -> None:
    drain(Broker(LOG), url)
    broker = Broker(LOG[:2])
    if has_offset:
        broker.committed[0] = OffsetAndMetadata(len(LOG), "", -1)
    with pytest.raises(ConfigurationError, match=r"reaches offset 6, and the topic ends at 2: .*GENCO_ARCHIVE_URL"):
        drain(broker, url)
    assert archived(url) == {0: ROWS}


def test_folder_of_another_group_or_an_empty_one_is_refused(url: str) -> None:
    broker = Broker(LOG)
    drain(broker, url)
    other = f"memory://other-{next(roots)}"
    with pytest.raises(ConfigurationError, match=r"up to offset 6, and the archive .* ends at 0: .*ARCHIVE_GROUP"):
        drain(broker, other)
    assert archived(other) == {}


def test_committed_file_that_was_removed_by_hand_is_told(url: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = ArchiveFolder(Store(url))
    chunk = Chunk(0, 0, 0.0)
    chunk.add(0, record(0))
    journal = folder.stage(chunk)
    folder.discard([next(iter(journal.files)).rpartition("/")[2]])
    folder.publish(journal)
    assert "is gone" in caplog.text


# -- the store ---------------------------------------------------------------------------------------------------------


def test_protocol_without_its_package_is_one_line_that_names_it() -> None:
    with pytest.raises(ConfigurationError) as error:
        Store("gs://user:hunter2@bucket/examples")
    assert "gcsfs" in str(error.value)
    assert "hunter2" not in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_protocol_is_one_line() -> None:
    with pytest.raises(ConfigurationError, match="GENCO_ARCHIVE_URL has the protocol nonsense"):
        Store("nonsense://x/y")


def test_folder_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot write to the archive at GENCO_ARCHIVE_URL"):
        ArchiveFolder(Store(str(tmp_path / "file" / "archive"))).check()


@pytest.mark.parametrize("form", ["{}", "file://{}", "{}/"])
def test_local_files_and_their_folders_are_synced_before_the_commit(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    fsync = os.fsync

    def traced(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", traced)
    root = tmp_path / "archive"
    folder = ArchiveFolder(Store(form.format(root)))
    chunk = Chunk(0, 0, 0.0)
    chunk.add(0, record(0))
    journal = folder.stage(chunk)
    staged = {str(root / name) for name in (*journal.files, f"{STAGING}/{journal.name}")}
    assert synced == staged | {str(root), str(root / STAGING)}
    synced.clear()
    folder.publish(journal)
    hour = (root / next(iter(journal.files.values()))).parent
    assert synced == {str(root), str(root / STAGING), str(root / POSITIONS), str(hour), str(hour.parent)}
