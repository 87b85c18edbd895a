"""`genco archive` as processes: two share the partitions, are killed and started again, and end when they are told."""

import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from genco.loop import KafkaKind
from genco.services import KafkaBroker, MockBroker
from genco.services.process import ManagedProcess
from streams.clients import kafka_producer
from streams.contracts.settings import PREFIX, KafkaSettings
from streams.contracts.topics import partition_counts

PARTITIONS = 3
EXAMPLES = Path(__file__).parents[1] / "data" / "v1" / "examples.arrow"
SESSION_MS = 6_000


class Writer:
    """Writes records of examples to all partitions, about a hundred a second, until it is closed."""

    def __init__(self, servers: dict[str, str], partitions: int) -> None:
        self._settings = kafka_settings(servers)
        self._partitions = partitions
        self._should_stop = threading.Event()
        self.sent: Counter[int] = Counter()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        value = EXAMPLES.read_bytes()
        producer = kafka_producer(self._settings)
        while not self._should_stop.wait(0.03):
            for partition in range(self._partitions):
                producer.send("examples", value, partition=partition)
                self.sent[partition] += 1
        producer.flush(timeout=10)
        producer.close(timeout=5)

    def close(self) -> None:
        self._should_stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()


def kafka_settings(servers: dict[str, str]) -> KafkaSettings:
    names = {f"{PREFIX}{name.upper()}": name for name in KafkaSettings.model_fields}
    return KafkaSettings(**{names[variable]: value for variable, value in servers.items()})


def archiver(name: str, servers: dict[str, str], root: Path, **settings: str) -> ManagedProcess:
    env = {
        "GENCO_ARCHIVE_URL": str(root / "archive"),
        "GENCO_ARCHIVE_INTERVAL_MS": "300",
        "GENCO_KAFKA_SESSION_TIMEOUT_MS": str(SESSION_MS),
    }
    command = [sys.executable, "-m", "genco", "archive"]
    process = ManagedProcess(name, command, log_path=root / f"{name}.log", env=env | servers | settings)
    process.start()
    return process


def archived(root: Path) -> dict[int, Counter[int]]:
    """How many rows a reader sees of each offset, by partition."""
    if not any((root / "archive").glob("date=*/*/*.parquet")):
        return {}
    table = ds.dataset(root / "archive", partitioning="hive").to_table(columns=["partition", "offset"])
    rows: dict[int, Counter[int]] = {}
    for partition, offset in zip(table["partition"].to_pylist(), table["offset"].to_pylist(), strict=True):
        rows.setdefault(partition, Counter())[offset] += 1
    return rows


def wait_until_archived(root: Path, sent: Counter[int], processes: list[ManagedProcess], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while (held := {partition: len(rows) for partition, rows in archived(root).items()}) != sent:
        for process in processes:
            assert process.running, process.said()
        assert time.monotonic() < deadline, (held, sent, [process.said() for process in processes])
        time.sleep(0.5)


def assert_exactly_once(root: Path, sent: Counter[int]) -> None:
    rows_per_record = ds.dataset(root / "archive", partitioning="hive").count_rows() // sent.total()
    assert rows_per_record >= 1
    expected = {p: dict.fromkeys(range(count), rows_per_record) for p, count in sent.items()}
    assert archived(root) == expected
    assert list((root / "archive" / "_staging").iterdir()) == []


def end(process: ManagedProcess) -> None:
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0, process.said()
    assert time.monotonic() - begun < 10


def kill_and_restart(servers: dict[str, str], partitions: int, root: Path) -> None:
    """Two archivers; one is killed twice while records flow, and both are ended in good order."""
    writer = Writer(servers, partitions)
    processes = [archiver("one", servers, root), archiver("two", servers, root)]
    try:
        for life in range(2):
            wait_until_more(root)
            processes[life].kill()
            processes[life] = archiver(f"life-{life}", servers, root)
        writer.close()
        wait_until_archived(root, writer.sent, processes, 40)
        for process in processes:
            end(process)
    finally:
        writer.close()
        for process in processes:
            process.kill()
    assert_exactly_once(root, writer.sent)


def wait_until_more(root: Path) -> None:
    deadline = time.monotonic() + 30
    before = sum(len(rows) for rows in archived(root).values())
    while sum(len(rows) for rows in archived(root).values()) < before + 60:
        assert time.monotonic() < deadline, "nothing is archived"
        time.sleep(0.5)


@contextmanager
def running(kind: KafkaKind) -> Iterator[tuple[dict[str, str], int]]:
    """A broker with our topics: (environment variables that lead to it, number of partitions)."""
    if kind == "configured":
        yield {"GENCO_KAFKA_BOOTSTRAP_SERVERS": os.environ["GENCO_KAFKA_BOOTSTRAP_SERVERS"]}, 4
        return
    counts = partition_counts(PARTITIONS)
    with KafkaBroker(counts) if kind == "home" else MockBroker(counts) as broker:
        yield broker.client_settings(), PARTITIONS


@pytest.mark.kafka
@pytest.mark.long
def test_two_archivers_on_apache_kafka_killed_and_restarted_write_every_offset_once(
    tmp_path: Path, apache_kafka: KafkaKind
) -> None:
    with running(apache_kafka) as (servers, partitions):
        kill_and_restart(servers, partitions, tmp_path)


@pytest.mark.kafka
@pytest.mark.long
def test_paused_archiver_on_apache_kafka_is_fenced_and_writes_nothing_twice(
    tmp_path: Path, apache_kafka: KafkaKind
) -> None:
    with running(apache_kafka) as (servers, partitions):
        writer = Writer(servers, partitions)
        processes = [archiver("one", servers, tmp_path)]
        try:
            wait_until_more(tmp_path)
            processes[0].send_signal(signal.SIGSTOP)
            processes.append(archiver("two", servers, tmp_path))
            wait_until_more(tmp_path)  # after the session of the first has ended
            processes[0].send_signal(signal.SIGCONT)
            time.sleep(2)
            writer.close()
            wait_until_archived(tmp_path, writer.sent, processes, 30)
            for process in processes:
                end(process)
        finally:
            writer.close()
            for process in processes:
                process.kill()
        assert_exactly_once(tmp_path, writer.sent)


@pytest.mark.long
def test_archiver_on_the_embedded_broker_killed_and_restarted_writes_every_offset_once(tmp_path: Path) -> None:
    with running("embedded") as (servers, partitions):
        writer = Writer(servers, partitions)
        process = archiver("one", servers, tmp_path)
        try:
            wait_until_more(tmp_path)
            process.kill()
            process = archiver("two", servers, tmp_path)
            wait_until_more(tmp_path)
            writer.close()
            wait_until_archived(tmp_path, writer.sent, [process], 30)
            end(process)
        finally:
            writer.close()
            process.kill()
        assert_exactly_once(tmp_path, writer.sent)


def test_archiver_flushes_at_its_end_what_is_not_due(tmp_path: Path) -> None:
    with running("embedded") as (servers, partitions):
        writer = Writer(servers, partitions)
        process = archiver("one", servers, tmp_path, GENCO_ARCHIVE_INTERVAL_MS="3600000")
        try:
            time.sleep(5)
            assert archived(tmp_path) == {}
            end(process)
        finally:
            writer.close()
            process.kill()
        held = {partition: sorted(rows) for partition, rows in archived(tmp_path).items()}
        assert set(held) == set(range(partitions))
        assert all(offsets == list(range(len(offsets))) and len(offsets) > 20 for offsets in held.values())
        process = archiver("two", servers, tmp_path)
        try:
            wait_until_archived(tmp_path, writer.sent, [process], 30)
            end(process)
        finally:
            process.kill()
        assert_exactly_once(tmp_path, writer.sent)
