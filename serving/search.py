"""A request, ready to be searched, and coordinate ascent from any starts on it, `serving.ascent` for numpy's callers.

Shapes: L draws, M of them posterior draws, T slots of the card, X candidates over all slots, R starts, C context
columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from serving.ascent import Effects, FloatArray, IntArray, climbs, main_effects, values
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
    effects: Effects
    """All that the compiled search looks at."""

    @classmethod
    def of(cls, card: Card, product: int, context_C: FloatArray) -> Problem:
        """Return the problem of a card in a context."""
        main_LX = main_effects(card.base, card.content, card.by_context, card.weights.context, context_C, card.first)
        pull, size = card.weights.pull, np.uint64(card.weights.pull.shape[2])
        flat = Effects(main_LX.ravel(), card.content.ravel(), pull.ravel(), card.pair.ravel(), card.first, size)
        return cls(card, main_LX, product, context_C, flat)

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
        return Ascent(self.effects, 0)

    def on_mean(self) -> Ascent:
        """Return the search under the posterior mean alone, as if it were the only draw."""
        return Ascent(self.effects, self.num_draws)


class Ascent:
    """Searches the best creatives of a request under each of L draws, those from `first_draw` on."""

    def __init__(self, effects: Effects, first_draw: int) -> None:
        self.num_scores = 0
        """Scores of single candidates that were needed so far."""
        self._effects, self._first_draw = effects, first_draw

    def values(self, place_LRT: IntArray) -> FloatArray:
        """Return the creative logits (L, R) of R creatives on each draw."""
        self.num_scores += place_LRT.size
        return self._values(place_LRT)

    def _values(self, place_LRT: IntArray) -> FloatArray:
        num_draws, num_creatives, _ = place_LRT.shape
        value: FloatArray = values(*self._effects, self._first_draw, place_LRT.astype(np.uint64).ravel(), num_creatives)
        return value.reshape(num_draws, num_creatives)

    def best(self, place_LRT: IntArray) -> IntArray:
        """Return the best of R creatives on each draw, (L, T)."""
        return _best(place_LRT, self.values(place_LRT))

    def climb(self, start_LRT: IntArray, max_sweeps: int) -> IntArray:
        """Improve R starts, slot by slot, until nothing moves; return the best end on each draw, (L, T)."""
        place, num_creatives = start_LRT.astype(np.uint64).ravel(), start_LRT.shape[1]
        self.num_scores += climbs(*self._effects, self._first_draw, place, num_creatives, max_sweeps)
        end_LRT = place.reshape(start_LRT.shape).astype(np.int64)
        return end_LRT[:, 0] if num_creatives == 1 else _best(end_LRT, self._values(end_LRT))


def _best(place_LRT: IntArray, value_LR: FloatArray) -> IntArray:
    best_LT: IntArray = place_LRT[np.arange(len(place_LRT)), value_LR.argmax(1)]
    return best_LT
