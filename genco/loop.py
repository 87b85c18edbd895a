"""The processes of the loop on this machine: services, joiner, learner, server, kept running.

`genco demo`, `genco replay` and the end-to-end tests start it. It is closed: broker, Redis, keys, model and data are
its own, whatever `GENCO_` settings the caller's shell holds, so that a demo never publishes to the servers of a real
system. Only with `kafka="configured"` does it use the Kafka that the settings name.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

from genco.services import (
    MOCK_BROKER_PARTITION_BYTES,
    ChildCommand,
    KafkaBroker,
    MockBroker,
    RedisServer,
    Supervisor,
    free_port,
)
from genco.services import Service as LocalService
from streams.clients import check_topics, create_topics, require_empty_topics
from streams.contracts.settings import PREFIX, ConfigurationError, JoinSettings, KafkaSettings, load
from streams.contracts.topics import partition_counts

Role = Literal["join", "learn", "serve", "monitor"]
KafkaKind = Literal["embedded", "home", "configured"]

_LOG_LEVEL: Final = "GENCO_LOG_LEVEL"
BYTES_PER_IMPRESSION: Final = 500
"""Of a record in the embedded broker, compressed, the record of `examples` included: an upper bound for the demo."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopOptions:
    """What to start, and how."""

    roles: Sequence[Role] = ("join", "learn", "serve")
    kafka: KafkaKind = "embedded"
    """`configured`: the one that GENCO_KAFKA_BOOTSTRAP_SERVERS names; its topics must be empty."""
    partitions: int = 4
    attribution_window_ms: int = 30_000
    label_wait_ms: int = 5_000
    rate: float = 0.0
    """Impressions a second that are expected; 0: unknown."""
    settings: Mapping[str, str] | None = None
    """Further environment variables of the processes."""
    directory: Path | None = None
    """Where checkpoints, snapshots and logs go; None: a temporary one that is removed at the end."""


class Loop:
    """Starts everything on entry, stops everything on exit, whatever happens between."""

    def __init__(self, options: LoopOptions) -> None:
        self.options = options
        self._stack = contextlib.ExitStack()
        self.env: dict[str, str] = {}
        """Settings of the processes, and of clients that want to talk to them."""
        self.supervisor: Supervisor
        self.url: str | None = None
        """Of the server's API, if one was started."""
        self.kafka_name = ""
        self.directory: Path

    def __enter__(self) -> Self:
        """Start the services, then the processes.

        Raises:
            ServiceError: If a service does not start.
            ConfigurationError: If the window cannot fit the embedded broker, or the topics are wrong.
        """
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        options = self.options
        if options.kafka != "configured":
            self._stack.enter_context(without_settings())
        if options.directory is None:
            self.directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="genco-")))
        else:
            self.directory = options.directory
            self.directory.mkdir(parents=True, exist_ok=True)
        self.env = {
            "GENCO_PARTITIONS": str(options.partitions),
            "GENCO_ATTRIBUTION_WINDOW_MS": str(options.attribution_window_ms),
            "GENCO_LABEL_WAIT_MS": str(options.label_wait_ms),
            "GENCO_SIGNING_KEY": secrets.token_hex(32),
            "GENCO_CHECKPOINT_DIR": str(self.directory / "checkpoints"),
            "GENCO_LAST_GOOD_DIR": str(self.directory / "last_good"),
            # One thread for each process: they share the machine's cores.
            "OMP_NUM_THREADS": "1",
        }
        self._start_kafka()
        if "learn" in options.roles or "serve" in options.roles:
            self._start_redis()
        self.env |= dict(options.settings or {})
        if "serve" in options.roles:
            port = free_port()
            self.env |= {"GENCO_HTTP_HOST": "127.0.0.1", "GENCO_HTTP_PORT": str(port)}
            self.url = f"http://127.0.0.1:{port}"
        commands = [
            ChildCommand(name=role, argv=[sys.executable, "-m", "genco", role], env=self.env) for role in options.roles
        ]
        self.supervisor = Supervisor(commands, log_directory=self.directory)
        self._stack.callback(self.supervisor.stop)
        self.supervisor.start()

    def _start_kafka(self) -> None:
        options = self.options
        counts = partition_counts(options.partitions)
        if options.kafka == "configured":
            settings = load(KafkaSettings)
            self.kafka_name = f"Kafka at {settings.kafka_bootstrap_servers}"
            self.env["GENCO_PARTITIONS"] = str(check_topics(settings))
            require_empty_topics(settings)
            return
        broker: LocalService
        if options.kafka == "home":
            broker = KafkaBroker()
            self.kafka_name = "Apache Kafka, started here"
        else:
            _require_fit(options)
            broker = MockBroker(counts)
            self.kafka_name = "embedded broker"
        self._stack.enter_context(broker)
        self.env |= broker.client_settings()
        if options.kafka == "home":
            create_topics(self.settings(KafkaSettings))

    def _start_redis(self) -> None:
        redis_server = RedisServer()
        self._stack.enter_context(redis_server)
        self.env |= redis_server.client_settings()

    def settings(self, kind: Any) -> Any:
        """Return settings of a class of `streams.contracts.settings`, as the processes have them."""
        names = {f"GENCO_{name.upper()}": name for name in kind.model_fields}
        return load(kind, **{names[variable]: value for variable, value in self.env.items() if variable in names})

    def join_settings(self) -> JoinSettings:
        """Return the joiner's settings."""
        settings: JoinSettings = self.settings(JoinSettings)
        return settings


@contextlib.contextmanager
def without_settings() -> Iterator[None]:
    """Take every GENCO_ variable but the log level out of the environment for a while."""
    held = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(PREFIX) and name != _LOG_LEVEL}
    try:
        yield
    finally:
        os.environ.update(held)


def _require_fit(options: LoopOptions) -> None:
    """Refuse a window that the embedded broker cannot keep: it drops the oldest records without a word."""
    window_s = options.attribution_window_ms / 1000
    needed = options.rate * window_s * BYTES_PER_IMPRESSION / options.partitions
    if needed > MOCK_BROKER_PARTITION_BYTES:
        fits = MOCK_BROKER_PARTITION_BYTES * options.partitions / BYTES_PER_IMPRESSION / window_s
        raise ConfigurationError(
            f"{options.rate:.0f} impressions a second for a window of {window_s:.0f} s do "
            f"not fit the embedded broker (5 MiB a partition, {options.partitions} partitions); use at most "
            f"{fits:.0f} impressions a second, or --kafka home"
        )
