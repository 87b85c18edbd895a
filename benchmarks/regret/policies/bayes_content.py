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

from benchmarks.regret.policies.base import BenchPolicy, CatalogNow, Choice, Facts, Floats32, Ints, Labels, RequestBatch
from benchmarks.regret.policies.content import ContentTable
from benchmarks.regret.policies.diagonal import DiagonalLogistic
from benchmarks.regret.policies.search import Effects, best_creatives

DRAWS: Final = 64
SCALE: Final = 0.2
"""Spread of the draws in posterior standard deviations."""
PRIOR_SD: Final = {
    "bias": 1.0,
    "product": 0.7,
    "context": 0.2,
    "product_context": 0.2,
    "element": 0.08,
    "content": 0.04,
    "content_context": 0.016,
    "content_pair": 0.012,
}


class BayesContent(BenchPolicy):
    """Remembers everything."""

    forget: ClassVar[float] = 0.0
    """Share of the way back to the prior for every 1,000 labels."""

    def __init__(self, facts: Facts, seed: int) -> None:
        super().__init__(facts, seed)
        self._content = ContentTable(facts)
        S, G, C, P = facts.num_slots, self._content.size, facts.context_size, facts.num_products
        self._pairs = list(itertools.combinations(range(S), 2))
        self._shapes: dict[str, tuple[int, ...]] = {
            "bias": (1,),
            "product": (P,),
            "context": (C,),
            "product_context": (P, C),
            "element": (S, facts.num_elements),
            "content": (S, G),
            "content_context": (S, G, C),
            "content_pair": (len(self._pairs), G, G),
        }
        ends = np.cumsum([int(np.prod(shape)) for shape in self._shapes.values()]).tolist()
        self._columns = {
            name: np.arange(end - int(np.prod(shape)), end).reshape(shape)
            for (name, shape), end in zip(self._shapes.items(), ends, strict=True)
        }
        sd = np.concatenate([np.full(int(np.prod(shape)), PRIOR_SD[name]) for name, shape in self._shapes.items()])
        self._model = DiagonalLogistic(sd)
        self._effects = self._draw()

    def catalog(self, catalog: CatalogNow) -> None:
        """Take the content of new elements."""
        self._content.see(catalog)
        self._effects = self._draw()

    def choose(self, requests: RequestBatch) -> Choice:
        """Show what is best on a draw."""
        draw_N = self.rng.integers(DRAWS, size=len(requests))
        context_NC = requests.context(self.facts)
        return Choice(best_creatives(self._effects, draw_N, context_NC, requests.candidates))

    def learn(self, labels: Labels) -> None:
        """Forget a little, learn the labels, draw anew."""
        if not len(labels):
            return
        self._model.forget(1 - (1 - self.forget) ** (len(labels) / 1000))
        self._model.learn(*self._features(labels.requests, labels.chosen), labels.label, labels.weight)
        self._effects = self._draw()

    def _features(self, requests: RequestBatch, chosen_NS: Ints) -> tuple[Ints, Floats32]:
        """Return the (N, J) columns and values of shown cards."""
        n, columns, slots = len(requests), self._columns, np.arange(self.facts.num_slots)
        context_NC = requests.context(self.facts)
        content_NSG = self._content.table_SEG[slots, chosen_NS]
        first, second = (list(side) for side in zip(*self._pairs, strict=True)) if self._pairs else ([], [])
        pair_NQGG = content_NSG[:, first, :, None] * content_NSG[:, second, None, :]
        ones = np.ones((n, 1), np.float32)
        # Columns of each row, or of all rows alike with a first axis of 1.
        parts = (
            (columns["bias"][None], ones),
            (columns["product"][requests.product, None], ones),
            (columns["context"][None], context_NC),
            (columns["product_context"][requests.product], context_NC),
            (columns["element"][slots, chosen_NS], np.broadcast_to(ones, chosen_NS.shape)),
            (columns["content"][None], content_NSG),
            (columns["content_context"][None], content_NSG[..., None] * context_NC[:, None, None]),
            (columns["content_pair"][None], pair_NQGG),
        )
        numbers = [np.broadcast_to(column, value.shape).reshape(n, -1) for column, value in parts]
        return np.concatenate(numbers, axis=1), np.concatenate([v.reshape(n, -1) for _, v in parts], axis=1)

    def _draw(self) -> Effects:
        theta_MD = self._model.draw(DRAWS, SCALE, self.rng)
        theta = {name: theta_MD[:, columns] for name, columns in self._columns.items()}
        content = self._content.table_SEG
        main = np.einsum("seg,msg->mse", content, theta["content"]) + theta["element"]
        by_context = content[None] @ theta["content_context"]
        pair = np.empty((DRAWS, len(self._pairs), *theta["element"].shape[2:], theta["element"].shape[2]), np.float32)
        for q, (s, t) in enumerate(self._pairs):
            pair[:, q] = content[s] @ theta["content_pair"][:, q] @ content[t].T
        return Effects(main, by_context, pair)


class BayesContentForget(BayesContent):
    """Forgets 1 % a batch."""

    forget = 0.01
