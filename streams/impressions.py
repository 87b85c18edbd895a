"""Impressions as the joiner holds them: a record's batch, column by column.

Records of our servers come in columns. NDJSON is parsed into them: its values go into Arrow at once, and the
candidates, most of an impression's bytes and mostly those that the product had a moment ago, are parsed once for each
distinct text.

What is accepted is exactly what `EventDecoder` accepts: whatever the quick way is not sure of, it decides, with its
reasons. Nothing here knows Kafka or the clock.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from operator import attrgetter
from typing import Annotated, Final

import msgspec
import numpy as np
import pyarrow as pa
from msgspec import Meta
from numpy.typing import NDArray

from streams.contracts.codec import (
    MAX_BATCH_EVENTS,
    MAX_LINE_BYTES,
    BadEvent,
    EventDecoder,
    has_no_other_keys,
    is_a_line_each,
)
from streams.contracts.events import (
    MAX_CANDIDATES,
    MAX_SLOTS,
    PROPENSITY_TOLERANCE,
    Identifier,
    Impression,
)
from streams.contracts.impressions import (
    COLUMN_NAMES,
    COLUMN_SCHEMA,
    batch_of,
    candidates_array,
    is_columnar,
    is_sound,
    offsets_array,
    read_impressions,
    row_sizes,
)

MAX_CACHED_BYTES: Final = 8 * 2**20
"""Of the texts of candidates that are kept parsed; what they are parsed into is some six times that."""

Slots = dict[str, list[str]]
_WireSlots = Annotated[
    dict[Identifier, Annotated[list[Identifier], Meta(min_length=1, max_length=MAX_CANDIDATES)]],
    Meta(min_length=1, max_length=MAX_SLOTS),
]
_decode_slots = msgspec.json.Decoder(_WireSlots).decode
_encode_json = msgspec.json.Encoder().encode

_PARSED: Final = pa.schema([field for field in COLUMN_SCHEMA if field.name != "candidates"])
"""What of NDJSON goes into columns at once."""
_NUM_FIELDS: Final = len(Impression.__struct_fields__)


class Candidates(msgspec.Struct, gc=False, eq=False):
    """The candidates of an impression, shared by all that have the same. Compared by identity."""

    text: bytes
    """JSON object: slot -> element ids."""
    parsed: Slots | None = None
    """None until they come a second time, and again when the cache lets them go."""
    members: tuple[Container[str], ...] = ()
    """The elements of each slot, as long as they are parsed."""

    def slots(self) -> Slots:
        """Return slot -> element ids, in the order of the text."""
        parsed = self.parsed  # another thread may let it go meanwhile
        return _decode_slots(self.text) if parsed is None else parsed

    def keep_parsed(self) -> None:
        """Parse them for good."""
        self.parsed = _decode_slots(self.text)
        self.members = tuple(map(frozenset, self.parsed.values()))

    def let_go(self) -> None:
        """Keep the text alone."""
        self.parsed, self.members = None, ()


class CandidatesCache:
    """Parses each text once that comes again and again, as long as it is among the newest `max_bytes` of texts."""

    def __init__(self, max_bytes: int = MAX_CACHED_BYTES) -> None:
        self._max_bytes = max_bytes
        # The oldest of a plain dict is found only after all that were removed before it.
        self._by_text: OrderedDict[bytes, Candidates] = OrderedDict()
        self._num_bytes = 0
        self._new: list[Candidates] = []

    def get(self, text: bytes) -> Candidates:
        """Return the candidates of a text, parsed until `settle` at least.

        Raises:
            msgspec.MsgspecError: If they are none.
        """
        found = self._by_text.get(text)
        if found is None:
            slots = _decode_slots(text)
            found = self._by_text[text] = Candidates(text, slots, tuple(slots.values()))
            self._num_bytes += len(text)
            self._new.append(found)
        elif found.parsed is None:
            found.keep_parsed()
        return found

    def settle(self) -> None:
        """End a batch: those that came for the first time keep only their text, and the oldest go that are too many."""
        for found in self._new:
            found.let_go()
        self._new.clear()
        while self._num_bytes > self._max_bytes:
            text, found = self._by_text.popitem(last=False)
            found.let_go()
            self._num_bytes -= len(text)


class ImpressionColumns:
    """The columns of N impressions, until they leave, in the form that takes little memory."""

    __slots__ = ("_batch", "_candidates", "_ends", "_value", "num_bytes")

    def __init__(self, batch: pa.RecordBatch, candidates: list[Candidates] | None, value: bytes | None = None) -> None:
        """Keep the columns.

        Args:
            batch: N rows of `COLUMN_SCHEMA`, or without the candidates.
            candidates: Of each row, if they are not in the batch.
            value: The record of Kafka that holds just this batch, compressed: then it is kept instead.
        """
        self._batch = batch if value is None else None
        self._candidates = candidates
        self._value = value
        sizes = row_sizes(batch)
        if candidates:
            # An element id costs a byte more in Arrow than in JSON, where its quotes and a comma make it four at least.
            texts = np.fromiter([len(found.text) for found in candidates], np.int64, len(candidates))
            sizes += texts + texts // 4
        self._ends = np.concatenate([[0], np.cumsum(sizes)])
        """Bytes of the rows before each, in a record of examples before it is compressed."""
        self.num_bytes = int(self._ends[-1]) if value is None else len(value)
        """About what they take here. Texts of candidates are mostly shared, and counted in full all the same."""

    def bytes_of(self, first: int, last: int) -> int:
        """Return what rows [first, last) take in a record of examples, before it is compressed."""
        return int(self._ends[last] - self._ends[first])

    def fitting(self, first: int, last: int, num_bytes: int) -> int:
        """Return the end of the rows from `first` on, `last` at most, that take no more than so many bytes."""
        return min(last, int(np.searchsorted(self._ends, self._ends[first] + num_bytes, side="right")) - 1)

    def take(self, rows: NDArray[np.intp]) -> ImpressionColumns:
        """Return the columns of these rows, in that order."""
        candidates = None if self._candidates is None else [self._candidates[row] for row in rows.tolist()]
        return ImpressionColumns(self._columns().take(pa.array(rows)), candidates)

    def rows(self, first: int, last: int, shelf: CandidatesShelf) -> pa.RecordBatch:
        """Return rows [first, last) with all columns of `COLUMN_SCHEMA`."""
        batch = self._columns().slice(first, last - first)
        if self._candidates is None:
            return batch
        candidates = shelf.column(self._candidates[first:last])
        arrays = [candidates if name == "candidates" else batch.column(name) for name in COLUMN_NAMES]
        return pa.RecordBatch.from_arrays(arrays, schema=COLUMN_SCHEMA)

    def _columns(self) -> pa.RecordBatch:
        return self._batch if self._value is None else batch_of(self._value)


@dataclass(frozen=True, slots=True)
class ImpressionBatch:
    """N impressions in the order of their record."""

    ids: list[str]
    times_ms: NDArray[np.int64]
    columns: ImpressionColumns
    lines: Sequence[int]
    """The place of each in the record, from 0."""

    def __len__(self) -> int:
        """Return N."""
        return len(self.ids)

    @classmethod
    def empty(cls) -> ImpressionBatch:
        """Return the batch of a record without impressions."""
        columns = ImpressionColumns(pa.RecordBatch.from_pylist([], schema=COLUMN_SCHEMA), None)
        return cls([], np.empty(0, np.int64), columns, [])

    def take(self, rows: Sequence[int] | NDArray[np.intp]) -> ImpressionBatch:
        """Return the batch of these rows, in that order."""
        index = np.asarray(rows, np.intp)
        chosen = index.tolist()
        return ImpressionBatch(
            [self.ids[row] for row in chosen],
            self.times_ms[index],
            self.columns.take(index),
            [self.lines[row] for row in chosen],
        )


class _Wire(Impression, frozen=True, kw_only=True, gc=False):
    """An impression whose candidates are still text."""

    candidates: msgspec.Raw  # type: ignore[assignment]


class _Flat:
    """The mappings slot -> value of N impressions, one slot after the other."""

    def __init__(self, events: Sequence[Impression], slots: Sequence[Mapping[str, object]]) -> None:
        self.num_slots = np.fromiter(map(len, slots), np.int32, len(slots))
        self.names = list(chain.from_iterable(slots))
        creatives = [event.creative for event in events]
        propensities = [event.slot_propensities for event in events]
        # Each impression must have the slots of its candidates in their order; equal lists of all names alone do not
        # tell where one impression ends.
        self.is_in_order = (
            self.names == list(chain.from_iterable(creatives)) == list(chain.from_iterable(propensities))
            and list(map(len, creatives)) == list(map(len, propensities)) == self.num_slots.tolist()
        )
        self.chosen = list(chain.from_iterable(map(dict.values, creatives)))
        self.propensities = np.fromiter(chain.from_iterable(map(dict.values, propensities)), np.float64)

    def is_consistent(self, candidates: Sequence[Candidates], propensity: NDArray[np.float64]) -> bool:
        """Say whether no impression contradicts itself, as `impression_fault` would; False also if out of order."""
        if not self.is_in_order:
            return False
        members = chain.from_iterable([found.members for found in candidates])
        if not all(map(operator.contains, members, self.chosen)):
            return False
        starts = np.cumsum(self.num_slots) - self.num_slots
        products = np.multiply.reduceat(self.propensities, starts)
        return bool((np.abs(products - propensity) <= PROPENSITY_TOLERANCE * products).all())


class ImpressionDecoder:
    """Decodes records of the topic `impressions`. Keep one: it holds the compiled schema and the cache."""

    def __init__(self) -> None:
        self._decode_lines = msgspec.json.Decoder(_Wire).decode_lines
        self._exact = EventDecoder(Impression)
        self._cache = CandidatesCache()

    def decode(self, value: bytes) -> tuple[ImpressionBatch, list[BadEvent]]:
        """Read the value of one record: the good impressions, and the bad lines. Never raises on bad bytes."""
        try:
            batch = _all_sound(value) if is_columnar(value) else self._all_good(value)
            if batch is not None:
                return batch, []
            decoded = self._exact.decode_batch(value)
            return self._from_events(decoded.events, {event.index for event in decoded.bad}), decoded.bad
        finally:
            self._cache.settle()

    def _all_good(self, value: bytes) -> ImpressionBatch | None:
        """Read the batch in one go; None if there is anything that a closer look must decide."""
        try:
            events = self._decode_lines(value)
            candidates = [self._cache.get(bytes(event.candidates)) for event in events]
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        if len(events) > MAX_BATCH_EVENTS or not is_a_line_each(value, len(events)) or _has_long_line(value):
            return None
        slots = [found.slots() for found in candidates]
        flat = _Flat(events, slots)
        propensity = np.fromiter([event.propensity for event in events], np.float64, len(events))
        if not flat.is_consistent(candidates, propensity):
            return None
        num_keys = _NUM_FIELDS * len(events) + sum([len(event.context) for event in events]) + 3 * len(flat.names)
        if not has_no_other_keys(value, num_keys):
            return None
        return _batch(events, candidates, flat, range(len(events)))

    def _from_events(self, events: Sequence[Impression], bad: Container[int]) -> ImpressionBatch:
        """Make a batch of impressions that were decoded one by one; `bad` are the lines between them."""
        candidates = [self._cache.get(_encode_json(event.candidates)) for event in events]
        lines = list(islice((line for line in count() if line not in bad), len(events)))
        # The columns share the names of the slots, and take them from the creative.
        events = [
            msgspec.structs.replace(
                event, slot_propensities={slot: event.slot_propensities[slot] for slot in event.creative}
            )
            for event in events
        ]
        flat = _Flat(events, [event.creative for event in events])
        return _batch(events, candidates, flat, lines)


def _all_sound(value: bytes) -> ImpressionBatch | None:
    """Read a batch in columns; None if there is anything that a closer look must decide."""
    try:
        batch = read_impressions(value)
    except ValueError:
        return None
    if batch.num_rows > MAX_BATCH_EVENTS or not is_sound(batch):
        return None
    ids = batch.column("decision_id").to_pylist()
    times_ms = batch.column("occurred_at_ms").to_numpy()
    return ImpressionBatch(ids, times_ms, ImpressionColumns(batch, None, value), range(len(ids)))


def _has_long_line(value: bytes) -> bool:
    """Say whether a line is longer than is allowed."""
    if len(value) <= MAX_LINE_BYTES:
        return False
    ends = np.append(np.flatnonzero(np.frombuffer(value, np.uint8) == ord("\n")), len(value))
    return int(np.diff(ends, prepend=-1).max()) - 1 > MAX_LINE_BYTES


def _batch(
    events: Sequence[Impression], candidates: list[Candidates], flat: _Flat, lines: Sequence[int]
) -> ImpressionBatch:
    ids = [event.decision_id for event in events]
    starts = offsets_array(flat.num_slots)
    # Mostly all impressions of a record have the same slots: Arrow repeats a few names faster than it reads many.
    num_names = int(flat.num_slots[0]) if len(ids) else 0
    few = flat.names[:num_names]
    if flat.names == few * len(ids):
        names = pa.array(few, pa.string()).take(pa.array(np.tile(np.arange(num_names, dtype=np.int32), len(ids))))
    else:
        names = pa.array(flat.names, pa.string())
    arrays: dict[str, pa.Array] = {
        "decision_id": pa.array(ids, pa.string()),
        "context": pa.array([_encode_json(event.context) for event in events], pa.string()),
        "creative": pa.MapArray.from_arrays(starts, names, pa.array(flat.chosen, pa.string())),
        "slot_propensities": pa.MapArray.from_arrays(starts, names, pa.array(flat.propensities)),
    }
    for field in _PARSED:
        if field.name not in arrays:
            arrays[field.name] = pa.array(list(map(attrgetter(field.name), events)), field.type)
    columns = pa.RecordBatch.from_arrays([arrays[name] for name in _PARSED.names], schema=_PARSED)
    return ImpressionBatch(
        ids, columns.column("occurred_at_ms").to_numpy(), ImpressionColumns(columns, candidates), lines
    )


class CandidatesShelf:
    """Makes the column `candidates` of examples: what comes again and again is made once, and then copied by Arrow.

    Args:
        max_bytes: Of the texts of what it keeps; when they are more it begins anew.
    """

    def __init__(self, max_bytes: int = MAX_CACHED_BYTES) -> None:
        self._max_bytes = max_bytes
        self._clear()

    def _clear(self) -> None:
        self._array = candidates_array([])
        self._places: dict[Candidates, int] = {}
        self._num_bytes = 0

    def column(self, candidates: Sequence[Candidates]) -> pa.Array:
        """Return the column of N impressions."""
        missing = [found for found in dict.fromkeys(candidates) if found not in self._places]
        if not missing:
            return self._taken(candidates)
        if all(found.parsed is not None for found in missing):
            self._add(missing)
            if all(found in self._places for found in candidates):
                return self._taken(candidates)
        # Some of them came once only, and so may all others of this kind.
        distinct = {found: place for place, found in enumerate(dict.fromkeys(candidates))}
        array = candidates_array([found.slots() for found in distinct])
        return array.take(pa.array([distinct[found] for found in candidates], pa.int32()))

    def _taken(self, candidates: Sequence[Candidates]) -> pa.Array:
        return self._array.take(pa.array([self._places[found] for found in candidates], pa.int32()))

    def _add(self, new: Sequence[Candidates]) -> None:
        self._num_bytes += sum(len(found.text) for found in new)
        if self._num_bytes > self._max_bytes:
            self._clear()
            return
        self._places |= {found: place for place, found in enumerate(new, len(self._array))}
        self._array = pa.concat_arrays([self._array, candidates_array([found.slots() for found in new])])
