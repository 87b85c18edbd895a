"""Vowpal Wabbit: a conditional contextual bandit over the slots (CCB), and slates.

Both see the context and the product, crossed with each candidate's id and content, and explore by SquareCB. The cost
is -1 for a click, and each slot gets the card's whole cost: CCB by our hand, slates by definition. Actions are drawn
from the probabilities that VW gives, so propensities are exact. VW learns one card after the other; of a late click it
cannot take back that the card was told without one, so that card is told a second time, clicked.

References:
    Foster and Rakhlin (2020), Beyond UCB (SquareCB). https://vowpalwabbit.org, CCB and slates.

Shapes: N requests, S slots, A candidates.
"""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np
import vowpalwabbit

from benchmarks.regret.policies.base import (
    BenchPolicy,
    CatalogNow,
    Choice,
    Facts,
    Floats,
    Labels,
    RequestBatch,
)
from benchmarks.regret.policies.content import ContentTable

OPTIONS: Final = "--squarecb --gamma_scale 100 -q CA -q PA -b 20 --quiet"


class VwCcb(BenchPolicy):
    """Slots decided one after the other, each from its own candidates."""

    reduction: ClassVar[str] = "--ccb_explore_adf"

    def __init__(self, facts: Facts, seed: int) -> None:
        super().__init__(facts, seed)
        self._workspace = vowpalwabbit.Workspace(f"{self.reduction} {OPTIONS} --random_seed {seed % 2**31}")
        self._content = ContentTable(facts)
        self._actions: dict[tuple[int, int], str] = {}
        width = facts.num_candidates
        self._included = [",".join(map(str, range(s * width, (s + 1) * width))) for s in range(facts.num_slots)]

    def catalog(self, catalog: CatalogNow) -> None:
        """Take the content of new elements."""
        self._content.see(catalog)

    def choose(self, requests: RequestBatch) -> Choice:
        """Draw each slot's candidate from the probabilities that VW gives."""
        N, S, A = requests.candidates.shape
        chosen_NS, propensity_NS = np.empty((N, S), np.int64), np.empty((N, S))
        for n, (shared, actions) in enumerate(self._cards(requests)):
            probability_SA = self._probabilities(self._workspace.predict([*shared, *actions, *self._slots()]))
            for s in range(S):
                place = self.rng.choice(A, p=probability_SA[s])
                chosen_NS[n, s], propensity_NS[n, s] = requests.candidates[n, s, place], probability_SA[s, place]
        return Choice(chosen_NS, propensity_NS)

    def learn(self, labels: Labels) -> None:
        """Tell VW each card with its cost."""
        place_NS = (labels.requests.candidates == labels.chosen[:, :, None]).argmax(axis=2)
        for n, (_, actions) in enumerate(self._cards(labels.requests)):
            shown = list(zip(place_NS[n].tolist(), labels.propensity[n].tolist(), strict=True))
            shared = self._shared(labels.requests, n, cost=-float(labels.label[n]))
            slots = self._shown_slots(shown, cost=-float(labels.label[n]))
            self._workspace.learn([shared, *actions, *slots])

    def _cards(self, requests: RequestBatch) -> list[tuple[list[str], list[str]]]:
        """Return the lines of each request: the shared one, and one for each candidate."""
        rows = requests.candidates.tolist()
        return [
            ([self._shared(requests, n)], [self._action(s, e) for s, slot in enumerate(row) for e in slot])
            for n, row in enumerate(rows)
        ]

    def _shared(self, requests: RequestBatch, n: int, cost: float | None = None) -> str:
        device, segment = requests.device[n], requests.segment[n]
        return f"ccb shared |C d{device} s{segment} |P p{requests.product[n]}"

    def _action(self, slot: int, element: int) -> str:
        key = slot, element
        if key not in self._actions:
            numbers = " ".join(f"{slot}f{g}:{x:.4f}" for g, x in enumerate(self._content.table_SEG[slot, element]))
            self._actions[key] = f"{self._head(slot)} |A {slot}e{element} {numbers}"
        return self._actions[key]

    def _head(self, slot: int) -> str:
        return "ccb action"

    def _slots(self) -> list[str]:
        return [f"ccb slot {included} |S s{s}" for s, included in enumerate(self._included)]

    def _shown_slots(self, shown: list[tuple[int, float]], cost: float) -> list[str]:
        width = self.facts.num_candidates
        return [
            f"ccb slot {s * width + place}:{cost}:{propensity} {self._included[s]} |S s{s}"
            for s, (place, propensity) in enumerate(shown)
        ]

    def _probabilities(self, prediction: list[list[tuple[int, float]]]) -> Floats:
        """Return (S, A) probabilities in the order of the candidates."""
        out = np.zeros((len(prediction), self.facts.num_candidates))
        for s, slot in enumerate(prediction):
            for action, probability in slot:
                out[s, action % self.facts.num_candidates] = probability
        normalized: Floats = out / out.sum(axis=1, keepdims=True)  # single precision leaves 1e-7
        return normalized


class VwSlates(VwCcb):
    """Slots decided at once; one cost for the whole card."""

    reduction = "--slates"

    def _shared(self, requests: RequestBatch, n: int, cost: float | None = None) -> str:
        told = "" if cost is None else f" {cost}"
        return super()._shared(requests, n).replace("ccb shared", f"slates shared{told}")

    def _head(self, slot: int) -> str:
        return f"slates action {slot}"

    def _slots(self) -> list[str]:
        return [f"slates slot |S s{s}" for s in range(self.facts.num_slots)]

    def _shown_slots(self, shown: list[tuple[int, float]], cost: float) -> list[str]:
        return [f"slates slot {place}:{propensity} |S s{s}" for s, (place, propensity) in enumerate(shown)]
