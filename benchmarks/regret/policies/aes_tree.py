"""Thompson sampling on a tree of elements, after AES (Chen et al. 2021): an exact search, for pairs along the tree.

The tree is the chain of the slots: a card scores by its elements and by the pairs of neighboring slots' elements, so
dynamic programming finds the best card of a draw exactly. Bayesian linear regression with full covariance on the click
itself, as the paper's, for each product apart; the size of its posterior grows with the square of the pairs, so it
plays only where a product is alone. Knows neither content nor context.

References:
    Chen et al. (2021), Automated Creative Selection (AES), arXiv 2103.01453.

Shapes: N requests or labels, S slots, E elements, M draws, D = S E + (S - 1) E E coefficients.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from benchmarks.regret.policies.base import BenchPolicy, CatalogNow, Choice, Facts, Floats, Ints, Labels, RequestBatch

DRAWS: Final = 256
SCALE: Final = 0.5
"""Spread of the draws in posterior standard deviations."""
RATE: Final = 0.03
"""Click rate that the prior expects; effects in probabilities are effects in logits times about this."""
ELEMENT_SD: Final = 0.15
PAIR_SD: Final = 0.15
"""Prior standard deviations in logits."""


class AesTree(BenchPolicy):
    """Elements and neighboring pairs of one product.

    Raises:
        ValueError: If there is more than one product.
    """

    def __init__(self, facts: Facts, seed: int) -> None:
        super().__init__(facts, seed)
        if facts.num_products != 1:
            raise ValueError(f"aes-tree plays one product; the world has {facts.num_products}")
        S, E = facts.num_slots, facts.num_elements
        sd_D = RATE * np.concatenate([[1.0], np.full(S * E, ELEMENT_SD), np.full((S - 1) * E * E, PAIR_SD)])
        self._precision_DD = np.diag(sd_D**-2.0)
        self._push_D = np.zeros(len(sd_D))
        self._push_D[0] = RATE / sd_D[0] ** 2
        self._num_clicks, self._num_seen = 1.0, 1.0 / RATE
        self._draw()

    def catalog(self, catalog: CatalogNow) -> None:
        """Need no content."""

    def choose(self, requests: RequestBatch) -> Choice:
        """Find the best card of each request's draw, from the last slot back to the first."""
        draw_N = self.rng.integers(DRAWS, size=len(requests))
        candidates_NSA = requests.candidates
        N, S = candidates_NSA.shape[:2]
        rows = np.arange(N)
        value_NA = self._element_MSE[draw_N[:, None], S - 1, candidates_NSA[:, S - 1]]
        follows: list[Ints] = []
        for slot in range(S - 2, -1, -1):
            here_NA, next_NA = candidates_NSA[:, slot], candidates_NSA[:, slot + 1]
            pair_NAA = self._pair_MSEE[draw_N[:, None, None], slot, here_NA[:, :, None], next_NA[:, None, :]]
            total_NAA = pair_NAA + value_NA[:, None, :]
            follows.append(total_NAA.argmax(axis=2))
            value_NA = self._element_MSE[draw_N[:, None], slot, here_NA] + total_NAA.max(axis=2)
        place_N = value_NA.argmax(axis=1)
        chosen_NS = np.empty((N, S), np.int64)
        for slot in range(S):
            chosen_NS[:, slot] = candidates_NSA[rows, slot, place_N]
            if slot < S - 1:
                place_N = follows[S - 2 - slot][rows, place_N]
        return Choice(chosen_NS)

    def learn(self, labels: Labels) -> None:
        """Add the labels to the statistics, draw anew."""
        if not len(labels):
            return
        S, E, chosen_NS = self.facts.num_slots, self.facts.num_elements, labels.chosen
        rows = np.arange(len(labels))
        x_ND = np.zeros((len(labels), len(self._push_D)))
        x_ND[:, 0] = 1.0
        for slot in range(S):
            x_ND[rows, 1 + slot * E + chosen_NS[:, slot]] = 1.0
        for slot in range(S - 1):
            column_N = (slot * E + chosen_NS[:, slot]) * E + chosen_NS[:, slot + 1]
            x_ND[rows, 1 + S * E + column_N] = 1.0
        self._num_clicks += float(labels.label.sum())
        self._num_seen += len(labels)
        rate = self._num_clicks / self._num_seen
        weight_N = labels.weight / (rate * (1 - rate))
        self._precision_DD += (x_ND * weight_N[:, None]).T @ x_ND
        self._push_D += x_ND.T @ (weight_N * labels.label)
        self._draw()

    def _draw(self) -> None:
        S, E = self.facts.num_slots, self.facts.num_elements
        lower_DD = np.linalg.cholesky(self._precision_DD)
        noise_DM: Floats = self.rng.standard_normal((len(lower_DD), DRAWS))
        mean_D = np.linalg.solve(self._precision_DD, self._push_D)
        theta_MD = mean_D + SCALE * np.linalg.solve(lower_DD.T, noise_DM).T
        self._element_MSE = theta_MD[:, 1 : 1 + S * E].reshape(DRAWS, S, E)
        self._pair_MSEE = theta_MD[:, 1 + S * E :].reshape(DRAWS, S - 1, E, E)
