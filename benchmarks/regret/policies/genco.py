"""Ours: the very learner and the very policy of the product, at their defaults, in one process.

What stands between them in production (Kafka, Redis, the gate) is left out; the policy that decides is the learner's
after its last update.
"""

from __future__ import annotations

import numpy as np

from benchmarks.regret.policies.base import (
    FINAL,
    LATE_POSITIVE,
    PROVISIONAL,
    BenchPolicy,
    CatalogNow,
    Choice,
    Facts,
    Floats32,
    Ints,
    Labels,
    RequestBatch,
)
from learner.online import LearnerSettings, OnlineLearner
from serving.policy import DecisionRequest, Policy, UniformPolicy
from streams.contracts.catalog import Element, Product
from streams.contracts.codec import encode_context
from streams.contracts.examples import NO_DELAY, ContextValue, ExampleBatch, LabelKind

_KINDS = {FINAL: LabelKind.FINAL, PROVISIONAL: LabelKind.PROVISIONAL, LATE_POSITIVE: LabelKind.LATE_POSITIVE}


class Genco(BenchPolicy):
    """Names for the benchmark's numbers, and the product behind them."""

    def __init__(self, facts: Facts, seed: int) -> None:
        super().__init__(facts, seed)
        self._learner = self.make_learner(seed)
        self._policy: Policy | UniformPolicy = Policy.uniform()
        self._ids = [[f"{slot}-{number}" for number in range(facts.num_elements)] for slot in facts.slots]
        self._numbers = [{element_id: number for number, element_id in enumerate(ids)} for ids in self._ids]
        self._cards: dict[bytes, dict[str, list[str]]] = {}

    def make_learner(self, seed: int) -> OnlineLearner:
        """Return a learner with its defaults."""
        return OnlineLearner(LearnerSettings(seed=seed))

    def catalog(self, catalog: CatalogNow) -> None:
        """Tell the learner of the elements alive, as the topic `catalog` would."""
        products = {
            f"p{number}": Product(product_id=f"p{number}", slots=self._card(candidates_SA))
            for number, candidates_SA in enumerate(catalog.candidates)
        }
        self._learner.apply_catalog(self._elements(catalog.first, catalog.content), products)

    def _card(self, candidates_SA: Ints) -> dict[str, list[str]]:
        """Return slot -> element ids, the same object for the same candidates."""
        key = candidates_SA.tobytes()
        if key not in self._cards:
            rows = zip(self.facts.slots, self._ids, candidates_SA.tolist(), strict=True)
            self._cards[key] = {slot: [ids[e] for e in row] for slot, ids, row in rows}
        return self._cards[key]

    def _elements(self, first: int, content_SEF: Floats32) -> dict[str, Element]:
        return {
            (element_id := self._ids[s][first + e]): Element(element_id=element_id, slot=slot, features=content_F)
            for s, slot in enumerate(self.facts.slots)
            for e, content_F in enumerate(content_SEF[s].tolist())
        }

    def _contexts(self, requests: RequestBatch) -> list[dict[str, ContextValue]]:
        devices, segments = self.facts.devices, self.facts.segments
        columns = (requests.device.tolist(), requests.segment.tolist(), requests.hour.tolist())
        return [{"device": devices[d], "segment": segments[s], "hour": h} for d, s, h in zip(*columns, strict=True)]

    def choose(self, requests: RequestBatch) -> Choice:
        """Decide as a server would."""
        seeds = self.rng.integers(2**62, size=len(requests)).tolist()
        columns = (requests.product.tolist(), self._contexts(requests), requests.candidates, seeds)
        asked = [
            DecisionRequest(product_id=f"p{product}", context=context, candidates=self._card(candidates_SA), seed=seed)
            for product, context, candidates_SA, seed in zip(*columns, strict=True)
        ]
        choices = self._policy.choose(asked)
        chosen = [
            [numbers[e] for numbers, e in zip(self._numbers, choice.creative.values(), strict=True)]
            for choice in choices
        ]
        propensity = [list(choice.slot_propensities.values()) for choice in choices]
        return Choice(np.array(chosen, np.int64), np.array(propensity))

    def learn(self, labels: Labels) -> None:
        """Learn as the learner would from the topic `examples`, and serve what it has learned."""
        if len(labels):
            self._learner.update(self._examples(labels))
            self._policy = self._learner.policy()

    def _examples(self, labels: Labels) -> ExampleBatch:
        requests = labels.requests
        n, slots = len(labels), self.facts.slots
        creatives = [
            {slot: ids[e] for slot, ids, e in zip(slots, self._ids, row, strict=True)} for row in labels.chosen.tolist()
        ]
        return ExampleBatch.from_columns(
            {
                "decision_id": [f"0.{number}" for number in labels.number.tolist()],
                "occurred_at_ms": labels.occurred_ms,
                "product_id": [f"p{product}" for product in requests.product.tolist()],
                "context": [encode_context(context) for context in self._contexts(requests)],
                "candidates": [self._card(candidates_SA) for candidates_SA in requests.candidates],
                "creative": creatives,
                "slot_propensities": [dict(zip(slots, row, strict=True)) for row in labels.propensity.tolist()],
                "propensity": labels.propensity.prod(axis=1),
                "model_id": ["default"] * n,
                "epoch": np.zeros(n, np.int64),
                "policy_version": np.zeros(n, np.int64),
                "source": ["policy"] * n,
                "holdout": np.zeros(n, np.bool_),
                "seed": np.zeros(n, np.int64),
                "survival_probability": 1.0 / labels.weight,
                "label": labels.label.astype(np.int8),
                "reward": labels.label.astype(np.float64),
                "label_kind": [_KINDS[kind] for kind in labels.kind.tolist()],
                "delay_ms": np.where(labels.label > 0, labels.delay_ms, NO_DELAY),
            }
        )
