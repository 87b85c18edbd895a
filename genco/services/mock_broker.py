"""The embedded Kafka broker: librdkafka's mock cluster, from the confluent-kafka wheel, in a process of its own.

    python -m genco.services.mock_broker --topic impressions:4 --topic clicks:4

prints `{"bootstrap_servers": "127.0.0.1:PORT"}` and runs until its standard input ends, or SIGTERM or SIGINT comes.
It speaks the Kafka protocol over TCP to any client, starts in a fifth of a second, and is for demos and tests only:

- Records are in memory, and each partition keeps 5 MiB of them *as sent* (compressed). Older ones go silently.
- A record batch must stay below 2.5 MiB: one that leaves room for none of the older ones is acknowledged and then
  unreadable itself (an error of librdkafka 2.16 at least).
- Consumer groups, idempotent producers and all codecs work. Topic administration and looking up offsets by time
  do not: every topic must be named here.
- kafka-python must not ask for its version (it retries for ever): give it `api_version=(2, 1)`, the first with zstd.
  aiokafka and librdkafka need no setting.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from genco.services.process import ManagedProcess, ServiceError
from genco.services.service import Service

MOCK_BROKER_PARTITION_BYTES = 5 * 1024 * 1024
"""What each partition keeps, in bytes as sent; fixed in librdkafka."""
INSTALL_HINT = "install the extra: pip install 'genco-online[local]'"
LIBRARY_PATTERNS = ("../confluent_kafka.libs/librdkafka*.so*", ".dylibs/librdkafka*.dylib")
"""Where the Linux and the macOS wheels keep librdkafka, relative to the package confluent_kafka."""
READY_KEY = "bootstrap_servers"


class MockBroker(Service):
    """The embedded broker as a child process.

    Args:
        topics: Partition count of each topic; there is no other way to create one.
        ready_timeout: Seconds that the start may take.
    """

    def __init__(self, topics: Mapping[str, int], *, ready_timeout: float = 15.0) -> None:
        super().__init__("the embedded broker", ready_timeout=ready_timeout, grace=2.0)
        self._topics = dict(topics)

    @property
    def bootstrap_servers(self) -> str:
        """Address of the broker; another one after each start.

        Raises:
            ServiceError: If it is not started.
        """
        address = self._printed_address()
        if address is None:
            raise ServiceError(f"{self.name} has not printed its address: call start() first")
        return address

    def client_settings(self) -> dict[str, str]:
        """Return the environment variables that lead the other processes to this broker."""
        return {
            "GENCO_KAFKA_BOOTSTRAP_SERVERS": self.bootstrap_servers,
            "GENCO_KAFKA_API_VERSION": "2.1",
            # A fetch that found nothing is answered after its full wait, whatever has come meanwhile.
            "GENCO_KAFKA_FETCH_MAX_WAIT_MS": "50",
        }

    def _launch(self, directory: Path) -> ManagedProcess:
        find_librdkafka()  # Fail here, where the message is short, rather than in the child.
        topics = [argument for name, count in self._topics.items() for argument in ("--topic", f"{name}:{count}")]
        log_path = directory / "broker.log"
        log_path.unlink(missing_ok=True)  # The address of an earlier start is not ours.
        return ManagedProcess(
            self.name,
            [sys.executable, "-m", "genco.services.mock_broker", *topics],
            log_path=log_path,
            env={"PYTHONPATH": _python_path()},
            hold_stdin=True,
        )

    def _is_ready(self) -> bool:
        return self._printed_address() is not None

    def _printed_address(self) -> str | None:
        lines = self._started_process().last_lines(100)
        ready_lines = [line for line in lines if line.startswith(f'{{"{READY_KEY}"')]
        return str(json.loads(ready_lines[-1])[READY_KEY]) if ready_lines else None


def _python_path() -> str:
    """Return a PYTHONPATH on which the child finds this package, however this process found it."""
    package_root = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(path for path in (package_root, os.environ.get("PYTHONPATH")) if path)


def find_librdkafka() -> Path:
    """Return the librdkafka that the confluent-kafka wheel carries, without importing the package.

    Raises:
        ServiceError: If the wheel is not installed or carries none.
    """
    spec = importlib.util.find_spec("confluent_kafka")
    if spec is None or spec.origin is None:
        raise ServiceError(f"the embedded broker needs confluent-kafka, which is not installed; {INSTALL_HINT}")
    package = Path(spec.origin).parent
    for pattern in LIBRARY_PATTERNS:
        for path in sorted((package / pattern).parent.glob(Path(pattern).name)):
            return path
    raise ServiceError(f"confluent-kafka in {package} carries no librdkafka (built from source?); {INSTALL_HINT}")


class MockCluster:
    """One mock broker inside this process, on a loopback port that the kernel chooses.

    Args:
        library: Path of librdkafka.
        topics: Partition count of each topic.

    Raises:
        ServiceError: If librdkafka refuses.
    """

    def __init__(self, library: Path, topics: Mapping[str, int]) -> None:
        self._lib = _load(library)
        error = ctypes.create_string_buffer(512)
        configuration = self._lib.rd_kafka_conf_new()
        # The client handle only carries the cluster; level 4 silences its notice about having no broker of its own.
        self._lib.rd_kafka_conf_set(configuration, b"log_level", b"4", error, len(error))
        self._handle = self._lib.rd_kafka_new(RD_KAFKA_PRODUCER, configuration, error, len(error))
        if not self._handle:
            raise ServiceError(f"librdkafka gave no client handle: {error.value.decode()}")
        self._cluster = self._lib.rd_kafka_mock_cluster_new(self._handle, 1)
        if not self._cluster:
            raise ServiceError("librdkafka gave no mock cluster: can this process listen on the loopback interface?")
        if hasattr(
            self._lib, "rd_kafka_mock_group_initial_rebalance_delay_ms"
        ):  # librdkafka 2.4; else groups wait 3 s.
            self._lib.rd_kafka_mock_group_initial_rebalance_delay_ms(self._cluster, 0)
        for name, num_partitions in topics.items():
            code = self._lib.rd_kafka_mock_topic_create(self._cluster, name.encode(), num_partitions, 1)
            if code != 0:
                raise ServiceError(f"librdkafka refused topic {name} with {num_partitions} partitions: error {code}")

    @property
    def bootstrap_servers(self) -> str:
        """Address of the broker."""
        address: bytes = self._lib.rd_kafka_mock_cluster_bootstraps(self._cluster)
        return address.decode()

    def close(self) -> None:
        """Stop the broker."""
        self._lib.rd_kafka_mock_cluster_destroy(self._cluster)
        self._lib.rd_kafka_destroy(self._handle)


RD_KAFKA_PRODUCER = 0
SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "rd_kafka_conf_new": (ctypes.c_void_p, []),
    "rd_kafka_conf_set": (
        ctypes.c_int,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t],
    ),
    "rd_kafka_new": (ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]),
    "rd_kafka_destroy": (None, [ctypes.c_void_p]),
    "rd_kafka_mock_cluster_new": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int]),
    "rd_kafka_mock_cluster_destroy": (None, [ctypes.c_void_p]),
    "rd_kafka_mock_cluster_bootstraps": (ctypes.c_char_p, [ctypes.c_void_p]),
    "rd_kafka_mock_topic_create": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int]),
    "rd_kafka_mock_group_initial_rebalance_delay_ms": (None, [ctypes.c_void_p, ctypes.c_int32]),
}
"""Result and arguments of the functions used; ctypes would cut pointers to 32 bits without them."""


def _load(library: Path) -> ctypes.CDLL:
    try:
        lib = ctypes.CDLL(str(library))
    except OSError as error:
        raise ServiceError(f"cannot load {library}: {error}; {INSTALL_HINT}") from error
    for name, (result, arguments) in SIGNATURES.items():
        if hasattr(lib, name):
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    return lib


def _topic(argument: str) -> tuple[str, int]:
    name, separator, count = argument.rpartition(":")
    if not separator or not name or not count.isdecimal() or int(count) < 1:
        raise argparse.ArgumentTypeError(f"topic is {argument!r}; must be NAME:PARTITIONS, such as clicks:4")
    return name, int(count)


def _exit(_signal_number: int, _frame: FrameType | None) -> None:
    sys.exit(0)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a broker until standard input ends, or SIGTERM or SIGINT comes."""
    parser = argparse.ArgumentParser(prog="python -m genco.services.mock_broker", description="Embedded Kafka broker.")
    parser.add_argument("--topic", action="append", type=_topic, required=True, help="NAME:PARTITIONS; repeatable")
    topics = dict(parser.parse_args(argv).topic)
    signal.signal(signal.SIGTERM, _exit)
    signal.signal(signal.SIGINT, _exit)
    try:
        cluster = MockCluster(find_librdkafka(), topics)
    except ServiceError as error:
        sys.exit(str(error))
    try:
        print(json.dumps({READY_KEY: cluster.bootstrap_servers}), flush=True)
        sys.stdin.buffer.read()  # Ends when the owner closes the pipe or dies, however it dies.
    finally:
        cluster.close()


if __name__ == "__main__":
    main()
