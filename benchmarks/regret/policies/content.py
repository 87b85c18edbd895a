"""Content of the elements as a few numbers each, for peers that take products of them.

Up to `MAX_SIZE` numbers are taken as they are. Of more the first principal components over the catalog are taken,
fitted when the elements are first seen, scaled together to a mean variance of 1.

Shapes: S slots, E elements, F content numbers, G <= F of them kept.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from benchmarks.regret.policies.base import CatalogNow, Facts, Floats, Floats32

MAX_SIZE: Final = 8


class ContentTable:
    """(S, E, G) content by element number; zeros for elements that have not appeared."""

    def __init__(self, facts: Facts) -> None:
        self.size = min(facts.content_size, MAX_SIZE)
        self.table_SEG: Floats32 = np.zeros((facts.num_slots, facts.num_elements, self.size), np.float32)
        self._mean_F: Floats | None = None
        self._basis_FG: Floats = np.eye(facts.content_size)

    def see(self, catalog: CatalogNow) -> None:
        """Take notice of the elements alive."""
        content_SEF = catalog.content.astype(np.float64)
        if self._mean_F is None:
            self._mean_F = np.zeros(content_SEF.shape[2])
            if content_SEF.shape[2] > self.size:
                self._fit(content_SEF.reshape(-1, content_SEF.shape[2]))
        alive = slice(catalog.first, catalog.first + content_SEF.shape[1])
        self.table_SEG[:, alive] = (content_SEF - self._mean_F) @ self._basis_FG

    def _fit(self, content_EF: Floats) -> None:
        self._mean_F = content_EF.mean(axis=0)
        _, singular, rows = np.linalg.svd(content_EF - self._mean_F, full_matrices=False)
        scale = np.sqrt((singular[: self.size] ** 2).mean() / len(content_EF))
        self._basis_FG = rows[: self.size].T / scale
