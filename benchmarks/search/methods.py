"""Searches of the creative that each posterior draw believes in, and what they cost.

An evaluation is the score of one candidate in one slot, by a draw or by the generator. What is shared by all draws (the
generator's proposals, a search under the posterior mean) is divided by their number.

Shapes: M draws, T slots, A candidates, R starts or proposals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from serving.ascent import FloatArray, IntArray
from serving.policy import Policy
from serving.refine import relay
from serving.search import Problem

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
        self.sizes = [len(ids) for ids in problem.card.elements]

    def random(self, num_draws: int, num_starts: int) -> IntArray:
        """Return random creatives, (M, R, T)."""
        shape = num_draws, num_starts
        return np.stack([self._rng.integers(size, size=shape) for size in self.sizes], -1)

    def proposals(self, num: int, temperature: float = 1.0) -> tuple[IntArray, float]:
        """Return creatives of the generator, (R, T), and what they cost."""
        uniform = self._rng.random((num, len(self.sizes)))
        # In parallel the scores are the same for all proposals.
        times = 1 if self._pointer.variant == "parallel" else num
        return self._pointer.propose(self.problem.asked, uniform, temperature), times * sum(self.sizes)

    def main_effects(self) -> IntArray:
        """Return the best elements by main effect on each draw, (M, 1, T)."""
        return np.stack([main[:-1].argmax(-1) for main in self.problem.by_slot()], -1)[:, None]

    def ascents(self, num_starts: int) -> Found:
        """Coordinate ascent from random starts until it rests."""
        ascent = self.problem.on_draws()
        winners = ascent.climb(self.random(self.num_draws, num_starts), UNTIL_REST)
        return Found(winners, ascent.num_scores / self.num_draws)

    def greedy(self, sweeps: int) -> Found:
        """Coordinate ascent from the best main effects."""
        ascent = self.problem.on_draws()
        winners = ascent.climb(self.main_effects(), sweeps)
        return Found(winners, sum(self.sizes) + ascent.num_scores / self.num_draws)

    def mean_then_draws(self, num_starts: int, sweeps: int) -> Found:
        """Search under the posterior mean from random starts, then a few sweeps on each draw."""
        ascent = self.problem.on_mean()
        best = ascent.climb(self.random(1, num_starts), UNTIL_REST)
        starts = np.broadcast_to(best[:, None], (self.num_draws, 1, len(self.sizes)))
        return self._on_draws(starts, sweeps, ascent.num_scores)

    def best_proposal(self, num: int) -> Found:
        """The best of some proposals on each draw, as it is."""
        proposed, cost = self.proposals(num)
        ascent = self.problem.on_draws()
        winners = ascent.best(np.broadcast_to(proposed, (self.num_draws, *proposed.shape)))
        return Found(winners, (cost + ascent.num_scores) / self.num_draws)

    def refined_proposal(self, num: int, sweeps: int) -> Found:
        """The best of some proposals on each draw, and a few sweeps from there."""
        best = self.best_proposal(num)
        return self._on_draws(best.winners[:, None], sweeps, best.evaluations * self.num_draws)

    def _on_draws(self, start: IntArray, sweeps: int, shared: float) -> Found:
        ascent = self.problem.on_draws()
        winners = ascent.climb(start, sweeps) if sweeps else start[:, 0]
        return Found(winners, (shared + ascent.num_scores) / self.num_draws)

    def rewards(self, winners: IntArray) -> tuple[FloatArray, float]:
        """Return the creative logit of each draw's winner under that draw (M,), and their mean under the mean."""
        on_draws = self.problem.on_draws().values(winners[:, None])[:, 0]
        on_mean = self.problem.on_mean().values(winners[None])
        return on_draws, float(on_mean.mean())

    def served(self, num: int, sweeps: int, *, temperature: float = 2.0) -> Found:
        """Proposals as the served policy uses them, see `serving.refine`."""
        proposed, cost = self.proposals(num, temperature)
        return self._relay(proposed, sweeps, cost)

    def random_relay(self, num: int, sweeps: int) -> Found:
        """The relay of the served policy from random starts: what it is worth without a generator."""
        return self._relay(self.random(1, num)[0], sweeps, 0)

    def _relay(self, start: IntArray, sweeps: int, shared: float) -> Found:
        winners, num_scores = relay(self.problem, start, sweeps)
        return Found(winners, (shared + num_scores) / self.num_draws)


Search = Callable[[Request], Found]

METHODS: dict[str, dict[str, Search]] = {
    "ascents from random starts": {
        "1 start": lambda request: request.ascents(1),
        "2 starts": lambda request: request.ascents(2),
        "6 starts": lambda request: request.ascents(6),
        "16 starts": lambda request: request.ascents(16),
    },
    "ascent from the best main effects": {
        "1 sweep": lambda request: request.greedy(1),
        "4 sweeps": lambda request: request.greedy(4),
    },
    "posterior mean from random starts, then a sweep on each draw": {
        "1 start": lambda request: request.mean_then_draws(1, 1),
        "6 starts": lambda request: request.mean_then_draws(6, 1),
        "16 starts": lambda request: request.mean_then_draws(16, 1),
    },
    "relay from random starts": {
        "1 sweep": lambda request: request.random_relay(32, 1),
        "2 sweeps": lambda request: request.random_relay(32, 2),
        "4 sweeps": lambda request: request.random_relay(32, 4),
        "to rest": lambda request: request.random_relay(32, UNTIL_REST),
    },
    "best proposal": {
        "of 1": lambda request: request.best_proposal(1),
        "of 4": lambda request: request.best_proposal(4),
        "of 16": lambda request: request.best_proposal(16),
        "of 64": lambda request: request.best_proposal(64),
    },
    "best proposal, then a sweep": {
        "of 1": lambda request: request.refined_proposal(1, 1),
        "of 4": lambda request: request.refined_proposal(4, 1),
        "of 16": lambda request: request.refined_proposal(16, 1),
    },
    "relay from proposals": {
        "8, 1 sweep": lambda request: request.served(8, 1),
        "16, 1 sweep": lambda request: request.served(16, 1),
        "16, 2 sweeps": lambda request: request.served(16, 2),
        "16, 4 sweeps": lambda request: request.served(16, 4),
        "32, 4 sweeps": lambda request: request.served(32, 4),
    },
    "relay from proposals at temperature 1": {
        "32, 4 sweeps": lambda request: request.served(32, 4, temperature=1.0),
    },
}
"""Family -> setting -> search."""
FULL: Final = ("ascents from random starts", "16 starts")
"""The full search, whose reward is to be had for a tenth."""
SERVED: Final = ("relay from proposals", "16, 4 sweeps")
"""What the policy does by default."""
