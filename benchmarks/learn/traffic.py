"""Records of `examples` for `genco bench learn`: simulated shoppers who are shown cards by uniform play.

Four slots of twenty candidates, as the joiner would write them: records of 500, the labels final, the ids genuine. Of
uniform play no two creatives of a product are alike, so nothing about the creatives can be remembered; a policy that
has learned something repeats itself, which is easier. Candidates repeat, product by product, as they do in life.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np

from genco.world import World
from genco.world_catalog import Request
from genco.world_config import WorldConfig
from streams.contracts.catalog import Element, Product
from streams.contracts.codec import encode_context
from streams.contracts.decision_ids import make_decision_id
from streams.contracts.examples import LabelKind, encode_examples
from streams.example_records import EXAMPLES_PER_RECORD

CANDIDATES: Final = 20
ELEMENTS: Final = 60
"""Alive in a slot, over all products."""
FIRST_MS: Final = 1_764_000_000_000
IMPRESSIONS_PER_SECOND: Final = 1_000
"""Of event time; with the horizon it says how many decisions are remembered."""
_KEY: Final = b"the key of a benchmark's decisions"


class Shown(NamedTuple):
    """An impression and its label."""

    request: Request
    creative: dict[str, str]
    clicked: bool


@dataclass(slots=True)
class Traffic:
    """A world, its catalog, and its log; the same for the same arguments."""

    num_products: int = 30
    seed: int = 0
    world: World = field(init=False)
    elements: dict[str, Element] = field(init=False)
    products: dict[str, Product] = field(init=False)

    def __post_init__(self) -> None:
        """Make the world."""
        config = WorldConfig(
            seed=self.seed,
            num_products=self.num_products,
            elements_per_slot=ELEMENTS,
            candidates_per_slot=CANDIDATES,
        )
        self.world = World(config)
        catalog = self.world.catalog(0.0)
        self.elements = {e["element_id"]: Element.model_validate(e) for e in catalog.elements}
        self.products = {p["product_id"]: Product.model_validate(p) for p in catalog.products}

    def shown(self, number: int) -> list[Shown]:
        """Return the impressions of the record with this number."""
        n, world = EXAMPLES_PER_RECORD, self.world
        rng = np.random.default_rng([self.seed, number])
        requests = world.requests(rng, n, 0.0)
        asked = world.request_dicts(requests, 0.0)
        place_NS = rng.integers(CANDIDATES, size=(n, len(world.config.slots)))
        creatives = [
            {slot: ids[a] for (slot, ids), a in zip(request["candidates"].items(), places, strict=True)}
            for request, places in zip(asked, place_NS.tolist(), strict=True)
        ]
        clicked = rng.random(n) < world.click_probability(requests, world.encode(creatives), 0.0)
        return list(map(Shown, asked, creatives, clicked.tolist()))

    def record(self, number: int) -> bytes:
        """Return the value of the record with this number."""
        shown = self.shown(number)
        n, num_slots = len(shown), len(self.world.config.slots)
        rng = np.random.default_rng([self.seed, number, 1])
        times_ms = (FIRST_MS + np.arange(number * n, (number + 1) * n) * 1000 // IMPRESSIONS_PER_SECOND).tolist()
        route_N, label_N = rng.integers(1024, size=n).tolist(), [int(each.clicked) for each in shown]
        return encode_examples(
            {
                "decision_id": [
                    make_decision_id(route, time_ms, number * n + i, _KEY)
                    for i, (route, time_ms) in enumerate(zip(route_N, times_ms, strict=True))
                ],
                "occurred_at_ms": times_ms,
                "product_id": [each.request["product_id"] for each in shown],
                "context": [encode_context(each.request["context"]) for each in shown],
                "candidates": [each.request["candidates"] for each in shown],
                "creative": [each.creative for each in shown],
                "slot_propensities": [dict.fromkeys(each.creative, 1 / CANDIDATES) for each in shown],
                "propensity": [float(CANDIDATES) ** -num_slots] * n,
                "model_id": ["default"] * n,
                "epoch": [0] * n,
                "policy_version": [0] * n,
                "source": ["uniform"] * n,
                "holdout": [True] * n,
                "seed": rng.integers(2**62, size=n),
                "survival_probability": [1.0] * n,
                "label": label_N,
                "reward": [float(label) for label in label_N],
                "label_kind": [LabelKind.FINAL.value] * n,
                "delay_ms": [1_000 if label else None for label in label_N],
            }
        )
