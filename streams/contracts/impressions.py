"""Impressions in columns: what our servers write to the topic `impressions`, beside NDJSON that any client may write.

One Kafka record holds one Arrow IPC stream with one record batch of `IMPRESSION_SCHEMA`: the columns of an example
without its label. The joiner takes it in much faster than the same impressions as NDJSON, for little is parsed. Its
first bytes tell the two apart. What is accepted is the same: `is_sound` finds in one go that nothing is wrong with a
batch, and whatever it is not sure of is decided line by line, by the rules for JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Annotated, Any, Final, get_args

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Meta
from numpy.typing import NDArray

from streams.contracts.events import (
    MAX_CANDIDATES,
    MAX_CONTEXT_FIELDS,
    MAX_SLOTS,
    PROPENSITY_TOLERANCE,
    ContextField,
    ContextValue,
    Impression,
    Source,
)
from streams.contracts.examples import EXAMPLE_SCHEMA, arrow_stream

SCHEMA_VERSION: Final = 1
COLUMN_NAMES: Final = [name for name in Impression.__struct_fields__ if name != "schema_version"]
COLUMN_SCHEMA: Final = pa.schema([EXAMPLE_SCHEMA.field(name) for name in COLUMN_NAMES])
IMPRESSION_SCHEMA: Final = COLUMN_SCHEMA.with_metadata(
    {"genco.schema": "impressions", "genco.schema_version": str(SCHEMA_VERSION)}
)

_STREAM_BEGINS: Final = b"\xff\xff\xff\xff"
"""Of an Arrow IPC stream; no JSON begins so."""
_MAX_ID: Final = 128
_MAX_TIME_MS: Final = 4_102_444_800_000
_SOURCES: Final = frozenset(get_args(Source))
_Context = Annotated[dict[ContextField, ContextValue], Meta(max_length=MAX_CONTEXT_FIELDS)]
_decode_contexts = msgspec.json.Decoder(list[_Context]).decode
_encode_json = msgspec.json.Encoder().encode


def is_columnar(value: bytes) -> bool:
    """Say whether the value of a record is an Arrow stream, and not NDJSON."""
    return value.startswith(_STREAM_BEGINS)


def encode_impressions(impressions: Sequence[Impression]) -> bytes:
    """Return the value of one record."""
    arrays = [_column(impressions, name) for name in COLUMN_NAMES]
    return arrow_stream(pa.RecordBatch.from_arrays(arrays, schema=IMPRESSION_SCHEMA), IMPRESSION_SCHEMA)


def batch_of(value: bytes) -> pa.RecordBatch:
    """Return the columns of a record that `read_impressions` has read before."""
    with pa.ipc.open_stream(value) as reader:
        batch = reader.read_next_batch()
    return pa.RecordBatch.from_arrays([batch.column(name) for name in COLUMN_NAMES], schema=COLUMN_SCHEMA)


def read_impressions(value: bytes) -> pa.RecordBatch:
    """Return the columns of a record, of `COLUMN_SCHEMA`; their values are not looked at.

    Raises:
        ValueError: If the bytes are no Arrow stream with one batch of these columns, or of another schema version.
    """
    try:
        with pa.ipc.open_stream(value) as reader:
            metadata = reader.schema.metadata or {}
            batches = list(reader)
        version = metadata.get(b"genco.schema_version", b"none").decode("ascii", "replace")
        if version != str(SCHEMA_VERSION):
            raise ValueError(f"schema_version: {version[:20]!r}; this program reads version {SCHEMA_VERSION}")
        if len(batches) != 1:
            raise ValueError(f"{len(batches)} record batches; expected one")
        batch = batches[0]
        batch.validate(full=True)  # damaged offsets would be read beyond their buffers
        if batch.schema.names == COLUMN_NAMES and batch.schema.equals(COLUMN_SCHEMA):
            return batch
        return pa.RecordBatch.from_arrays(
            [batch.column(name).cast(COLUMN_SCHEMA.field(name).type) for name in COLUMN_NAMES], schema=COLUMN_SCHEMA
        )
    except KeyError as missing:
        raise ValueError(f"lacks the column {missing}; expected {COLUMN_NAMES}") from None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, MemoryError) as error:
        raise ValueError(f"no Arrow stream of impressions ({error})") from error


def impression_lines(batch: pa.RecordBatch) -> list[bytes]:
    """Return each impression as a JSON object, as it would stand in NDJSON; what is wrong with it stays wrong."""
    columns = batch.to_pydict()
    return [_line({name: columns[name][row] for name in COLUMN_NAMES}) for row in range(batch.num_rows)]


def _line(row: dict[str, Any]) -> bytes:
    # New lines may stand in JSON as white space only, and must not end a line of NDJSON.
    row["context"] = msgspec.Raw((row["context"] or "null").replace("\n", " ").encode())
    for name in ("candidates", "creative", "slot_propensities"):
        if row[name] is not None:
            pairs = (_encode_json(key) + b":" + _encode_json(value) for key, value in row[name])
            row[name] = msgspec.Raw(b"{" + b",".join(pairs) + b"}")
    return _encode_json({"schema_version": SCHEMA_VERSION} | row)


def row_sizes(batch: pa.RecordBatch) -> NDArray[np.int64]:
    """Return the bytes of each row: contexts and candidates one by one, for they differ most, the rest by its mean.

    Args:
        batch: N rows of `COLUMN_SCHEMA`, or without the candidates.
    """
    contexts = batch.column("context")
    sizes: NDArray[np.int64] = np.diff(_text_offsets(contexts)).astype(np.int64)
    rest: int = batch.nbytes - int(sizes.sum())
    if "candidates" in batch.schema.names:
        candidates = batch.column("candidates")
        slots = candidates.offsets.to_numpy()
        elements = candidates.items.offsets.to_numpy()[slots]
        own = np.diff(_text_offsets(candidates.items.values)[elements]) + 4 * np.diff(elements)
        rest -= int(own.sum())
        sizes += own
    sizes += max(0, rest) // max(1, batch.num_rows) + 1
    return sizes


def is_sound(batch: pa.RecordBatch) -> bool:
    """Say whether surely every row is an impression that `EventDecoder` accepts. False only means "not sure".

    Args:
        batch: N rows from `read_impressions`.
    """
    if batch.num_rows == 0 or any(column.null_count for column in batch.columns):
        return False
    column = batch.column
    return (
        all(_has_lengths(column(name), 1, _MAX_ID) for name in ("decision_id", "product_id", "model_id"))
        and _is_within(column("occurred_at_ms").to_numpy(), 0, _MAX_TIME_MS - 1)
        and all(_is_within(column(name).to_numpy(), 0, 2**53 - 1) for name in ("epoch", "policy_version"))
        and _is_within(column("seed").to_numpy(), 0, 2**63 - 1)
        and all(_are_probabilities(column(name).to_numpy()) for name in ("propensity", "survival_probability"))
        and _SOURCES.issuperset(column("source").to_pylist())
        and _has_sound_slots(batch)
        and _has_sound_contexts(column("context"))
    )


def _has_sound_slots(batch: pa.RecordBatch) -> bool:
    candidates, creative, propensities = (batch.column(n) for n in ("candidates", "creative", "slot_propensities"))
    starts = candidates.offsets.to_numpy()
    num_slots = np.diff(starts)
    keys, lists, chosen = candidates.keys, candidates.items, creative.items
    values = propensities.items
    if not _is_within(num_slots, 1, MAX_SLOTS) or any(part.null_count for part in (lists, chosen, values)):
        return False
    # The same slots in the same order; any other order needs a closer look.
    for other in (creative, propensities):
        if not (np.array_equal(other.offsets.to_numpy(), starts) and other.keys.equals(keys)):
            return False
    elements, list_starts = lists.values, lists.offsets.to_numpy()
    num_elements = np.diff(list_starts)
    if not (
        _is_within(num_elements, 1, MAX_CANDIDATES)
        and not elements.null_count
        and _has_lengths(keys, 1, _MAX_ID)
        and _has_lengths(elements, 1, _MAX_ID)
        and _are_distinct(keys, num_slots)
    ):
        return False
    slot_of_element = pa.array(np.repeat(np.arange(len(num_elements), dtype=np.int32), num_elements))
    is_chosen = pc.equal(elements, chosen.take(slot_of_element)).to_numpy(zero_copy_only=False)
    if not np.logical_or.reduceat(is_chosen, list_starts[:-1] - list_starts[0]).all():
        return False
    numbers = values.to_numpy()
    products = np.multiply.reduceat(numbers, starts[:-1] - starts[0])
    difference = np.abs(products - batch.column("propensity").to_numpy())
    return _are_probabilities(numbers) and bool((difference <= PROPENSITY_TOLERANCE * products).all())


def _are_distinct(keys: pa.Array, num_slots: NDArray[np.int32]) -> bool:
    """Say whether no impression names a slot twice."""
    names = keys.to_pylist()
    first = names[: num_slots[0]]
    if names == first * len(num_slots):
        return len(set(first)) == len(first)
    ends = np.cumsum(num_slots).tolist()
    return all(len(set(names[end - num : end])) == num for end, num in zip(ends, num_slots.tolist(), strict=True))


def _has_sound_contexts(contexts: pa.Array) -> bool:
    texts = contexts.cast(pa.binary()).to_pylist()
    try:
        decoded = _decode_contexts(b"[" + b",".join(texts) + b"]")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    if len(decoded) != len(texts):
        return False  # a text that holds two
    # As many colons as keys: none stands twice.
    num_keys = sum(map(len, decoded))
    num_colons: int = sum(text.count(b":") for text in texts)
    return num_colons == num_keys


def _has_lengths(texts: pa.Array, least: int, most: int) -> bool:
    """Say whether all texts have so many bytes: then they have no more characters."""
    return _is_within(np.diff(_text_offsets(texts)), least, most)


def _text_offsets(texts: pa.Array) -> NDArray[np.int32]:
    return np.frombuffer(texts.buffers()[1] or bytes(4), np.int32)[texts.offset : texts.offset + len(texts) + 1]


def _is_within(numbers: NDArray[Any], least: int, most: int) -> bool:
    return len(numbers) == 0 or bool(numbers.min() >= least and numbers.max() <= most)


def _are_probabilities(numbers: NDArray[np.float64]) -> bool:
    return bool(((numbers > 0.0) & (numbers <= 1.0)).all())  # and no nan


def _column(impressions: Sequence[Impression], name: str) -> pa.Array:
    values = [getattr(impression, name) for impression in impressions]
    kind = COLUMN_SCHEMA.field(name).type
    if name == "context":
        return pa.array([_encode_json(context) for context in values], kind)
    if name == "candidates":
        return candidates_array(values)
    if name in ("creative", "slot_propensities"):
        return slots_array(values, pa.array(list(chain.from_iterable(map(dict.values, values))), kind.item_type))
    return pa.array(values, kind)


def slots_array(mappings: Sequence[dict[str, Any]], items: pa.Array) -> pa.Array:
    """Return the column of N mappings slot -> value, of which `items` are all values, one mapping after the other."""
    lengths = np.fromiter(map(len, mappings), np.int32, len(mappings))
    return pa.MapArray.from_arrays(offsets_array(lengths), _texts(chain.from_iterable(mappings)), items)


def candidates_array(candidates: Sequence[dict[str, list[str]]]) -> pa.Array:
    """Return the column of N mappings slot -> element ids."""
    lists = list(chain.from_iterable(map(dict.values, candidates)))
    lengths = np.fromiter(map(len, lists), np.int32, len(lists))
    elements = _texts(chain.from_iterable(lists))
    return slots_array(candidates, pa.ListArray.from_arrays(offsets_array(lengths), elements))


def offsets_array(lengths: NDArray[np.int32]) -> pa.Array:
    """Return where each of N lists of these lengths begins, and where the last ends: N + 1 numbers."""
    ends = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=ends[1:])
    return pa.array(ends)


def _texts(texts: Iterable[str]) -> pa.Array:
    return pa.array(list(texts), pa.string())
