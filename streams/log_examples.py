"""Read a log as examples, without Kafka: NDJSON of impressions and clicks, Arrow records, or the Parquet archive.

NDJSON goes through the joiner that runs behind Kafka. Lines, records and files that cannot be read are counted and
told, never fatal.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from streams.archive_chunk import ARCHIVE_SCHEMA, HOUR_MS, Place
from streams.attribution import PartitionJoiner
from streams.contracts.catalog import Element, Product
from streams.contracts.codec import END_OF_LOG_MS, encode_batch, split_to_fit
from streams.contracts.events import Click, Impression
from streams.contracts.examples import EXAMPLE_SCHEMA, decode_table
from streams.contracts.settings import JoinSettings
from streams.contracts.topics import CLICKS, IMPRESSIONS
from streams.example_spans import SpanCutter, SpanRule
from streams.impressions import CandidatesShelf
from streams.record_decoder import RecordDecoder
from streams.replay import BATCH, ReplaySummary, log_files, read_log

logger = logging.getLogger(__name__)

CHUNK: Final = 4_000
"""Events between two looks at what has become decidable."""
SUFFIXES: Final = (".ndjson", ".parquet", ".arrow")


@dataclass(slots=True)
class LogSummary:
    """What was read, and what was not."""

    impressions: int = 0
    clicks: int = 0
    catalog: int = 0
    examples: int = 0
    """Read from Arrow or Parquet, or made by joining."""
    behind: int = 0
    """Examples that came after the update they belonged to: the log is not in the order of time."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Lines, events and files left out, by reason."""
    first_skipped: str = ""

    def clear(self) -> LogSummary:
        """Forget everything, for the log is read again; return itself."""
        self.impressions = self.clicks = self.catalog = self.examples = self.behind = 0
        self.skipped.clear()
        self.first_skipped = ""
        return self

    def skip(self, place: str, reason: str) -> None:
        """Count something that was left out."""
        self.skipped[reason.partition(":")[0]] += 1
        self.first_skipped = self.first_skipped or f"{place}: {reason}"


@dataclass(frozen=True, slots=True)
class LogUpdate:
    """What one update learns."""

    log: str
    """Which log it is of; the files of a folder of NDJSON are a log each."""
    span: int
    """The last span of the update; increases within a log."""
    examples: pa.Table
    """Of `EXAMPLE_SCHEMA`, in the order in which they are learned."""
    catalog: tuple[Element | Product, ...] = ()
    """Records of the catalog that come before it."""


def log_kind(path: Path) -> str:
    """Return the suffix of the files that a log consists of.

    Raises:
        ValueError: If there is no log.
    """
    for suffix in SUFFIXES:
        if path.suffix == suffix if path.is_file() else any(path.rglob(f"*{suffix}")):
            return suffix
    raise ValueError(
        f"{path}: no such log; expected a file or a folder of files that end in {', '.join(SUFFIXES)} "
        "(genco archive and genco import make some)"
    )


def log_updates(path: Path, rule: SpanRule, summary: LogSummary) -> Iterator[LogUpdate]:
    """Yield the updates of a log that has no recorded ones.

    Raises:
        ValueError: If there is no log.
    """
    kind = log_kind(path)
    if kind == ".ndjson":
        for file in log_files(path):
            yield from _joined(file, rule, summary)
        return
    cutter = SpanCutter(rule)
    hours = (
        _parquet_hours(path) if kind == ".parquet" else {0: [path] if path.is_file() else sorted(path.rglob("*.arrow"))}
    )
    last_hour = max(hours)
    for hour, files in sorted(hours.items()):
        for file in files:
            examples = _table(file, summary)
            summary.examples += examples.num_rows
            cutter.add(examples.select(EXAMPLE_SCHEMA.names))
        # What later folders hold was shown later, and is due a label wait after that at the earliest.
        complete_until_ms = None if hour == last_hour else (hour + 1) * HOUR_MS + rule.label_wait_ms
        for span, examples in cutter.updates(complete_until_ms):
            yield LogUpdate("examples", span, examples)
    summary.behind += cutter.num_behind


def _parquet_hours(path: Path) -> dict[int, list[Path]]:
    """Return the files of each hour of an archive; of a Parquet file, or a folder of another form, all in one."""
    if path.is_file():
        return {0: [path]}
    files = _archive_files(path)
    hours: dict[int, list[Path]] = {}
    for file in files:
        hours.setdefault(_hour_of(file), []).append(file)
    return hours if -1 not in hours else {0: files}


def _archive_files(path: Path) -> list[Path]:
    """Return the Parquet files of a folder, without those that the archive is still writing."""
    found = sorted(path.rglob("*.parquet"))
    return [file for file in found if not any(part.startswith("_") for part in file.relative_to(path).parts)]


def _hour_of(file: Path) -> int:
    """Return the hour since 1970 that an archive's folders name, or -1."""
    names = dict(part.split("=", 1) for part in file.parts if part.count("=") == 1)
    try:
        midnight = datetime.fromisoformat(names["date"]).replace(tzinfo=UTC)
        return int(midnight.timestamp() * 1000) // HOUR_MS + int(names["hour"])
    except (KeyError, ValueError):
        return -1


def _table(file: Path, summary: LogSummary) -> pa.Table:
    """Return what a file of examples holds; nothing, counted, if it cannot be read."""
    try:
        if file.suffix == ".arrow":
            return decode_table(file.read_bytes())
        table = pq.read_table(file, partitioning=None)
        names = [name for name in ARCHIVE_SCHEMA.names if name in table.column_names]
        return table.select(names).cast(pa.schema([ARCHIVE_SCHEMA.field(name) for name in names]))
    except (ValueError, OSError, KeyError, pa.ArrowException) as error:
        summary.skip(file.name, f"file of examples: {error}")
        return ARCHIVE_SCHEMA.empty_table()


# -- NDJSON ----------------------------------------------------------------------------------------------------------


def _joined(file: Path, rule: SpanRule, summary: LogSummary) -> Iterator[LogUpdate]:
    """Join a file of events and yield its updates, with the catalog records that stood before their last events."""
    lines = ReplaySummary()
    join, cutter, name = _Join(rule, summary), SpanCutter(rule), _identity(file)
    records = read_log(file, lines)
    catalog: list[Element | Product] = []
    while chunk := list(islice(records, CHUNK)):
        found = [record for record in chunk if isinstance(record, Element | Product)]
        catalog += found
        summary.catalog += len(found)
        for examples in join.add([record for record in chunk if isinstance(record, Impression | Click)]):
            cutter.add(examples)
        for span, examples in cutter.updates(join.watermark_ms):
            yield LogUpdate(name, span, examples, tuple(catalog))
            catalog.clear()
    for examples in join.end():
        cutter.add(examples)
    for span, examples in cutter.updates(None):
        yield LogUpdate(name, span, examples, tuple(catalog))
        catalog.clear()
    summary.skipped.update(lines.skipped)
    summary.first_skipped = summary.first_skipped or lines.first_skipped
    summary.behind += cutter.num_behind


def _identity(file: Path) -> str:
    """Return a name that stays when the log grows or moves, and differs between logs of the same name."""
    with file.open("rb") as opened:
        return f"{file.name}:{blake2b(opened.readline(), digest_size=8).hexdigest()}"


class _Join:
    """The joiner of one partition, fed with events in the order of a file."""

    def __init__(self, rule: SpanRule, summary: LogSummary) -> None:
        settings = JoinSettings(
            kafka_bootstrap_servers="none:1",  # the joiner itself knows no Kafka
            attribution_window_ms=rule.attribution_window_ms,
            label_wait_ms=rule.label_wait_ms,
            idle_timeout_ms=0,
            max_event_age_ms=0,
        )
        self._joiner = PartitionJoiner(settings)
        self._decoder = RecordDecoder(settings)
        self._shelf = CandidatesShelf()
        self._summary = summary
        self._offset = 0
        self._newest_ms = 0

    @property
    def watermark_ms(self) -> int:
        """Time up to which everything has been joined."""
        return self._joiner.watermark_ms or 0

    def add(self, events: list[Impression | Click]) -> list[pa.Table]:
        """Join events, and return the examples that have become due."""
        impressions = [event for event in events if isinstance(event, Impression)]
        clicks = [event for event in events if isinstance(event, Click)]
        self._summary.impressions += len(impressions)
        self._summary.clicks += len(clicks)
        if events:
            self._newest_ms = max(self._newest_ms, max(event.occurred_at_ms for event in events))
        self._feed(IMPRESSIONS, impressions)
        self._feed(CLICKS, clicks)
        self._mark(self._newest_ms)
        return self._output()

    def end(self) -> list[pa.Table]:
        """Return the examples that are left, for no event comes any more."""
        self._mark(END_OF_LOG_MS)
        return self._output()

    def _feed(self, topic: Any, events: Any) -> None:
        for start in range(0, len(events), BATCH):
            for _, value in split_to_fit(events[start : start + BATCH], encode_batch):
                record = self._decoder.decode(topic, self._next_offset(), self._newest_ms, value)
                for bad in record.bad:
                    self._summary.skip(topic, bad.reason)
                self._joiner.add(record, 0)

    def _mark(self, until_ms: int) -> None:
        for topic in (IMPRESSIONS, CLICKS):
            self._joiner.add(self._decoder.decode(topic, self._next_offset(), until_ms, b"", until_ms), 0)

    def _next_offset(self) -> int:
        self._offset += 1
        return self._offset

    def _output(self) -> list[pa.Table]:
        self._joiner.advance({})
        found = []
        while (output := self._joiner.take_output()) is not None:
            found += [decode_table(record.encode(self._shelf)) for record in output.records]
            found += [decode_table(value) for _, value in output.late.encode(self._shelf)]
            self._joiner.acknowledge(output.number)
            self._joiner.take_finished()
        self._summary.examples += sum(table.num_rows for table in found)
        return found


# -- archive in the order of offsets ---------------------------------------------------------------------------------


class ArchiveCursor:
    """The examples of an archive by partition and offset, as an update that was recorded needs them."""

    def __init__(self, path: Path, summary: LogSummary) -> None:
        """Look at the names of the files; their content is read when it is needed.

        Raises:
            ValueError: If there is a Parquet file that is none of an archive's.
        """
        self._summary = summary
        self._chunks: dict[int, dict[Place, list[Path]]] = {}
        for file in [path] if path.is_file() else _archive_files(path):
            place = Place.of_file(file.name)
            if place is None:
                raise ValueError(
                    f"{file}: its name tells no offsets, so recorded updates cannot be applied to it; expected a file "
                    "of genco archive, or no --updates"
                )
            self._chunks.setdefault(place.partition, {}).setdefault(place, []).append(file)
        self._loaded: dict[int, pa.Table] = {}
        self._order = {
            partition: sorted(chunks, key=lambda place: place.first) for partition, chunks in self._chunks.items()
        }

    def take(self, partition: int, until: int) -> pa.Table:
        """Return the examples of a partition before this offset that were not taken yet."""
        waiting, order = self._loaded.pop(partition, ARCHIVE_SCHEMA.empty_table()), self._order.get(partition, [])
        while order and order[0].first < until:
            place = order.pop(0)
            tables = [_table(file, self._summary) for file in self._chunks[partition][place]]
            waiting = pa.concat_tables([waiting, *tables])
        offset_N = waiting.column("offset").to_numpy()
        self._loaded[partition] = waiting.filter(pa.array(offset_N >= until))
        taken = waiting.filter(pa.array(offset_N < until))
        self._summary.examples += taken.num_rows
        return taken.select(EXAMPLE_SCHEMA.names)
