"""How a context, a product and an element become numbers; the vocabulary of a model.

The learner grows a vocabulary in order of arrival (`GrowingFeatureSpec`) and freezes it into each snapshot
(`FeatureSpec`), so a server computes the very numbers that the learner trained on. Whatever the vocabulary lacks has
index -1 and contributes nothing. `ContentEncoder` turns what an element is (numbers, text) into F numbers; it is pure,
so an element that a snapshot has never met is encoded by the server itself.

Shapes: C context columns, F content numbers an element, N contexts.
"""

from __future__ import annotations

import hashlib
import math
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
ContextValue = str | int | float | bool

UNKNOWN = -1
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
    """A frozen vocabulary: the position of a name in these tuples is its row or column in the tensors of a snapshot."""

    slots: tuple[str, ...]
    context: tuple[ContextColumn, ...]
    products: tuple[str, ...]
    elements: tuple[tuple[int, str], ...]
    """(index of the slot, element id)."""
    content_size: int
    encoder: str

    def __post_init__(self) -> None:
        """Refuse what could not have been frozen from a growing vocabulary."""
        if not 1 <= self.content_size <= MAX_CONTENT_SIZE:
            raise ValueError(f"content_size is {self.content_size}; must be in [1, {MAX_CONTENT_SIZE}]")
        columns = [(column.field, column.value) for column in self.context]
        for name, values in (("slots", self.slots), ("products", self.products), ("elements", self.elements)):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} of a feature spec hold a name twice")
        if len(set(columns)) != len(columns):
            raise ValueError("context columns of a feature spec hold a column twice")
        if any(not 0 <= slot < len(self.slots) for slot, _ in self.elements):
            raise ValueError(f"an element of a feature spec names a slot outside [0, {len(self.slots)})")
        if any(not (math.isfinite(c.mean) and math.isfinite(c.sd) and c.sd > 0) for c in self.context):
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
        return {name: i for i, name in enumerate(self.slots)}

    @cached_property
    def product_index(self) -> dict[str, int]:
        """Product id -> index."""
        return {name: i for i, name in enumerate(self.products)}

    @cached_property
    def element_index(self) -> dict[tuple[int, str], int]:
        """(slot index, element id) -> index."""
        return {key: i for i, key in enumerate(self.elements)}

    @cached_property
    def _categories(self) -> dict[tuple[str, str | bool], int]:
        return {(c.field, c.value): i for i, c in enumerate(self.context) if c.value is not None}

    @cached_property
    def _numbers(self) -> dict[str, tuple[int, float, float]]:
        return {c.field: (i, c.mean, c.sd) for i, c in enumerate(self.context) if c.value is None}

    def context_row(self, context: Mapping[str, ContextValue]) -> FloatArray:
        """Return the (C,) numbers of a context; unknown fields and values and non-finite numbers count nothing."""
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
                elif field in numbers and math.isfinite(value):
                    column, mean, sd = numbers[field]
                    row[column] = min(max((value - mean) / sd, -CLIP), CLIP)
        return out


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureLimits:
    """Caps of a vocabulary; beyond a cap a name stays unknown and is counted."""

    content_size: int = 8
    """F: content numbers an element, in [1, 16]."""
    max_slots: int = 16
    max_context_columns: int = 32
    max_products: int = 512
    max_elements: int = 4096

    def __post_init__(self) -> None:
        """Refuse sizes that a feature spec would refuse later."""
        if not 1 <= self.content_size <= MAX_CONTENT_SIZE:
            raise ValueError(f"content_size is {self.content_size}; must be in [1, {MAX_CONTENT_SIZE}]")


class GrowingFeatureSpec:
    """The vocabulary of a learner: names get their index when they are first observed and keep it for ever."""

    def __init__(self, limits: FeatureLimits | None = None) -> None:
        self.limits = limits or FeatureLimits()
        self.encoder = ContentEncoder(self.limits.content_size)
        self.unknown: Counter[str] = Counter()
        """How often a name found its vocabulary full, by `slot`, `context`, `product` and `element`."""
        self._slots: dict[str, int] = {}
        self._products: dict[str, int] = {}
        self._elements: dict[tuple[int, str], int] = {}
        self._columns: dict[tuple[str, str | bool | None], int] = {}
        # Numeric fields: count, mean and sum of squared deviations.
        self._moments: dict[str, tuple[int, float, float]] = {}

    def _index(self, known: dict[Any, int], key: object, limit: int, kind: str) -> int:
        index = known.get(key)
        if index is None:
            if len(known) >= limit:
                self.unknown[kind] += 1
                return UNKNOWN
            index = known[key] = len(known)
        return index

    def slot(self, name: str) -> int:
        """Return the index of a slot, new ones included, or -1 if the vocabulary is full."""
        return self._index(self._slots, name, self.limits.max_slots, "slot")

    def product(self, product_id: str, *, seen: int = 1) -> int:
        """Return the index of a product seen `seen` times, new ones included, or -1 if the vocabulary is full."""
        return self._index(self._products, product_id, self.limits.max_products, "product")

    def element(self, slot: str, element_id: str, *, seen: int = 1) -> int:
        """Return the index of a slot's element seen `seen` times, new ones included, or -1 if a vocabulary is full."""
        slot_index = self.slot(slot)
        if slot_index == UNKNOWN:
            return UNKNOWN
        return self._index(self._elements, (slot_index, element_id), self.limits.max_elements, "element")

    def context(self, context: Mapping[str, ContextValue]) -> None:
        """Learn the columns of one context and the mean and spread of its numbers."""
        for field, value in context.items():
            if isinstance(value, (str, bool)):
                self.category(field, value)
            else:
                self.numbers(field, np.array([value], np.float64))

    def category(self, field: str, value: str | bool, *, seen: int = 1) -> None:
        """Learn that a field had a value `seen` times."""
        self._index(self._columns, (field, value), self.limits.max_context_columns, "context")

    def numbers(self, field: str, values_N: NDArray[np.float64]) -> None:
        """Learn the numbers that a field had; those that are not finite are left out."""
        values_N = values_N[np.isfinite(values_N)]
        limit = self.limits.max_context_columns
        if not len(values_N) or self._index(self._columns, (field, None), limit, "context") == UNKNOWN:
            return
        # Moments of two samples together: Chan, Golub and LeVeque (1983).
        count, mean, squares = self._moments.get(field, (0, 0.0, 0.0))
        more, other = len(values_N), float(values_N.mean())
        step, total = other - mean, count + more
        squares += float(np.square(values_N - other).sum()) + step * step * count * more / total
        self._moments[field] = total, mean + step * more / total, squares

    def _column(self, field: str, value: str | bool | None) -> ContextColumn:
        if value is not None:
            return ContextColumn(field=field, value=value)
        count, mean, squares = self._moments[field]
        sd = math.sqrt(squares / count)
        return ContextColumn(field=field, mean=mean, sd=sd if sd > 1e-9 * max(1.0, abs(mean)) else 1.0)

    def freeze(self) -> FeatureSpec:
        """Return the vocabulary as it is now."""
        return FeatureSpec(
            slots=tuple(self._slots),
            context=tuple(self._column(*key) for key in self._columns),
            products=tuple(self._products),
            elements=tuple(self._elements),
            content_size=self.limits.content_size,
            encoder=self.encoder.id,
        )

    def state(self) -> dict[str, Any]:
        """Return all of it as JSON-able values."""
        return {
            "slots": list(self._slots),
            "products": list(self._products),
            "elements": [list(key) for key in self._elements],
            "columns": [list(key) for key in self._columns],
            "moments": {field: list(moments) for field, moments in self._moments.items()},
            "unknown": dict(self.unknown),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the place of the vocabulary that `state` described."""
        self._slots = {name: i for i, name in enumerate(state["slots"])}
        self._products = {name: i for i, name in enumerate(state["products"])}
        self._elements = {(slot, name): i for i, (slot, name) in enumerate(state["elements"])}
        self._columns = {(field, value): i for i, (field, value) in enumerate(state["columns"])}
        self._moments = {field: (int(n), float(m), float(q)) for field, (n, m, q) in state["moments"].items()}
        self.unknown = Counter(state["unknown"])


class ContentEncoder:
    """Element content -> F numbers in [-4, 4]: deterministic, the same in every process and release of one `id`.

    At most F features are taken as they are; more are projected by a fixed random matrix with orthonormal rows,
    which keeps the variance of a number (Johnson and Lindenstrauss 1984). Text becomes signed hashed counts of
    words and of character trigrams (Weinberger et al. 2009), normalized to length 1, in the numbers that the features
    leave free: hashed on top of features it would blur what is exact.

    Example:
        >>> ContentEncoder(4).encode((1.0, -2.0), "")
        array([ 1., -2.,  0.,  0.], dtype=float32)
    """

    def __init__(self, content_size: int = 8) -> None:
        if not 1 <= content_size <= MAX_CONTENT_SIZE:
            raise ValueError(f"content_size is {content_size}; must be in [1, {MAX_CONTENT_SIZE}]")
        self.size = content_size
        self.id = f"hash-1:{content_size}"

    @classmethod
    def from_id(cls, encoder_id: str) -> ContentEncoder:
        """Return the encoder of that id.

        Raises:
            ValueError: If this release has no such encoder.
        """
        match = re.fullmatch(r"hash-1:(\d{1,2})", encoder_id)
        if match is None:
            raise ValueError(f"element encoder is {encoder_id!r}; this release knows hash-1:<size>")
        return cls(int(match[1]))

    def encode(self, features: Sequence[float], text: str) -> FloatArray:
        """Return the (F,) numbers of an element; zeros without content.

        Raises:
            ValueError: If a feature is not finite.
        """
        x = np.asarray(features, np.float64)
        if not np.isfinite(x).all():
            raise ValueError(f"element features hold a value that is not finite: {x[~np.isfinite(x)][0]}")
        if len(x) > self.size:
            x = _projection(self.size, len(x)) @ x
        out = np.concatenate([x, _hashed(text, self.size - len(x))])
        clipped: FloatArray = np.clip(out, -CLIP, CLIP).astype(np.float32)
        return clipped


def _hashed(text: str, size: int) -> NDArray[np.float64]:
    """Return signed counts of words and trigrams in `size` buckets, of length 1 (zeros without any)."""
    out = np.zeros(size)
    words = re.findall(r"\w+", text.lower())
    if not words or not size:
        return out
    spaced = f" {' '.join(words)} "
    for gram in [f"w:{word}" for word in words] + [f"c:{spaced[i : i + 3]}" for i in range(len(spaced) - 2)]:
        # crc32 and not hash(): Python salts the latter in every process.
        code = zlib.crc32(gram.encode())
        out[(code >> 1) % size] += 1.0 if code & 1 else -1.0
    length = np.linalg.norm(out)
    return out / length if length > 0 else out


@lru_cache(maxsize=64)
def _projection(rows: int, columns: int) -> NDArray[np.float64]:
    normal = np.random.default_rng([rows, columns]).standard_normal((columns, rows))
    q, r = np.linalg.qr(normal)
    # QR leaves the signs of the columns open; the diagonal of R fixes them, so every LAPACK gives the same matrix.
    result: NDArray[np.float64] = (q * np.sign(np.diag(r))).T
    return result
