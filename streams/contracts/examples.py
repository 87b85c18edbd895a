"""Labeled impressions as the topic `examples` and the Parquet archive carry them.

One Kafka record holds one Arrow IPC stream with one record batch. Its schema travels along, so any Arrow reader opens
it without this package. The columns are those of `Impression` plus the label:

    label       1 if a click within the attribution window is known, else 0
    reward      worth of the click (1.0 for a plain click), 0.0 without one
    label_kind  `final`: will not change; `provisional`: negative so far; `late_positive`: corrects a provisional one
    delay_ms    click time - impression time, null without a click

Labels form a lattice: nothing < provisional negative < positive. A consumer keeps the strongest by decision id, so
duplicates and re-emission after a crash change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Final, Self

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

SCHEMA_VERSION: Final = 1
COMPRESSION: Final = "lz4"
"""Of the buffers inside a record, which any Arrow reader undoes; so the Kafka producer compresses nothing."""
NO_DELAY: Final = -(2**62)
"""Stands for "no click" among delays; a click a little before its impression has a negative delay."""


class LabelKind(StrEnum):
    """How certain a label is."""

    FINAL = "final"
    PROVISIONAL = "provisional"
    LATE_POSITIVE = "late_positive"


EXAMPLE_SCHEMA = pa.schema(
    [
        pa.field("decision_id", pa.string(), nullable=False),
        pa.field("occurred_at_ms", pa.int64(), nullable=False),
        pa.field("product_id", pa.string(), nullable=False),
        # JSON object: values are strings, numbers and booleans, and their type matters to the features.
        pa.field("context", pa.string(), nullable=False),
        pa.field("candidates", pa.map_(pa.string(), pa.list_(pa.string())), nullable=False),
        pa.field("creative", pa.map_(pa.string(), pa.string()), nullable=False),
        pa.field("slot_propensities", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("propensity", pa.float64(), nullable=False),
        pa.field("model_id", pa.string(), nullable=False),
        pa.field("epoch", pa.int64(), nullable=False),
        pa.field("policy_version", pa.int64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("holdout", pa.bool_(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("survival_probability", pa.float64(), nullable=False),
        pa.field("label", pa.int8(), nullable=False),
        pa.field("reward", pa.float64(), nullable=False),
        pa.field("label_kind", pa.string(), nullable=False),
        pa.field("delay_ms", pa.int64()),
    ],
    metadata={"genco.schema": "examples", "genco.schema_version": str(SCHEMA_VERSION)},
)

ContextValue = str | int | float | bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleBatch:
    """N labeled impressions, column by column, in the order of the log.

    Columns are Python lists where values are text or mappings, arrays where they are numbers. `creative`, `candidates`
    and `slot_propensities` keep the slot order of the decision.
    """

    decision_id: list[str]
    occurred_at_ms: NDArray[np.int64]
    product_id: list[str]
    context: list[dict[str, ContextValue]]
    candidates: list[dict[str, list[str]]]
    creative: list[dict[str, str]]
    slot_propensities: list[dict[str, float]]
    propensity: NDArray[np.float64]
    model_id: list[str]
    epoch: NDArray[np.int64]
    policy_version: NDArray[np.int64]
    source: list[str]
    holdout: NDArray[np.bool_]
    seed: NDArray[np.int64]
    survival_probability: NDArray[np.float64]
    label: NDArray[np.int8]
    reward: NDArray[np.float64]
    label_kind: list[str]
    delay_ms: NDArray[np.int64]
    """`NO_DELAY` without a click."""

    def __len__(self) -> int:
        """Return N."""
        return len(self.decision_id)

    def take(self, rows: Sequence[int] | NDArray[np.intp]) -> Self:
        """Return the batch of the given rows, in that order."""
        index = np.asarray(rows, np.intp)
        columns: dict[str, Any] = {}
        for field in fields(self):
            column = getattr(self, field.name)
            columns[field.name] = [column[i] for i in index] if isinstance(column, list) else column[index]
        return type(self)(**columns)

    @classmethod
    def empty(cls) -> ExampleBatch:
        """Return the batch of no examples."""
        return decode_examples(encode_examples({name: [] for name in EXAMPLE_SCHEMA.names}))

    @classmethod
    def concat(cls, batches: Sequence[ExampleBatch]) -> ExampleBatch:
        """Return the batches one after the other."""
        if not batches:
            return cls.empty()
        columns: dict[str, Any] = {}
        for field in fields(cls):
            parts = [getattr(batch, field.name) for batch in batches]
            if isinstance(parts[0], list):
                columns[field.name] = [value for part in parts for value in part]
            else:
                columns[field.name] = np.concatenate(parts)
        return cls(**columns)


def encode_examples(columns: Mapping[str, Sequence[Any]]) -> bytes:
    """Return the value of one Kafka record: an Arrow IPC stream with one record batch.

    Args:
        columns: For each name in `EXAMPLE_SCHEMA` a sequence of N values; `context` as JSON text, `delay_ms` None
            without a click, maps as lists of pairs or mappings.

    Raises:
        ValueError: If a column is missing or holds a value of another type.
    """
    try:
        arrays = [
            pa.array([list(v.items()) for v in columns[f.name]] if pa.types.is_map(f.type) else columns[f.name], f.type)
            for f in EXAMPLE_SCHEMA
        ]
    except KeyError as missing:
        raise ValueError(f"examples lack the column {missing}; expected {EXAMPLE_SCHEMA.names}") from None
    except (pa.ArrowInvalid, pa.ArrowTypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"a column of examples does not fit the schema: {error}") from error
    return example_record(pa.RecordBatch.from_arrays(arrays, schema=EXAMPLE_SCHEMA))


def example_record(batch: pa.RecordBatch) -> bytes:
    """Return the value of one Kafka record: an Arrow IPC stream with this batch of `EXAMPLE_SCHEMA`, compressed."""
    return arrow_stream(batch, EXAMPLE_SCHEMA)


def arrow_stream(batch: pa.RecordBatch, schema: pa.Schema) -> bytes:
    """Return an Arrow IPC stream with one batch, its buffers compressed; the schema brings its metadata along."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression=COMPRESSION)) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def example_batch_of(value: bytes) -> pa.RecordBatch:
    """Return the batch of a value that `example_record` made."""
    with pa.ipc.open_stream(value) as reader:
        return reader.read_next_batch()


def decode_table(value: bytes) -> pa.Table:
    """Read the value of one record of the topic `examples` as columns of `EXAMPLE_SCHEMA`, without looking into them.

    Columns that this version does not know are ignored.

    Raises:
        ValueError: If the bytes are no Arrow stream, a column is missing or of another type, or the schema is of
            another major version.
    """
    try:
        with pa.ipc.open_stream(value) as reader:
            metadata = reader.schema.metadata or {}
            batches = list(reader)
        version = int(metadata.get(b"genco.schema_version", b"0"))
        if version != SCHEMA_VERSION:
            raise ValueError(f"examples of schema version {version}; this program reads version {SCHEMA_VERSION}")
        if not batches:
            raise ValueError("examples end after their schema; the record was cut")
        table = pa.Table.from_batches(batches)
        table.validate(full=True)  # damaged offsets would be read beyond their buffers
        empty = [f.name for f in EXAMPLE_SCHEMA if not f.nullable and table.column(f.name).null_count]
        if empty:
            raise ValueError(f"examples have no value somewhere in {', '.join(empty)}")
        columns = [table.column(f.name).cast(f.type) for f in EXAMPLE_SCHEMA]
    except KeyError as missing:
        raise ValueError(f"examples lack the column {missing}; expected {EXAMPLE_SCHEMA.names}") from None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, MemoryError) as error:
        # MemoryError: damaged bytes may claim that a buffer is larger than any memory.
        raise ValueError(f"not a record of examples: {error}") from error
    return pa.Table.from_arrays(columns, schema=EXAMPLE_SCHEMA)


def decode_examples(value: bytes) -> ExampleBatch:
    """Read the value of one record of the topic `examples`.

    Columns that this version does not know are ignored.

    Raises:
        ValueError: If the bytes are no Arrow stream, a column is missing or of another type, or the schema is of
            another major version.
    """
    columns = decode_table(value).to_pydict()
    try:
        contexts = [msgspec.json.decode(text, type=dict[str, ContextValue]) for text in columns["context"]]
    except msgspec.DecodeError as error:
        raise ValueError(f"not a record of examples: {error}") from error
    return ExampleBatch(
        decision_id=columns["decision_id"],
        occurred_at_ms=np.array(columns["occurred_at_ms"], np.int64),
        product_id=columns["product_id"],
        context=contexts,
        candidates=[dict(pairs) for pairs in columns["candidates"]],
        creative=[dict(pairs) for pairs in columns["creative"]],
        slot_propensities=[dict(pairs) for pairs in columns["slot_propensities"]],
        propensity=np.array(columns["propensity"], np.float64),
        model_id=columns["model_id"],
        epoch=np.array(columns["epoch"], np.int64),
        policy_version=np.array(columns["policy_version"], np.int64),
        source=columns["source"],
        holdout=np.array(columns["holdout"], np.bool_),
        seed=np.array(columns["seed"], np.int64),
        survival_probability=np.array(columns["survival_probability"], np.float64),
        label=np.array(columns["label"], np.int8),
        reward=np.array(columns["reward"], np.float64),
        label_kind=columns["label_kind"],
        delay_ms=np.array([NO_DELAY if d is None else d for d in columns["delay_ms"]], np.int64),
    )
