"""What goes into the archive: consecutive records of one partition of `examples`, as columns, and the names of files.

Examples keep the order of the log and get two columns that say where they stood in it. They lie in folders by the hour
of their impression (event time, UTC), so records that came together may go to several folders:

    date=2026-11-24/hour=13/examples-p00003-000000012345-000000012999.parquet

with the partition and the first and last offset of the chunk. A record that cannot be read is kept as it came.

Nothing here knows Kafka, file systems or clocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
import pyarrow as pa

from streams.contracts.examples import EXAMPLE_SCHEMA, decode_table

ARCHIVE_SCHEMA: Final = EXAMPLE_SCHEMA.append(pa.field("partition", pa.int32(), nullable=False)).append(
    pa.field("offset", pa.int64(), nullable=False)
)
UNREADABLE: Final = "_unreadable"
HOUR_MS: Final = 3_600_000
END_OF_TIME_MS: Final = 253_402_300_800_000
"""The year 10000: later times have no name of ten characters."""
RECORD_OVERHEAD: Final = 20_480
"""Bytes that a record takes in memory beside its value, as measured; many tiny records would pass any limit without."""

_FILE: Final = re.compile(r"examples-p(\d{5,})-(\d{12,})-(\d{12,})\.parquet")


@dataclass(frozen=True, slots=True)
class Place:
    """Which records a chunk covers: partition, first and last offset."""

    partition: int
    first: int
    last: int

    def __str__(self) -> str:
        """Return the part of a file's name that says it."""
        return f"p{self.partition:05d}-{self.first:012d}-{self.last:012d}"

    def file(self, hour: int) -> str:
        """Return the name of the file of an hour, counted from the beginning of 1970, inside the archive."""
        start = datetime.fromtimestamp(hour * HOUR_MS / 1000, UTC)
        return f"date={start:%Y-%m-%d}/hour={start.hour}/examples-{self}.parquet"  # 03 would be text to DuckDB

    @classmethod
    def of_file(cls, name: str) -> Place | None:
        """Return the place that a file's name tells, None if it is no file of the archive."""
        match = _FILE.fullmatch(name.rpartition("/")[2])
        return cls(*(int(part) for part in match.groups())) if match else None


def unreadable_file(partition: int, offset: int) -> str:
    """Return the name, inside the archive, of a record that cannot be read."""
    return f"{UNREADABLE}/p{partition:05d}-{offset:012d}.arrow"


@dataclass(slots=True)
class Chunk:
    """Records of a partition that wait to be written, in the order of the log."""

    partition: int
    first: int
    since_ms: float
    """When the first of them was read."""
    last: int = -1
    num_rows: int = 0
    num_bytes: int = 0
    unreadable: dict[int, bytes] = field(default_factory=dict)
    """Raw values by offset."""
    _tables: list[Any] = field(default_factory=list)

    @property
    def place(self) -> Place:
        """Which records these are."""
        return Place(self.partition, self.first, self.last)

    def add(self, offset: int, value: bytes | None) -> str | None:
        """Add the next record and return None, or what is wrong with it."""
        fault = None
        try:
            table = _placed(value or b"", self.partition, offset)
        # Damage may also claim more memory than there is, which is no ValueError.
        except (ValueError, MemoryError, pa.ArrowException) as error:
            fault = str(error)
            self.unreadable[offset] = value or b""
            self.num_bytes += len(value or b"")
        else:
            self._tables.append(table)
            self.num_rows += table.num_rows
            self.num_bytes += table.nbytes
        self.last = offset
        self.num_bytes += RECORD_OVERHEAD
        return fault

    def hours(self) -> Iterator[tuple[int, Any]]:
        """Yield (hour counted from the beginning of 1970, table of its examples as they came)."""
        if not self.num_rows:
            return
        table = pa.concat_tables(self._tables)
        hour_N = table.column("occurred_at_ms").to_numpy() // HOUR_MS
        for hour in np.unique(hour_N):
            yield int(hour), table.filter(pa.array(hour_N == hour))


def _placed(value: bytes, partition: int, offset: int) -> Any:
    """Return the examples of a record with the columns of `ARCHIVE_SCHEMA`."""
    table = decode_table(value)
    times_N = table.column("occurred_at_ms").to_numpy()
    if len(times_N) and not 0 <= times_N.min() <= times_N.max() < END_OF_TIME_MS:
        raise ValueError("an example's occurred_at_ms is outside the years 1970 to 9999")
    place = (np.full(len(times_N), partition, np.int32), np.full(len(times_N), offset, np.int64))
    return pa.Table.from_arrays([*table.columns, *(pa.array(column) for column in place)], schema=ARCHIVE_SCHEMA)
