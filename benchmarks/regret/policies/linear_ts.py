"""Linear Thompson sampling for each slot by itself, with content, context and their products, and the element's id.

Each slot has a Bayesian linear regression with full covariance of what the click is above the product's smoothed click
rate; the variance of a click is that of the running click rate. The draw decides each slot alone.

References:
    Agrawal and Goyal (2013), Thompson Sampling for Contextual Bandits with Linear Payoffs.

Shapes: N requests or labels, S slots, E elements, G content numbers, C context numbers, M draws,
D = 1 + C + G + G C + E coefficients of a slot.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from benchmarks.regret.policies.base import (
    BenchPolicy,
    CatalogNow,
    Choice,
    Facts,
    Floats,
    Floats32,
    Ints,
    Labels,
    RequestBatch,
)
from benchmarks.regret.policies.content import ContentTable
from benchmarks.regret.policies.search import linear_scores, num_draws

SCALE: Final = 0.3
"""Spread of the draws in posterior standard deviations."""
RATE: Final = 0.03
"""Click rate that the prior expects; effects in probabilities are effects in logits times about this."""
SMOOTHING: Final = 50.0
"""Impressions at the overall click rate that a product's own rate begins with."""


class LinearTs(BenchPolicy):
    """A regression for each slot."""

    def __init__(self, facts: Facts, seed: int) -> None:
        super().__init__(facts, seed)
        self._num_draws = num_draws(facts)
        self._content = ContentTable(facts)
        S, E, G, C = facts.num_slots, facts.num_elements, self._content.size, facts.context_size
        sd_D = RATE * np.concatenate(
            [np.full(n, sd) for n, sd in ((1, 0.2), (C, 0.2), (G, 0.06), (G * C, 0.03), (E, 0.08))]
        )
        self._precision_SDD = np.tile(np.diag(sd_D**-2.0), (S, 1, 1))
        self._push_SD = np.zeros((S, len(sd_D)))
        self._seen_P, self._clicks_P = np.zeros(facts.num_products), np.zeros(facts.num_products)
        self._sizes = S, E, G, C
        self._draw()

    def catalog(self, catalog: CatalogNow) -> None:
        """Take the content of new elements."""
        self._content.see(catalog)
        self._draw()

    def choose(self, requests: RequestBatch) -> Choice:
        """Show in each slot what is best on the request's draw."""
        draw_N = self.rng.integers(self._num_draws, size=len(requests))
        context_NC = requests.context(self.facts)
        score_NSA = linear_scores(self._main_MSE, self._context_MSEC, draw_N, context_NC, requests.candidates)
        best_NS1 = score_NSA.argmax(axis=2)[:, :, None]
        return Choice(np.take_along_axis(requests.candidates, best_NS1, axis=2)[:, :, 0])

    def learn(self, labels: Labels) -> None:
        """Add the labels to the statistics, draw anew."""
        if not len(labels):
            return
        above_N = labels.label - self._product_rate()[labels.requests.product]
        rate = self._overall_rate()
        weight_N = labels.weight / (rate * (1 - rate))
        for slot in range(self.facts.num_slots):
            x_ND = self._features(labels.requests, slot, labels.chosen[:, slot])
            self._precision_SDD[slot] += (x_ND * weight_N[:, None]).T @ x_ND
            self._push_SD[slot] += x_ND.T @ (weight_N * above_N)
        np.add.at(self._seen_P, labels.requests.product, labels.weight)
        np.add.at(self._clicks_P, labels.requests.product, labels.weight * labels.label)
        self._draw()

    def _overall_rate(self) -> float:
        return float((self._clicks_P.sum() + RATE * SMOOTHING) / (self._seen_P.sum() + SMOOTHING))

    def _product_rate(self) -> Floats:
        return (self._clicks_P + SMOOTHING * self._overall_rate()) / (self._seen_P + SMOOTHING)

    def _features(self, requests: RequestBatch, slot: int, chosen_N: Ints) -> Floats32:
        n, context_NC = len(requests), requests.context(self.facts)
        content_NG = self._content.table_SEG[slot, chosen_N]
        own_NE = np.zeros((n, self.facts.num_elements), np.float32)
        own_NE[np.arange(n), chosen_N] = 1.0
        products_NGC = content_NG[:, :, None] * context_NC[:, None]
        ones = np.ones((n, 1), np.float32)
        return np.concatenate([ones, context_NC, content_NG, products_NGC.reshape(n, -1), own_NE], axis=1)

    def _draw(self) -> None:
        S, E, G, C = self._sizes
        self._main_MSE = np.empty((self._num_draws, S, E), np.float32)
        self._context_MSEC = np.empty((self._num_draws, S, E, C), np.float32)
        for slot in range(S):
            lower_DD = np.linalg.cholesky(self._precision_SDD[slot])
            noise_DM = self.rng.standard_normal((len(lower_DD), self._num_draws))
            mean_D = np.linalg.solve(self._precision_SDD[slot], self._push_SD[slot])
            theta_MD = mean_D + SCALE * np.linalg.solve(lower_DD.T, noise_DM).T
            _, content_MG, products_M, own_ME = np.split(theta_MD, np.cumsum([1 + C, G, G * C]), axis=1)
            content_EG = self._content.table_SEG[slot]
            self._main_MSE[:, slot] = content_MG @ content_EG.T + own_ME
            self._context_MSEC[:, slot] = content_EG @ products_M.reshape(self._num_draws, G, C)
