"""The candidates of cards: each distinct set is parsed once, though thousands of examples carry it.

A row of the column `candidates` is told from others by the very bytes that Arrow keeps of it, so that looking it up
costs the same whether a log has ten products or ten thousand. What was parsed is kept over batches, up to a number of
candidates; beyond it the shelf begins anew.

Names get a code when they are first seen, so that creatives can be compared with candidates in arrays. Codes are the
shelf's own: a vocabulary may be full, but whether an element was a candidate is known anyway.

Shapes: N rows, U distinct sets, T slots of a set, V candidates of a set, slot after slot, Z entries of all creatives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from streams.contracts.events import MAX_CANDIDATES, MAX_SLOTS

IntArray = NDArray[np.int64]
Key = tuple[bytes, bytes, bytes, bytes]

MAX_KEPT: Final = 2_000_000
"""Candidates, of all sets together."""
NOWHERE: Final = -1


class CandidateSet:
    """What a decision could choose from: slots in their order, and the element ids of each."""

    __slots__ = ("code_V", "elements", "place_V", "size_T", "slot_code_T", "slot_place_T", "slots")

    def __init__(self, candidates: Mapping[str, Sequence[str]], codes: dict[str, int]) -> None:
        """Take candidates that are sound.

        Args:
            candidates: Slot -> element ids.
            codes: Code of each name; new names are added.
        """
        self.slots = tuple(candidates)
        self.elements = tuple(map(tuple, candidates.values()))
        self.size_T = np.array([len(ids) for ids in self.elements], np.int64)
        self.slot_code_T, self.slot_place_T = _ordered(self.slots, codes)
        ordered = [_ordered(ids, codes) for ids in self.elements]
        self.code_V = np.concatenate([code_A for code_A, _ in ordered])
        self.place_V = np.concatenate([place_A for _, place_A in ordered])

    @property
    def candidates(self) -> dict[str, tuple[str, ...]]:
        """Slot -> element ids, in slot order."""
        return dict(zip(self.slots, self.elements, strict=True))


def _ordered(names: Sequence[str], codes: dict[str, int]) -> tuple[IntArray, IntArray]:
    """Return the codes of names in ascending order, and the place of each among the names."""
    code = np.array([codes.setdefault(name, len(codes)) for name in names], np.int64)
    place = code.argsort()
    return code[place], place


class CandidateShelf:
    """Keeps the sets that were parsed."""

    def __init__(self, max_kept: int = MAX_KEPT) -> None:
        self._max_kept = max_kept
        self._sets: dict[Key, CandidateSet | None] = {}
        self._codes: dict[str, int] = {}
        self._num_kept = 0

    def make(self, candidates: Mapping[str, Sequence[str]]) -> CandidateSet:
        """Return the set of sound candidates; it is not kept."""
        return CandidateSet(candidates, self._codes)

    def find(self, column: pa.Array) -> tuple[list[CandidateSet | None], IntArray]:
        """Return the distinct sets of a column of candidates, in order of appearance, and which one each row has.

        None stands for what is no set of candidates: no slot, a slot or an element without a name, a slot without
        elements, a name that stands twice, or more than an impression may have.

        Args:
            column: N rows, of the column `candidates` of `EXAMPLE_SCHEMA`.
        """
        if self._num_kept > self._max_kept:
            self._sets.clear()
            self._codes.clear()
            self._num_kept = 0
        distinct: dict[Key, int] = {}
        number_N = np.array([distinct.setdefault(key, len(distinct)) for key in row_keys(column)], np.int64)
        first_U = np.unique(number_N, return_index=True)[1].tolist()
        return [self._set(key, column, row) for key, row in zip(distinct, first_U, strict=True)], number_N

    def _set(self, key: Key, column: pa.Array, row: int) -> CandidateSet | None:
        if key not in self._sets:
            pairs = column[row].as_py()
            self._sets[key] = found = self.make(dict(pairs)) if _is_sound(pairs) else None
            self._num_kept += 1 if found is None else len(found.code_V)
        return self._sets[key]

    def places(self, sets: Sequence[CandidateSet | None], number_N: IntArray, column: pa.Array) -> IntArray:
        """Return what creatives chose: the place of the element among the candidates of each slot of its set.

        Args:
            sets: U sets, from the last `find`.
            number_N: Which one each row has.
            column: N rows, of the column `creative` of `EXAMPLE_SCHEMA`.

        Returns:
            (N, T), T of the widest set; `NOWHERE` behind the slots of a narrower set, and in the whole row if the
            creative does not choose one of the candidates for each slot, and nothing else.
        """
        known = [found for found in sets if found is not None]
        num_slots_U = np.array([0 if found is None else len(found.slots) for found in sets], np.int64)
        place_NT = np.full((len(number_N), num_slots_U.max(initial=0)), NOWHERE, np.int64)
        if not known:
            return place_NT
        start_N = column.offsets.to_numpy().astype(np.int64)
        row_Z = np.repeat(np.arange(len(number_N)), np.diff(start_N))
        set_Z = number_N[row_Z]
        entries = slice(int(start_N[0]), int(start_N[-1]))
        slot_code_Z = self._codes_of(column.keys[entries])
        code_Z = self._codes_of(column.items[entries])
        # Slots are looked for in the sets, and then elements in the slots; a slot's number counts over all sets.
        slot_Z = _look_up(
            num_slots_U, _joined([s.slot_code_T for s in known]), _joined([s.slot_place_T for s in known]),
            set_Z, slot_code_Z,
        )  # fmt: skip
        first_slot_U = num_slots_U.cumsum() - num_slots_U
        found_Z = _look_up(
            _joined([s.size_T for s in known]), _joined([s.code_V for s in known]), _joined([s.place_V for s in known]),
            first_slot_U[set_Z] + slot_Z, code_Z,
        )  # fmt: skip
        fits_Z = (slot_Z != NOWHERE) & (found_Z != NOWHERE)
        place_NT[row_Z[fits_Z], slot_Z[fits_Z]] = found_Z[fits_Z]
        wanted_N = num_slots_U[number_N]
        # As many entries as slots, and every slot filled: so no entry is left over, and none stands twice.
        fits_N = (np.diff(start_N) == wanted_N) & ((place_NT != NOWHERE).sum(1) == wanted_N)
        place_NT[~fits_N] = NOWHERE
        return place_NT

    def _codes_of(self, texts: pa.Array) -> IntArray:
        """Return the codes of texts, `NOWHERE` for those that stand in no set."""
        encoded = texts.dictionary_encode()
        codes = [self._codes.get(text, NOWHERE) for text in encoded.dictionary.to_pylist()]
        # What is missing has no number in the dictionary; it is like a name that stands in no set.
        index: IntArray = np.array([*codes, NOWHERE], np.int64)[encoded.indices.fill_null(len(codes)).to_numpy()]
        return index


def _joined(parts: Sequence[IntArray]) -> IntArray:
    return np.concatenate(parts)


def _look_up(size_G: IntArray, code_V: IntArray, value_V: IntArray, group_Z: IntArray, code_Z: IntArray) -> IntArray:
    """Return the value that stands at a code in a group, (Z,); `NOWHERE` where there is none.

    Args:
        size_G: How many of V codes each group has; one group follows the other.
        code_V: Codes, ascending within a group, each at least 0.
        value_V: Value at each code.
        group_Z: Where to look.
        code_Z: What to look for.
    """
    key_V = (np.repeat(np.arange(len(size_G)), size_G) << 32) | code_V
    key_Z = np.where(code_Z < 0, -1, (group_Z << 32) | code_Z)
    place_Z = np.minimum(np.searchsorted(key_V, key_Z), len(key_V) - 1)
    return np.where(key_V[place_Z] == key_Z, value_V[place_Z], NOWHERE)


def _is_sound(pairs: Sequence[tuple[str, Sequence[str | None] | None]]) -> bool:
    names = [name for name, _ in pairs]
    return (
        1 <= len(pairs) <= MAX_SLOTS
        and all(names)
        and len(set(names)) == len(names)
        and all(
            ids is not None and 1 <= len(ids) <= MAX_CANDIDATES and all(ids) and len(set(ids)) == len(ids)
            for _, ids in pairs
        )
    )


def row_keys(column: pa.Array) -> list[Key]:
    """Return for each row the bytes in which it differs from every row with another set: lengths and texts.

    What is missing looks like what is empty; neither is allowed.
    """
    slot_N, lists = column.offsets.to_numpy(), column.items
    list_K, text_V, name_K = lists.offsets.to_numpy(), _text_offsets(lists.values), _text_offsets(column.keys)
    shapes = np.stack([np.diff(name_K), np.diff(list_K)], 1).astype(np.int32).tobytes()
    lengths = np.diff(text_V).astype(np.int32).tobytes()
    names, texts = _text_bytes(column.keys), _text_bytes(lists.values)
    first_N = list_K[slot_N]
    bounds = [(8 * slot_N).tolist(), (4 * first_N).tolist(), name_K[slot_N].tolist(), text_V[first_N].tolist()]
    return [
        (shapes[a:b], lengths[c:d], names[e:f], texts[g:h])
        for a, b, c, d, e, f, g, h in zip(*(part for bound in bounds for part in (bound, bound[1:])), strict=False)
    ]


def _text_offsets(texts: pa.Array) -> IntArray:
    """Return where each text begins in the bytes of its column, and where the last one ends."""
    data = texts.buffers()[1]
    if data is None or not len(texts):
        return np.zeros(1, np.int64)
    return np.frombuffer(data, np.int32, len(texts) + 1, 4 * texts.offset).astype(np.int64)


def _text_bytes(texts: pa.Array) -> bytes:
    data = texts.buffers()[2]
    return b"" if data is None else data.to_pybytes()
