"""The credits of a card: what each candidate adds to the logit, by itself and beside the others. Arrays in and out.

With main(a) the effect of candidate a by itself, pair(a, b) what a and b add together, and played(b) how often slot t
shows b, everything follows from sums, because the creative's logit is a sum of main effects and of pairs:

    beside(a) = sum over the other slots t, b of played_t(b) pair(a, b)
    credit(a) = main(a) + beside(a) / 2           pairs shared half and half: credits add up to the creative logit
    worth(a)  = main(a) + beside(a)               pairs in whole: what changes when a comes in is all of them
    uplift(a) = worth(a) - mean of worth over the slot's candidates

Posterior draws are at full width here: what a snapshot narrows for Thompson sampling has been widened again.

Shapes: L = M + 1 posterior draws with the mean last, T slots of a card, A and B candidates of a slot.

References:
    Abramowitz and Stegun (1964), Handbook of Mathematical Functions, 26.7.5 (quantiles of Student's t).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

CONFIDENCE: Final = 0.9
"""Of every interval that is shown."""


@dataclass(frozen=True, slots=True)
class Credit:
    """An element's share of the creative part of the logit."""

    element_id: str
    credit: float
    """In logits; the credits of a creative add up to its creative logit. Pair terms are shared half and half."""
    uplift: float
    """What the creative's logit gains against the mean of the slot's candidates, the other slots being as they are."""
    sd: float
    """Posterior standard deviation of the credit, in logits."""


@dataclass(frozen=True, slots=True)
class CardEffects:
    """The effects of a card's candidates in one context."""

    main: Sequence[FloatArray]
    """(L, A) of each slot."""
    pair: Sequence[Sequence[FloatArray]]
    """[t][s] with s < t: (L, A of slot t, B of slot s)."""

    def beside(self, played: Sequence[FloatArray]) -> list[FloatArray]:
        """Return what candidates gain from the other slots, (L, A) for each slot.

        Args:
            played: (A,) how often each slot shows each candidate; adds up to 1.
        """
        out: list[FloatArray] = [np.zeros_like(main_LA) for main_LA in self.main]
        for t, row in enumerate(self.pair):
            for s, pair_LAB in enumerate(row):
                out[t] += pair_LAB @ played[s]
                out[s] += np.einsum("lab,a->lb", pair_LAB, played[t])
        return out

    def credit(self, played: Sequence[FloatArray]) -> list[FloatArray]:
        """Return the credits of all candidates, (L, A) for each slot."""
        return [main_LA + 0.5 * beside_LA for main_LA, beside_LA in zip(self.main, self.beside(played), strict=True)]

    def worth(self, played: Sequence[FloatArray]) -> list[FloatArray]:
        """Return the logit that each candidate brings when it comes in, (L, A) for each slot."""
        return [main_LA + beside_LA for main_LA, beside_LA in zip(self.main, self.beside(played), strict=True)]

    def interaction(self, t: int, s: int) -> FloatArray:
        """Return what pairs of slots s < t add beyond what each of the two adds on average, (L, A, B)."""
        pair_LAB = self.pair[t][s]
        by_a, by_b = pair_LAB.mean(2, keepdims=True), pair_LAB.mean(1, keepdims=True)
        centered_LAB: FloatArray = pair_LAB - by_a - by_b + by_a.mean(1, keepdims=True)
        return centered_LAB

    def credits(self, elements: Sequence[Sequence[str]], places: Sequence[int]) -> list[Credit]:
        """Return the credit of each element of a creative.

        Args:
            elements: Ids of the candidates of each slot.
            places: Which of them the creative shows.
        """
        played = [np.eye(len(ids), dtype=np.float32)[place] for ids, place in zip(elements, places, strict=True)]
        shares = zip(elements, places, self.credit(played), self.worth(played), strict=True)
        return [
            Credit(
                element_id=ids[place],
                credit=float(credit_LA[-1, place]),
                uplift=float(worth_LA[-1, place] - worth_LA[-1].mean()),
                sd=float(deviation(credit_LA[:, place])),
            )
            for ids, place, credit_LA, worth_LA in shares
        ]


def widened(narrow: FloatArray, scale: float, axis: int = 0) -> FloatArray:
    """Return posterior draws at full width.

    Args:
        narrow: Draws along an axis, the mean last, spread by `scale` posterior standard deviations.
        scale: The Thompson scale.
        axis: Where the draws stand.
    """
    mean = np.take(narrow, [-1], axis)
    wide: FloatArray = mean + (narrow - mean) / np.float32(scale)
    return wide


def deviation(value_L: FloatArray) -> FloatArray:
    """Return the posterior standard deviation of values over the draws (first axis), the mean being known."""
    sd: FloatArray = np.sqrt(np.square(value_L[:-1] - value_L[-1]).mean(0))
    return sd


def half_width(num_draws: int) -> float:
    """Return how many estimated standard deviations a two-sided interval of `CONFIDENCE` reaches to each side.

    Student's t with as many degrees of freedom as there are draws: a deviation that is estimated from few draws is
    itself uncertain, and 32 draws ask for 1.69 instead of 1.64.

    Example:
        >>> round(half_width(32), 3), round(half_width(8), 3)
        (1.694, 1.859)
    """
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    n = num_draws
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    return z + (z**3 + z) / (4 * n) + second + third
