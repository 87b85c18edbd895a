"""Makes numbers of a batch of examples: rows that wait for their labels, and what can be told without any.

Texts become codes once for each distinct value. Maps are flattened, so nothing here is done example by example.

Shapes: N examples, T = 8 slots at most.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from streams.contracts.examples import ContextValue, ExampleBatch, LabelKind, parse_context

MAX_SLOTS: Final = 8
"""Slots beyond these are in no slice by element."""
MAX_NAMES: Final = 100_000
MAX_CONTEXTS: Final = 65_536
VERSION_BITS: Final = 40
TOLERANCE: Final = 1e-6
"""Of the logged propensity against the product of those of its slots, relative."""

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(slots=True)
class Rows:
    """N labeled impressions, as far as labels are needed for what is said about them."""

    key: IntArray
    """Hash of the decision id."""
    time_ms: IntArray
    is_click: NDArray[np.bool_]
    is_late: NDArray[np.bool_]
    """Whether the row is a late positive."""
    delay_ms: IntArray
    is_holdout: NDArray[np.bool_]
    version: IntArray
    """Epoch << 40 | version."""
    product: NDArray[np.int32]
    element: NDArray[np.int32]
    """(N, T) codes of slot and element; -1: no such slot."""
    current: FloatArray
    """Click probability by the model that served then; nan: unknown."""
    reference: FloatArray

    def __len__(self) -> int:
        """Return N."""
        return len(self.key)

    def take(self, rows: Any) -> Self:
        """Return some of the rows."""
        return type(self)(*(getattr(self, f.name)[rows] for f in fields(self)))

    @classmethod
    def concat(cls, parts: list[Self]) -> Self:
        """Return the rows of one or more parts."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))


@dataclass(slots=True)
class Arrivals:
    """What impressions say before any label: sums, which add up."""

    num: int = 0
    num_holdout: int = 0
    num_fallback: int = 0
    """Decided by another rung than the newest policy."""
    surprise: float = 0.0
    """Sum of -ln p; its mean is the policy's entropy."""
    log_actions: float = 0.0
    """Sum of ln |A|, A the creatives that were possible."""
    weight: float = 0.0
    """Sum of u = 1 / (p |A|), whose expectation is 1 wherever every creative is possible."""
    weight_square: float = 0.0
    min_scaled: float = math.inf
    """Smallest p |A|: 1 is uniform play, and the share of the uniform traffic the least there may be."""
    num_inconsistent: int = 0
    """The propensity is not the product of those of the slots."""
    slot_num: Counter[str] = field(default_factory=Counter)
    slot_weight: dict[str, float] = field(default_factory=dict)
    """Sum of 1 / (p_s |A_s|) of each slot."""
    products: Counter[str] = field(default_factory=Counter)
    contexts: Counter[str] = field(default_factory=Counter)
    """JSON of the context -> how often."""

    def add(self, other: Arrivals) -> None:
        """Add the sums of other impressions."""
        for name in ("num", "num_holdout", "num_fallback", "surprise", "log_actions", "weight", "weight_square"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.num_inconsistent += other.num_inconsistent
        self.min_scaled = min(self.min_scaled, other.min_scaled)
        self.slot_num.update(other.slot_num)
        for slot, weight in other.slot_weight.items():
            self.slot_weight[slot] = self.slot_weight.get(slot, 0.0) + weight
        self.products.update(other.products)
        self.contexts.update(other.contexts)

    @property
    def entropy_ratio(self) -> float:
        """Entropy of the policy in units of that of uniform play; nan without impressions or without choice."""
        return self.surprise / self.log_actions if self.log_actions > 0 else math.nan

    @property
    def effective_ratio(self) -> float:
        """Effective sample size of the weights 1 / p for each impression; nan without any."""
        return self.weight**2 / (self.num * self.weight_square) if self.weight_square > 0 else math.nan


def version_name(code: int) -> str:
    """Return the policy version of a row's code, as people write it."""
    return f"{code >> VERSION_BITS}.{code & (1 << VERSION_BITS) - 1}"


class Names:
    """Codes for names; those beyond the limit share one."""

    def __init__(self, limit: int = MAX_NAMES) -> None:
        self._limit = limit
        self._codes: dict[str, int] = {}
        self.names: list[str] = []

    def codes(self, names: list[str]) -> NDArray[np.int32]:
        """Return the code of each name."""
        return np.array([self._code(name) for name in names], np.int32)

    def _code(self, name: str) -> int:
        code = self._codes.get(name)
        if code is None:
            if len(self.names) >= self._limit:
                return self._limit - 1
            code = self._codes[name] = len(self.names)
            self.names.append(name)
        return code


class Reader:
    """Reads batches, and remembers names and contexts."""

    def __init__(self, ignored_fields: frozenset[str] = frozenset()) -> None:
        self._ignored = ignored_fields
        self.products = Names()
        self.elements = Names()
        self._contexts: dict[str, tuple[tuple[str, str], ...]] = {}

    def rows(self, batch: ExampleBatch, current_N: FloatArray, reference_N: FloatArray) -> Rows:
        """Return the rows of a batch with their predictions."""
        columns = batch.columns
        products, product_N = _distinct(columns.column("product_id"))
        ids = columns.column("decision_id").to_pylist()
        return Rows(
            key=np.fromiter(map(hash, ids), np.int64, len(ids)),
            time_ms=batch.occurred_at_ms,
            is_click=batch.label > 0,
            is_late=batch.has_kind(LabelKind.LATE_POSITIVE),
            delay_ms=batch.delay_ms,
            is_holdout=batch.holdout,
            version=(batch.epoch << VERSION_BITS) | batch.policy_version,
            product=self.products.codes(products)[product_N],
            element=self._elements(columns.column("creative")),
            current=current_N,
            reference=reference_N,
        )

    def _elements(self, creative: pa.MapArray) -> NDArray[np.int32]:
        row, place, keys, items = _flattened(creative)
        slots, slot = _distinct(keys)
        elements, element = _distinct(items)
        pair = slot * len(elements) + element
        codes, which = np.unique(pair, return_inverse=True)
        names = [f"{slots[code // len(elements)]}={elements[code % len(elements)]}" for code in codes.tolist()]
        out = np.full((len(creative), MAX_SLOTS), -1, np.int32)
        inside = place < MAX_SLOTS
        out[row[inside], place[inside]] = self.elements.codes(names)[which[inside]]
        return out

    def arrivals(self, batch: ExampleBatch) -> Arrivals:
        """Return the sums over a batch without late positives, which have come before."""
        columns = batch.columns
        num = len(batch)
        if not num:
            return Arrivals()
        row, _, slots, lists = _flattened(columns.column("candidates"))
        sizes = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.float64)
        log_actions_N = np.bincount(row, np.log(np.maximum(sizes, 1.0)), num)
        propensity_N = np.clip(batch.propensity, 1e-300, 1.0)
        log_p_N = np.log(propensity_N)
        scaled_N = np.exp(log_p_N + log_actions_N)
        weight_N = 1.0 / scaled_N
        out = Arrivals(
            num=num,
            num_holdout=int(batch.holdout.sum()),
            num_fallback=num - int(pc.sum(pc.equal(columns.column("source"), "policy")).as_py() or 0),
            surprise=float(-log_p_N.sum()),
            log_actions=float(log_actions_N.sum()),
            weight=float(weight_N.sum()),
            weight_square=float((weight_N**2).sum()),
            min_scaled=float(scaled_N.min()),
        )
        self._read_slots(out, columns.column("slot_propensities"), log_p_N, slots, sizes)
        out.products.update(_counted(columns.column("product_id")))
        out.contexts.update(_counted(columns.column("context")))
        return out

    def _read_slots(
        self, out: Arrivals, propensities: pa.MapArray, log_p_N: FloatArray, slots: pa.Array, sizes: FloatArray
    ) -> None:
        """Audit the propensities of the slots; both maps keep the slot order of the decision."""
        row, _, keys, items = _flattened(propensities)
        slot_p = np.clip(items.to_numpy(zero_copy_only=False), 1e-300, 1.0)
        joint_N = np.bincount(row, np.log(slot_p), len(log_p_N))
        out.num_inconsistent = int((np.abs(joint_N - log_p_N) > TOLERANCE).sum())
        if not keys.equals(slots):
            out.num_inconsistent = len(log_p_N)
            return
        names, slot = _distinct(keys)
        num = np.bincount(slot, minlength=len(names)).tolist()
        weight = np.bincount(slot, 1.0 / (slot_p * sizes), len(names)).tolist()
        out.slot_num.update(dict(zip(names, num, strict=True)))
        out.slot_weight.update(dict(zip(names, weight, strict=True)))

    def fields(self, contexts: Mapping[str, int]) -> dict[str, Counter[str]]:
        """Return field -> value -> how often, for contexts that are counted."""
        out: dict[str, Counter[str]] = {}
        for text, count in contexts.items():
            for name, value in self._context(text):
                if name not in out:
                    out[name] = Counter()
                out[name][value] += count
        return out

    def _context(self, text: str) -> tuple[tuple[str, str], ...]:
        """Return the fields of a context that are watched, and their values as names."""
        found = self._contexts.get(text)
        if found is None:
            if len(self._contexts) >= MAX_CONTEXTS:
                self._contexts.clear()
            try:
                parsed = parse_context(text)
            except ValueError:
                parsed = {}
            found = tuple((name, _name_of(value)) for name, value in parsed.items() if name not in self._ignored)
            self._contexts[text] = found
        return found


def _name_of(value: ContextValue) -> str:
    """Return a value as a name, numbers with a point to one digit."""
    return f"{value:.1g}" if isinstance(value, float) else str(value)


def _counted(texts: pa.Array) -> Mapping[str, int]:
    names, codes = _distinct(texts)
    return dict(zip(names, np.bincount(codes, minlength=len(names)).tolist(), strict=True))


def _distinct(texts: pa.Array) -> tuple[list[str], IntArray]:
    """Return the distinct texts in order of appearance, and which one each row has."""
    encoded = texts.dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)


def _flattened(maps: pa.MapArray) -> tuple[IntArray, IntArray, pa.Array, pa.Array]:
    """Return for each entry its row, its place in the row, its key and its item."""
    offsets = maps.offsets.to_numpy().astype(np.int64)
    lengths = np.diff(offsets)
    row = np.repeat(np.arange(len(maps)), lengths)
    place = np.arange(offsets[0], offsets[-1]) - np.repeat(offsets[:-1], lengths)
    first, count = int(offsets[0]), int(offsets[-1] - offsets[0])
    return row, place, maps.keys.slice(first, count), maps.items.slice(first, count)
