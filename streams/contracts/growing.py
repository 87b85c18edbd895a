"""The vocabulary of a learner: it grows with what arrives, forgets what no longer does, and freezes into a spec.

Slots, products, elements and context columns (a category, or the number of a field) each have rows of their own,
`Vocabulary` says by which rules. Time is event time, and told: `advance` before the names of an update, `expire` after
them. The clock moves by at most a sixteenth of the time to live an update, so neither a night without traffic nor one
wrong time stamp expires what is in use.

Everything follows from the order of the calls and their arguments, and `state` and `restore` go on exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streams.contracts.encoders import ContentEncoder
from streams.contracts.features import MAX_CONTENT_SIZE, ContextColumn, ContextValue, FeatureSpec
from streams.contracts.moments import MAX_NUMBER, Moments
from streams.contracts.vocabulary import UNKNOWN, Vocabulary

DAY_MS = 86_400_000


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureLimits:
    """Bounds of a vocabulary. Beyond a cap a name stays unknown and is counted, until a row falls free."""

    content_size: int = 8
    """F: content numbers an element, in [1, 16]."""
    max_slots: int = 16
    max_context_columns: int = 32
    max_values_per_field: int = 24
    """Columns that one context field may take, so that a field of countless values leaves room for the others."""
    max_products: int = 16_384
    max_elements: int = 4096
    min_seen: int = 1
    """How often a name must be seen to get a row, unless a catalog holds it."""
    expire_after_ms: int = 7 * DAY_MS
    """Names that no catalog holds lose their rows when they were not seen for so much event time."""

    def __post_init__(self) -> None:
        """Refuse sizes that a feature spec would refuse later."""
        if not 1 <= self.content_size <= MAX_CONTENT_SIZE:
            raise ValueError(f"content_size is {self.content_size}; must be in [1, {MAX_CONTENT_SIZE}]")
        names = ("max_slots", "max_context_columns", "max_values_per_field", "max_products", "max_elements")
        for name in (*names, "min_seen", "expire_after_ms"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Freed:
    """Rows whose names have expired. What was learned for them must be reset before a new name takes them."""

    slots: tuple[int, ...] = ()
    context: tuple[int, ...] = ()
    products: tuple[int, ...] = ()
    elements: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        """Say whether there is any."""
        return bool(self.slots or self.context or self.products or self.elements)


class GrowingFeatureSpec:
    """Slots, products, elements and context columns of one model."""

    def __init__(self, limits: FeatureLimits | None = None, encoder: ContentEncoder | None = None) -> None:
        """Start empty.

        Args:
            limits: Bounds.
            encoder: What turns the content of elements into numbers; a `ContentEncoder` if left out.
        """
        self.limits = limits = limits or FeatureLimits()
        self.encoder = encoder or ContentEncoder(limits.content_size)
        self.now_ms = 0
        self._slots = Vocabulary[str](limits.max_slots, min_seen=limits.min_seen)
        self._products = Vocabulary[str](limits.max_products, min_seen=limits.min_seen)
        self._elements = Vocabulary[tuple[str, str]](limits.max_elements, min_seen=limits.min_seen)
        self._columns = Vocabulary[tuple[str, str | bool | None]](limits.max_context_columns, min_seen=limits.min_seen)
        self._moments: dict[str, Moments] = {}
        self._values: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._frozen_elements: tuple[tuple[int, int], tuple[tuple[int, str] | None, ...]] = (-1, -1), ()

    # -- names --------------------------------------------------------------------------------------------------------

    def advance(self, now_ms: int) -> None:
        """Say that event time is `now_ms`; names seen from here on were seen then."""
        if self.now_ms == 0:
            self.now_ms = max(now_ms, 0)
        else:
            step = max(1, self.limits.expire_after_ms // 16)
            self.now_ms = max(self.now_ms, min(now_ms, self.now_ms + step))

    def slot(self, name: str, *, seen: int = 1) -> int:
        """Return the index of a slot seen `seen` times, or -1 if it is too rare or the vocabulary full."""
        return self._slots.row(name, self.now_ms, seen=seen)

    def product(self, product_id: str, *, seen: int = 1) -> int:
        """Return the index of a product seen `seen` times, or -1 if it is too rare or the vocabulary full."""
        return self._products.row(product_id, self.now_ms, seen=seen)

    def element(self, slot: str, element_id: str, *, seen: int = 1) -> int:
        """Return the index of an element of a slot seen `seen` times, or -1 if it is too rare or a vocabulary full."""
        if self.slot(slot, seen=seen) == UNKNOWN:
            return UNKNOWN
        return self._elements.row((slot, element_id), self.now_ms, seen=seen)

    def touch(self, *, slots: NDArray[np.int64], elements: NDArray[np.int64]) -> None:
        """Say that the names of these rows were seen, for callers that remember rows; -1 is passed over."""
        self._slots.touch(slots, self.now_ms)
        self._elements.touch(elements, self.now_ms)

    def catalog(self, products: Iterable[str], elements: Iterable[tuple[str, str]]) -> None:
        """Say what the catalog holds now: products, and elements as (slot, id).

        They get rows at once and keep them while the catalog holds them. Those that it has dropped expire later, like
        any name that is no longer seen: impressions of them may still be on their way.
        """
        named = list(elements)
        self._slots.pin(dict.fromkeys(slot for slot, _ in named), self.now_ms)
        self._products.pin(products, self.now_ms)
        self._elements.pin((key for key in named if self._slots.get(key[0]) != UNKNOWN), self.now_ms)

    # -- contexts -----------------------------------------------------------------------------------------------------

    def context(self, context: Mapping[str, ContextValue]) -> None:
        """Learn the columns of one context and the mean and spread of its numbers."""
        for field, value in context.items():
            if isinstance(value, (str, bool)):
                self.category(field, value)
            elif -MAX_NUMBER <= value <= MAX_NUMBER:
                self.numbers(field, (value,))
            else:
                self._refused["context_absurd"] += 1

    def category(self, field: str, value: str | bool, *, seen: int = 1) -> None:
        """Learn that a field had a value `seen` times."""
        if self._columns.get((field, value)) == UNKNOWN and self._values[field] >= self.limits.max_values_per_field:
            self._refused["context_crowded"] += seen
        else:
            self._column(field, value, seen)

    def numbers(self, field: str, values: ArrayLike) -> None:
        """Learn the numbers that a field had, (N,); those that are not finite or absurd are counted and left out."""
        moments = Moments.of(values)
        self._refused["context_absurd"] += np.size(values) - moments.count
        if moments.count and self._column(field, None, moments.count) != UNKNOWN:
            self._moments[field] = self._moments.get(field, Moments()).merge(moments)

    def _column(self, field: str, value: str | bool | None, seen: int) -> int:
        before = len(self._columns)
        row = self._columns.row((field, value), self.now_ms, seen=seen)
        self._values[field] += len(self._columns) - before
        return row

    # -- forgetting ---------------------------------------------------------------------------------------------------

    def expire(self) -> Freed:
        """Free the rows of all names that were not seen for long and that no catalog holds."""
        before_ms = self.now_ms - self.limits.expire_after_ms
        elements = self._elements.expire(before_ms)
        in_use = {self._slots.get(name[0]) for name in self._elements.names if name is not None}
        columns = self._columns.names
        freed = Freed(
            elements=tuple(elements),
            products=tuple(self._products.expire(before_ms)),
            context=tuple(self._columns.expire(before_ms)),
            slots=tuple(self._slots.expire(before_ms, keep=in_use)),
        )
        for field, value in (columns[row] or ("", None) for row in freed.context):
            self._values[field] -= 1
            if value is None:
                self._moments.pop(field, None)
        self._values = +self._values
        return freed

    @property
    def unknown(self) -> Counter[str]:
        """Sightings of names without a row, by kind and reason.

        `product_rare`, `element_full` and so on; `context_crowded`: its field has too many values; `context_absurd`: a
        number that is not finite or too large.
        """
        counts = {
            "slot": self._slots.unknown,
            "product": self._products.unknown,
            "element": self._elements.unknown,
            "context": self._columns.unknown,
        }
        named = Counter({f"{kind}_{reason}": n for kind, unknown in counts.items() for reason, n in unknown.items()})
        return +(named + self._refused)

    # -- what it is now -----------------------------------------------------------------------------------------------

    def freeze(self) -> FeatureSpec:
        """Return the vocabulary as it is now."""
        version = self._slots.version, self._elements.version
        if self._frozen_elements[0] != version:
            # Thousands of elements that seldom change, and a spec for every update.
            slot_of = {name: row for row, name in enumerate(self._slots.names)}
            elements = tuple(key and (slot_of[key[0]], key[1]) for key in self._elements.names)
            self._frozen_elements = version, elements
        return FeatureSpec(
            slots=self._slots.names,
            context=tuple(key and self._frozen_column(*key) for key in self._columns.names),
            products=self._products.names,
            elements=self._frozen_elements[1],
            content_size=self.limits.content_size,
            encoder=self.encoder.id,
        )

    def _frozen_column(self, field: str, value: str | bool | None) -> ContextColumn:
        if value is not None:
            return ContextColumn(field=field, value=value)
        moments = self._moments[field]
        return ContextColumn(field=field, mean=moments.mean, sd=moments.sd)

    def state(self) -> dict[str, Any]:
        """Return all of it as JSON-able values, the encoder apart."""
        return {
            "now_ms": self.now_ms,
            "slots": self._slots.state(),
            "products": self._products.state(),
            "elements": self._elements.state(),
            "columns": self._columns.state(),
            "moments": {field: [m.count, m.mean, m.squares] for field, m in self._moments.items()},
            "refused": dict(self._refused),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the place of the vocabulary that `state` described.

        Raises:
            ValueError: If it has more rows than the limits allow now.
        """
        self.now_ms = state["now_ms"]
        self._slots.restore(**state["slots"])
        self._products.restore(**state["products"])
        self._elements.restore(**_with_tuples(state["elements"]))
        self._columns.restore(**_with_tuples(state["columns"]))
        self._moments = {
            field: Moments(count=count, mean=mean, squares=squares)
            for field, (count, mean, squares) in state["moments"].items()
        }
        self._values = Counter(key[0] for key in self._columns.names if key is not None)
        self._refused = Counter(state["refused"])
        self._frozen_elements = (-1, -1), ()


def _with_tuples(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a vocabulary whose names are pairs, which JSON makes lists."""
    names = [name and tuple(name) for name in state["names"]]
    waiting = [(tuple(name), count) for name, count in state["waiting"]]
    return {**state, "names": names, "waiting": waiting}
