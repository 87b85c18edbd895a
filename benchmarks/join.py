"""`genco bench join`: impressions a second from bytes in Kafka to acknowledged examples in Kafka, beside peers.

One `genco join` process on topics that were filled before it starts; its examples are read back and checked against the
log. The peers take turns with it on the same broker: a plain Faust agent, and Quix Streams with a join of its own.
Those read one event a record, as their users would write them; ours reads records of 256.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.broker import BenchmarkBroker, BenchmarkError, KafkaKind, choose_kafka
from benchmarks.join_ours import (
    ATTRIBUTION_WINDOW_MS,
    LABEL_WAIT_MS,
    PARTITIONS,
    JoinerRound,
    JoinLog,
    bytes_per_open_impression,
    fill_log,
    run_round,
    traffic,
)
from benchmarks.join_parts import microseconds_of_parts
from benchmarks.join_peers import PEER_TOPICS, Peers, PeerUnavailableError, quix_python
from benchmarks.processes import Steady
from benchmarks.traffic import IMPRESSIONS_A_RECORD
from genco.loop import without_settings
from streams.clients import COMPRESSION
from streams.contracts.topics import IMPRESSIONS, partition_counts

ROUNDS: Final = 3
DEFAULT_IMPRESSIONS: Final[dict[KafkaKind, int]] = {"home": 1_000_000, "embedded": 60_000}
MAX_PEER_IMPRESSIONS: Final = 100_000
MAX_OPEN_IMPRESSIONS: Final = 500_000
MAX_PARTS_IMPRESSIONS: Final = 200_000

Say = Callable[[str], None]


@dataclass(slots=True)
class _Results:
    """What the rounds gave."""

    ours: list[JoinerRound] = field(default_factory=list)
    ndjson: list[JoinerRound] = field(default_factory=list)
    varied: list[JoinerRound] = field(default_factory=list)
    faust: list[Steady] = field(default_factory=list)
    quix: list[Steady] = field(default_factory=list)
    quix_pass_through: Steady | None = None
    quix_reason: str | None = None
    """Why there is no figure."""
    bytes_per_open_impression: float = 0.0
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    """Microseconds an impression, by part."""


def run(*, impressions: int | None, kafka: KafkaKind | None, peers: bool, say: Say) -> dict[str, Any]:
    """Return the figures: medians over rounds in which all take turns, so that a slow moment of the machine hits all.

    Args:
        impressions: Of a log; None: as many as the broker is good for.
        kafka: None: Apache Kafka if there is one, else the embedded broker.
        peers: Whether to run them too.
        say: Takes a line about the progress.

    Raises:
        ServiceError: If the broker does not start.
        BenchmarkError: If a process ends or stalls, or the joiner's examples are not those of the log.
    """
    kind = choose_kafka(kafka)
    count = impressions or DEFAULT_IMPRESSIONS[kind]
    if kind == "embedded":
        say("embedded broker: small sizes, as it keeps 5 MiB a partition; the speed of Apache Kafka is another")
    with ExitStack() as stack:
        stack.enter_context(without_settings())
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="genco-bench-")))
        topics = partition_counts(PARTITIONS) | dict.fromkeys(PEER_TOPICS, PARTITIONS)
        broker = stack.enter_context(BenchmarkBroker(kind, topics))
        bench = _Bench(broker, kind, directory, count, say)
        results = bench.run(peers=peers)
    return _report(results, kind, count)


class _Bench:
    """The rounds on one broker."""

    def __init__(self, broker: BenchmarkBroker, kind: KafkaKind, directory: Path, impressions: int, say: Say) -> None:
        self._broker = broker
        self._kind = kind
        self._directory = directory
        self._impressions = impressions
        self._say = say
        self._results = _Results()
        self._quix: Path | None = None
        """Python that has Quix Streams; None: no use trying."""

    def run(self, *, peers: bool) -> _Results:
        self._turns(peers=peers)
        self._others()
        self._memory()
        self._parts()
        return self._results

    def _turns(self, *, peers: bool) -> None:
        """Let ours and the peers take turns on one log."""
        self._say(f"filling the topics: {self._impressions:,} impressions")
        log = fill_log(self._broker, traffic(self._impressions))
        rivals: Peers | None = None
        if peers:
            count = min(self._impressions, MAX_PEER_IMPRESSIONS)
            self._say(f"filling the peers' topics: {count:,} impressions, one a record")
            rivals = Peers(self._broker, traffic(count), self._directory)
            rivals.fill()
            self._find_quix()
        for number in range(1, ROUNDS + 1):
            self._results.ours.append(self._ours(log, f"joiner-{number}"))
            if rivals is not None:
                done = rivals.faust(f"faust-{number}")
                self._results.faust.append(done)
                self._say(f"faust-{number}: {done.rate:,.0f} impressions/s read and sent")
                self._quix_round(rivals, number)

    def _others(self) -> None:
        # Only now: a joiner goes on to the next log when it has come to the end of one.
        for name, rounds, varied in (
            ("ndjson", self._results.ndjson, False),
            ("varied", self._results.varied, True),
        ):
            kind = "NDJSON, candidates never repeated" if varied else "NDJSON"
            self._say(f"filling the topics: {self._impressions:,} impressions as {kind}")
            log = fill_log(self._broker, traffic(self._impressions, columnar=False, varied=varied))
            for number in range(1, ROUNDS + 1):
                rounds.append(self._ours(log, f"joiner-{name}-{number}"))

    def _memory(self) -> None:
        count = min(self._impressions, MAX_OPEN_IMPRESSIONS)
        self._say(f"memory: {count:,} impressions that stay open")
        self._results.bytes_per_open_impression = bytes_per_open_impression(
            self._broker, traffic(count), "joiner-memory", self._directory
        )

    def _parts(self) -> None:
        count = min(self._impressions, MAX_PARTS_IMPRESSIONS)
        self._say(f"the parts by themselves: {count:,} impressions")
        for name, columnar in (("columns", True), ("ndjson", False)):
            log = traffic(count, columnar=columnar)
            self._results.parts[name] = microseconds_of_parts(log, ATTRIBUTION_WINDOW_MS, LABEL_WAIT_MS)

    def _ours(self, log: JoinLog, group: str) -> JoinerRound:
        done = run_round(self._broker, log, group, self._directory)
        self._say(
            f"{group}: {done.steady.rate:,.0f} impressions/s, {done.from_start:,.0f} from the start of the process; "
            f"{done.examples.first_labels:,} first labels and {done.examples.positives:,} positives, all as expected"
        )
        return done

    def _find_quix(self) -> None:
        if self._kind == "embedded":
            self._give_up_quix("it asks the broker what its topics are like, which the embedded one does not answer")
            return
        try:
            self._quix = quix_python(self._say)
        except PeerUnavailableError as error:
            self._give_up_quix(str(error))

    def _quix_round(self, rivals: Peers, number: int) -> None:
        if self._quix is None:
            return
        try:
            done = rivals.quix_join(self._quix, f"quix-{number}")
            self._results.quix.append(done)
            self._say(f"quix-{number}: {done.rate:,.0f} impressions/s joined")
            if number == 1:
                self._results.quix_pass_through = rivals.quix_pass_through(self._quix, "quix-pass-through")
        except BenchmarkError as error:
            self._give_up_quix(str(error))

    def _give_up_quix(self, reason: str) -> None:
        """Report no figure, and why."""
        self._say(f"no figure for Quix Streams: {reason}")
        self._results.quix_reason = reason
        self._results.quix.clear()
        self._quix = None


def _mean_bytes() -> float:
    """Return the size of an impression as it is sent, before compression."""
    sample = traffic(10_000)
    sizes = [len(record.value) for record in sample.batches() if record.topic == IMPRESSIONS]
    return sum(sizes) / sample.options.impressions


def _report(results: _Results, kind: KafkaKind, impressions: int) -> dict[str, Any]:
    ours = [done.steady.rate for done in results.ours]
    faust, quix = [done.rate for done in results.faust], [done.rate for done in results.quix]
    passed = results.quix_pass_through
    return {
        "impressions_per_second": _median(ours),
        "plain_faust_impressions_per_second": _median(faust),
        "quix_impressions_per_second": _median(quix),
        "bytes_per_open_impression": results.bytes_per_open_impression,
        "impressions_per_second_ndjson": _median([done.steady.rate for done in results.ndjson]),
        "impressions_per_second_ndjson_varied": _median([done.steady.rate for done in results.varied]),
        "impressions_per_second_from_first_read": _median([done.from_first_read for done in results.ours]),
        "impressions_per_second_from_start": _median([done.from_start for done in results.ours]),
        "ratio_to_plain_faust": _median_ratio(ours, faust),
        "ratio_to_quix": _median_ratio(ours, quix),
        "quix_pass_through_impressions_per_second": None if passed is None else passed.rate,
        "quix_reason": results.quix_reason,
        "joiner_cpu_seconds_per_million": _cpu_per_million([done.steady for done in results.ours]),
        "joiner_cpu_seconds_per_million_ndjson": _cpu_per_million([done.steady for done in results.ndjson]),
        "joiner_cpu_seconds_per_million_ndjson_varied": _cpu_per_million([done.steady for done in results.varied]),
        "plain_faust_cpu_seconds_per_million": _cpu_per_million(results.faust),
        "quix_cpu_seconds_per_million": _cpu_per_million(results.quix),
        **{f"{part}_us_{name}": us for name, parts in results.parts.items() for part, us in parts.items()},
        "rounds": ROUNDS,
        "impressions_per_second_rounds": ours,
        "impressions_per_second_ndjson_rounds": [done.steady.rate for done in results.ndjson],
        "impressions_per_second_ndjson_varied_rounds": [done.steady.rate for done in results.varied],
        "plain_faust_rounds": faust,
        "quix_rounds": quix,
        "impressions": impressions,
        "clicks_joined": results.ours[0].examples.positives,
        "examples_counted": sum(
            done.examples.first_labels for done in (*results.ours, *results.ndjson, *results.varied)
        ),
        "peer_impressions": min(impressions, MAX_PEER_IMPRESSIONS) if faust else 0,
        "open_impressions_memory": min(impressions, MAX_OPEN_IMPRESSIONS),
        "max_open_impressions": max(done.max_open for done in results.ours),
        "bytes_per_impression": _mean_bytes(),
        "impressions_per_record": IMPRESSIONS_A_RECORD,
        "compression": COMPRESSION,
        "attribution_window_ms": ATTRIBUTION_WINDOW_MS,
        "label_wait_ms": LABEL_WAIT_MS,
        "partitions": PARTITIONS,
        "kafka": "Apache Kafka, started here" if kind == "home" else "embedded broker",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
    }


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _median_ratio(values: Sequence[float], others: Sequence[float]) -> float | None:
    return _median([a / b for a, b in zip(values, others, strict=True)]) if others else None


def _cpu_per_million(rounds: Sequence[Steady]) -> float | None:
    """Return the processor time that a million impressions take."""
    return _median([done.cpu_s / done.done * 1e6 for done in rounds if done.cpu_s is not None])
