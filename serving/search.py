"""A request, ready to be searched, and coordinate ascent from any starts on it, `serving.ascent` for numpy's callers.

Shapes: L draws, M of them posterior draws, T slots of the card, X candidates over all slots, R starts, C context
columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from serving.ascent import FloatArray, IntArray, climb, main_effects, values
from serving.card import Card
from serving.pointer import Asked


@dataclass(frozen=True, slots=True)
class Problem:
    """A request, ready to be searched."""

    card: Card
    main: FloatArray
    """(M + 1, X) main effects of the candidates, the posterior mean last."""
    product: int
    """Vocabulary index of the product, -1 if the snapshot lacks it."""
    context: FloatArray
    """(C,)"""

    @classmethod
    def of(cls, card: Card, product: int, context_C: FloatArray) -> Problem:
        """Return the problem of a card in a context."""
        main_LX = main_effects(card.base, card.content, card.by_context, card.weights.context, context_C, card.first)
        return cls(card, main_LX, product, context_C)

    @property
    def num_draws(self) -> int:
        """M."""
        return len(self.main) - 1

    @property
    def asked(self) -> Asked:
        """The same request as the generator sees it."""
        return Asked(self.card.slots, self.card.keys, self.card.first, self.product, self.context)

    def by_slot(self) -> list[FloatArray]:
        """Return the main effects of each slot's candidates, (M + 1, A)."""
        return [self.main[:, span] for span in self.card.spans]

    def on_draws(self) -> Ascent:
        """Return the search under each of the M draws."""
        return Ascent(self, slice(0, -1))

    def on_mean(self) -> Ascent:
        """Return the search under the posterior mean alone, as if it were the only draw."""
        return Ascent(self, slice(-1, None))


class Ascent:
    """Searches the best creatives of a request under each of L draws."""

    def __init__(self, problem: Problem, draws: slice) -> None:
        """Take the request, and which draws to look at."""
        self.num_scores = 0
        """Scores of single candidates that were needed so far."""
        card = problem.card
        self._effects = problem.main[draws], card.content[draws], card.weights.pull[draws], card.pair, card.first

    def values(self, place_LRT: IntArray) -> FloatArray:
        """Return the creative logits (L, R) of R creatives on each draw."""
        self.num_scores += place_LRT.size
        value_LR: FloatArray = values(np.ascontiguousarray(place_LRT), *self._effects)
        return value_LR

    def best(self, place_LRT: IntArray) -> IntArray:
        """Return the best of R creatives on each draw, (L, T)."""
        return _best(place_LRT, self.values(place_LRT))

    def climb(self, start_LRT: IntArray, max_sweeps: int) -> IntArray:
        """Improve R starts, slot by slot, until nothing moves; return the best end on each draw, (L, T)."""
        end_LRT = start_LRT.copy(order="C")
        self.num_scores += climb(end_LRT, *self._effects, max_sweeps)
        if end_LRT.shape[1] == 1:
            return end_LRT[:, 0]
        value_LR: FloatArray = values(end_LRT, *self._effects)
        return _best(end_LRT, value_LR)


def _best(place_LRT: IntArray, value_LR: FloatArray) -> IntArray:
    best_LT: IntArray = place_LRT[np.arange(len(place_LRT)), value_LR.argmax(1)]
    return best_LT
