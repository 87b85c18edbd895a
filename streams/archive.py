"""`genco archive`: writes the topic `examples` to Parquet files, every record exactly once by its offset.

A chunk is staged in the archive, committed to Kafka, then published (`streams/archive_folder.py`). The commit is the
one point of decision: it names the chunk's journal, and Kafka refuses it from a process that is no longer a member of
the group's generation. Whoever gets a partition finishes the chunk that the last commit names and throws away whatever
else is staged. Nothing else is remembered, so a process may end at any point.

Every doubt is resolved by becoming a new member of the group: a commit that failed may have happened, and only a new
generation makes sure that it will not happen later.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from typing import Any, Final

from kafka import ConsumerRebalanceListener, KafkaConsumer, TopicPartition
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata
from prometheus_client import Counter, Gauge

from streams.archive_chunk import Chunk
from streams.archive_folder import ArchiveFolder, Journal
from streams.archive_store import Store
from streams.clients import UnreachableError, check_topics, kafka_consumer
from streams.contracts.settings import ArchiveSettings, ConfigurationError
from streams.contracts.topics import EXAMPLES
from streams.telemetry import MetricsServer

POLL_MS: Final = 250
COMMIT_TIMEOUT_MS: Final = 4_000
"""Short, for a process that was told to end must do so within ten seconds."""
CLOSE_TIMEOUT_MS: Final = 2_000
REJOIN_S: Final = 1.0

logger = logging.getLogger(__name__)

_rows = Counter("genco_archive_rows_total", "Examples that readers of the archive can see")
_files = Counter("genco_archive_files_total", "Files that readers of the archive can see")
_offset = Gauge("genco_archive_offset", "Offset after the last archived record", ["partition"])
_unreadable = Counter("genco_archive_unreadable_total", "Records kept as they came, for they could not be read")
_lost = Counter("genco_archive_lost_total", "Records that retention removed before they were archived")


class Archiver(ConsumerRebalanceListener):  # type: ignore[misc]
    """One membership in the consumer group, from joining to leaving; an error ends it.

    Args:
        consumer: Of the group, not subscribed yet, with auto_offset_reset "none": an offset that is out of range must
            not be passed over.
        folder: Where the archive is; the same for all members.
        interval_ms: A chunk is written this long after its first record has come.
        max_bytes: Beyond it, over all partitions, the largest chunk is written.
    """

    def __init__(self, consumer: KafkaConsumer, folder: ArchiveFolder, *, interval_ms: float, max_bytes: int) -> None:
        self._consumer = consumer
        self._folder = folder
        self._interval_ms = interval_ms
        self._max_bytes = max_bytes
        self._chunks: dict[int, Chunk] = {}
        self._arrived: set[int] = set()
        """Partitions that are assigned and not begun."""
        consumer.subscribe([EXAMPLES], listener=self)

    def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        """Note the partitions; nothing is read of them before `turn` has found their beginnings."""
        for place in assigned:
            self._consumer.seek(place, 0)  # any: without a position, polling would look for one and fail
            self._consumer.pause(place)
            self._arrived.add(place.partition)

    def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        """Drop what is not written yet: the next owner reads it again."""
        for place in revoked:
            self._chunks.pop(place.partition, None)
            self._arrived.discard(place.partition)
            with contextlib.suppress(KeyError):
                _offset.remove(place.partition)

    def turn(self, now_ms: float) -> None:
        """Take what has come, and write what is due.

        Raises:
            KafkaError: This membership is over; a new one goes on.
            ConfigurationError: The archive does not belong to this topic or group.
        """
        polled = self._consumer.poll(timeout_ms=POLL_MS)
        for partition in sorted(self._arrived):
            self._begin(partition)
        for place, records in polled.items():
            for record in records:
                self._take(place.partition, record, now_ms)
        for chunk in list(self._chunks.values()):
            if now_ms - chunk.since_ms >= self._interval_ms:
                self._write(chunk)

    def flush(self) -> None:
        """Write everything that has been read."""
        for chunk in list(self._chunks.values()):
            self._write(chunk)

    def _take(self, partition: int, record: Any, now_ms: float) -> None:
        chunk = self._chunks.get(partition)
        if chunk is None:
            chunk = self._chunks[partition] = Chunk(partition, record.offset, now_ms)
        fault = chunk.add(record.offset, record.value)
        if fault is not None:
            place = {"partition": partition, "offset": record.offset}
            logger.error("unreadable record of examples, kept as it came", extra=place | {"fault": fault})
        while sum(held.num_bytes for held in self._chunks.values()) > self._max_bytes:
            self._write(max(self._chunks.values(), key=lambda held: held.num_bytes))

    def _write(self, chunk: Chunk) -> None:
        journal = self._folder.stage(chunk)
        self._commit(chunk.partition, journal.next_offset, journal.name)
        del self._chunks[chunk.partition]
        self._folder.publish(journal)
        _count(journal)

    def _commit(self, partition: int, offset: int, journal: str) -> None:
        """Commit, or fail if another member may own the partition now.

        Every commit is made in the generation that assigned the partition: a new one begins inside `poll`, which tells
        `on_partitions_revoked` first.
        """
        committed = {TopicPartition(EXAMPLES, partition): OffsetAndMetadata(offset, journal, -1)}
        self._consumer.commit(committed, timeout_ms=COMMIT_TIMEOUT_MS)

    def _begin(self, partition: int) -> None:
        """Bring a partition's staged chunks to an end, find where the archive goes on, and read from there."""
        place = TopicPartition(EXAMPLES, partition)
        committed = self._consumer.committed(place, metadata=True, timeout_ms=COMMIT_TIMEOUT_MS)
        name = (committed.metadata or "") if committed else ""
        if name in self._folder.staged(partition):
            journal = self._folder.finish(name)
            if journal is not None:
                logger.info("finished the chunk of an earlier owner", extra={"partition": partition, "journal": name})
                _count(journal)
        start, lost = self._start(place, committed)
        rest = self._folder.staged(partition)
        if rest or lost:
            # After the listing, before the removal: if this process no longer owns the partition, so that some of the
            # rest may be its successor's, the commit fails. And a gap is told once: who comes next begins behind it.
            self._commit(partition, start, "" if lost else name)
            self._folder.discard(rest)
            logger.info("removed chunks that were never committed", extra={"partition": partition, "files": len(rest)})
        if lost:
            _lost.inc(lost)
        self._arrived.discard(partition)
        self._consumer.seek(place, start)
        self._consumer.resume(place)
        _offset.labels(partition).set(start)

    def _start(self, place: TopicPartition, committed: OffsetAndMetadata | None) -> tuple[int, int]:
        """Return the offset from which to read, and how many records before it are lost."""
        position = self._position(place.partition, committed)
        beginning: int = self._consumer.beginning_offsets([place], timeout_ms=COMMIT_TIMEOUT_MS)[place]
        end: int = self._consumer.end_offsets([place], timeout_ms=COMMIT_TIMEOUT_MS)[place]
        if position is None:
            return beginning, 0
        if position > end:
            raise ConfigurationError(
                f"the archive of {EXAMPLES} partition {place.partition} reaches offset {position}, and the topic ends "
                f"at {end}: it was created anew or lost records. Set GENCO_ARCHIVE_URL to a new folder and "
                "GENCO_ARCHIVE_GROUP to a new name"
            )
        if position < beginning:
            gap = {"partition": place.partition, "archived": position, "log_begins": beginning}
            logger.error("retention removed records before they were archived", extra=gap)
        return max(position, beginning), max(beginning - position, 0)

    def _position(self, partition: int, committed: OffsetAndMetadata | None) -> int | None:
        """Return how far the archive has come by its files and by Kafka, whichever is further."""
        position = self._folder.position(partition)
        if committed is None:
            return position  # the group is new, or its offsets have expired
        if committed.metadata and (position or 0) < committed.offset:
            position = self._folder.position_by_files(partition)  # not always up to date on an object store
        if committed.metadata and (position or 0) < committed.offset:
            raise ConfigurationError(
                f"the group has archived {EXAMPLES} partition {partition} up to offset {committed.offset}, and the "
                f"archive at GENCO_ARCHIVE_URL ends at {position or 0}: it is another one. Set the right folder, or "
                "GENCO_ARCHIVE_GROUP to a new name"
            )
        if position is not None and position > committed.offset:
            offsets = {"partition": partition, "archived": position, "committed": committed.offset}
            logger.warning("the archive is ahead of the committed offset, and goes on from its own", extra=offsets)
        return max(position or 0, int(committed.offset))


def _count(journal: Journal) -> None:
    _rows.inc(journal.num_rows)
    _files.inc(len(journal.files) - journal.num_unreadable)
    _unreadable.inc(journal.num_unreadable)
    _offset.labels(journal.partition).set(journal.next_offset)


def run(settings: ArchiveSettings) -> None:
    """Archive until SIGTERM or SIGINT.

    Raises:
        UnreachableError: If no broker answers at the start.
        ConfigurationError: If the archive cannot be written at the start, a topic is missing, or the archive belongs
            to another topic or group.
        OSError: If the archive cannot be written later.
    """
    folder = ArchiveFolder(Store(settings.archive_url))
    folder.check()
    check_topics(settings)
    metrics = MetricsServer(settings.metrics_host, settings.metrics_port) if settings.metrics_port else None
    should_stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: should_stop.set())
    logger.info("archiving", extra={"group": settings.archive_group})
    try:
        while not should_stop.is_set():
            try:
                _be_member(settings, folder, should_stop)
            except (KafkaError, UnreachableError) as error:
                # A rebalance in the middle of a commit, or a broker that is away: what was not committed is read again.
                logger.warning("left the group, and joins it again", extra={"cause": f"{error!r}"})
                should_stop.wait(REJOIN_S)
    finally:
        if metrics is not None:
            metrics.close()
    logger.info("archive closed")


def _be_member(settings: ArchiveSettings, folder: ArchiveFolder, should_stop: threading.Event) -> None:
    consumer = kafka_consumer(
        settings,
        group_id=settings.archive_group,
        auto_offset_reset="none",
        session_timeout_ms=settings.kafka_session_timeout_ms,
        heartbeat_interval_ms=min(3_000, settings.kafka_session_timeout_ms // 3),
    )
    try:
        archiver = Archiver(
            consumer, folder, interval_ms=settings.archive_interval_ms, max_bytes=settings.archive_max_bytes
        )
        while not should_stop.is_set():
            archiver.turn(time.monotonic() * 1000)
        archiver.flush()
    finally:
        consumer.close(timeout_ms=CLOSE_TIMEOUT_MS)
