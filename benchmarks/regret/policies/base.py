"""What the benchmark tells a policy, and what it asks of it.

Everything is a number, so that peers are fast: products count from 0, elements of a slot from 0 in order of appearance
(numbers are never used again), contexts are C numbers. `catalog` is called before the first decision and whenever
elements change, `choose` for each batch of requests, `learn` between two batches with the labels that have come since.

Shapes: N requests or labels, P products, S slots, A candidates of a slot, E elements alive in a slot, F content
numbers, C context numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]
Ints = NDArray[np.int64]

FINAL: Final = 0
"""Kind of a label that will not change: a click."""
PROVISIONAL: Final = 1
"""Kind of a label without a click so far."""
LATE_POSITIVE: Final = 2
"""Kind of a label that corrects a provisional one: the click came after it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Sizes of a world."""

    num_products: int
    num_slots: int
    num_candidates: int
    num_elements: int
    """Element numbers that a slot uses during the run, new elements included."""
    content_size: int
    devices: tuple[str, ...]
    segments: tuple[str, ...]
    slots: tuple[str, ...]

    @property
    def context_size(self) -> int:
        """C: one number for each device and segment, and one for the hour."""
        return len(self.devices) + len(self.segments) + 1


@dataclass(frozen=True, slots=True)
class CatalogNow:
    """The elements alive and the candidates of the products."""

    first: int
    """Number of the oldest element alive, the same in every slot."""
    content: Floats32
    """(S, E, F): content of the elements `first`, `first` + 1, ..."""
    candidates: Ints
    """(P, S, A): element numbers, ascending in each slot."""


@dataclass(frozen=True)
class RequestBatch:
    """N page views that need a creative."""

    product: Ints
    device: Ints
    segment: Ints
    hour: Ints
    """0 to 23."""
    candidates: Ints
    """(N, S, A) element numbers."""

    def __len__(self) -> int:
        """Return N."""
        return len(self.product)

    def take(self, rows: Ints) -> RequestBatch:
        """Return the batch of the given rows."""
        return RequestBatch(*(getattr(self, field.name)[rows] for field in fields(self)))

    @classmethod
    def concat(cls, parts: Sequence[RequestBatch]) -> RequestBatch:
        """Return the parts one after the other."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def context(self, facts: Facts) -> Floats32:
        """Return device and segment one-hot, and the hour in standard deviations."""
        out = np.zeros((len(self), facts.context_size), np.float32)
        rows = np.arange(len(self))
        out[rows, self.device] = 1.0
        out[rows, len(facts.devices) + self.segment] = 1.0
        out[:, -1] = (self.hour - 11.5) / 6.92
        return out


class Choice(NamedTuple):
    """What a policy shows."""

    chosen: Ints
    """(N, S) element numbers, each among the candidates of its request and slot."""
    propensity: Floats | None = None
    """(N, S): probability of each slot's element given those of the earlier slots; None where the policy cannot tell,
    as Thompson sampling can not."""


@dataclass(frozen=True, slots=True)
class Labels:
    """N labels, in the order in which a joiner emits them."""

    number: Ints
    """Number of the impression since the world began."""
    requests: RequestBatch
    chosen: Ints
    """(N, S)"""
    propensity: Floats
    """(N, S): as the policy chose; 1 where it did not tell."""
    label: Ints
    """1 if clicked."""
    kind: Ints
    """`FINAL`, `PROVISIONAL` or `LATE_POSITIVE`."""
    occurred_ms: Ints
    """When the impression was shown, since the world began."""
    delay_ms: Ints
    """From the impression to its click, 0 without one."""
    weight: Floats
    """Impressions that this one stands for; 1 unless a log was thinned."""

    def __len__(self) -> int:
        """Return N."""
        return len(self.number)

    def take(self, rows: Ints) -> Labels:
        """Return the labels of the given rows, in that order."""
        columns: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return Labels(**{name: c.take(rows) if name == "requests" else c[rows] for name, c in columns.items()})

    @classmethod
    def concat(cls, parts: Sequence[Labels]) -> Labels:
        """Return the parts one after the other."""
        columns: dict[str, Any] = {}
        for field in fields(cls):
            values = [getattr(part, field.name) for part in parts]
            columns[field.name] = RequestBatch.concat(values) if field.name == "requests" else np.concatenate(values)
        return cls(**columns)


class BenchPolicy(ABC):
    """A policy under test; its settings are its defaults, the same in every world."""

    def __init__(self, facts: Facts, seed: int) -> None:
        """Begin to know nothing.

        Args:
            facts: Sizes of the world.
            seed: Of everything random in the policy.
        """
        self.facts = facts
        self.rng = np.random.default_rng([seed, 7])

    @abstractmethod
    def catalog(self, catalog: CatalogNow) -> None:
        """Take notice of the elements alive."""

    @abstractmethod
    def choose(self, requests: RequestBatch) -> Choice:
        """Decide a batch of requests."""

    @abstractmethod
    def learn(self, labels: Labels) -> None:
        """Learn from the labels that have come since the last call; there may be none."""


def known_content(facts: Facts, known_SEF: Floats32 | None, catalog: CatalogNow) -> Floats32:
    """Return (S, num_elements, F) content by element number, zeros for those that have not appeared yet."""
    if known_SEF is None:
        known_SEF = np.zeros((facts.num_slots, facts.num_elements, facts.content_size), np.float32)
    alive = slice(catalog.first, catalog.first + catalog.content.shape[1])
    known_SEF[:, alive] = catalog.content
    return known_SEF
