"""A real Apache Kafka for tests and demos: one KRaft node, broker and controller in one, on loopback ports.

It runs from an unpacked distribution (`KAFKA_HOME`), which it never writes to, and needs Java. `kill` and `start` again
is the crash of the fault tests: same ports, same log, so every acknowledged record is still there.
"""

import base64
import os
import shutil
import socket
import subprocess
import uuid
from collections.abc import Mapping
from pathlib import Path

from kafka.admin import KafkaAdminClient
from kafka.errors import KafkaError, TopicAlreadyExistsError

from genco.services.process import LOOPBACK, ManagedProcess, ServiceError, free_port, require_free_port
from genco.services.service import Service

SERVER_START = Path("bin", "kafka-server-start.sh")
STORAGE_TOOL = Path("bin", "kafka-storage.sh")
HOME_CONFIGURATION = Path("config", "server.properties")
FORMATTED_MARK = "meta.properties"
"""File that Kafka's format command leaves in the data directory."""
HEAP_OPTIONS = "-Xmx512m -Xms256m"
TOPIC_TIMEOUT_MS = 30_000


class KafkaBroker(Service):
    """An Apache Kafka node as a child process.

    Args:
        topics: Partition count of each topic that the start creates; those that exist are left as they are.
        home: The unpacked distribution; by default what `find_kafka_home` finds.
        data_directory: Keep the log there after `stop`; the caller's to remove. By default in the private directory.
        ready_timeout: Seconds that the start may take.
    """

    def __init__(
        self,
        topics: Mapping[str, int] | None = None,
        *,
        home: Path | None = None,
        data_directory: Path | None = None,
        ready_timeout: float = 60.0,
    ) -> None:
        super().__init__("Kafka", ready_timeout=ready_timeout, grace=20.0)
        self._topics = dict(topics or {})
        self._home = home
        self._data_directory = data_directory
        self._broker_port: int | None = None
        self._controller_port: int | None = None

    @property
    def bootstrap_servers(self) -> str:
        """Address of the broker; the same after each start.

        Raises:
            ServiceError: If it was never started, so that it has no port.
        """
        if self._broker_port is None:
            raise ServiceError(f"{self.name} has no port yet: call start() first")
        return f"{LOOPBACK}:{self._broker_port}"

    def client_settings(self) -> dict[str, str]:
        """Return the environment variable that leads the other processes to this broker."""
        return {"GENCO_KAFKA_BOOTSTRAP_SERVERS": self.bootstrap_servers}

    def start(self) -> None:
        """Start the broker and return when it serves and has its topics; see `Service.start`."""
        super().start()
        try:
            self._prepare_topics()
        except BaseException:
            self.stop()
            raise

    def _launch(self, directory: Path) -> ManagedProcess:
        home = self._home or find_kafka_home()
        if home is None:
            raise ServiceError("found no Apache Kafka: set KAFKA_HOME to an unpacked Kafka 4 distribution")
        _require_runnable(home)
        self._broker_port = self._broker_port or free_port()
        self._controller_port = self._controller_port or free_port()
        require_free_port(self._broker_port, self.name)
        require_free_port(self._controller_port, self.name)
        environment = {
            "KAFKA_HEAP_OPTS": os.environ.get("KAFKA_HEAP_OPTS", HEAP_OPTIONS),
            "LOG_DIR": str(directory / "server-logs"),  # The official scripts write into the distribution otherwise.
        }
        data_directory = (self._data_directory or directory / "data").resolve()
        configuration = directory / "server.properties"
        configuration.write_text(self._configuration(home, data_directory))
        if not (data_directory / FORMATTED_MARK).exists():
            _format_storage(home, configuration, environment, self._ready_timeout)
        return ManagedProcess(
            self.name,
            [str(home / SERVER_START), str(configuration)],
            log_path=directory / "kafka.log",
            env=environment,
        )

    def _configuration(self, home: Path, data_directory: Path) -> str:
        settings = read_properties(home / HOME_CONFIGURATION)
        # The official file names its controller like this, at a fixed port; Kafka refuses both kinds together.
        settings.pop("controller.quorum.bootstrap.servers", None)
        broker, controller = f"{LOOPBACK}:{self._broker_port}", f"{LOOPBACK}:{self._controller_port}"
        settings |= {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@{controller}",
            "listeners": f"PLAINTEXT://{broker},CONTROLLER://{controller}",
            "advertised.listeners": f"PLAINTEXT://{broker}",
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "PLAINTEXT",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
            "log.dirs": str(data_directory),
            "auto.create.topics.enable": "false",
            "offsets.topic.replication.factor": "1",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "group.initial.rebalance.delay.ms": "0",
            # After a crash the controller refuses the broker until its old session has expired: 9 s by default.
            "broker.heartbeat.interval.ms": "500",
            "broker.session.timeout.ms": "3000",
        }
        return "".join(f"{key}={value}\n" for key, value in settings.items())

    def _is_ready(self) -> bool:
        try:
            socket.create_connection((LOOPBACK, int(self._broker_port or 0)), timeout=1.0).close()
        except OSError:
            return False
        return True

    def _prepare_topics(self) -> None:
        # Listening is not serving: after a crash the partitions get their leaders later.
        try:
            with KafkaAdminClient(bootstrap_servers=self.bootstrap_servers) as admin:
                admin.list_topics()
                if self._topics:
                    _create_topics(admin, self._topics)
        except KafkaError as error:
            said = self._started_process().said()
            raise ServiceError(f"{self.name} listens and does not serve: {error}; it said: {said}") from error


def find_kafka_home() -> Path | None:
    """Return the Kafka to use: KAFKA_HOME, else `../shared/kafka` beside the working directory or the checkout.

    Raises:
        ServiceError: If KAFKA_HOME is set and no Kafka is there; falling back would hide the mistake.
    """
    named = os.environ.get("KAFKA_HOME")
    if named:
        home = Path(named)
        if not (home / SERVER_START).is_file():
            raise ServiceError(f"KAFKA_HOME is {named}, which holds no {SERVER_START}: set it to an unpacked Kafka 4")
        return home.resolve()
    checkout = Path(__file__).resolve().parents[2]
    for place in (Path.cwd(), checkout):
        home = place / ".." / "shared" / "kafka"
        if (home / SERVER_START).is_file():
            return home.resolve()
    return None


def has_java() -> bool:
    """Say whether Kafka's scripts will find a Java: that of JAVA_HOME, else `java` on PATH."""
    java_home = os.environ.get("JAVA_HOME")
    return shutil.which(str(Path(java_home, "bin", "java")) if java_home else "java") is not None


def read_properties(path: Path) -> dict[str, str]:
    """Read a Java properties file of plain `key=value` lines, as Kafka's are."""
    lines = (line.strip() for line in path.read_text().splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {key.strip(): value.strip() for key, _, value in pairs}


def _require_runnable(home: Path) -> None:
    for part in (SERVER_START, STORAGE_TOOL, HOME_CONFIGURATION):
        if not (home / part).is_file():
            raise ServiceError(f"Kafka home {home} holds no {part}: set KAFKA_HOME to an unpacked Kafka 4 distribution")
    if not has_java():
        raise ServiceError("Kafka needs Java, and none was found: install a Java 17 runtime, or correct JAVA_HOME")


def _format_storage(home: Path, configuration: Path, environment: Mapping[str, str], timeout: float) -> None:
    command = [str(home / STORAGE_TOOL), "format", "-t", _cluster_id(), "-c", str(configuration)]
    try:
        done = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ServiceError(
            f"formatting Kafka's storage took longer than {timeout:g} s: is the machine busy?"
        ) from error
    if done.returncode != 0:
        output = " | ".join((done.stdout + done.stderr).splitlines()[-4:])
        raise ServiceError(f"formatting Kafka's storage ended with code {done.returncode}; it said: {output}")


def _cluster_id() -> str:
    """Return what `kafka-storage.sh random-uuid` prints, without starting a Java for it."""
    identifier = "-"
    while identifier.startswith("-"):  # The command line would take it for an option.
        identifier = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
    return identifier


def _create_topics(admin: KafkaAdminClient, topics: Mapping[str, int]) -> None:
    wanted = {name: {"num_partitions": count, "replication_factor": 1} for name, count in topics.items()}
    answer = admin.create_topics(wanted, raise_errors=False)
    for topic in answer["topics"]:
        if topic["error_code"] not in (0, TopicAlreadyExistsError.errno):
            raise ServiceError(f"Kafka refused topic {topic['name']}: {topic['error_message']}")
    admin.wait_for_topics(list(topics), timeout_ms=TOPIC_TIMEOUT_MS)
