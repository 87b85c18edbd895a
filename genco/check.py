"""`genco check`: what is configured, what answers, and what to do about the rest."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from genco.services import ServiceError, find_kafka_home
from streams.clients import UnreachableError, check_topics, redis_client, require_redis
from streams.contracts.settings import (
    EX_CONFIG,
    ConfigurationError,
    JoinSettings,
    KafkaSettings,
    LearnSettings,
    RedisSettings,
    ServeSettings,
    load,
)


def run() -> int:
    """Print a line for each check; return 0 if all hold, else 78."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("settings of genco join", lambda: _settings(JoinSettings)),
        ("settings of genco learn", lambda: _settings(LearnSettings)),
        ("settings of genco serve", lambda: _settings(ServeSettings)),
        ("Kafka", _kafka),
        ("Redis", _redis),
        ("Kafka to start here (--kafka home)", _kafka_home),
    ]
    failed = False
    for name, check in checks:
        try:
            print(f"ok    {name}: {check()}")
        except (ConfigurationError, UnreachableError, ServiceError) as error:
            failed = True
            print(f"FAIL  {name}: {error}")
    return EX_CONFIG if failed else 0


def _settings(kind: type[JoinSettings] | type[LearnSettings] | type[ServeSettings]) -> str:
    load(kind)
    return "complete"


def _kafka() -> str:
    settings = load(KafkaSettings)
    return f"{settings.kafka_bootstrap_servers} answers, topics complete, {check_topics(settings)} partitions"


def _redis() -> str:
    client = redis_client(load(RedisSettings), timeout_s=2.0, retries=0)
    try:
        return f"{require_redis(client)} answers, nothing is evicted"
    finally:
        client.close()


def _kafka_home() -> str:
    home = find_kafka_home()
    if home is None:
        return "none (set KAFKA_HOME to an unpacked Apache Kafka to use it); the embedded broker needs nothing"
    java = shutil.which("java")
    return f"{home}, " + (f"Java at {java}" if java else "but no java on PATH: install a Java 17 runtime to use it")
