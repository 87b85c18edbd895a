"""`genco check`: what is configured, what answers, and what to do about the rest."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import redis

from genco.services import ServiceError, find_kafka_home
from serving.snapshot_store import SnapshotStore
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
from streams.contracts.snapshot import SnapshotError


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
    settings = load(RedisSettings)
    client = redis_client(settings, timeout_s=2.0, retries=0)
    try:
        return f"{require_redis(client)} answers, nothing is evicted; {_registry(client, settings.model_id)}"
    finally:
        client.close()


def _registry(client: redis.Redis, model_id: str) -> str:
    """Say what is served, and what holds it; the user of the server may read that, and no more."""
    try:
        sight = SnapshotStore(client, model_id, b"").look()
    except (redis.RedisError, SnapshotError) as error:
        raise UnreachableError(f"the registry of model {model_id!r} cannot be read ({error})") from None
    pointer = sight.pointer
    where = "nothing published yet" if pointer is None else f"current {pointer.name}, revision {pointer.revision}"
    pin = f", pinned to {sight.pin}" if sight.pin else ""
    frozen = {True: ", frozen", False: "", None: ", pin and freeze not readable by this user"}[sight.frozen]
    return f"model {model_id}: {where}{pin}{frozen}"


def _kafka_home() -> str:
    home = find_kafka_home()
    if home is None:
        return "none (set KAFKA_HOME to an unpacked Apache Kafka to use it); the embedded broker needs nothing"
    java = shutil.which("java")
    return f"{home}, " + (f"Java at {java}" if java else "but no java on PATH: install a Java 17 runtime to use it")
