"""`genco monitor` as a process: it reads examples, writes alerts and a heartbeat, and ends those of one before it."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from genco.services import MockBroker, RedisServer
from genco.services.process import ManagedProcess
from streams.clients import assign_whole_topic, kafka_consumer, kafka_producer
from streams.contracts.alerts import HEARTBEAT, Alert, Cause
from streams.contracts.examples import LabelKind
from streams.contracts.settings import KafkaSettings
from streams.contracts.topics import ALERTS, EXAMPLES, partition_counts
from streams.telemetry import now_ms
from tests.builders import examples_value, shown

WAIT_S = 40.0


@pytest.fixture
def servers() -> Iterator[dict[str, str]]:
    with MockBroker(partition_counts(2)) as broker, RedisServer() as redis_server:
        yield broker.client_settings() | redis_server.client_settings()


def monitor(name: str, servers: dict[str, str], root: Path) -> ManagedProcess:
    env = {"GENCO_SIGNING_KEY": "k" * 32, "GENCO_MONITOR_INTERVAL_MS": "1000", "GENCO_KAFKA_SESSION_TIMEOUT_MS": "6000"}
    command = [sys.executable, "-m", "genco", "monitor"]
    process = ManagedProcess(name, command, log_path=root / f"{name}.log", env=env | servers)
    process.start()
    return process


def kafka_settings(servers: dict[str, str]) -> KafkaSettings:
    return KafkaSettings(
        kafka_bootstrap_servers=servers["GENCO_KAFKA_BOOTSTRAP_SERVERS"],
        kafka_api_version=servers["GENCO_KAFKA_API_VERSION"],
        kafka_fetch_max_wait_ms=50,
    )


def write_examples(settings: KafkaSettings) -> None:
    """Write 4,000 impressions whose slot propensities do not multiply to the propensity."""
    producer = kafka_producer(settings)
    for number in range(8):
        time_ms = now_ms() - 60_000
        impressions = [shown(f"{number}.{row}", time_ms, propensity=0.5) for row in range(500)]
        value = examples_value([(impression, LabelKind.PROVISIONAL, None) for impression in impressions])
        producer.send(EXAMPLES, value, partition=number % 2)
    producer.flush(timeout=10)
    producer.close(timeout=5)


class Reader:
    """Follows the topic `alerts`."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._consumer = kafka_consumer(settings)
        assign_whole_topic(self._consumer, ALERTS)
        self._seen: list[Alert] = []

    def wait_for(self, name: str, state: str) -> Alert:
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            for records in self._consumer.poll(timeout_ms=200).values():
                self._seen.extend(Alert.from_bytes(record.value) for record in records)
            if found := [alert for alert in self._seen if (alert.name, alert.state) == (name, state)]:
                return found[0]
        raise AssertionError(f"no {name} {state} in {WAIT_S} s; seen {self._seen}")

    def close(self) -> None:
        self._consumer.close()


def test_alert_and_heartbeat_are_written(servers: dict[str, str], tmp_path: Path) -> None:
    settings = kafka_settings(servers)
    write_examples(settings)
    reader, process = Reader(settings), monitor("monitor", servers, tmp_path)
    assert reader.wait_for("PropensityMismatch", "firing").cause is Cause.LEARNER_BROKE
    assert reader.wait_for(HEARTBEAT, "firing").is_heartbeat
    process.stop(grace=10.0)
    reader.close()


@pytest.mark.long
def test_new_monitor_ends_the_alerts_of_one_that_is_gone(servers: dict[str, str], tmp_path: Path) -> None:
    settings = kafka_settings(servers)
    write_examples(settings)
    reader, first = Reader(settings), monitor("first", servers, tmp_path)
    alert = reader.wait_for("PropensityMismatch", "firing")
    first.stop(grace=10.0)
    second = monitor("second", servers, tmp_path)
    assert reader.wait_for("PropensityMismatch", "resolved").alert_id == alert.alert_id
    second.stop(grace=10.0)
    reader.close()
