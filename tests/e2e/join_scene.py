"""`genco join` processes on topics of a broker: started, killed, watched, and their examples checked twice.

Each scene has a group of its own that begins at the present ends of the topics, so that scenes can share a broker. What
it checks in the end: the audit's ledger balances, and the strongest label of every decision in `examples` is the one
that the test expects of what it sent.
"""

import json
import re
import sys
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Self

from kafka import KafkaAdminClient, TopicPartition
from kafka.errors import KafkaError, RetriableError
from kafka.structs import OffsetAndMetadata

from genco.follow import Follower
from genco.loop import without_settings
from genco.services import ManagedProcess
from streams.clients import kafka_consumer
from streams.contracts.examples import decode_examples
from streams.contracts.settings import PREFIX, JoinSettings
from streams.contracts.topics import CLICKS, EXAMPLES, IMPRESSIONS
from tests.e2e.join_traffic import Sent

CHECKOUT = Path(__file__).parents[2]
SESSION_MS = 6_000
JOIN = (sys.executable, "-m", "genco", "join")
READ = (IMPRESSIONS, CLICKS)


class Scene:
    """Some joiners of one group.

    Args:
        servers: Settings that lead to the broker, whose topics exist.
        directory: For logs; empty.
        settings: Further settings of the joiners, without the prefix.
    """

    def __init__(self, servers: dict[str, str], directory: Path, **settings: object) -> None:
        self.directory = directory
        self.group = f"joiners-{uuid.uuid4().hex[:8]}"
        self.env = servers | {
            "GENCO_JOINER_GROUP": self.group,
            "GENCO_KAFKA_SESSION_TIMEOUT_MS": str(SESSION_MS),
            "GENCO_KAFKA_FETCH_MAX_WAIT_MS": "100",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(CHECKOUT),
        }
        self.env |= {f"{PREFIX}{name.upper()}": str(value) for name, value in settings.items()}
        names = {f"{PREFIX}{name.upper()}": name for name in JoinSettings.model_fields}
        self.settings = JoinSettings(**{names[name]: value for name, value in self.env.items() if name in names})
        self.processes: dict[str, ManagedProcess] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(without_settings())
        self.consumer = self._stack.enter_context(closing(kafka_consumer(self.settings)))
        topics, partitions = (*READ, EXAMPLES), range(self.settings.partitions)
        places = [TopicPartition(topic, partition) for topic in topics for partition in partitions]
        self.begin: dict[TopicPartition, int] = self.consumer.end_offsets(places)
        self.set_committed({place: offset for place, offset in self.begin.items() if place.topic in READ})
        self.follower = self._stack.enter_context(closing(Follower(self.settings, from_beginning=False)))
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
        self._stack.close()

    # -- processes ---------------------------------------------------------------------------------

    def start(self, name: str, **settings: object) -> ManagedProcess:
        """Start a joiner; one that was started under this name before gets a log of its own."""
        env = self.env | {f"{PREFIX}{key.upper()}": str(value) for key, value in settings.items()}
        process = ManagedProcess(name, JOIN, log_path=self.directory / f"{name}.log", env=env, cwd=self.directory)
        process.start()
        self.processes[name] = process
        return process

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the log of a joiner; what is no JSON, such as a traceback, comes as a message."""
        path = self.directory / f"{name}.log"
        found = []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
            try:
                found.append(json.loads(line))
            except ValueError:
                found.append({"message": line})
        return found

    def said(self, name: str, text: str) -> list[dict[str, Any]]:
        """Return the lines of a log that hold a text."""
        return [line for line in self.lines(name) if text in line["message"]]

    def wait_until(self, happened: Callable[[], Any], what: str, timeout_s: float = 30.0) -> Any:
        """Return what `happened` does once it is true.

        Raises:
            AssertionError: After `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while not (found := happened()):
            if time.monotonic() > deadline:
                tails = {name: process.last_lines(6) for name, process in self.processes.items()}
                raise AssertionError(f"{what}: not within {timeout_s:g} s; {tails}")
            time.sleep(0.1)
        return found

    def wait_ready(self, *names: str, count: int = 1, timeout_s: float = 45.0) -> None:
        """Wait until joiners have read again what there was, `count` times since their start."""
        for name in names:
            self.wait_until(lambda name=name: len(self.said(name, "recovered in")) >= count, f"{name} ready", timeout_s)

    def recoveries_s(self, name: str) -> list[float]:
        """Return how long each of a joiner's recoveries took, from its log."""
        return [
            float(re.findall(r"recovered in ([0-9.]+)", line["message"])[0]) for line in self.said(name, "recovered")
        ]

    # -- what is seen from outside -----------------------------------------------------------------

    def committed(self) -> dict[TopicPartition, int]:
        """Return what the group has committed."""
        with closing(KafkaAdminClient(bootstrap_servers=self.settings.kafka_bootstrap_servers)) as admin:
            found = admin.list_group_offsets({self.group: None})[self.group]
        return {place: offset.offset for place, offset in found.items()}

    def set_committed(self, offsets: dict[TopicPartition, int]) -> None:
        """Set what the group has committed, while nobody is in it."""
        with closing(KafkaAdminClient(bootstrap_servers=self.settings.kafka_bootstrap_servers)) as admin:
            wanted = {place: OffsetAndMetadata(offset, "", -1) for place, offset in offsets.items()}
            deadline = time.monotonic() + 20
            while True:
                try:
                    return admin.alter_group_offsets(self.group, wanted)
                except RetriableError:  # a broker that has just started has no coordinator yet
                    assert time.monotonic() < deadline
                    time.sleep(0.2)

    def num_members(self) -> int:
        """Return how many members the group has, as the broker sees it."""
        with closing(KafkaAdminClient(bootstrap_servers=self.settings.kafka_bootstrap_servers)) as admin:
            return len(admin.describe_groups([self.group])[self.group]["members"])

    def num_written(self) -> int:
        """Return how many records of examples there are."""
        places = [place for place in self.begin if place.topic == EXAMPLES]
        return sum(self.consumer.end_offsets(places).values()) - sum(self.begin[place] for place in places)

    def newest_example_ms(self) -> int:
        """Return the time of the newest impression among the last examples of each partition."""
        places = [place for place in self.begin if place.topic == EXAMPLES]
        self.consumer.assign(places)
        try:
            ends = self.consumer.end_offsets(places)
            for place, end in ends.items():
                self.consumer.seek(place, max(self.begin[place], end - 3))
            found = self.consumer.poll(timeout_ms=1_000)
        except KafkaError:  # it is just coming back
            return 0
        times = [int(decode_examples(r.value).occurred_at_ms.max()) for records in found.values() for r in records]
        return max(times, default=0)

    def labels(self) -> dict[str, int]:
        """Return the strongest label of each decision, from the bytes in `examples`."""
        places = [place for place in self.begin if place.topic == EXAMPLES]
        self.consumer.assign(places)
        for place in places:
            self.consumer.seek(place, self.begin[place])
        ends = self.consumer.end_offsets(places)
        strongest: dict[str, int] = {}
        while any(self.consumer.position(place) < end for place, end in ends.items()):
            for records in self.consumer.poll(timeout_ms=500).values():
                for record in records:
                    batch = decode_examples(record.value)
                    for decision_id, label in zip(batch.decision_id, batch.label.tolist(), strict=True):
                        strongest[decision_id] = max(label, strongest.get(decision_id, 0))
        return strongest

    def journeys(self, decision_ids: set[str]) -> dict[str, list[tuple[str, int, int, int, int]]]:
        """Return where the events of decisions stand: topic, partition, offset, time, time at which Kafka had it."""
        places = [place for place in self.begin if place.topic in READ]
        self.consumer.assign(places)
        for place in places:
            self.consumer.seek(place, self.begin[place])
        ends = self.consumer.end_offsets(places)
        found: dict[str, list[tuple[str, int, int, int, int]]] = {}
        while any(self.consumer.position(place) < end for place, end in ends.items()):
            for place, records in self.consumer.poll(timeout_ms=500).items():
                for record in records:
                    for line in record.value.splitlines():
                        match = re.search(rb'"decision_id":"([^"]*)".*"occurred_at_ms":([0-9]+)', line)
                        if match and (name := match[1].decode()) in decision_ids:
                            step = (place.topic, place.partition, record.offset, int(match[2]), record.timestamp)
                            found.setdefault(name, []).append(step)
        return found

    def is_held_up(self, journey: list[tuple[str, int, int, int, int]]) -> bool:
        """Say whether a decision's click was in Kafka, by the broker's clock, only when its window was over.

        A machine that stands still for seconds does that to the traffic; no joiner can know of such a click.
        """
        shown = [occurred_ms for topic, _, _, occurred_ms, _ in journey if topic == IMPRESSIONS]
        written = [written_ms for topic, _, _, _, written_ms in journey if topic == CLICKS]
        return bool(shown and written) and min(written) > min(shown) + self.settings.attribution_window_ms

    def ledger(self) -> dict[str, Any]:
        """Return the audit's ledger of what it has read so far, as if nothing were on its way."""
        with self.follower.lock:
            assert self.follower.failure is None, self.follower.failure
            return self.follower.audit.ledger(drained=True)

    def check_all(self, sent: Sent, timeout_s: float = 60.0) -> dict[str, Any]:
        """Wait until everything is joined and check it, by the audit and by the labels that are expected."""
        begun = time.monotonic()

        def is_drained() -> bool:
            with self.follower.lock:
                consumed = self.follower.audit.consumed
                has_all = all(consumed[topic] == sent.events[topic] for topic in READ)
            return has_all and self.ledger()["imbalance"] == 0

        deadline = time.monotonic() + timeout_s
        while not is_drained() and time.monotonic() < deadline:
            for process in self.processes.values():
                process.poll()
            time.sleep(0.25)
        ledger = self.ledger()
        labels = self.labels()
        wrong = {i: (label, labels.get(i)) for i, label in sent.expected.items() if labels.get(i) != label}
        tails = {name: process.last_lines(4) for name, process in self.processes.items()}
        journeys = self.journeys(set(wrong)) if wrong else {}
        held_up = {i for i in wrong if self.is_held_up(journeys.get(i, []))}
        assert wrong.keys() == held_up, (len(wrong), len(sent.expected), len(held_up), journeys, ledger, tails)
        assert labels.keys() == sent.expected.keys()
        assert ledger["imbalance"] == len(held_up), (ledger, sent.events, tails)
        num_bad = ledger["impressions"]["dead_letter"] + ledger["clicks"]["dead_letter"]
        assert num_bad == sent.num_bad
        with self.follower.lock:
            kinds = dict(self.follower.audit.label_kinds)
        say(
            f"{len(labels)} decisions, {sum(labels.values())} positive, examples {kinds}, {sent.num_bad} bad, "
            f"{len(held_up)} clicked in time and in Kafka too late; "
            f"drained {time.monotonic() - begun:.1f} s after the last event"
        )
        return ledger


def say(line: object) -> None:
    """Tell a figure; pytest shows it with -s, and when a test fails."""
    sys.stderr.write(f"{line}\n")


def metrics(port: int) -> Counter[str]:
    """Return the values of /metrics, summed over labels; empty if nobody answers."""
    found: Counter[str] = Counter()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    except OSError:
        return found
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name.partition("{")[0]] += float(value)
    return found


def rss_mib(process: ManagedProcess) -> float:
    """Return the memory that a process has in use."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024
