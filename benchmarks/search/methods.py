"""Searches of the creative that each posterior draw believes in, and what they cost.

An evaluation is the score of one candidate in one slot, by a draw or by the generator. What is shared by all draws (the
generator's proposals, a search under the posterior mean) is divided by their number.

Shapes: M draws, T slots, A candidates, R starts or proposals; the leading 1 is the one request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from serving.policy import Policy
from serving.search import FloatArray, IntArray, Problem

UNTIL_REST = 64
"""Sweeps after which every ascent has come to rest."""


@dataclass(frozen=True)
class Found:
    """What a search found for one request."""

    winners: IntArray
    """(M, T)"""
    evaluations: float
    """For one draw."""


class Request:
    """One request, and the searches of it."""

    def __init__(self, policy: Policy, problem: Problem, rng: np.random.Generator) -> None:
        self.problem, self._pointer, self._rng = problem, policy.pointer, rng
        self.num_draws = problem.num_draws
        self.sizes = [main.shape[2] for main in problem.main]

    def random(self, num_draws: int, num_starts: int) -> IntArray:
        """Return random creatives, (1, M, R, T)."""
        shape = 1, num_draws, num_starts
        return np.stack([self._rng.integers(size, size=shape) for size in self.sizes], -1)

    def proposals(self, num: int) -> tuple[IntArray, float]:
        """Return creatives of the generator, (1, R, T), and what they cost."""
        deck, rows = self.problem.deck, self.problem.rows
        keys = [keys_KAd[rows] for keys_KAd in deck.keys]
        uniform = self._rng.random((1, num, len(self.sizes)))
        proposed = self._pointer.propose(deck.slots, keys, self.problem.product, self.problem.context, uniform)
        return proposed, num * sum(self.sizes)

    def main_effects(self) -> IntArray:
        """Return the best elements by main effect on each draw, (1, M, 1, T)."""
        return np.stack([main[:, :-1].argmax(-1) for main in self.problem.main], -1)[:, :, None]

    def ascent(self, num_starts: int) -> Found:
        """Coordinate ascent from random starts until it rests."""
        ascent = self.problem.on_draws()
        winners = ascent.climb(self.random(self.num_draws, num_starts), UNTIL_REST)
        return Found(winners[0], ascent.num_scores / self.num_draws)

    def greedy(self, sweeps: int) -> Found:
        """Coordinate ascent from the best main effects."""
        ascent = self.problem.on_draws()
        winners = ascent.climb(self.main_effects(), sweeps)
        return Found(winners[0], sum(self.sizes) + ascent.num_scores / self.num_draws)

    def mean_then_draws(self, num_starts: int, sweeps: int) -> Found:
        """Search under the posterior mean from random starts, then a few sweeps on each draw."""
        ascent = self.problem.on_mean()
        best = ascent.climb(self.random(1, num_starts), UNTIL_REST)
        return self._on_draws(
            np.broadcast_to(best[:, :, None], (1, self.num_draws, 1, len(self.sizes))), sweeps, ascent.num_scores
        )

    def best_proposal(self, num: int) -> Found:
        """The best of some proposals on each draw, as it is."""
        proposed, cost = self.proposals(num)
        ascent = self.problem.on_draws()
        winners = ascent.best(np.broadcast_to(proposed[:, None], (1, self.num_draws, *proposed.shape[1:])))
        return Found(winners[0], (cost + ascent.num_scores) / self.num_draws)

    def refined_proposal(self, num: int, sweeps: int) -> Found:
        """The best of some proposals on each draw, and a few sweeps from there."""
        best = self.best_proposal(num)
        return self._on_draws(best.winners[None, :, None], sweeps, best.evaluations * self.num_draws)

    def _on_draws(self, start: IntArray, sweeps: int, shared: float) -> Found:
        ascent = self.problem.on_draws()
        winners = ascent.climb(start, sweeps) if sweeps else start[:, :, 0]
        return Found(winners[0], (shared + ascent.num_scores) / self.num_draws)

    def rewards(self, winners: IntArray) -> tuple[FloatArray, float]:
        """Return the creative logit of each draw's winner under that draw (M,), and their mean under the mean."""
        on_draws = self.problem.on_draws().values(winners[None, :, None])[0, :, 0]
        on_mean = self.problem.on_mean().values(winners[None, None])
        return on_draws, float(on_mean.mean())


METHODS: dict[str, dict[str, Callable[[Request], Found]]] = {
    "ascent from random starts": {f"{n}": lambda r, n=n: r.ascent(n) for n in (1, 2, 6, 16)},  # type: ignore[misc]
    "ascent from main effects": {f"{k} sweeps": lambda r, k=k: r.greedy(k) for k in (1, 2, 4, 8)},  # type: ignore[misc]
    "mean from random starts, a sweep on each draw": {
        f"{n}": lambda r, n=n: r.mean_then_draws(n, 1)
        for n in (1, 2, 6, 16)  # type: ignore[misc]
    },
    "best proposal": {f"{n}": lambda r, n=n: r.best_proposal(n) for n in (1, 4, 16, 64)},  # type: ignore[misc]
    "best proposal, a sweep": {f"{n}": lambda r, n=n: r.refined_proposal(n, 1) for n in (1, 4, 16, 64)},  # type: ignore[misc]
}
"""Family -> setting -> search."""
FULL = ("ascent from random starts", "16")
