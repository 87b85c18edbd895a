"""Records of the topic `examples`: impressions that left the joiner together, with their labels.

A record outlives its writing: until the attribution window has passed it is where a late click finds its impression, so
the very bytes that were sent are the joiner's memory of it. Encoding is a step of its own, for another thread: Arrow
works there without holding up the reader. Nothing here knows Kafka or the clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from streams.contracts.events import Click
from streams.contracts.examples import (
    EXAMPLE_SCHEMA,
    LabelKind,
    example_batch_of,
    example_record,
)
from streams.impressions import CandidatesShelf, ImpressionColumns

EXAMPLES_PER_RECORD: Final = 500
RECORD_BYTES: Final = 800_000
"""Of the columns of one record before compression; brokers refuse records of 1 MiB and more unless told otherwise."""
INDEX_BYTES: Final = 120
"""What an open impression costs beside its columns: its key, its place in the index, its time."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [first, last) of impressions that came together."""

    columns: ImpressionColumns
    first: int
    last: int

    @property
    def num_bytes(self) -> int:
        """About what they take in memory."""
        return self.columns.bytes_of(self.first, self.last)


class ExampleRecord:
    """N examples that leave together, and the impressions in them as long as their window is open."""

    __slots__ = (
        "_clicks",
        "_parts",
        "_value",
        "clicked",
        "close_ms",
        "counted_bytes",
        "is_closed",
        "keys",
        "kind_without_click",
        "num_positive",
        "times_ms",
    )

    def __init__(
        self,
        parts: Sequence[Part],
        keys: NDArray[np.int64],
        times_ms: NDArray[np.int64],
        clicks: Mapping[int, Click],
        close_ms: int,
        kind_without_click: LabelKind,
    ) -> None:
        """Take what a record is made of.

        Args:
            parts: Its N rows.
            keys: Key of each row in the joiner's index.
            times_ms: When each was shown.
            clicks: Row -> its click; the others have none so far.
            close_ms: When the watermark is beyond this, no click counts any more for any of them.
            kind_without_click: Of the label of a row without a click.
        """
        self._parts = parts
        self._value: bytes | None = None
        self.keys = keys
        self.times_ms = times_ms
        self._clicks = clicks
        self.close_ms = close_ms
        self.kind_without_click = kind_without_click
        self.num_positive = len(clicks)
        """Rows that left with a click."""
        self.clicked: set[int] = set(clicks)
        """Rows of which a click is known."""
        self.is_closed = False
        self.counted_bytes = self.num_bytes
        """What its owner has counted of it, for it shrinks when it is encoded."""

    def __len__(self) -> int:
        """Return N."""
        return len(self.keys)

    @property
    def num_bytes(self) -> int:
        """About what it holds in memory."""
        held = sum(part.num_bytes for part in self._parts) if self._value is None else len(self._value)
        return held + INDEX_BYTES * len(self)

    def encode(self, shelf: CandidatesShelf) -> bytes:
        """Return the value of the Kafka record; the columns are let go. May run in another thread, once at a time."""
        if self._value is None:
            self._value = example_record(self._batch(shelf))
            self._parts = ()
        return self._value

    def row_of(self, key: int) -> int:
        """Return the row of a key that is in it."""
        return int(np.flatnonzero(self.keys == key)[0])

    def with_clicks(self, clicks: Mapping[int, Click], shelf: CandidatesShelf) -> pa.RecordBatch:
        """Return late positives: the rows of these clicks.

        Args:
            clicks: Row -> the click that came for it.
            shelf: Makes the candidates, if the record was not encoded yet.
        """
        batch = self._batch(shelf) if self._value is None else example_batch_of(self._value)
        rows = list(clicks)
        is_unknown = self.kind_without_click is LabelKind.UNKNOWN
        return labeled(
            batch.take(pa.array(rows, pa.int32())),
            dict(enumerate(clicks.values())),
            LabelKind.UNKNOWN if is_unknown else LabelKind.LATE_POSITIVE,
        )

    def _batch(self, shelf: CandidatesShelf) -> pa.RecordBatch:
        batch = pa.concat_batches([part.columns.rows(part.first, part.last, shelf) for part in self._parts])
        return labeled(batch, self._clicks, self.kind_without_click)


def labeled(batch: pa.RecordBatch, clicks: Mapping[int, Click], kind_without_click: LabelKind) -> pa.RecordBatch:
    """Return rows of examples with their labels.

    Args:
        batch: N rows with at least the columns of an impression.
        clicks: Row -> its click.
        kind_without_click: Kind of the other labels; LATE_POSITIVE, if every row has a click that came late; UNKNOWN,
            if it is the kind of all: the clicked ones alone would make every element look like a winner.
    """
    num_rows = batch.num_rows
    rows = np.fromiter(clicks, np.intp, len(clicks))
    label = np.zeros(num_rows, np.int8)
    label[rows] = 1
    reward = np.zeros(num_rows)
    reward[rows] = [click.reward for click in clicks.values()]
    times_ms = batch.column("occurred_at_ms").to_numpy()
    delay_ms = np.zeros(num_rows, np.int64)
    delay_ms[rows] = [click.occurred_at_ms for click in clicks.values()] - times_ms[rows]
    is_of_all = kind_without_click in (LabelKind.LATE_POSITIVE, LabelKind.UNKNOWN)
    kind_with_click = kind_without_click if is_of_all else LabelKind.FINAL
    kinds = pa.array([kind_without_click.value, kind_with_click.value], pa.string())
    columns: dict[str, Any] = {
        "label": pa.array(label),
        "reward": pa.array(reward),
        "label_kind": kinds.take(pa.array(label)),
        "delay_ms": pa.array(delay_ms, mask=label == 0),
    }
    arrays = [columns[name] if name in columns else batch.column(name) for name in EXAMPLE_SCHEMA.names]
    return pa.RecordBatch.from_arrays(arrays, schema=EXAMPLE_SCHEMA)


class LatePositives:
    """Clicks whose impressions had left as negatives, in the order in which they came for each record."""

    def __init__(self) -> None:
        self._clicks: dict[ExampleRecord, dict[int, Click]] = {}
        self._count = 0

    def __len__(self) -> int:
        """Return how many there are."""
        return self._count

    def add(self, record: ExampleRecord, row: int, click: Click) -> None:
        """Note the first click of a row."""
        self._clicks.setdefault(record, {})[row] = click
        self._count += 1

    def encode(self, shelf: CandidatesShelf) -> Iterator[tuple[int, bytes]]:
        """Yield how many examples a Kafka record holds, and its value."""
        waiting: list[pa.RecordBatch] = []
        for record, clicks in self._clicks.items():
            batch = record.with_clicks(clicks, shelf)
            if waiting and not _fits(waiting, batch):
                yield _joined(waiting)
                waiting = []
            waiting.append(batch)
        if waiting:
            yield _joined(waiting)


def _fits(waiting: Sequence[pa.RecordBatch], batch: pa.RecordBatch) -> bool:
    together = [*waiting, batch]
    num_rows = sum(part.num_rows for part in together)
    num_bytes: int = sum(part.nbytes for part in together)
    return num_rows <= EXAMPLES_PER_RECORD and num_bytes <= RECORD_BYTES


def _joined(batches: Sequence[pa.RecordBatch]) -> tuple[int, bytes]:
    batch = pa.concat_batches(batches)
    return batch.num_rows, example_record(batch)
