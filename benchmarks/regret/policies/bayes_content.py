"""Bayesian logistic regression on content, with independent coefficients and Thompson sampling.

The features of a card: 1, product, context, product x context, and for every slot the element itself, its content,
content x context, and for every pair of slots content x content. So it knows of interactions and of new elements; what
it lacks is the covariance of the coefficients. The prior standard deviations and the scale of the draws are those that
served it best on seeds which no table shows.

`bayes-content-forget` is the same but goes back towards its prior by 1 % a batch of 1,000, for worlds that move.

Shapes: N requests or labels, S slots, Q slot pairs, E elements, G content numbers, C context numbers, P products,
M draws.
"""

from __future__ import annotations

import itertools
from typing import ClassVar, Final

import numpy as np

from benchmarks.regret.policies.base import BenchPolicy, CatalogNow, Choice, Facts, Ints, Labels, RequestBatch
from benchmarks.regret.policies.content import ContentTable
from benchmarks.regret.policies.diagonal import DiagonalLogistic, Part
from benchmarks.regret.policies.search import best_creatives, linear_scores, num_draws

SCALE: Final = 0.2
"""Spread of the draws in posterior standard deviations."""


class BayesContent(BenchPolicy):
    """Remembers everything."""

    forget: ClassVar[float] = 0.0
    """Share of the way back to the prior for every 1,000 labels."""

    def __init__(self, facts: Facts, seed: int) -> None:
        super().__init__(facts, seed)
        self._num_draws = num_draws(facts)
        self._content = ContentTable(facts)
        S, G, C, P = facts.num_slots, self._content.size, facts.context_size, facts.num_products
        self._pairs = list(itertools.combinations(range(S), 2))
        self._model = DiagonalLogistic(
            {
                "bias": ((1,), 1.0),
                "product": ((P,), 0.7),
                "context": ((C,), 0.2),
                "product_context": ((P, C), 0.2),
                "element": ((S, facts.num_elements), 0.08),
                "content": ((S, G), 0.04),
                "content_context": ((S, G, C), 0.016),
                "content_pair": ((len(self._pairs), G, G), 0.012),
            }
        )
        self._draw()

    def catalog(self, catalog: CatalogNow) -> None:
        """Take the content of new elements."""
        self._content.see(catalog)
        self._draw()

    def choose(self, requests: RequestBatch) -> Choice:
        """Show what is best on a draw."""
        draw_N = self.rng.integers(self._num_draws, size=len(requests))
        context_NC = requests.context(self.facts)
        score_NSA = linear_scores(self._main_MSE, self._context_MSEC, draw_N, context_NC, requests.candidates)
        return Choice(best_creatives(score_NSA, self._pair_MQEE, draw_N, requests.candidates))

    def learn(self, labels: Labels) -> None:
        """Forget a little, learn the labels, draw anew."""
        if not len(labels):
            return
        self._model.forget(1 - (1 - self.forget) ** (len(labels) / 1000))
        self._model.learn(self._features(labels.requests, labels.chosen), labels.label, labels.weight)
        self._draw()

    def _features(self, requests: RequestBatch, chosen_NS: Ints) -> list[Part]:
        columns, slots = self._model.columns, np.arange(self.facts.num_slots)
        context_NC = requests.context(self.facts)
        content_NSG = self._content.table_SEG[slots, chosen_NS]
        first, second = [s for s, _ in self._pairs], [t for _, t in self._pairs]
        one_N1 = np.ones((len(requests), 1))
        return [
            (columns["bias"][None], one_N1),
            (columns["product"][requests.product, None], one_N1),
            (columns["context"][None], context_NC),
            (columns["product_context"][requests.product], context_NC),
            (columns["element"][slots, chosen_NS], np.ones(chosen_NS.shape)),
            (columns["content"][None], content_NSG),
            (columns["content_context"][None], content_NSG[..., None] * context_NC[:, None, None]),
            (columns["content_pair"][None], content_NSG[:, first, :, None] * content_NSG[:, second, None, :]),
        ]

    def _draw(self) -> None:
        theta = self._model.draw(self._num_draws, SCALE, self.rng)
        content_SEG = self._content.table_SEG
        self._main_MSE = np.einsum("seg,msg->mse", content_SEG, theta["content"]) + theta["element"]
        self._context_MSEC = content_SEG[None] @ theta["content_context"]
        E = self.facts.num_elements
        self._pair_MQEE = np.empty((self._num_draws, len(self._pairs), E, E), np.float32)
        for q, (s, t) in enumerate(self._pairs):
            self._pair_MQEE[:, q] = content_SEG[s] @ theta["content_pair"][:, q] @ content_SEG[t].T


class BayesContentForget(BayesContent):
    """Forgets 1 % a batch."""

    forget = 0.01
