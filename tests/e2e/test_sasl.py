"""Every client speaks SASL to a real Apache Kafka, and a server takes a changed password without a restart."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from kafka.admin import KafkaAdminClient, UserScramCredentialUpsertion

from genco.services import KafkaBroker, find_kafka_home
from genco.services.kafka_home import has_java
from genco.services.process import free_port
from serving.embedded import Embedded
from streams.app import aiokafka_options
from streams.clients import UnreachableError, check_topics, create_topics
from streams.contracts.settings import JoinSettings, ServeSettings, load
from tests.server_process import wait_until
from tests.serving.test_main import REQUEST

pytestmark = [pytest.mark.kafka, pytest.mark.long, pytest.mark.timeout(150)]
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
PASSWORD = "password-of-genco"


class SaslKafka(KafkaBroker):
    """A node with another listener, on which everybody says who he is."""

    def __init__(self) -> None:
        super().__init__()
        self.sasl_port = free_port()

    def _configuration(self, home: Path, data_directory: Path) -> str:
        text = super()._configuration(home, data_directory)
        sasl = f"SASL://127.0.0.1:{self.sasl_port}"
        lines = []
        for line in text.splitlines():
            name = line.partition("=")[0]
            more = {"listeners": sasl, "advertised.listeners": sasl}
            more["listener.security.protocol.map"] = "SASL:SASL_PLAINTEXT"
            lines.append(f"{line},{more[name]}" if name in more else line)
        plain = f'org.apache.kafka.common.security.plain.PlainLoginModule required user_genco="{PASSWORD}";'
        lines += [
            f"listener.name.sasl.sasl.enabled.mechanisms={','.join(MECHANISMS)}",
            f"listener.name.sasl.plain.sasl.jaas.config={plain}",
        ]
        for mechanism in MECHANISMS[1:]:
            module = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
            lines.append(f"listener.name.sasl.{mechanism.lower()}.sasl.jaas.config={module}")
        return "\n".join(lines) + "\n"

    def set_password(self, password: str) -> None:
        """Give the user another password for SCRAM."""
        with KafkaAdminClient(bootstrap_servers=self.bootstrap_servers) as admin:
            for mechanism in MECHANISMS[1:]:
                change = UserScramCredentialUpsertion("genco", mechanism, password)
                assert admin.alter_user_scram_credentials([change]) == {"genco": None}


@pytest.fixture(scope="module")
def kafka() -> Iterator[SaslKafka]:
    if find_kafka_home() is None or not has_java():
        pytest.skip("no Apache Kafka with a Java: set KAFKA_HOME, or put one into ../shared/kafka")
    with SaslKafka() as started:
        started.set_password(PASSWORD)
        yield started


def settings_of(kafka: SaslKafka, mechanism: str, **changes: Any) -> JoinSettings:
    return JoinSettings(
        **{
            "kafka_bootstrap_servers": f"127.0.0.1:{kafka.sasl_port}",
            "kafka_security_protocol": "SASL_PLAINTEXT",
            "kafka_sasl_mechanism": mechanism,
            "kafka_sasl_username": "genco",
            "kafka_sasl_password": PASSWORD,
            "partitions": 2,
        }
        | changes
    )


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_clients_of_both_libraries_come_in_and_strangers_do_not(kafka: SaslKafka, mechanism: str) -> None:
    settings = settings_of(kafka, mechanism)
    create_topics(settings)
    assert check_topics(settings) == 2

    async def produce() -> None:
        producer = AIOKafkaProducer(**aiokafka_options(settings))
        await producer.start()
        await producer.send_and_wait("control", b"not a record")
        await producer.stop()

    asyncio.run(produce())
    with pytest.raises(UnreachableError, match="GENCO_KAFKA_SASL"):
        check_topics(settings_of(kafka, mechanism, kafka_sasl_password="wrong"))


def test_server_takes_a_changed_password_without_a_restart(
    kafka: SaslKafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_topics(settings_of(kafka, "PLAIN"))
    file = tmp_path / "password"
    file.write_text(PASSWORD)
    for name, value in {
        "KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{kafka.sasl_port}",
        "KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
        "KAFKA_SASL_MECHANISM": "SCRAM-SHA-256",
        "KAFKA_SASL_USERNAME": "genco",
        "KAFKA_SASL_PASSWORD_FILE": str(file),
        "REDIS_URL": "redis://127.0.0.1:1/0",
        "SIGNING_KEY": "k" * 32,
        "LAST_GOOD_DIR": str(tmp_path),
    }.items():
        monkeypatch.setenv(f"GENCO_{name}", value)
    with Embedded(load(ServeSettings)) as embedded:
        embedded.decide([REQUEST] * 10)
        assert embedded.flush(30.0) == 0
        kafka.set_password("another-password")
        try:
            file.write_text("another-password")
            wait_until(lambda: not embedded._parts.event_log._is_stale())
            time.sleep(1.0)
            embedded.decide([REQUEST] * 10)
            assert embedded.flush(30.0) == 0
            counts = embedded.policy()["counters"]["events"]["impressions"]
            assert counts == {"accepted": 20, "acknowledged": 20, "dropped": {}}
            wait_until(lambda: embedded._parts.catalog.fault is None)
        finally:
            kafka.set_password(PASSWORD)
