"""`genco join`: the Faust agent around `PartitionJoiner`.

The agent only decodes records and hands them to the joiner of their partition. Every `emit_linger_ms` the pump moves
the watermarks on, has what was decided encoded in another thread, writes it with our own idempotent producer (Faust's
has no idempotence), and commits in order. Nothing is committed before the examples made from it are acknowledged.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, cast

import faust
import pyarrow as pa
from aiokafka import AIOKafkaProducer
from aiokafka.errors import IllegalStateError, KafkaError
from faust.types import TP

from streams.app import LogConsumer, aiokafka_options, create_app, run_worker
from streams.attribution import Output, PartitionJoiner
from streams.breaker import Breaker
from streams.clients import check_topics
from streams.contracts.codec import MAX_RECORD_BYTES, mark_of
from streams.contracts.dead_letters import DeadLetter
from streams.contracts.settings import JoinSettings
from streams.contracts.topics import ALERTS, CLICKS, DEAD_LETTERS, EXAMPLES, IMPRESSIONS
from streams.event_clock import JOIN_TOPICS, JoinTopic
from streams.impressions import CandidatesShelf
from streams.join_alerts import Desk, alert_of
from streams.join_guard import JoinGuard
from streams.join_hold import Hold
from streams.joiner_report import JoinerReport
from streams.reading_plan import Reading, places_to_hold
from streams.record_decoder import RecordDecoder
from streams.rereading import Rereading
from streams.telemetry import MetricsServer, monotonic_ms, now_ms
from streams.watchdog import Watchdog

logger = logging.getLogger(__name__)

COMMIT_EVERY_S: Final = 2.0
NOTES_TIMEOUT_S: Final = 10.0


class Joiner:
    """The joiners of the partitions that this process owns."""

    def __init__(self, settings: JoinSettings, app: faust.App, watchdog: Watchdog) -> None:
        self._settings = settings
        self._app = app
        self._watchdog = watchdog
        self._producer: AIOKafkaProducer | None = None
        # One thread: a record's examples must be encoded before the late positives that refer to it.
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._shelf = CandidatesShelf()
        self._decoder = RecordDecoder(settings)
        self._report = JoinerReport(settings.join_memory_mb)
        self._desk = Desk(settings)
        self._breakers = {topic: Breaker(settings.dead_letter_max_share) for topic in JOIN_TOPICS}
        self._generation = 0
        self._reset_state()

    def _reset_state(self) -> None:
        self._partitions: dict[int, PartitionJoiner] = {}
        self._guard: JoinGuard | None = None
        self._is_restored = False
        self._saved_holds: dict[int, Hold | None] = {}
        self._next_offset: dict[TP, int] = {}
        self._finished: dict[TP, int] = {}
        self._committed: dict[TP, int] = {}
        self._commit_at = 0.0
        self._at_end: set[TP] = set()
        self._held: frozenset[TP] = frozenset()
        self._first: dict[TP, int] = {}
        self._start: dict[TP, int] = {}
        self._rereading = Rereading(time.monotonic())
        self._is_recovering = True
        self._last_answer_ms = 0
        self._last_read = 0

    @property
    def _consumer(self) -> LogConsumer:
        return cast(LogConsumer, self._app.consumer)

    @property
    def _breaker_cause(self) -> str | None:
        for topic, breaker in self._breakers.items():
            if breaker.is_open:
                return f"{topic}: {breaker.cause}"
        return None

    def assign(self, partitions: set[int]) -> None:
        """Begin anew with these partitions: after a rebalance they are read again from what was committed."""
        self._generation += 1
        self._reset_state()
        self._consumer.hold(frozenset())
        settings, guard = self._settings, None
        # A replay's clock stands still without marks, and its clicks are those of the log.
        if settings.join_drop_ratio and settings.idle_timeout_ms:
            guard = self._guard = JoinGuard(settings, partitions)
        self._partitions = {
            partition: PartitionJoiner(settings, guard.feed_of(partition), guard.gates[partition])
            if guard
            else PartitionJoiner(settings)
            for partition in sorted(partitions)
        }

    def add(self, message: Any) -> None:
        """Hand one record to the joiner of its partition."""
        topic: JoinTopic = IMPRESSIONS if message.topic == IMPRESSIONS else CLICKS
        place = TP(topic, message.partition)
        joiner = self._partitions.get(message.partition)
        if joiner is None:
            return  # of an assignment that is over
        self._require_next(place, message.offset)
        self._next_offset[place] = message.offset + 1
        mark_ms = mark_of(list(dict(message.headers or ()).items()))
        timestamp_ms = round(message.timestamp * 1000)
        record = self._decoder.decode(topic, message.offset, timestamp_ms, message.value or b"", mark_ms)
        joiner.add(record, monotonic_ms())
        breaker = self._breakers[topic]
        breaker.observe(len(record.events), [bad.reason for bad in record.bad])
        if breaker.is_open:
            self._regulate()

    def _require_next(self, place: TP, offset: int) -> None:
        """Refuse a record that does not follow what was read before it.

        The consumer must hand on every record once. Should it not, nothing after that may be committed; ending is safe,
        for whoever starts next reads from what was.

        Raises:
            RuntimeError: If records are missing, or come again.
        """
        reached = self._next_offset.get(place, self._start.get(place))
        if reached is None:
            self._first[place] = offset  # `_locate` will know where reading begins
        elif offset != reached and offset != (expected := self._consumer.after_gap(place, reached)):
            raise RuntimeError(
                f"{place.topic} partition {place.partition}: offset {offset} came, expected {expected}: the consumer "
                "has lost records, or repeats them. Nothing after them was committed: the next start reads them again"
            )

    async def start(self) -> None:
        """Connect the producer."""
        self._producer = AIOKafkaProducer(
            **aiokafka_options(self._settings),
            acks="all",
            enable_idempotence=True,
            max_batch_size=MAX_RECORD_BYTES,
            max_request_size=4 * 2**20,
            request_timeout_ms=30_000,
        )
        await self._producer.start()

    async def stop(self) -> None:
        """Close the producer."""
        self._encoder.shutdown(wait=False, cancel_futures=True)
        self._desk.close()
        if self._producer is not None:
            await self._producer.stop()

    async def pump(self) -> None:
        """Decide, write, commit, once for each partition."""
        generation = self._generation
        self._watchdog.sign("event loop")
        await self._locate(generation)
        if generation != self._generation or not await self._restore(generation):
            return
        read_until_ms = {partition: self._read_until_ms(partition) for partition in self._partitions}
        await self._watch(read_until_ms)
        if generation != self._generation:
            return
        outputs: dict[int, Output] = {}
        for partition, joiner in self._partitions.items():
            joiner.advance(read_until_ms[partition])
            if (output := joiner.take_output()) is not None:
                outputs[partition] = output
        self._regulate()
        if outputs:
            await self._write(outputs, generation)
            # After a rebalance the next owner writes the same again, which changes nothing.
            if generation != self._generation:
                return
        for partition, joiner in self._partitions.items():
            if partition in outputs:
                joiner.acknowledge(outputs[partition].number)
            for topic, offset in joiner.take_finished().items():
                self._finished[TP(topic, partition)] = offset + 1
        await self._commit(generation)
        self._give_signs()
        self._report.state(self._partitions, len(self._held))

    # -- reading -----------------------------------------------------------------------------------

    async def _locate(self, generation: int) -> None:
        """Find out where reading of each partition begins, once the first fetches have been answered.

        Raises:
            RuntimeError: If the log of a partition ends before what was read of it, or its first records are missing.
        """
        places = [TP(topic, partition) for partition in self._partitions for topic in JOIN_TOPICS]
        if self._start or not all(self._consumer.highwater(place) is not None for place in places):
            return
        try:
            earliest = await self._consumer.earliest_offsets(*places)
        except (IllegalStateError, KafkaError):
            return  # a rebalance is under way, or the broker is away: the next round asks again
        if generation != self._generation:
            return
        for place in places:
            committed = self._consumer.committed_at_assignment(place)
            end = self._consumer.highwater(place)
            begin = earliest[place] if committed is None else committed
            if begin > end:
                raise RuntimeError(
                    f"{place.topic} partition {place.partition} was read up to offset {begin}, but its log ends at "
                    f"{end}: the broker has lost records, or the topic was made anew. If that is meant, start with "
                    "another GENCO_JOINER_GROUP"
                )
            if begin < earliest[place]:
                self._report.lost(place.topic, place.partition, begin, earliest[place] - begin)
                begin = earliest[place]
            self._start[place] = begin
            if place in self._first and self._first[place] > self._consumer.after_gap(place, begin):
                raise RuntimeError(
                    f"{place.topic} partition {place.partition}: offset {self._first[place]} came first, expected "
                    f"{begin}: the consumer has lost records. Nothing was committed: the next start reads them again"
                )
            self._rereading.begin(place, begin, end)

    def _read_until_ms(self, partition: int) -> dict[JoinTopic, int]:
        """Return for each topic that has been read to its end when that was so, by the monotonic clock."""
        found: dict[JoinTopic, int] = {}
        for topic in JOIN_TOPICS:
            place = TP(topic, partition)
            # What the client has delivered is not yet what has been joined.
            position = self._next_offset.get(place, self._start.get(place))
            end: int | None = self._consumer.highwater(place)
            answered_at_ms = self._consumer.answered_at_ms(place)
            if position is None or end is None or answered_at_ms is None:
                continue  # until the first fetch has been answered
            position = self._consumer.after_gap(place, position)
            self._rereading.read(place, position)
            # What is held is not fetched, so that nobody knows where its log ends now.
            if position >= end and place not in self._held:
                found[topic] = monotonic_ms() - max(0, now_ms() - answered_at_ms)
                self._at_end.add(place)
            else:
                self._at_end.discard(place)
        return found

    def _regulate(self) -> None:
        """Hold what must not be read now, and let the rest go."""
        readings = [
            Reading(
                TP(topic, partition),
                joiner.lead_ms(topic),
                TP(other, partition) in self._at_end,
                is_behind=joiner.lead_ms(other) > 0,
            )
            for partition, joiner in self._partitions.items()
            for topic, other in zip(JOIN_TOPICS, reversed(JOIN_TOPICS), strict=True)
        ]
        limit = self._settings.join_memory_mb * 2**20
        memory_share = sum(joiner.num_bytes for joiner in self._partitions.values()) / limit
        cause = self._breaker_cause
        self._held = places_to_hold(
            readings,
            max_lead_ms=max(1_000, self._settings.attribution_window_ms // 10),
            memory_share=memory_share,
            is_stopped=cause is not None,
            clicks_share=sum(joiner.num_click_bytes for joiner in self._partitions.values()) / limit,
        )
        self._consumer.hold(self._held)
        self._report.memory(is_full=memory_share >= 1.0, joiners=self._partitions.values())
        self._report.breaker(cause)

    # -- watching the clicks -----------------------------------------------------------------------

    async def _restore(self, generation: int) -> bool:
        """Let the guard go on from what was saved beside the offsets; tell whether it is done.

        Nothing may be decided before: there may be a hold.
        """
        guard = self._guard
        if guard is None or self._is_restored or not self._partitions:
            return True
        places = {TP(CLICKS, partition) for partition in self._partitions}
        try:
            notes = await asyncio.wait_for(self._consumer.committed_notes(places), NOTES_TIMEOUT_S)
        except (IllegalStateError, KafkaError, TimeoutError) as error:
            logger.warning("the offsets' notes cannot be read; trying again", extra={"cause": str(error)})
            return False
        if generation != self._generation:
            return False
        guard.restore({place.partition: text for place, text in notes.items()})
        self._saved_holds = {partition: gate.hold for partition, gate in guard.gates.items()}
        self._is_restored = True
        return True

    async def _watch(self, read_until_ms: Mapping[int, Mapping[JoinTopic, int]]) -> None:
        """Look whether clicks cease or come again, before anything is decided."""
        guard = self._guard
        if guard is None:
            return
        clocks_ms = {p: joiner.read_clock(read_until_ms[p]) for p, joiner in self._partitions.items()}
        decided_ms = {p: joiner.watermark_ms for p, joiner in self._partitions.items()}
        notices = guard.step(clocks_ms, decided_ms, now_ms())
        if guard.has_hold:
            notices += guard.accept(self._desk.accepted_ms())
        self._report.guard(guard)
        alerts = [alert_of(notice, self._settings, len(guard.own) + 1, now_ms()) for notice in notices]
        for alert in alerts:
            self._report.alert(alert)
            self._desk.take(alert)
        for alert in [*alerts, *self._desk.answered()]:
            if self._producer is None:
                raise RuntimeError("the joiner writes before it was started")
            # Not waited for: it is told again, and nothing else may wait for it.
            await self._producer.send(ALERTS, alert.to_bytes(), key=alert.model_id.encode(), partition=0)

    def _unsaved(self) -> dict[TP, int]:
        """Return the offsets to commit again because a hold beside them has changed."""
        if self._guard is None or not self._is_restored:
            return {}
        places = {
            partition: TP(CLICKS, partition)
            for partition, gate in self._guard.gates.items()
            if gate.hold != self._saved_holds.get(partition)
        }
        return {
            place: self._finished.get(place, self._start[place]) for place in places.values() if place in self._start
        }

    # -- writing -----------------------------------------------------------------------------------

    async def _write(self, outputs: dict[int, Output], generation: int) -> None:
        """Encode and send; return when the broker has everything, or at once after a rebalance."""
        if self._producer is None:
            raise RuntimeError("the joiner writes before it was started")
        sent = []
        for partition, output in outputs.items():
            values = await asyncio.get_running_loop().run_in_executor(self._encoder, _encode, output, self._shelf)
            if generation != self._generation:
                return
            for value in values:
                sent.append(await self._producer.send(EXAMPLES, value, partition=partition))
            for bad in output.bad:
                line = bad.event.line
                value, headers = DeadLetter(
                    bad.topic, partition, bad.offset, bad.event.index, bad.event.reason, line, len(line)
                ).encode()
                sent.append(await self._producer.send(DEAD_LETTERS, value, partition=partition, headers=headers))
        for delivery in sent:
            await delivery
        for output in outputs.values():
            self._report.written(output)

    async def _commit(self, generation: int) -> None:
        """Let Kafka know now and then what is finished."""
        now = time.monotonic()
        due = {place: offset for place, offset in self._finished.items() if self._committed.get(place) != offset}
        if self._breaker_cause is not None:
            due = {}  # a joiner that knows the schema shall find these records again
        unsaved = self._unsaved()
        if not due and not unsaved:
            self._watchdog.sign("commits")
        elif now >= self._commit_at or unsaved:
            self._commit_at = now + COMMIT_EVERY_S
            guard = self._guard
            holds = {} if guard is None else {partition: gate.hold for partition, gate in guard.gates.items()}
            notes = {} if guard is None else {TP(CLICKS, partition): guard.saved(partition) for partition in holds}
            if await self._consumer.commit_positions(unsaved | due, notes) and generation == self._generation:
                self._committed |= due
                self._saved_holds = holds
                self._watchdog.sign("commits")

    def _give_signs(self) -> None:
        """Tell the watchdog what goes on, and the log how far the last window has been read again."""
        consumer = self._consumer
        if not consumer.has_lost_its_group():
            self._watchdog.sign("group membership")
        places = [TP(topic, partition) for partition in self._partitions for topic in JOIN_TOPICS]
        answered_at_ms = max((consumer.answered_at_ms(place) or 0 for place in places), default=0)
        num_read = sum(self._next_offset.values())
        # What is held is not fetched.
        if not places or self._held or (answered_at_ms, num_read) != (self._last_answer_ms, self._last_read):
            self._watchdog.sign("fetches")
        self._last_answer_ms, self._last_read = answered_at_ms, num_read
        if self._is_recovering and self._start:
            self._report.rereading(self._rereading, sum(joiner.num_open for joiner in self._partitions.values()))
            self._is_recovering = not self._rereading.progress(time.monotonic()).is_complete


def _encode(output: Output, shelf: CandidatesShelf) -> list[bytes]:
    values = [record.encode(shelf) for record in output.records]
    values += [value for _, value in output.late.encode(shelf)]
    return values


def create_joiner_app(settings: JoinSettings, watchdog: Watchdog) -> faust.App:
    """Return the app with its agent and its pump; `run_worker` runs it."""
    app = create_app(settings, settings.joiner_group, instance_id=settings.joiner_instance_id)
    joiner = Joiner(settings, app, watchdog)
    topic = app.topic(IMPRESSIONS, CLICKS, key_serializer="raw", value_serializer="raw", allow_empty=True, acks=False)

    @app.agent(topic, concurrency=1)
    async def join(stream: Any) -> None:
        async for event in stream.noack().events():
            joiner.add(event.message)

    @app.on_partitions_revoked.connect
    async def on_revoked(*_args: Any, signal: Any = None, **_: Any) -> None:
        joiner.assign(set())

    @app.on_partitions_assigned.connect
    async def on_assigned(*args: Any, signal: Any = None, **_: Any) -> None:
        assigned = args[1]
        owned = {topic: {tp.partition for tp in assigned if tp.topic == topic} for topic in JOIN_TOPICS}
        logger.info("partitions assigned", extra={"partitions": sorted(owned[IMPRESSIONS])})
        if owned[IMPRESSIONS] != owned[CLICKS]:
            raise RuntimeError(
                f"impressions and clicks were assigned apart: {owned}; all joiners must be of one version, and both "
                "topics must have as many partitions (genco check tells)"
            )
        joiner.assign(owned[IMPRESSIONS])

    @app.task  # type: ignore[untyped-decorator]  # faust leaves it untyped
    async def pump() -> None:
        await joiner.start()
        watchdog.start()
        try:
            while not app.should_stop:
                await joiner.pump()
                await asyncio.sleep(settings.emit_linger_ms / 1000)
        finally:
            watchdog.stop()
            await joiner.stop()

    return app


def run(settings: JoinSettings) -> None:
    """Run the joiner until SIGTERM. Does not return.

    Raises:
        ConfigurationError: If the topics are missing or their partition counts differ.
        OSError: If the metrics port is taken.
    """
    check_topics(settings)
    # Arrow's own allocator gives pages back that are needed again at once; the system's keeps them.
    pa.set_memory_pool(pa.system_memory_pool())
    metrics = MetricsServer(settings.metrics_host, settings.metrics_port) if settings.metrics_port else None
    try:
        run_worker(create_joiner_app(settings, Watchdog(settings.stall_timeout_ms / 1000)))
    finally:
        if metrics is not None:
            metrics.close()
