"""Builds kafka-python and redis-py clients from settings, with limits that keep a broken network from blocking us.

The defaults of both libraries wait for minutes: redis-py 8 retries ten times with a timeout of five seconds each, and
retries writes too. So every client is made here.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeVar
from urllib.parse import unquote, urlsplit

import redis
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import NewTopic
from kafka.errors import KafkaError, TopicAlreadyExistsError
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry

from streams.contracts.settings import ConfigurationError, KafkaSettings, RedisSettings
from streams.contracts.topics import JOINED, TOPICS

COMPRESSION: Final = "zstd"
"""Events repeat their field names, so they shrink seven-fold; gzip takes ten times as long for more."""

CONNECT_TIMEOUT_S: Final = 3.0
ClientT = TypeVar("ClientT")
_BOOTSTRAP: Final = "GENCO_KAFKA_BOOTSTRAP_SERVERS"


class UnreachableError(ConnectionError):
    """A server does not answer; the message says which, and what to do. Trying again later may help."""


def require_kafka(settings: KafkaSettings) -> None:
    """Check that a broker accepts connections, before a client that would go on trying and logging for long.

    Raises:
        UnreachableError: If none of the bootstrap servers does.
    """
    causes = []
    for server in settings.kafka_bootstrap_servers.split(","):
        host, _, port = server.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
        except OSError as error:
            causes.append(f"{server}: {error.strerror or error}")
        else:
            return
    raise UnreachableError(f"no Kafka broker answers ({'; '.join(causes)}); start it, or set {_BOOTSTRAP}")


def kafka_options(settings: KafkaSettings) -> dict[str, Any]:
    """Return the connection options that every kafka-python client takes."""
    options: dict[str, Any] = {
        "bootstrap_servers": settings.kafka_bootstrap_servers.split(","),
        "security_protocol": settings.kafka_security_protocol,
        "request_timeout_ms": 15_000,
        "bootstrap_timeout_ms": 10_000,
        "reconnect_backoff_max_ms": 2_000,
    }
    if settings.kafka_api_version:
        options["api_version"] = tuple(int(part) for part in settings.kafka_api_version.split("."))
    if settings.kafka_sasl_mechanism and settings.kafka_sasl_password:
        options["sasl_mechanism"] = settings.kafka_sasl_mechanism
        options["sasl_plain_username"] = settings.kafka_sasl_username
        # That of now: a client that is made anew after a rotation gets the new one.
        options["sasl_plain_password"] = settings.secret("kafka_sasl_password")
    if settings.kafka_ssl_cafile:
        options["ssl_cafile"] = str(settings.kafka_ssl_cafile)
    return options


def kafka_producer(settings: KafkaSettings, **options: Any) -> KafkaProducer:
    """Return a producer whose acknowledged records survive a broker and are not repeated by its own retries.

    Raises:
        UnreachableError: If no broker answers.
    """
    defaults: dict[str, Any] = {
        "acks": "all",
        "enable_idempotence": True,
        "compression_type": COMPRESSION,
        "max_block_ms": 15_000,
        "delivery_timeout_ms": 120_000,
        "max_request_size": 4 * 2**20,
    }
    return _connected(KafkaProducer, settings, defaults | options)


def kafka_consumer(settings: KafkaSettings, *topics: str, **options: Any) -> KafkaConsumer:
    """Return a consumer that starts at the beginning and commits nothing by itself.

    Raises:
        UnreachableError: If no broker answers.
    """
    defaults: dict[str, Any] = {
        "auto_offset_reset": "earliest",
        "enable_auto_commit": False,
        "request_timeout_ms": 40_000,
        "fetch_max_wait_ms": settings.kafka_fetch_max_wait_ms,
    }
    return _connected(partial(KafkaConsumer, *topics), settings, defaults | options)


def _connected(client: Callable[..., ClientT], settings: KafkaSettings, options: dict[str, Any]) -> ClientT:
    require_kafka(settings)
    try:
        return client(**kafka_options(settings) | options)
    except (KafkaError, OSError) as error:
        raise _refused(settings, error) from error


def assign_whole_topic(consumer: KafkaConsumer, topic: str) -> list[TopicPartition]:
    """Assign every partition of a topic to the consumer, from its beginning, without a group.

    Raises:
        ConfigurationError: If the topic does not exist.
    """
    partitions = consumer.partitions_for_topic(topic)
    if not partitions:
        raise ConfigurationError(f"topic {topic} does not exist; create the topics with: genco topics")
    assignment = [TopicPartition(topic, p) for p in sorted(partitions)]
    consumer.assign(assignment)
    consumer.seek_to_beginning(*assignment)
    return assignment


def partitions_of(settings: KafkaSettings) -> dict[str, int]:
    """Return the partition count of every topic of ours that exists.

    Raises:
        UnreachableError: If no broker answers.
    """
    consumer = kafka_consumer(settings)
    try:
        return {name: len(found) for name in TOPICS if (found := consumer.partitions_for_topic(name))}
    except (KafkaError, OSError) as error:
        raise _refused(settings, error) from error
    finally:
        consumer.close()


def _refused(settings: KafkaSettings, error: Exception) -> UnreachableError:
    servers = settings.kafka_bootstrap_servers
    return UnreachableError(
        f"the Kafka broker at {servers} accepts connections but refuses requests ({type(error).__name__}: {error}); "
        "check its version, and the security settings GENCO_KAFKA_SECURITY_PROTOCOL and GENCO_KAFKA_SASL_*"
    )


def check_topics(settings: KafkaSettings) -> int:
    """Return the partition count of the joined topics.

    Raises:
        UnreachableError: If no broker answers.
        ConfigurationError: If a topic is missing or the joined ones differ in their counts: an impression and its
            click would then never meet.
    """
    counts = partitions_of(settings)
    missing = sorted(TOPICS.keys() - counts.keys())
    if missing:
        raise ConfigurationError(f"topics {', '.join(missing)} do not exist; create them with: genco topics")
    joined = {name: counts[name] for name in JOINED}
    if len(set(joined.values())) > 1:
        most = max(joined.values())
        mend = "; ".join(
            f"kafka-topics.sh --bootstrap-server {settings.kafka_bootstrap_servers} --alter "
            f"--topic {name} --partitions {most}"
            for name, count in joined.items()
            if count < most
        )
        raise ConfigurationError(
            f"partition counts differ: {joined}; they must be equal. Stop all writers, then: {mend}"
        )
    return joined[JOINED[0]]


def require_empty_topics(settings: KafkaSettings) -> None:
    """Check that nobody has written impressions, clicks or examples yet.

    Raises:
        UnreachableError: If no broker answers.
        ConfigurationError: If somebody has.
    """
    consumer = kafka_consumer(settings)
    try:
        places = [TopicPartition(name, p) for name in JOINED for p in consumer.partitions_for_topic(name) or ()]
        written = sorted({place.topic for place, end in consumer.end_offsets(places).items() if end})
    except (KafkaError, OSError) as error:
        raise _refused(settings, error) from error
    finally:
        consumer.close()
    if written:
        raise ConfigurationError(
            f"topics {', '.join(written)} at {settings.kafka_bootstrap_servers} hold records; a log has a clock of its "
            "own and must not meet other traffic: use a Kafka of its own, or leave --kafka configured away"
        )


def create_topics(settings: KafkaSettings, *, replication_factor: int = -1) -> list[str]:
    """Create the topics that do not exist yet and return their names.

    Args:
        settings: Where, and how many partitions.
        replication_factor: -1 for the broker's default.

    Raises:
        UnreachableError: If the broker refuses or does not answer.
    """
    created = []
    admin = _connected(KafkaAdminClient, settings, {})
    try:
        for topic in TOPICS.values():
            config = {"cleanup.policy": "compact" if topic.compacted else "delete"}
            if topic.append_time:
                config["message.timestamp.type"] = "LogAppendTime"
            if not topic.compacted:
                hours = topic.retention_hours
                config["retention.ms"] = "-1" if hours is None else str(hours * 3_600_000)
            partitions = settings.partitions if topic.partitioned else 1
            try:
                admin.create_topics([NewTopic(topic.name, partitions, replication_factor, topic_configs=config)])
            except TopicAlreadyExistsError:
                continue
            created.append(topic.name)
    except (KafkaError, OSError) as error:
        raise _refused(settings, error) from error
    finally:
        admin.close()
    return created


class _UrlFile(redis.CredentialProvider):
    """Name and password from the file of a Redis URL, as they are whenever a connection is made."""

    def __init__(self, settings: RedisSettings, name: str) -> None:
        self._settings = settings
        self._name = name

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """Return the password, after the name if there is one.

        Raises:
            redis.AuthenticationError: If the file cannot be read, or holds no password.
        """
        try:
            parts = urlsplit(self._settings.secret(self._name) or "")
        except (OSError, ValueError) as error:
            raise redis.AuthenticationError(f"the file of {self._name} cannot be read ({error})") from error
        if not parts.password:
            raise redis.AuthenticationError(f"the file of {self._name} holds no URL with a password any more")
        password = unquote(parts.password)
        return (unquote(parts.username), password) if parts.username else (password,)


def redis_client(settings: RedisSettings, *, timeout_s: float, retries: int, name: str = "redis_url") -> redis.Redis:
    """Return a client whose calls end within (retries + 1) * timeout_s, and a little back-off.

    If the URL stood in a file, each new connection takes name and password from it as they are then; the address stays
    that of the start.

    Args:
        settings: Where.
        timeout_s: Of one attempt, connecting or reading.
        retries: Further attempts; a write that timed out is sent again, so only idempotent writes may be made.
        name: The setting that holds the URL.
    """
    url, options = getattr(settings, name).get_secret_value(), {}
    parts = urlsplit(url)
    if parts.password and settings.file_of(name) is not None:
        url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        options["credential_provider"] = _UrlFile(settings, name)
    return redis.Redis.from_url(
        url,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(ExponentialWithJitterBackoff(base=0.01, cap=0.5), retries),
        health_check_interval=0,
        **options,
    )


def require_redis(client: redis.Redis) -> str:
    """Check at start that Redis answers and does not evict what it holds; return its address.

    Raises:
        UnreachableError: If it does not answer.
        ConfigurationError: If it refuses the password, or may evict the policy that is served.
    """
    where = {"host": "?", "port": "?"} | client.connection_pool.connection_kwargs
    at = "{host}:{port}".format_map(where)
    try:
        client.ping()
        policy = client.config_get("maxmemory-policy").get("maxmemory-policy", "noeviction")
    except redis.AuthenticationError as error:
        raise ConfigurationError(f"Redis at {at} refuses the password ({error}); correct GENCO_REDIS_URL") from None
    except redis.exceptions.NoPermissionError:
        return at  # a user with few rights, as it should be; whoever gave them knows the configuration
    except redis.RedisError as error:
        raise UnreachableError(f"Redis at {at} does not answer ({error}); start it, or set GENCO_REDIS_URL") from None
    if policy != "noeviction":
        raise ConfigurationError(
            f"Redis at {at} has maxmemory-policy {policy}, which may evict the policy that is served or the lease; "
            "mend it with: redis-cli -h {host} -p {port} CONFIG SET maxmemory-policy noeviction (and CONFIG REWRITE, "
            "or in redis.conf, so that it stays)".format_map(where)
        )
    return at
