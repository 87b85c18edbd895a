"""A world with large cards, and a learner that has learned from its traffic.

Of the world's products four in five have traffic, and of the elements of each slot the first half; the rest is new to
the learner, so that searches can be asked about products and elements that nobody has shown yet.
Uniform play is clicked 20 %, so that a short run teaches what takes a real one ten times as long.

Shapes: N impressions, P products, S slots, A candidates of a slot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from genco.world import DEVICES, SEGMENTS, Requests, World
from genco.world_config import WorldConfig
from learner.generator import GeneratorSettings
from learner.online import LearnerSettings, OnlineLearner
from serving.policy import DecisionRequest
from streams.contracts.catalog import Element
from streams.contracts.codec import encode_context
from streams.contracts.examples import NO_DELAY, ExampleBatch
from streams.contracts.features import ContextValue
from streams.contracts.growing import FeatureLimits

IntArray = NDArray[np.int64]

NUM_PRODUCTS: Final = 60
KNOWN_PRODUCTS: Final = 48
KNOWN_SHARE: Final = 2.5
"""Elements of a slot with traffic, and as many without, in candidates of a card."""
BATCH: Final = 1_000
KINDS: Final = ("known", "new products", "new elements", "all new")
"""What is asked: product and elements with traffic; a product without; a product with, half of whose candidates are
without; a product and elements without."""


@dataclass(frozen=True)
class Scene:
    """The world, and what of it has traffic."""

    num_slots: int
    num_candidates: int
    seed: int = 0

    @cached_property
    def num_known(self) -> int:
        """Elements of a slot with traffic."""
        return int(KNOWN_SHARE * self.num_candidates)

    @cached_property
    def world(self) -> World:
        """Every element may be shown with every product, for the scene has its own candidates."""
        elements = 2 * self.num_known
        return World(
            WorldConfig(
                seed=self.seed,
                num_products=NUM_PRODUCTS,
                slots=tuple(f"slot{s}" for s in range(self.num_slots)),
                elements_per_slot=elements,
                candidates_per_slot=elements,
                click_rate=0.2,
            )
        )

    @cached_property
    def elements(self) -> dict[str, Element]:
        """Every element, by id."""
        return {
            record["element_id"]: Element(
                element_id=record["element_id"], slot=record["slot"], features=tuple(record["features"])
            )
            for record in self.world.catalog(0.0).elements
        }

    @cached_property
    def candidates(self) -> IntArray:
        """(P, S, A) numbers of the elements that each product has."""
        rng = np.random.default_rng([self.seed, 1])
        shape = NUM_PRODUCTS, self.num_slots, self.num_known
        return rng.permuted(np.broadcast_to(np.arange(self.num_known), shape), axis=2)[:, :, : self.num_candidates]

    @cached_property
    def candidate_ids(self) -> list[dict[str, list[str]]]:
        """Slot -> ids of the elements that each product has."""
        return [self._ids(candidates_SA) for candidates_SA in self.candidates]

    def _ids(self, candidates_SA: IntArray) -> dict[str, list[str]]:
        return {
            slot: [self.world.element_id(s, int(number)) for number in candidates_SA[s]]
            for s, slot in enumerate(self.world.config.slots)
        }

    def traffic(self, num_impressions: int, number: int) -> ExampleBatch:
        """Return a batch of uniform play with its clicks; `number` names it and seeds it."""
        rng = np.random.default_rng([self.seed, 2, number])
        n, drawn = num_impressions, self.world.requests(rng, num_impressions, 0.0)
        product_N = rng.integers(KNOWN_PRODUCTS, size=n)
        requests = Requests(product=product_N, device=drawn.device, segment=drawn.segment, hour=drawn.hour)
        places_NS = rng.integers(self.num_candidates, size=(n, self.num_slots))
        chosen_NS = np.take_along_axis(self.candidates[product_N], places_NS[:, :, None], 2)[:, :, 0]
        label_N = rng.random(n) < self.world.click_probability(requests, chosen_NS, 0.0)
        slots, share = self.world.config.slots, 1.0 / self.num_candidates
        contexts = zip(drawn.device, drawn.segment, drawn.hour, strict=True)
        ids = self.candidate_ids
        return ExampleBatch.from_columns(
            {
                "decision_id": [f"{number}.{i}" for i in range(n)],
                "occurred_at_ms": 1_000 * number + np.arange(n) // BATCH,
                "product_id": [f"p{p}" for p in product_N],
                "context": [encode_context(context_of(*row)) for row in contexts],
                "candidates": [ids[p] for p in product_N],
                "creative": [
                    {slot: ids[p][slot][place] for slot, place in zip(slots, places_S, strict=True)}
                    for p, places_S in zip(product_N, places_NS, strict=True)
                ],
                "slot_propensities": [dict.fromkeys(slots, share)] * n,
                "propensity": np.full(n, share**self.num_slots),
                "model_id": ["bench"] * n,
                "epoch": np.zeros(n, np.int64),
                "policy_version": np.zeros(n, np.int64),
                "source": ["uniform"] * n,
                "holdout": np.ones(n, np.bool_),
                "seed": np.zeros(n, np.int64),
                "survival_probability": np.ones(n),
                "label": label_N.astype(np.int8),
                "reward": label_N.astype(np.float64),
                "label_kind": ["final"] * n,
                "delay_ms": np.full(n, NO_DELAY),
            }
        )

    def requests(self, kind: str, count: int) -> list[DecisionRequest]:
        """Return requests of one of `KINDS`; new elements come with their content."""
        rng = np.random.default_rng([self.seed, 3, KINDS.index(kind)])
        return [self._request(kind, rng) for _ in range(count)]

    def _request(self, kind: str, rng: np.random.Generator) -> DecisionRequest:
        is_known = kind in ("known", "new elements")
        product = int(rng.integers(KNOWN_PRODUCTS) if is_known else rng.integers(KNOWN_PRODUCTS, NUM_PRODUCTS))
        candidates_SA = self.candidates[product].copy()
        num_new = {"new elements": self.num_candidates // 2, "all new": self.num_candidates}.get(kind, 0)
        for new_A in candidates_SA:
            new_A[:num_new] = self.num_known + rng.permutation(self.num_known)[:num_new]
        ids = self._ids(candidates_SA)
        content = {element: self.elements[element] for row in ids.values() for element in row}
        context = context_of(int(rng.integers(len(DEVICES))), int(rng.integers(len(SEGMENTS))), int(rng.integers(24)))
        return DecisionRequest(f"p{product}", context, ids, content)

    def learn(self, impressions: int, generator: GeneratorSettings, say: Callable[[str], None]) -> OnlineLearner:
        """Return a learner of the product's settings, but for the generator's and the size of its vocabulary."""
        limits = FeatureLimits(max_elements=self.num_slots * self.num_known)
        learner = OnlineLearner(LearnerSettings(seed=self.seed, features=limits, generator=generator))
        known = {id_: e for id_, e in self.elements.items() if int(id_.rpartition("-")[2]) < self.num_known}
        learner.apply_catalog(known, {})
        for number in range(impressions // BATCH):
            report = learner.update(self.traffic(BATCH, number))
            if number % 10 == 9:
                loss = report.metrics.get("normalized_entropy", float("nan"))
                say(f"learned {(number + 1) * BATCH} impressions; normalized entropy {loss:.3f}")
        return learner


def context_of(device: int, segment: int, hour: int) -> dict[str, ContextValue]:
    """Return the context of a request: indices into `DEVICES` and `SEGMENTS`, and the hour."""
    return {"device": DEVICES[device], "segment": SEGMENTS[segment], "hour": int(hour)}
