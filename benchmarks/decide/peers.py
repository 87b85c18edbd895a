"""Vowpal Wabbit's slates and CCB on the same requests: probabilities of all candidates of all slots.

Its input is text; making the text is not counted, reading it is. Options as in `genco bench regret`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import vowpalwabbit

from benchmarks.regret.policies.vw import OPTIONS
from benchmarks.search.scene import Scene
from serving.policy import DecisionRequest
from streams.contracts.examples import ExampleBatch

REDUCTIONS: Final = {"slates": "--slates", "ccb": "--ccb_explore_adf"}


class VowpalWabbit:
    """One of VW's reductions for cards, taught by the scene's traffic."""

    def __init__(self, name: str, scene: Scene, impressions: int) -> None:
        """Learn.

        Args:
            name: One of `REDUCTIONS`.
            scene: Whose traffic and elements.
            impressions: How many are learned.
        """
        self._name = name
        self._workspace = vowpalwabbit.Workspace(f"{REDUCTIONS[name]} {OPTIONS}")
        self._elements = {
            element_id: f"|A {element_id} {' '.join(f'f{g}:{x:.4f}' for g, x in enumerate(element.features))}"
            for element_id, element in scene.elements.items()
        }
        batch = scene.traffic(impressions, 1)
        for number in range(len(batch)):
            self._workspace.learn(self._shown(batch, number))

    def decide(self, requests: Sequence[DecisionRequest]) -> tuple[list[Any], list[float]]:
        """Return for each request the probabilities of each slot's candidates, and how many seconds it took."""
        found, seconds = [], []
        for request in requests:
            lines = self._asked(request)
            started = time.perf_counter()
            found.append(self._workspace.predict(lines))
            seconds.append(time.perf_counter() - started)
        return found, seconds

    def _asked(self, request: DecisionRequest) -> list[str]:
        return self._lines(request.product_id, request.context, request.candidates, None)

    def _shown(self, batch: ExampleBatch, number: int) -> list[str]:
        candidates = batch.candidates[number]
        places = [candidates[slot].index(element) for slot, element in batch.creative[number].items()]
        cost = -float(batch.label[number])
        product, context = batch.product_id[number], batch.context[number]
        return self._lines(product, context, candidates, (cost, places))

    def _lines(
        self,
        product: str,
        context: Mapping[str, object],
        candidates: Mapping[str, Sequence[str]],
        shown: tuple[float, Sequence[int]] | None,
    ) -> list[str]:
        """Return a card as VW reads it; `shown` is its cost and the place of what each slot showed."""
        is_slates = self._name == "slates"
        told = f" {shown[0]}" if is_slates and shown else ""
        lines = [f"{self._name} shared{told} |C d{context['device']} s{context['segment']} |P {product}"]
        for s, ids in enumerate(candidates.values()):
            head = f"slates action {s}" if is_slates else "ccb action"
            lines += [f"{head} {self._elements[element_id]}" for element_id in ids]
        first = 0
        for s, ids in enumerate(candidates.values()):
            label = ""
            if shown:
                place, share = shown[1][s], 1 / len(ids)
                label = f" {place}:{share}" if is_slates else f" {first + place}:{shown[0]}:{share}"
            allowed = "" if is_slates else " " + ",".join(map(str, range(first, first + len(ids))))
            lines.append(f"{self._name} slot{label}{allowed} |S s{s}")
            first += len(ids)
        return lines
