"""Multivariate testing of Hill et al. (2017): elements and pairs of elements, Thompson sampling, hill climbing.

Bayesian regression on one-hots: bias, product, context, every slot's element, element x context, and every pair of
elements (the paper's main effects, pairwise interactions and context interactions), coefficients independent of each
other. Each request gets a posterior draw, and coordinate ascent finds its best creative. Knows no content, so a new
element starts at nothing. Logistic instead of the paper's probit link, which differs little.

References:
    Hill et al. (2017), An Efficient Bandit Algorithm for Realtime Multivariate Optimization, arXiv 1810.09558.

Shapes: S slots, Q slot pairs, E elements, C context numbers, M draws.
"""

from __future__ import annotations

import itertools
from typing import Final

import numpy as np

from benchmarks.regret.policies.base import BenchPolicy, CatalogNow, Choice, Facts, Ints, Labels, RequestBatch
from benchmarks.regret.policies.diagonal import DiagonalLogistic, Part
from benchmarks.regret.policies.search import best_creatives, linear_scores, num_draws

SCALE: Final = 0.4
"""Spread of the draws in posterior standard deviations."""


class Mvt(BenchPolicy):
    """Pairwise model on one-hots."""

    def __init__(self, facts: Facts, seed: int) -> None:
        super().__init__(facts, seed)
        self._num_draws = num_draws(facts)
        S, E, C = facts.num_slots, facts.num_elements, facts.context_size
        self._pairs = list(itertools.combinations(range(S), 2))
        self._model = DiagonalLogistic(
            {
                "bias": ((1,), 1.0),
                "product": ((facts.num_products,), 0.7),
                "context": ((C,), 0.2),
                "element": ((S, E), 0.1),
                "element_context": ((S, E, C), 0.04),
                "pair": ((len(self._pairs), E, E), 0.1),
            }
        )
        self._theta = self._model.draw(self._num_draws, SCALE, self.rng)

    def catalog(self, catalog: CatalogNow) -> None:
        """Need no content."""

    def choose(self, requests: RequestBatch) -> Choice:
        """Show what is best on a draw."""
        theta, context_NC = self._theta, requests.context(self.facts)
        draw_N = self.rng.integers(self._num_draws, size=len(requests))
        score_NSA = linear_scores(theta["element"], theta["element_context"], draw_N, context_NC, requests.candidates)
        return Choice(best_creatives(score_NSA, theta["pair"], draw_N, requests.candidates))

    def learn(self, labels: Labels) -> None:
        """Learn the labels, draw anew."""
        if len(labels):
            self._model.learn(self._features(labels.requests, labels.chosen), labels.label, labels.weight)
            self._theta = self._model.draw(self._num_draws, SCALE, self.rng)

    def _features(self, requests: RequestBatch, chosen_NS: Ints) -> list[Part]:
        columns, slots = self._model.columns, np.arange(self.facts.num_slots)
        context_NC, one_N1 = requests.context(self.facts), np.ones((len(requests), 1))
        first, second = [s for s, _ in self._pairs], [t for _, t in self._pairs]
        pair_NQ = columns["pair"][np.arange(len(self._pairs)), chosen_NS[:, first], chosen_NS[:, second]]
        context_NSC = np.broadcast_to(context_NC[:, None], (*chosen_NS.shape, context_NC.shape[1]))
        return [
            (columns["bias"][None], one_N1),
            (columns["product"][requests.product, None], one_N1),
            (columns["context"][None], context_NC),
            (columns["element"][slots, chosen_NS], np.ones(chosen_NS.shape)),
            (columns["element_context"][slots, chosen_NS], context_NSC),
            (pair_NQ, np.ones(pair_NQ.shape)),
        ]
