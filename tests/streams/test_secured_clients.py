"""TLS and SASL settings reach every client: kafka-python's, aiokafka's, the Faust app's and Redis'."""

from __future__ import annotations

import ssl
from typing import Any

import pytest
import redis
from faust.transport.drivers.aiokafka import credentials_to_aiokafka_auth

from streams import clients
from streams.app import aiokafka_options, create_app
from streams.contracts.settings import JoinSettings, RedisSettings

PASSWORD = "password-of-kafka"
SECURED: dict[str, Any] = {
    "kafka_bootstrap_servers": "kafka:9093",
    "kafka_security_protocol": "SASL_SSL",
    "kafka_sasl_mechanism": "SCRAM-SHA-512",
    "kafka_sasl_username": "genco",
    "kafka_sasl_password": PASSWORD,
}
SASL = {"sasl_mechanism": "SCRAM-SHA-512", "sasl_plain_username": "genco", "sasl_plain_password": PASSWORD}


@pytest.fixture
def settings() -> JoinSettings:
    return JoinSettings(**SECURED)


@pytest.mark.parametrize("make", ["kafka_producer", "kafka_consumer", "create_topics"])
def test_clients_of_kafka_python_are_secured(
    settings: JoinSettings, monkeypatch: pytest.MonkeyPatch, make: str
) -> None:
    made: list[dict[str, Any]] = []

    class MadeError(Exception):
        """Ends the test once a client would connect."""

    def client(*_: Any, **options: Any) -> None:
        made.append(options)
        raise MadeError

    for name in ("KafkaProducer", "KafkaConsumer", "KafkaAdminClient"):
        monkeypatch.setattr(clients, name, client)
    monkeypatch.setattr(clients, "require_kafka", lambda _: None)
    secured = settings.model_copy(update={"kafka_ssl_cafile": "/etc/ca.pem"})
    with pytest.raises(MadeError):
        getattr(clients, make)(secured)
    [options] = made
    assert options["security_protocol"] == "SASL_SSL"
    assert options["ssl_cafile"] == "/etc/ca.pem"
    assert {name: options[name] for name in SASL} == SASL


def test_clients_of_aiokafka_are_secured(settings: JoinSettings) -> None:
    options = aiokafka_options(settings)
    assert options["security_protocol"] == "SASL_SSL"
    assert options["ssl_context"].verify_mode is ssl.CERT_REQUIRED
    assert {name: options[name] for name in SASL} == SASL


@pytest.mark.parametrize(
    ("protocol", "has_password", "has_context"),
    [("SASL_SSL", True, True), ("SASL_PLAINTEXT", True, False), ("SSL", False, True), ("PLAINTEXT", False, False)],
)
def test_faust_app_is_secured(protocol: str, has_password: bool, has_context: bool) -> None:
    app = create_app(JoinSettings(**SECURED | {"kafka_security_protocol": protocol}), "secured")
    auth = credentials_to_aiokafka_auth(app.conf.broker_credentials, None)
    assert auth["security_protocol"] == protocol
    assert (auth.get("sasl_plain_password") == PASSWORD) is has_password
    assert (auth.get("sasl_mechanism") == "SCRAM-SHA-512") is has_password
    assert (auth.get("ssl_context") is not None) is has_context


def test_redis_is_secured() -> None:
    settings = RedisSettings(redis_url="rediss://server:secret@redis:6380/0")  # type: ignore[arg-type]
    client = clients.redis_client(settings, timeout_s=1.0, retries=0)
    pool = client.connection_pool
    assert pool.connection_class is redis.SSLConnection
    assert (pool.connection_kwargs["username"], pool.connection_kwargs["password"]) == ("server", "secret")
    connection = pool.connection_class(**pool.connection_kwargs)
    assert connection.cert_reqs is ssl.CERT_REQUIRED
    assert connection.check_hostname
    assert "secret" not in repr(client)
