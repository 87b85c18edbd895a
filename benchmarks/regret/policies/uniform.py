"""Uniform play: every candidate with the same probability. Its regret is 1 but for the noise of its choices."""

from __future__ import annotations

import numpy as np

from benchmarks.regret.policies.base import BenchPolicy, CatalogNow, Choice, Labels, RequestBatch


class Uniform(BenchPolicy):
    """Learns nothing."""

    def catalog(self, catalog: CatalogNow) -> None:
        """Need no catalog."""

    def choose(self, requests: RequestBatch) -> Choice:
        """Draw a candidate for each slot."""
        num_requests, num_slots, width = requests.candidates.shape
        place_NS = self.rng.integers(width, size=(num_requests, num_slots))
        chosen_NS = np.take_along_axis(requests.candidates, place_NS[:, :, None], axis=2)[:, :, 0]
        return Choice(chosen_NS, np.full((num_requests, num_slots), 1.0 / width))

    def learn(self, labels: Labels) -> None:
        """Learn nothing."""
