"""Thompson sampling on the click rate of each element by itself: a Beta posterior for each product, slot and element.

For each product apart, for products differ more in click rate than elements do: shared over products, an element's rate
would be that of its products. The prior is worth 31 impressions at a click rate of 3.2 %; with a flat one it would
play uniformly for most of a run.

References:
    Chapelle and Li (2011), An Empirical Evaluation of Thompson Sampling.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from benchmarks.regret.policies.base import BenchPolicy, CatalogNow, Choice, Facts, Labels, RequestBatch

PRIOR_CLICKS: Final = 1.0
PRIOR_SKIPS: Final = 30.0


class BetaTs(BenchPolicy):
    """Counts clicks and impressions; N requests, P products, S slots, E elements, A candidates."""

    def __init__(self, facts: Facts, seed: int) -> None:
        super().__init__(facts, seed)
        shape = facts.num_products, facts.num_slots, facts.num_elements
        self._clicks_PSE = np.full(shape, PRIOR_CLICKS, np.float32)
        self._skips_PSE = np.full(shape, PRIOR_SKIPS, np.float32)

    def catalog(self, catalog: CatalogNow) -> None:
        """Need no content."""

    def choose(self, requests: RequestBatch) -> Choice:
        """Draw a click rate for every candidate and show the largest of each slot."""
        arms = requests.product[:, None, None], np.arange(self.facts.num_slots)[:, None], requests.candidates
        rate_NSA = self.rng.beta(self._clicks_PSE[arms], self._skips_PSE[arms])
        best_NS1 = rate_NSA.argmax(axis=2)[:, :, None]
        return Choice(np.take_along_axis(requests.candidates, best_NS1, axis=2)[:, :, 0])

    def learn(self, labels: Labels) -> None:
        """Count; a late click does not take back that its impression was counted without one."""
        for slot in range(self.facts.num_slots):
            arms = labels.requests.product, labels.chosen[:, slot]
            np.add.at(self._clicks_PSE[:, slot], arms, labels.weight * labels.label)
            np.add.at(self._skips_PSE[:, slot], arms, labels.weight * (1 - labels.label))
