"""The topic `control` on the embedded broker: what is written is found again, what is no record is passed over."""

import logging
from collections.abc import Iterator

import pytest

from genco.services import MockBroker
from streams.clients import UnreachableError, kafka_producer
from streams.contracts.control import ControlRecord, RegistryState
from streams.contracts.settings import ConfigurationError, KafkaSettings
from streams.contracts.topics import CONTROL, partition_counts
from streams.control_log import ControlLog


def record(model: str, sequence: int, *, frozen: bool = False) -> ControlRecord:
    return ControlRecord(model_id=model, written_at_ms=1, state=RegistryState(sequence=sequence, frozen=frozen))


@pytest.fixture(scope="module")
def settings() -> Iterator[KafkaSettings]:
    with MockBroker(partition_counts(1)) as broker:
        yield KafkaSettings(
            kafka_bootstrap_servers=broker.bootstrap_servers, kafka_api_version="2.1", kafka_fetch_max_wait_ms=50
        )


def test_topic_without_records_of_a_model_holds_none(settings: KafkaSettings) -> None:
    log = ControlLog(settings)
    assert log.newest("silent") is None
    log.append(record("other", 3))
    assert log.newest("silent") is None


def test_newest_record_of_each_model_is_found(settings: KafkaSettings) -> None:
    log = ControlLog(settings)
    for sent in (record("a", 1), record("b", 1, frozen=True), record("a", 3, frozen=True), record("a", 2)):
        log.append(sent)
    assert log.newest("a") == record("a", 3, frozen=True)
    assert log.newest("b") == record("b", 1, frozen=True)


def test_damaged_records_are_passed_over_with_the_reason(
    settings: KafkaSettings, caplog: pytest.LogCaptureFixture
) -> None:
    log = ControlLog(settings)
    log.append(record("damaged", 1, frozen=True))
    producer = kafka_producer(settings)
    forged = record("other", 99).model_dump_json().encode()
    for value in (b"\xff\x00", b'{"schema_version":9}', None, forged):
        producer.send(CONTROL, key=b"damaged", value=value).get(timeout=10)
    producer.close()
    with caplog.at_level(logging.ERROR):
        assert log.newest("damaged") == record("damaged", 1, frozen=True)
    errors = [entry.error for entry in caplog.records]  # type: ignore[attr-defined]
    assert len(errors) == 3
    assert all("not a record of the topic control" in error for error in errors)


def test_broker_that_is_gone_and_topic_that_is_missing_are_named() -> None:
    gone = ControlLog(KafkaSettings(kafka_bootstrap_servers="127.0.0.1:1"))
    with pytest.raises(UnreachableError, match="no Kafka broker answers"):
        gone.append(record("a", 1))
    with pytest.raises(UnreachableError, match="no Kafka broker answers"):
        gone.newest("a")
    with MockBroker({"examples": 1}) as broker:
        log = ControlLog(KafkaSettings(kafka_bootstrap_servers=broker.bootstrap_servers, kafka_api_version="2.1"))
        with pytest.raises(ConfigurationError, match="genco topics"):
            log.newest("a")
