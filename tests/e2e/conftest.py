"""A real Apache Kafka for the tests that want one: KAFKA_HOME, ../shared/kafka, Docker, or a visible skip."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from genco.loop import KafkaKind
from genco.services import KafkaBroker, find_kafka_home, free_port
from streams.clients import UnreachableError, create_topics
from streams.contracts.settings import KafkaSettings

KAFKA_IMAGE = "apache/kafka:4.3.1"


def docker_answers() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, timeout=20, check=False).returncode == 0


@contextmanager
def kafka_container() -> Iterator[str]:
    """Run Kafka in a container and yield its bootstrap server, with our topics in it."""
    from testcontainers.core.container import DockerContainer

    port = free_port()
    container = DockerContainer(KAFKA_IMAGE)
    container.ports = {"9092/tcp": ("127.0.0.1", port)}  # with_bind_ports knows no address and would bind all
    for name, value in {
        "CLUSTER_ID": "4L6g3nShT-eMCtK--X86sw",
        "KAFKA_NODE_ID": "1",
        "KAFKA_PROCESS_ROLES": "broker,controller",
        "KAFKA_LISTENERS": "PLAINTEXT://:9092,CONTROLLER://:9093",
        "KAFKA_ADVERTISED_LISTENERS": f"PLAINTEXT://127.0.0.1:{port}",
        "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "KAFKA_CONTROLLER_LISTENER_NAMES": "CONTROLLER",
        "KAFKA_CONTROLLER_QUORUM_VOTERS": "1@localhost:9093",
        "KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
        "KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
        "KAFKA_TRANSACTION_STATE_LOG_MIN_ISR": "1",
        "KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
        "KAFKA_AUTO_CREATE_TOPICS_ENABLE": "false",
    }.items():
        container = container.with_env(name, value)
    with container:
        server = f"127.0.0.1:{port}"
        deadline = time.monotonic() + 90
        while True:
            try:
                create_topics(KafkaSettings(kafka_bootstrap_servers=server), replication_factor=1)
                break
            except UnreachableError:
                assert time.monotonic() < deadline, container.get_logs()
                time.sleep(1)
        yield server


def no_kafka() -> None:
    """End the test that needs one."""
    if os.environ.get("REQUIRE_KAFKA"):
        pytest.fail("REQUIRE_KAFKA is set, and there is no Kafka at KAFKA_HOME or ../shared/kafka, and no Docker")
    pytest.skip("no Kafka at KAFKA_HOME or ../shared/kafka, and no Docker")


@pytest.fixture(scope="module")
def kafka_servers() -> Iterator[dict[str, str]]:
    """Settings that lead to an Apache Kafka with our topics, one for all tests of a file."""
    if find_kafka_home() is not None:
        with KafkaBroker() as broker:
            settings = KafkaSettings(kafka_bootstrap_servers=broker.bootstrap_servers)
            create_topics(settings)
            yield broker.client_settings()
    elif docker_answers():
        with kafka_container() as server:
            yield {"GENCO_KAFKA_BOOTSTRAP_SERVERS": server}
    else:
        no_kafka()


@pytest.fixture
def apache_kafka(monkeypatch: pytest.MonkeyPatch) -> Iterator[KafkaKind]:
    """How `Loop` is to find a real Kafka."""
    if find_kafka_home() is not None:
        yield "home"
    elif docker_answers():
        with kafka_container() as server:
            monkeypatch.setenv("GENCO_KAFKA_BOOTSTRAP_SERVERS", server)
            yield "configured"
    else:
        no_kafka()


@pytest.fixture
def containerized_kafka(monkeypatch: pytest.MonkeyPatch) -> Iterator[KafkaKind]:
    """Kafka in a container, also where another one is at hand."""
    if not docker_answers():
        pytest.skip("no Docker engine answers")
    with kafka_container() as server:
        monkeypatch.setenv("GENCO_KAFKA_BOOTSTRAP_SERVERS", server)
        yield "configured"
