"""Where the joiner's time goes: decoding, joining and encoding by themselves, in this process and without Kafka.

What a joiner takes beyond these is Faust, the clients, the copies between threads, and waiting for them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Final

import pyarrow as pa

from benchmarks.traffic import Traffic
from streams.attribution import PartitionJoiner
from streams.contracts.settings import JoinSettings
from streams.contracts.topics import IMPRESSIONS
from streams.event_clock import JOIN_TOPICS, JoinTopic
from streams.impressions import CandidatesShelf
from streams.record_decoder import RecordDecoder

PARTS: Final = ("decode", "join", "encode")
RECORDS_AN_OUTPUT: Final = 16
"""Of impressions that a pump finds when the joiner is busy."""


def microseconds_of_parts(traffic: Traffic, attribution_window_ms: int, label_wait_ms: int) -> dict[str, float]:
    """Return how long each part takes for one impression, its share of the clicks included."""
    pa.set_memory_pool(pa.system_memory_pool())
    settings = JoinSettings(
        kafka_bootstrap_servers="localhost:9092",
        attribution_window_ms=attribution_window_ms,
        label_wait_ms=label_wait_ms,
        idle_timeout_ms=0,
    )
    run = _Run(settings)
    written_at_ms = time.time_ns() // 1_000_000
    records = sorted(traffic.batches(), key=lambda record: record.topic == IMPRESSIONS)  # clicks first
    for number, record in enumerate(records):
        topic: JoinTopic = JOIN_TOPICS[record.topic != IMPRESSIONS]
        run.read(topic, record.partition, number, written_at_ms, record.value)
        if topic == IMPRESSIONS and number % RECORDS_AN_OUTPUT == 0:
            run.write()
    return {part: 1e6 * run.seconds[part] / traffic.options.impressions for part in PARTS}


class _Run:
    """The joiners of all partitions, and the seconds that each part has taken."""

    def __init__(self, settings: JoinSettings) -> None:
        self._settings = settings
        self._decoder = RecordDecoder(settings)
        self._shelf = CandidatesShelf()
        self._joiners: dict[int, PartitionJoiner] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def read(self, topic: JoinTopic, partition: int, offset: int, timestamp_ms: int, value: bytes) -> None:
        if partition not in self._joiners:
            self._joiners[partition] = PartitionJoiner(self._settings)
        started = time.perf_counter()
        record = self._decoder.decode(topic, offset, timestamp_ms, value)
        decoded = time.perf_counter()
        self._joiners[partition].add(record, 0)
        self.seconds["decode"] += decoded - started
        self.seconds["join"] += time.perf_counter() - decoded

    def write(self) -> None:
        for joiner in self._joiners.values():
            started = time.perf_counter()
            joiner.advance({})
            output = joiner.take_output()
            joined = time.perf_counter()
            self.seconds["join"] += joined - started
            if output is None:
                continue
            for record in output.records:
                record.encode(self._shelf)
            for _ in output.late.encode(self._shelf):
                pass
            self.seconds["encode"] += time.perf_counter() - joined
            joiner.acknowledge(output.number)
            joiner.take_finished()
