"""The learner at its defaults, from the bytes of records to a snapshot that could be published."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import psutil
import torch

from benchmarks.learn.traffic import Traffic
from learner.design import Rows
from learner.encoding import ExampleEncoder
from learner.faults import faults
from learner.intake import Intake
from learner.online import LearnerSettings, OnlineLearner
from learner.parsing import ExampleParser
from learner.reward_model import LearnedBatch, RewardModel
from streams.contracts.examples import ExampleBatch, decode_examples
from streams.contracts.growing import GrowingFeatureSpec
from streams.contracts.settings import LearnSettings
from streams.example_records import EXAMPLES_PER_RECORD

WARM_UP: Final = 12_000
"""Impressions before the clock starts: the first 10,000 are passed over twice."""
HORIZON_MS: Final = 20_000
"""Decisions are remembered for so long, so that some are forgotten within the run; by default it is half an hour."""
SMALL: Final = 1_000
"""Impressions of the update that is timed up to its snapshot."""
SMALL_UPDATES: Final = 10
PARTS: Final = ("decode", "intake", "encode", "reward_model", "generator")
"""Microseconds of processor time an impression are told for each; the last one is what remains of the update."""


class Clock:
    """How long each part of each update took: by the clock, and in processor time, which others disturb less."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part of an update."""
        started, used = time.perf_counter(), time.process_time()
        yield
        self._seconds[name].append((time.perf_counter() - started, time.process_time() - used))

    def seconds(self, *names: str) -> float:
        """Return how long parts take together, the median of each."""
        return float(sum(np.median([wall for wall, _ in self._seconds[name]]) for name in names))

    def processor_seconds(self, *names: str) -> float:
        """Return the same in processor time."""
        return float(sum(np.median([used for _, used in self._seconds[name]]) for name in names))


class TimedRewardModel(RewardModel):
    """The reward model with a clock."""

    clock = Clock()

    def learn(self, rows: Rows, *args: Any, **kwargs: Any) -> LearnedBatch:
        """Learn, and note how long it took."""
        with self.clock.part("reward_model"):
            return super().learn(rows, *args, **kwargs)


def measure(num_products: int, impressions: int) -> dict[str, Any]:
    """Return speeds, the time of each part, and memory.

    Args:
        num_products: Of the world.
        impressions: How many are learned while the clock runs.
    """
    torch.set_num_threads(1)
    traffic = Traffic(num_products=num_products)
    learner = OnlineLearner(LearnerSettings(horizon_ms=HORIZON_MS))
    learner.reward_model = TimedRewardModel(learner.settings.reward_model)
    learner.apply_catalog(traffic.elements, traffic.products)
    size = int(LearnSettings.model_fields["update_max_examples"].default)

    number = 0
    while number * EXAMPLES_PER_RECORD < WARM_UP:
        number = _update(learner, traffic, number, size, Clock())
    process, clock, first_number = psutil.Process(), Clock(), number
    learner.reward_model.clock = clock
    resident = [process.memory_info().rss]
    while (number - first_number) * EXAMPLES_PER_RECORD < impressions:
        number = _update(learner, traffic, number, size, clock)
        resident.append(process.memory_info().rss)
    small = Clock()
    for _ in range(SMALL_UPDATES):
        number = _update(learner, traffic, number, SMALL, small, with_snapshot=True)
    _time_parts(traffic, first_number, number, size, clock)

    microseconds = {name: 1e6 * clock.processor_seconds(name) / size for name in PARTS[:-1]}
    both = 1e6 * clock.processor_seconds("decode", "update") / size
    metrics = learner.metrics()
    return {
        "impressions_per_second": size / clock.seconds("decode", "update"),
        "impressions_per_processor_second": size / clock.processor_seconds("decode", "update"),
        "update_1000_ms": 1e3 * small.seconds("decode", "update", "snapshot"),
        "update_1000_processor_ms": 1e3 * small.processor_seconds("decode", "update", "snapshot"),
        "snapshot_processor_ms": 1e3 * small.processor_seconds("snapshot"),
        "microseconds": microseconds | {PARTS[-1]: both - sum(microseconds.values())},
        "coefficients": int(metrics["num_coefficients"]),
        "resident_mb": [round(resident[at] / 2**20, 1) for at in _thirds(len(resident))],
        "bytes_per_decision": metrics["remembered_bytes"] / metrics["remembered_decisions"],
    }


def _update(
    learner: OnlineLearner, traffic: Traffic, number: int, size: int, clock: Clock, *, with_snapshot: bool = False
) -> int:
    """Learn the records from a number on, and return the number that comes next."""
    last = number + size // EXAMPLES_PER_RECORD
    values = [traffic.record(each) for each in range(number, last)]
    with clock.part("decode"):
        batch = decode(values)
    with clock.part("update"):
        report = learner.update(batch)
    if report.num_learned != size:
        raise RuntimeError(f"{report.num_learned} of {size} impressions were learned; skipped: {report.skipped}")
    if with_snapshot:
        with clock.part("snapshot"):
            learner.snapshot(
                model_id="benchmark",
                epoch=1,
                version=learner.num_updates,
                parent_sha256=None,
                trained_through={"0": last},
                due_ms_quantiles=[],
                created_at_ms=0,
                signing_key=b"the key of a benchmark's snapshot",
            )
    return last


def decode(values: Sequence[bytes]) -> ExampleBatch:
    """Return the examples of records."""
    return ExampleBatch.concat([decode_examples(value) for value in values])


def _time_parts(traffic: Traffic, first_number: int, last_number: int, size: int, clock: Clock) -> None:
    """Time what comes before the reward model by itself, again on all records, and from `first_number` on."""
    parser, intake, features = ExampleParser(), Intake(HORIZON_MS), GrowingFeatureSpec()
    encoder = ExampleEncoder(features)
    step = size // EXAMPLES_PER_RECORD
    for first in range(0, last_number - step + 1, step):
        timed = clock if first >= first_number else Clock()
        batch = decode([traffic.record(number) for number in range(first, first + step)])
        with timed.part("intake"):
            parsed = parser.parse(batch)
            rows, _ = intake.admit(batch, faults(batch, parsed))
        with timed.part("encode"):
            indexed = encoder.observe(parsed, rows)
            spec = features.freeze()
            indexed.encode(spec, torch.zeros(len(spec.elements), spec.content_size))


def _thirds(count: int) -> list[int]:
    """Return the places of the first, of those after a third and two thirds, and of the last."""
    return [round(part * (count - 1) / 3) for part in range(4)]
