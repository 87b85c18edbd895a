"""The candidate set of a request (its *card*) and what its candidates contribute whatever the product and context are.

Cards are met again and again, and preparing one costs as much as a decision, so they are kept, the latest used ones.

Shapes: L = M + 1 draws with the posterior mean last, T slots of the card, X candidates over all slots, F content
numbers, C context columns, d width of the generator's keys.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
from numpy.typing import NDArray

from serving.ascent import filled_up
from serving.effects import Effects, SlotWeights
from serving.pointer import Pointer
from streams.contracts.catalog import Element
from streams.contracts.encoders import ContentEncoder
from streams.contracts.features import FeatureSpec

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

MAX_BYTES = 256 * 1024 * 1024
"""Of the cards that are kept."""
MAX_LAYOUTS = 16
"""Slots of cards whose weights are kept."""
MAX_PAIRED: Final = 160
"""Candidates of a card, over all slots, up to which the effects of pairs of elements are searched: they take a table of
the square of it. Wider cards are searched by content, main effects and pairs of content alone."""


@dataclass(frozen=True, slots=True)
class Card:
    """The candidates of a request as a snapshot sees them."""

    names: tuple[str, ...]
    elements: tuple[tuple[str, ...], ...]
    slots: tuple[int, ...]
    """Vocabulary index of each slot, -1 if the snapshot lacks it."""
    index: list[IntArray]
    """Of each slot, the vocabulary index of each candidate, -1 if the snapshot lacks it."""
    first: NDArray[np.uint64]
    """(T + 1,) where the candidates of each slot begin, and at last X."""
    weights: SlotWeights
    keys: FloatArray
    """(d, X)"""
    content: FloatArray
    """(L, F X): content of the candidates as each draw sees it, slot after slot (F, A) numbers; F is filled up."""
    base: FloatArray
    """(L, X): main effect of a candidate without context."""
    by_context: FloatArray
    """(C, X): effect of the candidate itself with each context column."""
    pair: FloatArray
    """(X, X) effects of pairs of elements, (0, 0) where they are not searched."""

    @property
    def num_bytes(self) -> int:
        """Memory of what is its own."""
        arrays = (getattr(self, field.name) for field in fields(self))
        return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))

    @property
    def spans(self) -> list[slice]:
        """Which of all candidates are those of each slot."""
        ends = self.first.tolist()
        return [slice(low, high) for low, high in itertools.pairwise(ends)]

    def places(self, creative: Mapping[str, str]) -> list[int]:
        """Return the place of each element of a creative among its slot's candidates.

        Raises:
            ValueError: If the creative does not fill each slot with one of its candidates.
        """
        if creative.keys() != set(self.names):
            raise ValueError(f"creative fills the slots {sorted(creative)}; the request has {sorted(self.names)}")
        places = []
        for name, ids in zip(self.names, self.elements, strict=True):
            if creative[name] not in ids:
                raise ValueError(f"element {creative[name]!r} is no candidate of slot {name!r}")
            places.append(ids.index(creative[name]))
        return places

    def pair_effects(self) -> list[list[FloatArray]]:
        """Return what pairs of candidates add together: [t][s] with s < t, (L, A of slot t, B of slot s)."""
        spans, size = self.spans, self.weights.pull.shape[2]
        content = [
            self.content[:, size * span.start : size * span.stop].reshape(len(self.content), size, -1) for span in spans
        ]
        out: list[list[FloatArray]] = []
        for t, span in enumerate(spans):
            pull_LAZ = np.matmul(content[t].transpose(0, 2, 1), self.weights.pull[:, t])
            row = []
            for s, other in enumerate(spans[:t]):
                pair_LAB = np.matmul(pull_LAZ[:, :, s * size : (s + 1) * size], content[s])
                row.append(pair_LAB + self.pair[span, other] if len(self.pair) else pair_LAB)
            out.append(row)
        return out


class Cards:
    """Prepares cards and keeps the latest used ones. Not for several threads at once."""

    def __init__(self, spec: FeatureSpec, effects: Effects, pointer: Pointer, encoder: ContentEncoder) -> None:
        self._spec, self._effects, self._pointer, self._encoder = spec, effects, pointer, encoder
        self._kept: OrderedDict[bytes, Card] = OrderedDict()
        self._num_bytes = 0
        self._weights: OrderedDict[tuple[int, ...], SlotWeights] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: bytes, candidates: Mapping[str, Sequence[str]], content: Mapping[str, Element]) -> Card:
        """Return a card, prepared.

        Args:
            key: Stands for candidates and content: equal ones are the same card.
            candidates: Slot -> element ids, in slot order.
            content: Element id -> its content, for elements that the snapshot may not know.

        Raises:
            ValueError: If there is no slot, or a slot has no or twice the same candidate.
        """
        card = self._kept.get(key)
        if card is None:
            card = self._kept[key] = self._prepare(candidates, content)
            self._num_bytes += card.num_bytes
            while self._num_bytes > MAX_BYTES and len(self._kept) > 1:
                self._num_bytes -= self._kept.popitem(last=False)[1].num_bytes
        else:
            self._kept.move_to_end(key)
        return card

    def _prepare(self, candidates: Mapping[str, Sequence[str]], content: Mapping[str, Element]) -> Card:
        names, elements = checked(candidates)
        effects, slots = self._effects, tuple(self._spec.slot_index.get(name, -1) for name in names)
        element_index = self._spec.element_index
        index = [
            np.array([element_index.get((slot, e), -1) for e in ids], np.int64)
            for slot, ids in zip(slots, elements, strict=True)
        ]
        index_X = np.concatenate(index)
        content_XF = effects.content_of(index_X)
        slot_X = np.repeat(np.arange(len(slots)), [len(ids) for ids in elements])
        if content:
            for x, (t, element_id) in enumerate(zip(slot_X, (e for ids in elements for e in ids), strict=True)):
                # Known from an impression but not yet from the catalog counts as unknown here.
                if element_id in content and not content_XF[x].any():
                    element = content[element_id]
                    content_XF[x] = self._encoder.encode(names[t], element.features, element.text)
        weights = self._weights_of(slots)
        drawn_LXF = effects.drawn(content_XF, index_X)
        # A slot that the snapshot lacks has no effects, though its candidates may have content.
        base_LX = (drawn_LXF * weights.content[:, slot_X, : drawn_LXF.shape[2]]).sum(-1) + effects.own(index_X)
        return Card(
            names=names,
            elements=elements,
            slots=slots,
            index=index,
            first=np.cumsum([0, *map(len, elements)]).astype(np.uint64),
            weights=weights,
            keys=self._pointer.keys(content_XF, index_X),
            content=_slot_after_slot(filled_up(drawn_LXF, 2), elements),
            base=base_LX,
            by_context=np.ascontiguousarray(effects.by_context(index_X).T),
            pair=self._pairs(index) if len(index_X) <= MAX_PAIRED else np.zeros((0, 0), np.float32),
        )

    def _weights_of(self, slots: tuple[int, ...]) -> SlotWeights:
        weights = self._weights.get(slots)
        if weights is None:
            weights = self._weights[slots] = self._effects.weights(slots)
            while len(self._weights) > MAX_LAYOUTS:
                self._weights.popitem(last=False)
        return weights

    def _pairs(self, index: Sequence[IntArray]) -> FloatArray:
        ends = np.cumsum([len(index_A) for index_A in index]).tolist()
        pair_XX = np.zeros((ends[-1], ends[-1]), np.float32)
        for t in range(1, len(index)):
            span, before = slice(ends[t - 1], ends[t]), slice(0, ends[t - 1])
            pair_XX[span, before] = self._effects.pairs(index[t], np.concatenate(index[:t]))
            pair_XX[before, span] = pair_XX[span, before].T
        return pair_XX


def _slot_after_slot(drawn_LXF: FloatArray, elements: Sequence[Sequence[str]]) -> FloatArray:
    """Return content as the search reads it: the numbers of a slot together, (F, A)."""
    slots = np.split(drawn_LXF, np.cumsum([len(ids) for ids in elements])[:-1], axis=1)
    return np.concatenate([slot_LAF.transpose(0, 2, 1).reshape(len(slot_LAF), -1) for slot_LAF in slots], axis=1)


def checked(candidates: Mapping[str, Sequence[str]]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return slot names and candidates that can be decided.

    Raises:
        ValueError: If there is no slot, or a slot has no or twice the same candidate.
    """
    if not candidates:
        raise ValueError("request has no slot; expected at least one")
    for name, ids in candidates.items():
        if not ids or len(set(ids)) != len(ids):
            raise ValueError(
                f"slot {name!r} has {len(ids)} candidates, {len(set(ids))} distinct; expected >= 1, distinct"
            )
    return tuple(candidates), tuple(tuple(ids) for ids in candidates.values())
