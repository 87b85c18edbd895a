"""The impressions that were learned last: what the generator is trained on and the gate asks a policy about.

They are kept as references to what was parsed; a request is made of them only for the few that are drawn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from learner.candidate_sets import CandidateSet
from learner.gate import Logged
from learner.parsing import Context, ParsedExamples
from serving.policy import DecisionRequest
from streams.contracts.examples import ExampleBatch

MakeSet = Callable[[Mapping[str, Sequence[str]]], CandidateSet]


class RecentImpression(NamedTuple):
    """An impression with the label it had when it was learned first."""

    product_id: str
    context: Context
    candidates: CandidateSet
    places: list[int]
    """Of the chosen elements among the candidates of each slot; what comes behind the last slot says nothing."""
    propensity: float
    label: int

    @property
    def request(self) -> DecisionRequest:
        """The request, without its seed."""
        return DecisionRequest(self.product_id, self.context, self.candidates.candidates)

    @property
    def logged(self) -> Logged:
        """The impression as the gate wants it."""
        chosen = zip(self.candidates.slots, self.candidates.elements, self.places, strict=False)
        return Logged(self.request, {slot: ids[a] for slot, ids, a in chosen}, self.propensity, self.label)


class RecentImpressions:
    """The newest so many impressions, the oldest first."""

    def __init__(self, max_size: int) -> None:
        self._kept: deque[RecentImpression] = deque(maxlen=max_size)
        self.num_added = 0
        """Impressions that were taken since this process made it."""

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._kept)

    def __getitem__(self, place: int) -> RecentImpression:
        """Return the impression at a place; -1 is the newest."""
        return self._kept[place]

    def add(self, batch: ExampleBatch, parsed: ParsedExamples, rows: NDArray[np.int64]) -> None:
        """Take the impressions of these rows, which have no fault."""
        self.num_added += len(rows)
        rows = rows[-(self._kept.maxlen or 0) :]
        values = zip(
            [parsed.products[u] for u in parsed.product[rows]],
            [parsed.contexts[u] for u in parsed.context[rows]],
            [parsed.sets[u] for u in parsed.set[rows]],
            parsed.place[rows].tolist(),
            batch.propensity[rows].tolist(),
            batch.label[rows].tolist(),
            strict=True,
        )
        self._kept.extend(map(RecentImpression._make, values))

    def state(self) -> dict[str, Any]:
        """Return all of it as JSON-able values, what many share once; it follows from the values alone."""
        sets: dict[tuple[Any, ...], int] = {}
        contexts: dict[bytes, int] = {}
        shown = [
            [
                each.product_id,
                contexts.setdefault(msgspec.json.encode(each.context), len(contexts)),
                sets.setdefault((each.candidates.slots, each.candidates.elements), len(sets)),
                each.places[: len(each.candidates.slots)],
                each.propensity,
                each.label,
            ]
            for each in self._kept
        ]
        return {
            "sets": [dict(zip(slots, map(list, elements), strict=True)) for slots, elements in sets],
            "contexts": [msgspec.json.decode(context) for context in contexts],
            "shown": shown,
        }

    def restore(self, state: Mapping[str, Any], make_set: MakeSet) -> None:
        """Take the place of what `state` described."""
        sets = [make_set(candidates) for candidates in state["sets"]]
        self._kept.clear()
        self._kept.extend(
            RecentImpression(product_id, state["contexts"][context], sets[number], places, propensity, label)
            for product_id, context, number, places, propensity, label in state["shown"]
        )
