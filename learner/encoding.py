"""Parsed examples as the numbers of an update; their new names enter the vocabulary first.

Only distinct values are looked up, and sets of candidates only when they are new: a name keeps its index, so those of a
set are kept over batches. A set of which a full vocabulary lacks something is looked up every time.

Shapes: N rows, U distinct values of a batch, T slots of the widest set, V candidates of a set, slot after slot, S slots
of the vocabulary, F content numbers, C context columns, E elements.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.candidate_sets import CandidateSet
from learner.design import Rows
from learner.generator import padded
from learner.parsing import Context, ParsedExamples
from streams.contracts.features import UNKNOWN, FeatureSpec, GrowingFeatureSpec

IntArray = NDArray[np.int64]

MAX_SETS: Final = 32_768
"""Sets of candidates whose indices are kept."""


@dataclass(frozen=True, slots=True)
class SetIndex:
    """A set of candidates in the vocabulary; -1 stands for what the vocabulary lacks."""

    slot: IntArray
    """(T,)"""
    first: IntArray
    """(T,): where the candidates of each slot begin."""
    element: IntArray
    """(V,)"""
    is_whole: bool
    """Whether the vocabulary has all of it."""


@dataclass(frozen=True, slots=True)
class IndexedRows:
    """N rows in the vocabulary."""

    product: IntArray
    """(N,)"""
    contexts: list[Context]
    """Distinct ones."""
    context: IntArray
    """(N,): which of them each row has."""
    slot: IntArray
    """(N, T): slots of each row's set, in its own order; -1 where there is none or the vocabulary lacks it."""
    element: IntArray
    """(N, T): the chosen element of each of them, or -1."""

    def encode(self, spec: FeatureSpec, content_EF: Tensor) -> Rows:
        """Return the rows as numbers.

        Args:
            spec: The vocabulary, as it is after these rows have entered.
            content_EF: Content of its elements.
        """
        chosen_NS = np.full((len(self.product), len(spec.slots)), UNKNOWN, np.int64)
        row, place = np.nonzero(self.slot != UNKNOWN)
        chosen_NS[row, self.slot[row, place]] = self.element[row, place]
        chosen = torch.from_numpy(chosen_NS)
        content_NSF = padded(content_EF, (len(content_EF) + 1, content_EF.shape[1]))[chosen]
        context_NC = spec.context_matrix(self.contexts)[self.context]
        return Rows(torch.from_numpy(self.product), torch.from_numpy(context_NC), chosen, content_NSF)


class ExampleEncoder:
    """Finds what examples name in a vocabulary that grows with them."""

    def __init__(self, features: GrowingFeatureSpec) -> None:
        self._features = features
        self._sets: OrderedDict[CandidateSet, SetIndex] = OrderedDict()

    def forget(self) -> None:
        """Forget all indices that are kept, because names have got others."""
        self._sets.clear()

    def observe(self, parsed: ParsedExamples, rows: IntArray) -> IndexedRows:
        """Return N rows in the vocabulary, into which all that they name enters: products, contexts and candidates.

        All candidates, not only the chosen: the next decision may choose any of them.
        """
        used, product_N = _used(parsed.product[rows])
        product_U = np.array([self._features.product(parsed.products[u]) for u in used], np.int64)
        contexts, context_N = self._observe_contexts(parsed, rows)
        slot_NT, element_NT = self._observe_creatives(parsed, rows)
        return IndexedRows(product_U[product_N], contexts, context_N, slot_NT, element_NT)

    def _observe_contexts(self, parsed: ParsedExamples, rows: IntArray) -> tuple[list[Context], IntArray]:
        used, context_N = _used(parsed.context[rows])
        contexts = [context for u in used if (context := parsed.contexts[u]) is not None]
        for context, times in zip(contexts, np.bincount(context_N).tolist(), strict=True):
            self._features.context(context, times)
        return contexts, context_N

    def _observe_creatives(self, parsed: ParsedExamples, rows: IntArray) -> tuple[IntArray, IntArray]:
        used, set_N = _used(parsed.set[rows])
        found = [self.index(candidates) for u in used if (candidates := parsed.sets[u]) is not None]
        place_NT = parsed.place[rows]
        slot_UT = np.full((len(found), place_NT.shape[1]), UNKNOWN, np.int64)
        first_UT = np.zeros_like(slot_UT)
        start = 0
        for u, index in enumerate(found):
            slot_UT[u, : len(index.slot)] = index.slot
            first_UT[u, : len(index.slot)] = start + index.first
            start += len(index.element)
        slot_NT = slot_UT[set_N]
        element_V = np.concatenate([index.element for index in found])
        element_NT = np.where(place_NT >= 0, element_V[first_UT[set_N] + np.maximum(place_NT, 0)], UNKNOWN)
        return slot_NT, element_NT

    def index(self, candidates: CandidateSet) -> SetIndex:
        """Return where a set stands in the vocabulary; names that are new enter it."""
        found = self._sets.get(candidates)
        if found is None or not found.is_whole:
            found = self._sets[candidates] = self._look_up(candidates)
            if len(self._sets) > MAX_SETS:
                self._sets.popitem(last=False)
        return found

    def _look_up(self, candidates: CandidateSet) -> SetIndex:
        features, pairs = self._features, zip(candidates.slots, candidates.elements, strict=True)
        slot_T = np.array([features.slot(name) for name in candidates.slots], np.int64)
        element_V = np.array([features.element(name, e) for name, ids in pairs for e in ids], np.int64)
        is_whole = bool((slot_T != UNKNOWN).all() and (element_V != UNKNOWN).all())
        return SetIndex(slot_T, candidates.size_T.cumsum() - candidates.size_T, element_V, is_whole)


def _used(number_N: IntArray) -> tuple[list[int], IntArray]:
    """Return which numbers stand there, in ascending order, and the place of each row's number among them."""
    is_used = np.bincount(number_N) > 0
    return np.flatnonzero(is_used).tolist(), (is_used.cumsum() - 1)[number_N]
