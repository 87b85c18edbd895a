"""The models that predict: the one that served when an impression was shown, and a frozen one beside it.

A model predicts only impressions that were shown after it had been trained and while it served, so every prediction was
made before its label (progressive validation). The reference is a model of a while ago. What both get wrong has changed
in the world; what only the newer one gets wrong was learned wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from streams.contracts.examples import ExampleBatch
from streams.contracts.registry import Version

FloatArray = NDArray[np.float64]

MAX_MODELS: Final = 32
MIN_AGE_MS: Final = 120_000
MAX_AGE_MS: Final = 3_600_000
"""A reference is replaced when it is half as old as the first model, but within these bounds: the first minutes of a
learner are no measure of the next hours."""


class Predictor(Protocol):
    """Knows one snapshot."""

    def predict(self, batch: ExampleBatch) -> FloatArray:
        """Return the click probabilities of N examples under the posterior mean, (N,)."""
        ...


@dataclass(frozen=True, slots=True)
class Model:
    """A snapshot that served, from when on, and what is known of it."""

    version: Version
    since_ms: int
    """Impressions from here on are predicted by it."""
    trained_to_ms: int
    """Newest impression that it has learned."""
    predictor: Predictor
    norms: Mapping[str, float] = field(default_factory=dict)
    """Sizes of its weights, by name."""
    epsilon: float = 0.01
    """Share of the traffic that it leaves uniform."""


class Models:
    """The models of the last minutes, and the reference."""

    def __init__(self) -> None:
        self._served: list[Model] = []
        self._first_ms = 0
        self.reference: Model | None = None
        self.num_not_finite = 0
        """Predictions by models that served which are no numbers."""

    @property
    def current(self) -> Model | None:
        """The model that serves now."""
        return self._served[-1] if self._served else None

    def add(self, model: Model) -> None:
        """Take the model that serves from now on, which may be an older one after a rollback."""
        if not self._served:
            self._first_ms = model.since_ms
        self._served = [*self._served, model][-MAX_MODELS:]

    def renew_reference(self, now_ms: int, *, force: bool = False) -> bool:
        """Freeze the current model if the reference has come of age (or by force); return whether it was done."""
        current = self.current
        if current is None:
            return False
        limit = min(max((now_ms - self._first_ms) // 2, MIN_AGE_MS), MAX_AGE_MS)
        is_young = self.reference is not None and now_ms - self.reference.since_ms < limit
        if is_young and not force:
            return False
        self.reference = current
        return True

    def predict(self, batch: ExampleBatch) -> tuple[FloatArray, FloatArray]:
        """Return the predictions of the model that served and of the reference, (N,) each; nan: there was none."""
        times_N = batch.occurred_at_ms
        current_N, reference_N = np.full(len(batch), np.nan), np.full(len(batch), np.nan)
        if not self._served:
            return current_N, reference_N
        # The first model was there before anybody looked; what it had learned it must not predict.
        starts = np.array([model.since_ms for model in self._served])
        starts[0] = min(starts[0], self._served[0].trained_to_ms + 1)
        which_N = np.searchsorted(starts, times_N, side="right") - 1
        for number in np.unique(which_N[which_N >= 0]).tolist():
            rows = np.flatnonzero(which_N == number)
            part = batch if len(rows) == len(batch) else batch.take(rows)
            predicted = self._served[number].predictor.predict(part)
            self.num_not_finite += int((~np.isfinite(predicted)).sum())
            current_N[rows] = predicted
        if self.reference is not None:
            rows = np.flatnonzero(times_N >= min(self.reference.since_ms, self.reference.trained_to_ms + 1))
            if len(rows):
                part = batch if len(rows) == len(batch) else batch.take(rows)
                reference_N[rows] = self.reference.predictor.predict(part)
        return current_N, reference_N
