"""The archive's files: how a chunk gets there whole or not at all, and how far each partition has come.

    date=.../hour=.../examples-*.parquet   what readers read
    _unreadable/                           records that could not be read, as they came
    _staging/                              files of chunks that are not committed yet, and one journal for each
    _positions/                            for each partition the journal of its last chunk

A chunk is staged (files, then its journal), committed to Kafka by whoever calls, with the journal's name beside the
offset, and published: every staged file gets its final name, and the journal becomes the partition's position. Each
step of publishing may be repeated, by anybody, after a crash at any point. Staged names do not end in .parquet, so that
readers that do not know the underscore pass over them; every staging has names of its own, so that a process that was
paused cannot touch the files of its successor.

It knows nothing of Kafka and of who owns a partition.
"""

from __future__ import annotations

import logging
import uuid
from functools import partial
from typing import IO, Any, Final

import msgspec
import pyarrow.parquet as pq

from streams.archive_chunk import Chunk, Place, unreadable_file
from streams.archive_store import Store
from streams.contracts.settings import ConfigurationError

STAGING: Final = "_staging"
POSITIONS: Final = "_positions"
ROWS_PER_GROUP: Final = 131_072

logger = logging.getLogger(__name__)


class Journal(msgspec.Struct, frozen=True, kw_only=True):
    """What a staged chunk consists of."""

    name: str
    """Of the journal in `_staging`; what is committed to Kafka beside the offset."""
    partition: int
    next_offset: int
    num_rows: int
    num_unreadable: int
    files: dict[str, str]
    """Final name by staged name."""


class ArchiveFolder:
    """The files of an archive."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def check(self) -> None:
        """Check that files can be written and removed.

        Raises:
            ConfigurationError: If not.
        """
        name = f"{STAGING}/check-{uuid.uuid4().hex}"
        try:
            self._store.write(name, partial(_write_bytes, b""))
            self._store.remove(name)
        except Exception as error:
            cause = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise ConfigurationError(
                f"cannot write to the archive at GENCO_ARCHIVE_URL ({cause}); correct it, or its permissions"
            ) from error

    def stage(self, chunk: Chunk) -> Journal:
        """Write a chunk where no reader looks."""
        stem = f"{STAGING}/{chunk.place}-{uuid.uuid4().hex[:16]}"
        files: dict[str, str] = {}

        def write(final: str, content: Any) -> None:
            staged = f"{stem}.{len(files)}"
            self._store.write(staged, content)
            files[staged] = final

        for hour, table in chunk.hours():
            write(chunk.place.file(hour), partial(_write_parquet, table))
        for offset, value in chunk.unreadable.items():
            write(unreadable_file(chunk.partition, offset), partial(_write_bytes, value))
        journal = Journal(
            name=f"{stem}.json".rpartition("/")[2],
            partition=chunk.partition,
            next_offset=chunk.last + 1,
            num_rows=chunk.num_rows,
            num_unreadable=len(chunk.unreadable),
            files=files,
        )
        self._store.write(f"{STAGING}/{journal.name}", partial(_write_bytes, msgspec.json.encode(journal)))
        return journal

    def publish(self, journal: Journal) -> None:
        """Give the files of a committed chunk their final names; may be repeated."""
        for staged, final in journal.files.items():
            try:
                self._store.move(staged, final)
            except FileNotFoundError:  # an earlier attempt, or the partition's next owner, has moved it
                if not self._store.exists(final):
                    logger.error("a committed file of the archive is gone", extra={"file": final, "staged": staged})
        try:
            self._store.move(f"{STAGING}/{journal.name}", _position_file(journal.partition))
        except FileNotFoundError:
            return  # as above; nobody moves it before every file is in its place

    def staged(self, partition: int) -> list[str]:
        """Return the names in `_staging` that belong to a partition."""
        prefix = f"p{partition:05d}-"
        names = (path.rpartition("/")[2] for path in self._store.names(STAGING))
        return [name for name in names if name.startswith(prefix)]

    def finish(self, name: str) -> Journal | None:
        """Publish the chunk of a committed journal if nobody has; return it if this call did."""
        try:
            journal = msgspec.json.decode(self._store.read(f"{STAGING}/{name}"), type=Journal)
        except FileNotFoundError:
            return None
        self.publish(journal)
        return journal

    def discard(self, names: list[str]) -> None:
        """Remove files in `_staging`."""
        for name in names:
            self._store.remove(f"{STAGING}/{name}")

    def position(self, partition: int) -> int | None:
        """Return the offset after the last published chunk of a partition, None if there is none."""
        try:
            text = self._store.read(_position_file(partition))
        except FileNotFoundError:
            # If other partitions have theirs, this one has no chunk; without any they were removed.
            return None if self._store.names(POSITIONS) else self.position_by_files(partition)
        return msgspec.json.decode(text, type=Journal).next_offset

    def position_by_files(self, partition: int) -> int | None:
        """Return the same from the names of all files; slow in a large archive, and blind to unreadable records."""
        places = (Place.of_file(name) for name in self._store.names(""))
        ends = [place.last + 1 for place in places if place is not None and place.partition == partition]
        return max(ends, default=None)


def _position_file(partition: int) -> str:
    return f"{POSITIONS}/p{partition:05d}.json"


def _write_bytes(value: bytes, file: IO[bytes]) -> None:
    file.write(value)


def _write_parquet(table: Any, file: IO[bytes]) -> None:
    pq.write_table(table, file, compression="zstd", use_dictionary=True, row_group_size=ROWS_PER_GROUP)
