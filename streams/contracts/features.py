"""How a context, a product and an element become numbers: the frozen vocabulary that travels with a model.

The learner grows a vocabulary (`streams.contracts.growing`) and freezes it into each snapshot, so a server computes the
very numbers that the learner trained on. Whatever the vocabulary lacks has index -1 and contributes nothing. What an
element itself is becomes numbers in `streams.contracts.encoders`.

Shapes: C context columns, N contexts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import msgspec
import numpy as np
from numpy.typing import NDArray

from streams.contracts.moments import MAX_NUMBER

FloatArray = NDArray[np.float32]
ContextValue = str | int | float | bool

MAX_CONTENT_SIZE = 16
CLIP = 4.0
"""Bound of every content number and every standardized context number: one wild value must not move a model."""


class ContextColumn(msgspec.Struct, frozen=True, kw_only=True):
    """One number of a context: whether `field` has `value`, or, without a value, its standardized number."""

    field: str
    value: str | bool | None = None
    mean: float = 0.0
    sd: float = 1.0


class FeatureSpec(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A frozen vocabulary: the position of a name in these tuples is its row or column in the tensors of a snapshot.

    None stands where a row is free: its name has expired and no other has taken it yet. What the tensors hold there is
    never looked at.
    """

    slots: tuple[str | None, ...]
    context: tuple[ContextColumn | None, ...]
    products: tuple[str | None, ...]
    elements: tuple[tuple[int, str] | None, ...]
    """(index of the slot, element id)."""
    content_size: int
    encoder: str

    def __post_init__(self) -> None:
        """Refuse what could not have been frozen from a growing vocabulary."""
        if not 1 <= self.content_size <= MAX_CONTENT_SIZE:
            raise ValueError(f"content_size is {self.content_size}; must be in [1, {MAX_CONTENT_SIZE}]")
        columns = [column for column in self.context if column is not None]
        for name, values in (
            ("slots", self.slots),
            ("products", self.products),
            ("elements", self.elements),
            ("context", tuple((column.field, column.value) for column in columns)),
        ):
            if len(set(values)) + max(values.count(None) - 1, 0) != len(values):
                raise ValueError(f"{name} of a feature spec hold a name twice")
        slots = {index for index, name in enumerate(self.slots) if name is not None}
        if not {element[0] for element in self.elements if element is not None} <= slots:
            raise ValueError(f"an element of a feature spec names a slot that is none of its {len(slots)}")
        if any(not (math.isfinite(c.mean) and math.isfinite(c.sd) and c.sd > 0) for c in columns):
            raise ValueError("a context column of a feature spec has a mean or sd that is not finite, or sd <= 0")

    def to_json(self) -> bytes:
        """Return the canonical JSON of the vocabulary."""
        return msgspec.json.encode(self)

    @staticmethod
    def from_json(data: bytes) -> FeatureSpec:
        """Read what `to_json` wrote.

        Raises:
            ValueError: If the bytes are no JSON of this form or contradict themselves.
        """
        try:
            return msgspec.json.decode(data, type=FeatureSpec)
        except msgspec.MsgspecError as error:
            raise ValueError(f"not a feature spec: {error}") from None

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of the canonical JSON: two specs with one hash turn everything into the same numbers."""
        return hashlib.sha256(self.to_json()).hexdigest()

    @cached_property
    def slot_index(self) -> dict[str, int]:
        """Slot name -> index."""
        return {name: i for i, name in enumerate(self.slots) if name is not None}

    @cached_property
    def product_index(self) -> dict[str, int]:
        """Product id -> index."""
        return {name: i for i, name in enumerate(self.products) if name is not None}

    @cached_property
    def element_index(self) -> dict[tuple[int, str], int]:
        """(slot index, element id) -> index."""
        return {key: i for i, key in enumerate(self.elements) if key is not None}

    def row_of(self, slot: str, element_id: str) -> int:
        """Return the index of an element of a slot, -1 if it has none."""
        return self.element_index.get((self.slot_index.get(slot, -1), element_id), -1)

    @cached_property
    def columns(self) -> tuple[ContextColumn, ...]:
        """Context columns that are in use."""
        return tuple(column for column in self.context if column is not None)

    @cached_property
    def _categories(self) -> dict[tuple[str, str | bool], int]:
        columns = ((i, column) for i, column in enumerate(self.context) if column is not None)
        return {(c.field, c.value): i for i, c in columns if c.value is not None}

    @cached_property
    def _numbers(self) -> dict[str, tuple[int, float, float]]:
        columns = ((i, column) for i, column in enumerate(self.context) if column is not None)
        return {c.field: (i, c.mean, c.sd) for i, c in columns if c.value is None}

    def context_row(self, context: Mapping[str, ContextValue]) -> FloatArray:
        """Return the (C,) numbers of a context; unknown fields and values and absurd numbers count nothing."""
        row: FloatArray = self.context_matrix([context])[0]
        return row

    def context_matrix(self, contexts: Sequence[Mapping[str, ContextValue]]) -> FloatArray:
        """Return the (N, C) numbers of N contexts, each in [-4, 4]."""
        out = np.zeros((len(contexts), len(self.context)), np.float32)
        categories, numbers = self._categories, self._numbers
        for row, context in zip(out, contexts, strict=True):
            for field, value in context.items():
                if isinstance(value, (str, bool)):
                    column = categories.get((field, value))
                    if column is not None:
                        row[column] = 1.0
                # Comparing and not math.isfinite: an integer may be too large for a float.
                elif field in numbers and -MAX_NUMBER <= value <= MAX_NUMBER:
                    column, mean, sd = numbers[field]
                    row[column] = min(max((value - mean) / sd, -CLIP), CLIP)
        return out
