"""Batches of events: newline-separated JSON (NDJSON), one batch for each Kafka record, or impressions in columns.

A bad line never spoils its neighbors: `decode_batch` returns the good events and, for each bad one, its place, the
field and the reason. A batch of one is a single event, so any client can write to the topics by hand.

Marks: a record with the header `genco-mark` holds no events but the time up to which the partition is complete. A
replay writes them, so that the clock of a log goes on where it has gaps, and ends each partition with `END_OF_LOG_MS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar, cast

import msgspec
import numpy as np

from streams.contracts.events import Event, Impression, impression_fault
from streams.contracts.impressions import impression_lines, is_columnar, read_impressions

MAX_LINE_BYTES: Final = 256 * 1024
MAX_BATCH_EVENTS: Final = 10_000
MAX_RECORD_BYTES: Final = 900_000
"""Of what we write: a broker refuses records of 1 MiB and more unless it is told otherwise."""
END_OF_LOG_MS: Final = 2**62
MARK_HEADER: Final = "genco-mark"

EventT = TypeVar("EventT", bound=Event)
ItemT = TypeVar("ItemT")


@dataclass(frozen=True, slots=True)
class BadEvent:
    """A line that is no event."""

    index: int
    """Its place in the batch, from 0."""
    reason: str
    """Field and cause, for a person."""
    line: bytes


@dataclass(slots=True)
class Decoded(Generic[EventT]):
    """A decoded batch: every line is in exactly one of the two lists."""

    events: list[EventT] = field(default_factory=list)
    bad: list[BadEvent] = field(default_factory=list)


class EventDecoder(Generic[EventT]):
    """Decodes batches of one event type. Keep one for each topic: it holds the compiled schema."""

    def __init__(self, event_type: type[EventT]) -> None:
        decoder = msgspec.json.Decoder(event_type)
        self._decode = decoder.decode
        self._decode_lines = decoder.decode_lines
        self._is_impression = event_type is Impression
        # All fields of an impression are required, so the number of keys tells whether one came twice.
        self._num_fields = len(event_type.__struct_fields__)

    def decode_batch(self, value: bytes) -> Decoded[EventT]:
        """Read the value of one record of `impressions` or `clicks`. Never raises on bad bytes."""
        if self._is_impression and is_columnar(value):
            try:
                return self._line_by_line(lines_of(value))
            except ValueError as error:
                return Decoded(bad=[BadEvent(0, f"record: {error}", value)])
        events = self._all_good(value)
        return self._line_by_line(_ndjson_lines(value)) if events is None else Decoded(events)

    def _all_good(self, value: bytes) -> list[EventT] | None:
        """Read the batch in one go; None if there is anything that a closer look must decide."""
        if not self._is_impression or len(value) > MAX_LINE_BYTES:
            return None
        try:
            events = self._decode_lines(value)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        keys = 0
        for event in events:
            impression = cast(Impression, event)
            if impression_fault(impression):
                return None
            keys += self._num_keys(impression)
        if len(events) > MAX_BATCH_EVENTS or not is_a_line_each(value, len(events)):
            return None
        return events if has_no_other_keys(value, keys) else None

    def _line_by_line(self, lines: Iterable[bytes]) -> Decoded[EventT]:
        out: Decoded[EventT] = Decoded()
        events = out.events
        decode = self._decode
        for index, line in enumerate(lines):
            reason: str | None = None
            if index >= MAX_BATCH_EVENTS:
                reason = f"batch: more than {MAX_BATCH_EVENTS} events in one record; send smaller batches"
            elif len(line) > MAX_LINE_BYTES:
                reason = f"event: {len(line)} bytes; at most {MAX_LINE_BYTES}"
            else:
                try:
                    event = decode(line)
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                    reason = _reason(error)
                else:
                    reason = self._fault(event, line)
                    if reason is None:
                        events.append(event)
            if reason is not None:
                out.bad.append(BadEvent(index, reason, line))
        return out

    def _num_keys(self, event: Impression) -> int:
        return (
            self._num_fields
            + len(event.context)
            + len(event.candidates)
            + len(event.creative)
            + len(event.slot_propensities)
        )

    def _fault(self, event: EventT, line: bytes) -> str | None:
        if isinstance(event, Impression):
            if not has_no_other_keys(line, self._num_keys(event)) and (reason := _duplicate_key(line)):
                return reason
            return impression_fault(event)
        # Three keys are required and one may be left out, so these have no room for another, or for one twice.
        num_keys = line.count(b":")
        if num_keys == 3 or (num_keys == 4 and line.count(b'"reward":') == 1):
            return None
        return _duplicate_key(line)


def lines_of(value: bytes) -> list[bytes]:
    """Return the events of a record as lines of JSON, in the order in which their places are counted.

    Raises:
        ValueError: If the record is an Arrow stream that cannot be read.
    """
    return impression_lines(read_impressions(value)) if is_columnar(value) else _ndjson_lines(value)


def _ndjson_lines(value: bytes) -> list[bytes]:
    return [line for line in value.split(b"\n") if line and not line.isspace()]


def is_a_line_each(value: bytes, num_events: int) -> bool:
    """Say whether each of the events that were decoded from a batch surely has a line for itself, none blank.

    Places are line numbers, so a value over two lines, or two on one, needs a closer look. After `}` and a newline, `{`
    can only begin another event: within one, a comma or another bracket follows. So as many lines as events are proof
    if all begin and end so. False only means "not sure".
    """
    text = np.frombuffer(value, np.uint8)  # several times as fast as looking for the three bytes
    breaks = np.flatnonzero(text == ord("\n"))
    if value.endswith(b"\n"):
        breaks = breaks[:-1]
    if len(breaks) + 1 != num_events or not value.startswith(b"{"):
        return False
    return bool((text[breaks - 1] == ord("}")).all() and (text[breaks + 1] == ord("{")).all())


def has_no_other_keys(text: bytes, num_keys: int) -> bool:
    """Say whether JSON surely holds no key beside the `num_keys` that were decoded from it: none unknown, none twice.

    Every key brings a colon, so as many colons as keys are proof. Where values hold colons too, the colons right after
    a quote are counted, if none stands after white space, where one of a key could hide. False only means "not sure".
    """
    # numpy counts a byte four times as fast as bytes.count
    if np.count_nonzero(np.frombuffer(text, np.uint8) == ord(":")) == num_keys:
        return True
    return text.count(b'":') == num_keys and not any(hidden in text for hidden in (b" :", b"\t:", b"\r:", b"\n:"))


def _reason(error: Exception) -> str:
    """Turn a decoder's message into "field: cause"."""
    if isinstance(error, RecursionError):
        return "event: nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"event: not UTF-8 at byte {error.start}"
    message = str(error)
    cause, at, path = message.rpartition(" - at `")
    if at:
        # A key's own fault is told as "key` in `$.context".
        return f"{path.rpartition('$')[2].strip('.`') or 'event'}: {cause}"
    return f"event: {message}"


class _DuplicateKeyError(ValueError):
    """Carries the key out of the parser."""


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return out


def _duplicate_key(line: bytes) -> str | None:
    try:
        json.loads(line, object_pairs_hook=_refuse_duplicates)
    except _DuplicateKeyError as error:
        return f"{str(error)[:80]}: key stands twice in one object"
    except RecursionError:
        return "event: nested too deeply"
    except ValueError as error:  # unreachable after msgspec accepted the line, unless the two parsers differ
        return f"event: {error}"
    return None


_encoder = msgspec.json.Encoder()


def encode_event(event: Event) -> bytes:
    """Return one event as a line of JSON without the newline."""
    return _encoder.encode(event)


def encode_batch(events: Iterable[Event]) -> bytes:
    """Return the value of one record: a line for each event."""
    return _encoder.encode_lines(list(events))


def split_to_fit(
    items: Sequence[ItemT], encode: Callable[[Sequence[ItemT]], bytes], max_bytes: int = MAX_RECORD_BYTES
) -> Iterator[tuple[Sequence[ItemT], bytes]]:
    """Yield records, in order, none larger than `max_bytes` unless it holds one item alone: the items, and the value.

    Args:
        items: What is to be written, at least one.
        encode: Makes the value of a record.
        max_bytes: Halves are tried until they fit.
    """
    value = encode(items)
    if len(value) <= max_bytes or len(items) == 1:
        yield items, value
        return
    middle = len(items) // 2
    yield from split_to_fit(items[:middle], encode, max_bytes)
    yield from split_to_fit(items[middle:], encode, max_bytes)


def encode_context(context: Mapping[str, object]) -> str:
    """Return a context as JSON text, as the column `context` of the examples holds it."""
    return _encoder.encode(context).decode()


def encode_mark(complete_until_ms: int) -> tuple[bytes, Sequence[tuple[str, bytes]]]:
    """Return value and headers of a mark: no event before this time follows in the partition."""
    return b"", [(MARK_HEADER, str(complete_until_ms).encode())]


def mark_of(headers: Sequence[tuple[str, bytes]] | None) -> int | None:
    """Return the time of a mark, or None for a record of events."""
    for name, value in headers or ():
        if name == MARK_HEADER:
            try:
                return int(value)
            except (ValueError, TypeError):  # a header's value may be missing
                return None
    return None
