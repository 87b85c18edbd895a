"""The embedded broker answers the clients that the product uses, and leaves nothing behind."""

import asyncio
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from genco.services import MOCK_BROKER_PARTITION_BYTES, MockBroker, ServiceError

TOPICS = {"impressions": 4, "clicks": 2, "groups": 3, "async": 2, "gzip": 1, "kept": 3, "large": 1}
API_VERSION = (2, 1)


@pytest.fixture(scope="module")
def broker():
    with MockBroker(TOPICS) as broker:
        yield broker


@pytest.fixture
def producer(broker):
    producer = KafkaProducer(
        bootstrap_servers=broker.bootstrap_servers, api_version=API_VERSION, acks="all", enable_idempotence=True
    )
    yield producer
    producer.close(timeout=5)


@pytest.fixture
def consumer(broker):
    consumer = KafkaConsumer(
        bootstrap_servers=broker.bootstrap_servers,
        api_version=API_VERSION,
        group_id="tests",
        auto_offset_reset="earliest",
        consumer_timeout_ms=10_000,
    )
    yield consumer
    consumer.close()


def module_command(*topics):
    return [
        sys.executable,
        "-m",
        "genco.services.mock_broker",
        *(part for topic in topics for part in ("--topic", topic)),
    ]


def test_topics_have_the_partitions_asked_for(consumer):
    assert {topic: len(consumer.partitions_for_topic(topic)) for topic in TOPICS} == TOPICS


def test_settings_for_other_processes_name_address_and_api_version(broker):
    assert broker.client_settings() == {
        "GENCO_KAFKA_BOOTSTRAP_SERVERS": broker.bootstrap_servers,
        "GENCO_KAFKA_API_VERSION": "2.1",
        "GENCO_KAFKA_FETCH_MAX_WAIT_MS": "50",
    }


@pytest.mark.skipif(sys.platform != "linux", reason="other systems give loopback the one address")
def test_broker_listens_on_loopback_only(broker):
    host, port = broker.bootstrap_servers.split(":")
    assert host == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):  # A server bound to every address would answer here too.
        socket.create_connection(("127.0.0.2", int(port)), timeout=5)


def test_kafka_python_reads_from_an_assigned_partition_what_it_wrote(producer, consumer):
    metadata = producer.send("impressions", b"record", key=b"key", partition=2).get(10)
    assert (metadata.partition, metadata.offset) == (2, 0)
    consumer.assign([TopicPartition("impressions", 2)])
    record = next(consumer)
    assert (record.key, record.value, record.offset) == (b"key", b"record", 0)


def test_kafka_python_group_starts_at_once_and_commits(broker, producer):
    partitions = [TopicPartition("groups", partition) for partition in range(3)]
    for partition in partitions:
        producer.send("groups", b"record", partition=partition.partition).get(10)

    def seconds_to_first_records(group_id):
        with KafkaConsumer(
            "groups",
            bootstrap_servers=broker.bootstrap_servers,
            api_version=API_VERSION,
            group_id=group_id,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            consumer_timeout_ms=30_000,
        ) as consumer:
            started = time.monotonic()
            records = [next(consumer) for _ in partitions]
            seconds = time.monotonic() - started
            assert {record.partition for record in records} == {0, 1, 2}
            consumer.commit()
            assert [consumer.committed(partition) for partition in partitions] == [1, 1, 1]
            return seconds

    # librdkafka's own delay for a first group member is 3 s; three tries, because a busy machine may be as slow.
    assert any(seconds_to_first_records(f"group-{attempt}") < 2.9 for attempt in range(3))


def test_aiokafka_group_reads_what_an_idempotent_producer_wrote(broker):
    async def scenario():
        producer = AIOKafkaProducer(
            bootstrap_servers=broker.bootstrap_servers, acks="all", enable_idempotence=True, compression_type="gzip"
        )
        await producer.start()
        for value in (b"a", b"b"):
            await producer.send_and_wait("async", value, partition=1)
        await producer.stop()
        consumer = AIOKafkaConsumer(
            "async", bootstrap_servers=broker.bootstrap_servers, group_id="async-group", auto_offset_reset="earliest"
        )
        await consumer.start()
        records = [await asyncio.wait_for(consumer.getone(), 10) for _ in range(2)]
        await consumer.commit()
        await consumer.stop()
        return [(record.partition, record.offset, record.value) for record in records]

    assert asyncio.run(scenario()) == [(1, 0, b"a"), (1, 1, b"b")]


def test_partition_keeps_five_mebibytes_as_sent_and_drops_the_oldest(broker, producer, consumer):
    half = MOCK_BROKER_PARTITION_BYTES // 2
    record_bytes, count = 100_000, 80
    sent_bytes = {}
    compressing = KafkaProducer(
        bootstrap_servers=broker.bootstrap_servers, api_version=API_VERSION, acks="all", compression_type="gzip"
    )
    # Partition 0: more than fits. 1: less. 2: more, which fits because it shrinks.
    for partition, sender, value, num_records in (
        (0, producer, os.urandom(record_bytes), count),
        (1, producer, os.urandom(record_bytes), half // record_bytes),
        (2, compressing, bytes(record_bytes), count),
    ):
        for _ in range(num_records):
            sender.send("kept", value, partition=partition)
        sender.flush()
        sent_bytes[partition] = num_records * record_bytes
    compressing.close()
    partitions = [TopicPartition("kept", partition) for partition in range(3)]
    first, end = consumer.beginning_offsets(partitions), consumer.end_offsets(partitions)
    kept = [(end[partition] - first[partition]) * record_bytes for partition in partitions]
    assert sent_bytes[0] > MOCK_BROKER_PARTITION_BYTES
    assert MOCK_BROKER_PARTITION_BYTES - 3 * record_bytes < kept[0] <= MOCK_BROKER_PARTITION_BYTES
    assert kept[1] == sent_bytes[1]
    assert kept[2] == sent_bytes[2] > MOCK_BROKER_PARTITION_BYTES


def test_record_that_displaces_all_others_is_unreadable_as_documented(broker, consumer):
    """If this fails, librdkafka has mended it: take the warning out of the docstring of mock_broker."""
    sender = KafkaProducer(
        bootstrap_servers=broker.bootstrap_servers, api_version=API_VERSION, max_request_size=8_000_000
    )
    for _ in range(2):
        sender.send("large", os.urandom(MOCK_BROKER_PARTITION_BYTES * 6 // 10)).get(10)
    sender.close()
    partition = TopicPartition("large", 0)
    assert consumer.beginning_offsets([partition]) == consumer.end_offsets([partition]) == {partition: 2}


def test_stopped_broker_leaves_no_process_and_no_directory(temporary_root, is_alive):
    broker = MockBroker({"t": 1})
    broker.start()
    pid = broker.pid
    assert is_alive(pid)
    assert list(temporary_root.iterdir()) != []
    broker.stop()
    assert not is_alive(pid)
    assert list(temporary_root.iterdir()) == []
    with pytest.raises(ServiceError, match="not running"):
        _ = broker.bootstrap_servers


def test_killed_broker_starts_again_empty(temporary_root):
    with MockBroker({"t": 1}) as broker:
        broker.kill()
        assert not broker.running
        broker.start()
        consumer = KafkaConsumer(bootstrap_servers=broker.bootstrap_servers, api_version=API_VERSION)
        assert consumer.end_offsets([TopicPartition("t", 0)]) == {TopicPartition("t", 0): 0}
        consumer.close()


def test_broker_started_twice_is_refused(broker):
    with pytest.raises(ServiceError, match="already running"):
        broker.start()


def test_broker_dies_when_its_parent_is_killed(start_parent, wait_until, is_alive):
    parent = start_parent("""
import time
from genco.services import MockBroker
broker = MockBroker({"t": 1})
broker.start()
print(broker.pid, flush=True)
time.sleep(600)
""")
    child = int(parent.stdout.readline())
    assert is_alive(child)
    parent.kill()
    wait_until(lambda: not is_alive(child))


@pytest.mark.parametrize("end", ["stdin", signal.SIGTERM, signal.SIGINT])
def test_module_prints_its_address_and_runs_until_told_to_end(end):
    with subprocess.Popen(
        module_command("a:1", "b:2"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        host, port = json.loads(process.stdout.readline())["bootstrap_servers"].split(":")
        socket.create_connection((host, int(port)), timeout=5).close()
        assert process.poll() is None
        if end == "stdin":
            process.stdin.close()
        else:
            process.send_signal(end)
        assert process.wait(timeout=10) == 0
        assert process.stderr.read() == b""


@pytest.mark.parametrize("topic", ["clicks", "clicks:0", "clicks:many", ":4"])
def test_module_refuses_malformed_topic(topic):
    done = subprocess.run(module_command(topic), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "must be NAME:PARTITIONS, such as clicks:4" in done.stderr


def test_topic_without_partitions_is_refused(temporary_root):
    with pytest.raises(ServiceError, match="topic is 't:0'; must be NAME:PARTITIONS"):
        MockBroker({"t": 0}).start()
    assert list(temporary_root.iterdir()) == []


def test_missing_wheel_names_the_extra_to_install(monkeypatch, temporary_root):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServiceError, match=r"pip install 'genco-online\[local\]'"):
        MockBroker({"t": 1}).start()
    assert list(temporary_root.iterdir()) == []
