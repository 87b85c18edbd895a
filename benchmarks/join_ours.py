"""Our joiner as a process of its own, from bytes in Kafka to examples that Kafka has acknowledged."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from benchmarks.broker import BenchmarkBroker, BenchmarkError
from benchmarks.join_check import ExampleCheck, ExampleCounts
from benchmarks.processes import Sample, Steady, cpu_seconds, scrape, steady, watch
from benchmarks.traffic import Traffic, TrafficOptions
from genco.services import ManagedProcess, free_port
from streams.contracts.topics import CLICKS, EXAMPLES, IMPRESSIONS

PARTITIONS: Final = 4
IMPRESSIONS_A_SECOND: Final = 2_000
"""Of event time: 60,000 are within the window at once, and 10,000 wait for their label."""
ATTRIBUTION_WINDOW_MS: Final = 30_000
LABEL_WAIT_MS: Final = 5_000
LONGER_THAN_ANY_LOG_MS: Final = 86_400_000
POLL_S: Final = 0.1
"""Between two looks at /metrics; each costs the joiner about a millisecond."""
_LATE_POSITIVE: Final = 'label_kind="late_positive"'


@dataclass(frozen=True, slots=True)
class JoinLog:
    """A log in Kafka, and where it begins."""

    traffic: Traffic
    start: Mapping[str, Mapping[int, int]]


@dataclass(frozen=True, slots=True)
class JoinerRound:
    """What one joiner did with a log."""

    steady: Steady
    """From the first acknowledged example that was seen to the last. What waits for its label at the beginning has been
    read before, so this is too high by the share that it is of the log: 1 % of a million."""
    from_first_read: float
    """Impressions a second from the last look before anything was read to the last acknowledged example."""
    from_start: float
    """Impressions a second from the start of the process to the last acknowledged example."""
    max_open: int
    examples: ExampleCounts


def traffic(impressions: int, *, columnar: bool = True, varied: bool = False) -> Traffic:
    """Return a log that ended a minute ago."""
    duration_ms = impressions * 1000 // IMPRESSIONS_A_SECOND
    return Traffic(
        TrafficOptions(
            impressions=impressions,
            first_ms=time.time_ns() // 1_000_000 - duration_ms - 60_000,
            impressions_per_second=IMPRESSIONS_A_SECOND,
            columnar=columnar,
            varied=varied,
            partitions=PARTITIONS,
        )
    )


def fill_log(broker: BenchmarkBroker, log: Traffic) -> JoinLog:
    """Write a whole log with its end marks, a record a batch, as servers send them."""
    start = {topic: broker.ends(topic) for topic in (IMPRESSIONS, CLICKS)}
    broker.fill(log.batches(), batch_num_messages=1)
    broker.fill(log.end_marks())
    for topic, offsets in start.items():
        broker.require_kept(topic, offsets)
    return JoinLog(log, start)


def run_round(broker: BenchmarkBroker, log: JoinLog, group: str, directory: Path) -> JoinerRound:
    """Let a new joiner process a whole log, and check what it wrote.

    Raises:
        BenchmarkError: If it ends, stalls, or its examples are not those of the log.
    """
    broker.begin_group(group, log.start)
    examples_start = broker.ends(EXAMPLES)
    options = log.traffic.options
    joiner = _Joiner(broker, group, directory, ATTRIBUTION_WINDOW_MS, LABEL_WAIT_MS)
    started_s = time.monotonic()
    with joiner.process:
        samples = watch(joiner.process, joiner.labeled, options.impressions, every_s=POLL_S)
        joiner.process.kill()
    check = ExampleCheck(log.traffic.ids, log.traffic.joined(ATTRIBUTION_WINDOW_MS))
    for value in broker.read(EXAMPLES, examples_start):
        check.add(value)
    return JoinerRound(
        steady(samples),
        options.impressions / (samples[-1].at_s - _before_first_read(samples, started_s)),
        options.impressions / (samples[-1].at_s - started_s),
        int(max(sample.open_impressions for sample in samples)),
        check.verdict(),
    )


def _before_first_read(samples: Sequence[Sample], started_s: float) -> float:
    return max((sample.at_s for sample in samples if not sample.has_read), default=started_s)


def bytes_per_open_impression(broker: BenchmarkBroker, log: Traffic, group: str, directory: Path) -> float:
    """Return by how much the joiner grows for each impression that it holds, clicks included.

    Window and wait are longer than the log and it has no end, so all of it stays open. What is counted is the resident
    memory of the process from the first record, when everything is imported and connected, to the last.

    Raises:
        BenchmarkError: If it ends, stalls, or does not hold them all.
    """
    broker.begin_group(group, {topic: broker.ends(topic) for topic in (IMPRESSIONS, CLICKS)})
    joiner = _Joiner(broker, group, directory, LONGER_THAN_ANY_LOG_MS, LONGER_THAN_ANY_LOG_MS)
    records = log.batches()
    num_events = log.options.impressions + len(log.clicked)
    with joiner.process:
        broker.fill(islice(records, 1))
        first = int(watch(joiner.process, joiner.read, 1, every_s=POLL_S)[-1].done)
        before = joiner.resident_bytes()
        broker.fill(records, batch_num_messages=1)
        watch(joiner.process, joiner.read, num_events, every_s=POLL_S)
        time.sleep(1.0)
        values, after = joiner.metrics(), joiner.resident_bytes()
        joiner.process.kill()
    held = values.get("genco_join_pending_examples", 0.0)
    if held != log.options.impressions:
        raise BenchmarkError(f"the joiner holds {held:,.0f} of {log.options.impressions:,} impressions that are open")
    return (after - before) / (held - first)


class _Joiner:
    """A joiner, not started, and its metrics."""

    def __init__(
        self, broker: BenchmarkBroker, group: str, directory: Path, attribution_window_ms: int, label_wait_ms: int
    ) -> None:
        self._port = free_port()
        settings = broker.settings() | {
            "GENCO_JOINER_GROUP": group,
            "GENCO_PARTITIONS": str(PARTITIONS),
            "GENCO_ATTRIBUTION_WINDOW_MS": str(attribution_window_ms),
            "GENCO_LABEL_WAIT_MS": str(label_wait_ms),
            # The log's clock goes on by its events and marks alone.
            "GENCO_IDLE_TIMEOUT_MS": "0",
            "GENCO_METRICS_PORT": str(self._port),
            "OMP_NUM_THREADS": "1",
        }
        self.process = ManagedProcess(
            "the joiner", [sys.executable, "-m", "genco", "join"], log_path=directory / f"{group}.log", env=settings
        )

    def labeled(self) -> Sample | None:
        """Return how many first labels the broker has acknowledged."""
        return self._sample("genco_joiner_examples_total", without=_LATE_POSITIVE)

    def read(self) -> Sample | None:
        """Return how many events the joiner has read."""
        return self._sample("genco_joiner_events")

    def resident_bytes(self) -> float:
        """Return the size of the process in memory.

        Raises:
            BenchmarkError: If the metrics do not say it: they do on Linux.
        """
        resident = self.metrics().get("process_resident_memory_bytes")
        if resident is None:
            raise BenchmarkError("the joiner's metrics have no process_resident_memory_bytes; this needs Linux")
        return resident

    def metrics(self) -> dict[str, float]:
        """Return all metrics; none while it does not answer."""
        return scrape(self._port) or {}

    def _sample(self, name: str, without: str = "\n") -> Sample | None:
        values = self.metrics()
        if not values:
            return None
        return Sample(
            time.monotonic(),
            _sum(values, name, without),
            cpu_seconds(self.process.pid),
            values.get("genco_join_pending_examples", 0.0),
            has_read=_sum(values, "genco_joiner_events") > 0,
        )


def _sum(values: Mapping[str, float], name: str, without: str = "\n") -> float:
    """Return the sum of a metric over its labels, but for those that hold `without`."""
    return sum(value for key, value in values.items() if key.startswith(f"{name}{{") and without not in key)
