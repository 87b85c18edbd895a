"""One policy in one world, from the first impression to the last.

Each batch of impressions is decided with what was known before it; then the policy learns the labels that have come.
Regret comes from the true click probabilities of what was shown, not from the clicks, which would only add noise.

Shapes: B batches.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any, Self

import psutil

from benchmarks.regret.labels import LabelQueue
from benchmarks.regret.policies import ENTRIES
from benchmarks.regret.policies.base import BenchPolicy
from benchmarks.regret.traffic import Reference, Traffic
from benchmarks.regret.worlds import BATCH, WORLDS
from genco.world import regret

TAIL = 0.2
"""Share of a run that is its end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Which policy plays what."""

    world: str
    policy: str
    seed: int
    """Of the world and its traffic."""
    repeat: int
    """Of the policy's own randomness."""
    impressions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a run gave."""

    obtained: list[float]
    """Sum of the click probabilities of what was shown in each batch."""
    clicks: int
    decide_us: float
    """Microseconds a decision, median over the batches."""
    update_ms: float
    """Milliseconds an update, median over the batches."""
    memory_mb: float
    """Growth of the process since before the policy's code was loaded, at its largest between two batches."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read what `to_json` gave."""
        return cls(**value)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)

    def regret(self, reference: Reference, share: float = 1.0) -> float:
        """Return the normalized regret over the last share of the run: 0 best, 1 uniform play."""
        start = len(self.obtained) - max(1, round(share * len(self.obtained)))
        return regret(sum(reference.best[start:]), sum(self.obtained[start:]), sum(reference.uniform[start:]))


def play(run: Run) -> Outcome:
    """Carry out a run.

    Raises:
        ValueError: If there is no such world or policy, or the policy shows what is no candidate.
    """
    traffic = Traffic(WORLDS[run.world], run.seed, run.impressions)
    memory = _resident_mb()
    policy = ENTRIES[run.policy].load()(traffic.facts(), seed=1_000 * run.seed + run.repeat)
    return play_policy(policy, traffic, memory)


def play_policy(policy: BenchPolicy, traffic: Traffic, memory_mb: float = 0.0) -> Outcome:
    """Let a policy play a traffic; `memory_mb` is what the process held before the policy was made."""
    queue = LabelQueue(traffic.bench)
    obtained, decide_us, update_ms, memory, clicks = [], [], [], [], 0
    catalog = traffic.catalog(0.0)
    policy.catalog(catalog)
    for batch in traffic.batches():
        if traffic.world.first_alive(batch.now_s) != catalog.first:
            catalog = traffic.catalog(batch.now_s)
            policy.catalog(catalog)
        requests = traffic.request_batch(batch, catalog)
        start = time.perf_counter()
        choice = policy.choose(requests)
        decide_us.append((time.perf_counter() - start) / BATCH * 1e6)
        probability_N = traffic.world.click_probability(batch.requests, choice.chosen, batch.now_s)
        obtained.append(float(probability_N.sum()))
        clicked_N = batch.coin < probability_N
        clicks += int(clicked_N.sum())
        queue.add(batch, requests, choice, clicked_N)
        labels = queue.due(batch.end_ms)
        start = time.perf_counter()
        policy.learn(labels)
        update_ms.append((time.perf_counter() - start) * 1e3)
        memory.append(_resident_mb() - memory_mb)
    return Outcome(
        obtained=obtained,
        clicks=clicks,
        decide_us=statistics.median(decide_us),
        update_ms=statistics.median(update_ms),
        memory_mb=max(memory),
    )


def _resident_mb() -> float:
    return float(psutil.Process().memory_info().rss) / 1e6
