"""`genco check`: what is configured, what answers, and what to do about the rest."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import redis

from genco.services import find_kafka_home
from streams.clients import check_topics, redis_client
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
        except ConfigurationError as error:
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
    host = client.connection_pool.connection_kwargs.get("host", "?")
    port = client.connection_pool.connection_kwargs.get("port", "?")
    try:
        client.ping()
        policy = client.config_get("maxmemory-policy").get("maxmemory-policy", "noeviction")
    except redis.AuthenticationError as error:
        raise ConfigurationError(f"{host}:{port} refuses the password ({error}); correct GENCO_REDIS_URL") from None
    except redis.exceptions.NoPermissionError:
        return f"{host}:{port} answers (its eviction policy may not be read with this user)"
    except redis.RedisError as error:
        raise ConfigurationError(f"{host}:{port} does not answer ({error}); start it, or set GENCO_REDIS_URL") from None
    finally:
        client.close()
    if policy != "noeviction":
        raise ConfigurationError(
            f"{host}:{port} has maxmemory-policy {policy}, which may evict the policy that is served; "
            "set it to noeviction"
        )
    return f"{host}:{port} answers, nothing is evicted"


def _kafka_home() -> str:
    home = find_kafka_home()
    if home is None:
        return "none (set KAFKA_HOME to an unpacked Apache Kafka to use it); the embedded broker needs nothing"
    java = shutil.which("java")
    return f"{home}, " + (f"Java at {java}" if java else "but no java on PATH: install a Java 17 runtime to use it")
