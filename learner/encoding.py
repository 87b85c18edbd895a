"""Parsed examples as the numbers of an update; their new names enter the vocabulary first.

Only distinct values are looked up, and a set of candidates only until the vocabulary has all of it: a name keeps its
index, so those of a set are kept over batches.

Shapes: N rows, U distinct values of a batch, T slots of the widest set, V candidates of a set, slot after slot, S slots
of the vocabulary, F content numbers, C context columns, E elements.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
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
from streams.contracts.features import FeatureSpec
from streams.contracts.growing import GrowingFeatureSpec
from streams.contracts.vocabulary import UNKNOWN

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
        used, product_N, times = _used(parsed.product[rows])
        products = [self._features.product(parsed.products[u], seen=n) for u, n in zip(used, times, strict=True)]
        contexts, context_N = self._observe_contexts(parsed, rows)
        slot_NT, element_NT = self._observe_creatives(parsed, rows)
        return IndexedRows(np.array(products, np.int64)[product_N], contexts, context_N, slot_NT, element_NT)

    def _observe_contexts(self, parsed: ParsedExamples, rows: IntArray) -> tuple[list[Context], IntArray]:
        used, context_N, times = _used(parsed.context[rows])
        contexts = [context for u in used if (context := parsed.contexts[u]) is not None]
        categories: Counter[tuple[str, str | bool]] = Counter()
        numbers: dict[str, list[tuple[float, int]]] = {}
        for context, seen in zip(contexts, times, strict=True):
            for field, value in context.items():
                if isinstance(value, (str, bool)):
                    categories[field, value] += seen
                else:
                    numbers.setdefault(field, []).append((value, seen))
        for (field, category), seen in categories.items():
            self._features.category(field, category, seen=seen)
        for field, pairs in numbers.items():
            values, counts = np.array(pairs, np.float64).T
            self._features.numbers(field, np.repeat(values, counts.astype(np.int64)))
        return contexts, context_N

    def _observe_creatives(self, parsed: ParsedExamples, rows: IntArray) -> tuple[IntArray, IntArray]:
        used, set_N, times = _used(parsed.set[rows])
        sets = [candidates for u in used if (candidates := parsed.sets[u]) is not None]
        found = [self._enter(candidates, seen) for candidates, seen in zip(sets, times, strict=True)]
        # Those of a set that is kept are not looked up, but seen they were.
        slots, elements = (np.concatenate([getattr(index, n) for index in found]) for n in ("slot", "element"))
        self._features.touch(slots=slots, elements=elements)
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

    def _enter(self, candidates: CandidateSet, seen: int) -> SetIndex:
        """Return where a set seen `seen` times stands in the vocabulary; names that are new enter it."""
        found = self._sets.get(candidates)
        if found is not None:
            return found
        features, pairs = self._features, zip(candidates.slots, candidates.elements, strict=True)
        slots = [features.slot(name) for name in candidates.slots]
        return self._kept(candidates, slots, [features.element(name, e, seen=seen) for name, ids in pairs for e in ids])

    def find(self, candidates: CandidateSet, spec: FeatureSpec) -> SetIndex:
        """Return where a set stands in the vocabulary as it is now; nothing enters it."""
        found = self._sets.get(candidates)
        if found is not None:
            return found
        slots = [spec.slot_index.get(name, UNKNOWN) for name in candidates.slots]
        pairs = zip(slots, candidates.elements, strict=True)
        return self._kept(
            candidates, slots, [spec.element_index.get((slot, e), UNKNOWN) for slot, ids in pairs for e in ids]
        )

    def _kept(self, candidates: CandidateSet, slots: list[int], elements: list[int]) -> SetIndex:
        first_T = candidates.size_T.cumsum() - candidates.size_T
        found = SetIndex(np.array(slots, np.int64), first_T, np.array(elements, np.int64))
        # Of the others something may enter the vocabulary later.
        if UNKNOWN not in slots and UNKNOWN not in elements:
            self._sets[candidates] = found
            if len(self._sets) > MAX_SETS:
                self._sets.popitem(last=False)
        return found


def _used(number_N: IntArray) -> tuple[list[int], IntArray, list[int]]:
    """Return the numbers that stand there, ascending, the place of each row's among them, and how often each comes."""
    times_U = np.bincount(number_N)
    used = np.flatnonzero(times_U)
    return used.tolist(), ((times_U > 0).cumsum() - 1)[number_N], times_U[used].tolist()
