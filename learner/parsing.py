"""Examples as numbers of distinct values: what repeats is parsed once.

Products, contexts and candidates of a batch become lists of distinct values and, for each row, the number of its value.
Contexts and candidates that were parsed are kept over batches, within bounds. Nothing here knows a vocabulary; what is
wrong with a value is told in place of it, and `learner.faults` gives the reason.

Shapes: N examples, T slots of the widest set of candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from learner.candidate_sets import CandidateSet, CandidateShelf
from streams.contracts.events import MAX_CONTEXT_FIELDS
from streams.contracts.examples import ContextValue, ExampleBatch, parse_context

IntArray = NDArray[np.int64]
Context = dict[str, ContextValue]

MAX_CONTEXTS: Final = 65_536
"""Contexts that are kept, of any size an impression may have."""


@dataclass(frozen=True, slots=True)
class ParsedExamples:
    """N examples, their values by number."""

    products: list[str]
    product: IntArray
    """(N,): number of each row's product."""
    contexts: list[Context | None]
    """None: no JSON object of strings, finite numbers and booleans, or too many."""
    context: IntArray
    """(N,)"""
    sets: list[CandidateSet | None]
    """None: no candidates that an impression may have."""
    set: IntArray
    """(N,)"""
    place: IntArray
    """(N, T): place of the chosen element in each slot of the row's set, as `CandidateShelf.places`."""

    def __len__(self) -> int:
        """Return N."""
        return len(self.product)


class ExampleParser:
    """Parses batches, and remembers what it has parsed."""

    def __init__(self) -> None:
        self.shelf = CandidateShelf()
        self._contexts: dict[str, Context | None] = {}

    def parse(self, batch: ExampleBatch) -> ParsedExamples:
        """Return the examples with each distinct value parsed."""
        column = batch.columns.column
        products, product_N = _distinct(column("product_id"))
        texts, context_N = _distinct(column("context"))
        if len(self._contexts) > MAX_CONTEXTS:
            self._contexts.clear()
        contexts = [self._context(text) for text in texts]
        sets, set_N = self.shelf.find(column("candidates"))
        place_NT = self.shelf.places(sets, set_N, column("creative"))
        return ParsedExamples(products, product_N, contexts, context_N, sets, set_N, place_NT)

    def _context(self, text: str) -> Context | None:
        if text not in self._contexts:
            self._contexts[text] = _sound_context(text)
        return self._contexts[text]


def _sound_context(text: str) -> Context | None:
    try:
        context = parse_context(text)
    except ValueError:
        return None
    is_sound = len(context) <= MAX_CONTEXT_FIELDS and all(map(_is_sound_value, context.values()))
    return context if is_sound else None


def _is_sound_value(value: ContextValue) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or -(2**53) <= value <= 2**53


def _distinct(texts: pa.Array) -> tuple[list[str], IntArray]:
    """Return the distinct texts in order of appearance, and which one each row has."""
    encoded = texts.dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)
