"""What happens in a world whatever a policy does: who comes, how willing to click, how late a click would be.

The traffic follows from (world, seed) alone, drawn batch by batch from streams of its own. So all policies see the same
requests, and an impression is clicked if its coin is below the click probability of what the policy showed: where two
policies show the same, the same happens (common random numbers), and differences of paired runs have far less noise
than the runs.

Shapes: N impressions of a batch, B batches, P products, S slots, A candidates, E elements alive in a slot, F content.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.regret.policies.base import CatalogNow, Facts, RequestBatch
from benchmarks.regret.worlds import BATCH, RATE, BenchWorld
from genco.world import DEVICES, SEGMENTS, Requests, World

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_TRAFFIC = 101  # root of the random streams, apart from those of the world, which start from the same seed


@dataclass(frozen=True, slots=True)
class Batch:
    """The impressions between two updates."""

    first: int
    """Number of the first impression since the world began."""
    now_s: float
    """Time at which all of them are decided: that of the first."""
    requests: Requests
    occurred_ms: IntArray
    """(N,) since the world began."""
    coin: FloatArray
    """(N,) in [0, 1): clicked if below the click probability."""
    delay_ms: IntArray
    """(N,) from the impression to its click, if it gets one; 0 where labels are not delayed."""

    @property
    def end_ms(self) -> int:
        """Time of the update after this batch; later than all of it, and the time of the next batch."""
        return round((self.first + len(self.requests)) * 1000 / RATE)


@dataclass(frozen=True, slots=True)
class Reference:
    """Sums of click probabilities over each batch, whatever a policy does."""

    best: list[float]
    uniform: list[float]


class Traffic:
    """The traffic of a world and a seed, and the world's answers about it."""

    def __init__(self, bench: BenchWorld, seed: int, impressions: int) -> None:
        """Prepare the traffic.

        Raises:
            ValueError: If the impressions are not whole batches.
        """
        if impressions < BATCH or impressions % BATCH:
            raise ValueError(f"impressions is {impressions}; must be a multiple of {BATCH}, the batch, above 0")
        self.bench, self.seed, self.impressions = bench, seed, impressions
        self.world: World = bench.make(seed)
        self.slots = len(bench.config.slots)

    def facts(self) -> Facts:
        """Return the sizes that a policy may build its tables by."""
        config = self.bench.config
        eras = 0
        if config.new_elements_every_s:
            last_s = (self.impressions - BATCH) / RATE
            eras = int(last_s // config.new_elements_every_s)
        return Facts(
            num_products=config.num_products,
            num_slots=self.slots,
            num_candidates=config.candidates_per_slot,
            num_elements=config.elements_per_slot + eras * config.new_elements,
            content_size=config.content_size,
            devices=DEVICES,
            segments=SEGMENTS,
            slots=config.slots,
        )

    def batches(self) -> Iterator[Batch]:
        """Yield the batches in order; a longer run begins like a shorter one."""
        for number in range(self.impressions // BATCH):
            rng = np.random.default_rng([self.seed, _TRAFFIC, number])
            first = number * BATCH
            now_s = first / RATE
            requests, coin_N = self.world.requests(rng, BATCH, now_s), rng.random(BATCH)
            delay_N = self.world.delays(rng, BATCH) if self.bench.label_wait_s is not None else np.zeros(BATCH)
            yield Batch(
                first=first,
                now_s=now_s,
                requests=requests,
                occurred_ms=((first + np.arange(BATCH)) * 1000 / RATE).astype(np.int64),
                coin=coin_N,
                delay_ms=(delay_N * 1000).astype(np.int64),
            )

    def catalog(self, now_s: float) -> CatalogNow:
        """Return what can be shown now."""
        first, content_SEF = self.world.content(now_s)
        return CatalogNow(first, content_SEF.astype(np.float32), self.world.all_candidates(now_s))

    def request_batch(self, batch: Batch, catalog: CatalogNow) -> RequestBatch:
        """Return what a policy is told of the requests."""
        asked = batch.requests
        return RequestBatch(asked.product, asked.device, asked.segment, asked.hour, catalog.candidates[asked.product])

    def reference(self) -> Reference:
        """Compute what the best and uniform play get, the slow part of a world."""
        best, uniform = [], []
        for _, group in itertools.groupby(self.batches(), lambda batch: self.world.era(batch.now_s)):
            # All at once: the world is fastest where it is asked for many contexts of a product together.
            batches = list(group)
            requests, now_s = concat([batch.requests for batch in batches]), batches[0].now_s
            best += self.world.best(requests, now_s).reshape(len(batches), -1).sum(axis=1).tolist()
            uniform += self.world.uniform(requests, now_s).reshape(len(batches), -1).sum(axis=1).tolist()
        return Reference(best, uniform)


def concat(parts: Sequence[Requests]) -> Requests:
    """Return requests one after the other."""
    names = ("product", "device", "segment", "hour")
    return Requests(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})
