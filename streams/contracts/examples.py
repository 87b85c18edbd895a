"""Labeled impressions as the topic `examples` and the Parquet archive carry them.

One Kafka record holds one Arrow IPC stream with one record batch. Its schema travels along, so any Arrow reader opens
it without this package. The columns are those of `Impression` plus the label:

    label       1 if a click within the attribution window is known, else 0
    reward      worth of the click (1.0 for a plain click), 0.0 without one
    label_kind  `final`: will not change; `provisional`: negative so far; `late_positive`: corrects a provisional one;
                `unknown`: shown when clicks were lost, so that neither label says anything, and not to be learned
    delay_ms    click time - impression time, null without a click

Labels form a lattice: nothing < unknown < provisional negative < positive. A consumer keeps the strongest by decision
id, so duplicates and re-emission after a crash change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import cached_property
from typing import Any, Final

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
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
    UNKNOWN = "unknown"


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
Values = Sequence[Any] | NDArray[Any]
_decode_context = msgspec.json.Decoder(dict[str, ContextValue]).decode


class ExampleBatch:
    """N labeled impressions in columns, in the order of the log; never changed.

    Numbers are arrays of shape (N,). Texts and maps stay as Arrow holds them, in `columns`, for what reads many
    examples looks at each distinct value once. The lists of Python values are for tools and tests, which look at every
    example: each is made when it is first asked for. Maps keep the slot order of the decision.
    """

    def __init__(self, columns: pa.RecordBatch) -> None:
        """Take N rows of `EXAMPLE_SCHEMA`."""
        self.columns = columns

    @classmethod
    def from_columns(cls, columns: Mapping[str, Values]) -> ExampleBatch:
        """Return examples from values, as `encode_examples` takes them.

        Raises:
            ValueError: If a column is missing or holds a value of another type.
        """
        try:
            arrays = [
                pa.array(
                    [list(v.items()) for v in columns[f.name]] if pa.types.is_map(f.type) else columns[f.name], f.type
                )
                for f in EXAMPLE_SCHEMA
            ]
            return cls(pa.RecordBatch.from_arrays(arrays, schema=EXAMPLE_SCHEMA))
        except KeyError as missing:
            raise ValueError(f"examples lack the column {missing}; expected {EXAMPLE_SCHEMA.names}") from None
        except (pa.ArrowInvalid, pa.ArrowTypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"a column of examples does not fit the schema: {error}") from error

    @classmethod
    def empty(cls) -> ExampleBatch:
        """Return the batch of no examples."""
        return cls.from_columns({name: [] for name in EXAMPLE_SCHEMA.names})

    @classmethod
    def concat(cls, batches: Sequence[ExampleBatch]) -> ExampleBatch:
        """Return the batches one after the other."""
        return cls(pa.concat_batches([batch.columns for batch in batches])) if batches else cls.empty()

    def __len__(self) -> int:
        """Return N."""
        num_rows: int = self.columns.num_rows
        return num_rows

    def take(self, rows: Sequence[int] | NDArray[np.intp]) -> ExampleBatch:
        """Return the batch of the given rows, in that order."""
        return ExampleBatch(self.columns.take(pa.array(np.asarray(rows, np.int64))))

    def has_kind(self, kind: LabelKind) -> NDArray[np.bool_]:
        """Say for each example whether its label is of this kind, (N,)."""
        has: NDArray[np.bool_] = pc.equal(self.columns.column("label_kind"), kind.value).to_numpy(zero_copy_only=False)
        return has

    def _numbers(self, name: str) -> NDArray[Any]:
        numbers: NDArray[Any] = self.columns.column(name).to_numpy(zero_copy_only=False)
        return numbers

    def _texts(self, name: str) -> list[str]:
        texts: list[str] = self.columns.column(name).to_pylist()
        return texts

    def _maps(self, name: str) -> list[dict[str, Any]]:
        return [dict(pairs) for pairs in self.columns.column(name).to_pylist()]

    @cached_property
    def occurred_at_ms(self) -> NDArray[np.int64]:
        """When each was shown."""
        return self._numbers("occurred_at_ms")

    @cached_property
    def propensity(self) -> NDArray[np.float64]:
        """Of the whole creative."""
        return self._numbers("propensity")

    @cached_property
    def epoch(self) -> NDArray[np.int64]:
        """Of the policy that decided."""
        return self._numbers("epoch")

    @cached_property
    def policy_version(self) -> NDArray[np.int64]:
        """Of the policy that decided."""
        return self._numbers("policy_version")

    @cached_property
    def holdout(self) -> NDArray[np.bool_]:
        """Whether the uniform share decided."""
        return self._numbers("holdout")

    @cached_property
    def seed(self) -> NDArray[np.int64]:
        """Of the decision."""
        return self._numbers("seed")

    @cached_property
    def survival_probability(self) -> NDArray[np.float64]:
        """That the impression was not dropped before it reached Kafka."""
        return self._numbers("survival_probability")

    @cached_property
    def label(self) -> NDArray[np.int8]:
        """1 if a click is known, else 0."""
        return self._numbers("label")

    @cached_property
    def reward(self) -> NDArray[np.float64]:
        """Worth of the click."""
        return self._numbers("reward")

    @cached_property
    def delay_ms(self) -> NDArray[np.int64]:
        """From the impression to its click; `NO_DELAY` without one."""
        delays: NDArray[np.int64] = pc.fill_null(self.columns.column("delay_ms"), NO_DELAY).to_numpy()
        return delays

    @cached_property
    def decision_id(self) -> list[str]:
        """Id of each decision."""
        return self._texts("decision_id")

    @cached_property
    def product_id(self) -> list[str]:
        """Product of each card."""
        return self._texts("product_id")

    @cached_property
    def model_id(self) -> list[str]:
        """Of the policy that decided."""
        return self._texts("model_id")

    @cached_property
    def source(self) -> list[str]:
        """Rung of the ladder that decided."""
        return self._texts("source")

    @cached_property
    def label_kind(self) -> list[str]:
        """See `LabelKind`."""
        return self._texts("label_kind")

    @cached_property
    def candidates(self) -> list[dict[str, list[str]]]:
        """Slot -> element ids."""
        return self._maps("candidates")

    @cached_property
    def creative(self) -> list[dict[str, str]]:
        """Slot -> element id."""
        return self._maps("creative")

    @cached_property
    def slot_propensities(self) -> list[dict[str, float]]:
        """Slot -> probability of its element given those of the earlier slots."""
        return self._maps("slot_propensities")

    @cached_property
    def context(self) -> list[dict[str, ContextValue]]:
        """Field -> value; raises ValueError if a context is no JSON object of such values."""
        return [parse_context(text) for text in self._texts("context")]


def parse_context(text: str) -> dict[str, ContextValue]:
    """Return the context that stands as JSON in an example.

    Raises:
        ValueError: If the text is no JSON object of strings, numbers and booleans.
    """
    try:
        return _decode_context(text)
    except msgspec.MsgspecError as error:
        raise ValueError(f"context {text[:80]!r} is no JSON object of single values: {error}") from None


def encode_examples(columns: Mapping[str, Values]) -> bytes:
    """Return the value of one Kafka record: an Arrow IPC stream with one record batch.

    Args:
        columns: For each name in `EXAMPLE_SCHEMA` a sequence of N values; `context` as JSON text, `delay_ms` None
            without a click, maps as mappings.

    Raises:
        ValueError: If a column is missing or holds a value of another type.
    """
    return example_record(ExampleBatch.from_columns(columns).columns)


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
    """Read the value of one record of the topic `examples`; texts and maps are not looked into.

    Raises:
        ValueError: As `decode_table`.
    """
    columns = [column.combine_chunks() for column in decode_table(value).columns]
    return ExampleBatch(pa.RecordBatch.from_arrays(columns, schema=EXAMPLE_SCHEMA))
