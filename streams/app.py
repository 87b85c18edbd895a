"""The Faust app factory: the settings under which Faust loses nothing.

Faust reads and acknowledges; everything else is ours. Values are raw bytes that our code decodes (Faust acknowledges
what it cannot decode), no tables, no joins, no `take()` (it acknowledges what it has not processed), concurrency 1
(with out-of-order acknowledgement Faust 0.15 commits past records in flight), and a crash ends the process, for its
supervisor to start it again from the log.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncIterator, Mapping, Set
from typing import Any, Final

import faust
import mode
import uvloop
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError
from aiokafka.protocol.fetch import FetchRequest
from faust.auth import SASLCredentials, SSLCredentials
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread, Consumer, Transport
from faust.types import TP

from streams.contracts.settings import KafkaSettings

logger = logging.getLogger(__name__)

MAX_HOLD_S: Final = 30 * 86_400.0
"""For so long a consumer may hold all its partitions: until somebody has mended what made it stop."""
MAX_GAPS: Final = 10_000
"""So many of the newest runs of offsets without a record are remembered for each partition."""


class _ConsumerThread(AIOKafkaConsumerThread):
    """Faust's thread around an aiokafka consumer, with what Faust has no setting or call for."""

    def _create_worker_consumer(self, transport: Any) -> AIOKafkaConsumer:
        consumer = super()._create_worker_consumer(transport)
        # Faust asks the broker to wait 1.5 s for records; the embedded broker then does, even when some have come.
        consumer._fetch_max_wait_ms = transport.fetch_max_wait_ms  # noqa: SLF001 - no setting
        client = consumer._client  # noqa: SLF001 - the time of a request is seen nowhere else
        send = client.send

        async def send_and_note(node_id: Any, request: Any, **options: Any) -> Any:
            asked_ms = int(1000 * time.time())
            response = await send(node_id, request, **options)
            if isinstance(request, FetchRequest):
                # Nothing else runs before the client takes the response in.
                places = (TP(topic, partition) for topic, partitions in request.topics for partition, *_ in partitions)
                self.asked_ms.update(dict.fromkeys(places, asked_ms))
            return response

        client.send = send_and_note
        return consumer

    def __post_init__(self) -> None:
        super().__post_init__()
        self.gaps: dict[TP, dict[int, int]] = {}
        """For each partition where a run of offsets without a record begins, and where it ends."""
        self.asked_ms: dict[TP, int] = {}
        """When the newest fetch of a partition that was answered had been sent, in Unix milliseconds."""

    async def _fetch_records(
        self,
        consumer: AIOKafkaConsumer,
        active_partitions: set[TP],
        timeout: float | None = None,  # noqa: ASYNC109 - Faust's signature
        max_records: int | None = None,
    ) -> Mapping[TP, list[Any]]:
        # Where the client skips offsets that hold no record is seen here only, beside the records that it hands out.
        before = _positions(consumer)
        records: Mapping[TP, list[Any]] = await super()._fetch_records(
            consumer, active_partitions, timeout=timeout, max_records=max_records
        )
        for place, end in _positions(consumer).items():
            offsets = [record.offset for record in records.get(place, ())]
            begin = before.get(place, offsets[0] if offsets else end)
            if end - begin > len(offsets):
                self._note_gaps(place, begin, [*offsets, end])
        return records

    def _note_gaps(self, place: TP, begin: int, offsets: list[int]) -> None:
        found = self.gaps.setdefault(place, {})
        for offset in offsets:
            if begin < offset:
                found[begin] = offset
            begin = offset + 1
        while len(found) > MAX_GAPS:
            del found[next(iter(found))]

    async def seek_to_committed(self) -> Mapping[TP, int]:
        """Go to where each partition was committed, or to its beginning."""
        offsets: Mapping[TP, int] = await self.call_thread(self._seek_to_committed)
        return offsets

    async def _seek_to_committed(self) -> Mapping[TP, int]:
        # aiokafka leaves a partition of which nothing was committed where it stands. At the end of a rebalance that may
        # be behind records that it has handed out and Faust has dropped.
        consumer = self._ensure_consumer()
        offsets: Mapping[TP, int] = await consumer.seek_to_committed()
        if places := [place for place, offset in offsets.items() if not offset]:
            await consumer.seek_to_beginning(*places)
        return offsets

    def answered_at_ms(self, place: TP) -> int | None:
        """See `LogConsumer.answered_at_ms`."""
        consumer = self._consumer
        partition = TopicPartition(place.topic, place.partition)
        if consumer is None or partition not in consumer.assignment():
            return None
        # The client's own time is that at which it took the answer in, on a busy machine seconds after it was given.
        taken_at_ms: int | None = consumer.last_poll_timestamp(partition)
        return None if taken_at_ms is None else min(taken_at_ms, self.asked_ms.get(place, taken_at_ms))

    def has_lost_its_group(self) -> bool:
        """Say whether the task is dead that keeps the membership of the group: aiokafka never starts it again."""
        coordinator = getattr(self._consumer, "_coordinator", None)
        task: asyncio.Task[None] | None = getattr(coordinator, "_coordination_task", None)
        return task is not None and task.done()

    async def commit_positions(self, offsets: Mapping[TP, int], notes: Mapping[TP, str]) -> bool:
        """See `LogConsumer.commit_positions`."""
        committed: bool = await self.call_thread(self._try_to_commit, offsets, notes)
        return committed

    async def committed_notes(self, places: Set[TP]) -> dict[TP, str]:
        """See `LogConsumer.committed_notes`."""
        notes: dict[TP, str] = await self.call_thread(self._committed_notes, places)
        return notes

    async def _committed_notes(self, places: Set[TP]) -> dict[TP, str]:
        coordinator = self._ensure_consumer()._coordinator  # noqa: SLF001 - its own `committed` drops the metadata
        found = await coordinator.fetch_committed_offsets([TopicPartition(*place) for place in places])
        return {TP(*place): committed.metadata for place, committed in found.items()}

    async def _try_to_commit(self, offsets: Mapping[TP, int], notes: Mapping[TP, str]) -> bool:
        # Faust's own commit ends the worker at any error, even one that the next try would not meet.
        try:
            await self._ensure_consumer().commit(
                {
                    TopicPartition(place.topic, place.partition): (offset, notes.get(place, ""))
                    for place, offset in offsets.items()
                }
            )
        except (CommitFailedError, IllegalStateError) as error:
            logger.info("offsets not committed: a rebalance is under way", extra={"cause": str(error)})
            return False
        except KafkaError as error:
            logger.warning("offsets not committed; trying again", extra={"cause": f"{type(error).__name__}: {error}"})
            return False
        return True


def _positions(consumer: AIOKafkaConsumer) -> dict[TP, int]:
    """Return the offset of the next record that the client will hand out, for each partition it owns."""
    subscription = consumer._subscription.subscription  # noqa: SLF001 - its own `position` waits, and sends requests
    assignment = None if subscription is None else subscription.assignment
    if assignment is None or not assignment.active:
        return {}
    states = {TP(tp.topic, tp.partition): assignment.state_value(tp) for tp in assignment.tps}
    return {place: state.position for place, state in states.items() if state.has_valid_position}


class LogConsumer(Consumer):
    """Faust's consumer for agents that acknowledge by position: "everything before this offset is done".

    Faust counts acknowledged records one by one, for which each must be kept in memory, and skips the records after a
    gap in the offsets. Such agents take their topic with `acks=False` and call `commit_positions` instead.
    """

    _thread: _ConsumerThread

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: set[TP] = set()

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, Any]]:  # noqa: ASYNC109 - Faust's signature
        """Fetch records.

        Raises:
            RuntimeError: If the log of a partition has been cut: aiokafka then begins it again, and Faust passes over
                whatever comes below the offset that it has reached, without a word. Of topics with acknowledgement
                nothing is told: their agents may seek back.
        """
        async for place, message in super().getmany(timeout):
            reached = self._read_offset[place]
            is_behind = reached is not None and message.offset < reached
            if is_behind and not self.app.topics.acks_enabled_for(place.topic):
                raise RuntimeError(
                    f"{place.topic} partition {place.partition}: offset {message.offset} came after {reached}: the "
                    "broker has lost records, or the topic was made anew. If that is meant, start with another "
                    "GENCO_JOINER_GROUP"
                )
            # At the end of a rebalance records may come before Faust's flow control is on again. Streams then drop them
            # without a word, though they count as read.
            generation = self.app.consumer_generation_id
            while not (self.app.flow_control.is_active() or self.should_stop):  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0.01)
            if self.app.consumer_generation_id != generation:
                return  # what was fetched before a rebalance is read again after it
            yield place, message

    def _new_consumer_thread(self) -> AIOKafkaConsumerThread:
        return _ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    async def commit_positions(self, offsets: Mapping[TP, int], notes: Mapping[TP, str] | None = None) -> bool:
        """Commit the offset of the next record to read, for each partition; return whether the broker has it.

        False is no error: what is not committed is read again by the next owner, and committed with the next call.

        Args:
            offsets: Of each partition.
            notes: Text that is kept beside an offset, for the partition's next owner; at most 4,000 bytes.
        """
        return await self._thread.commit_positions(offsets, notes or {})

    async def committed_notes(self, places: Set[TP]) -> dict[TP, str]:
        """Return what is kept beside the committed offsets.

        Raises:
            KafkaError: If the broker does not tell.
        """
        return await self._thread.committed_notes(places)

    def committed_at_assignment(self, place: TP) -> int | None:
        """Return from where a partition was to be read when it was assigned; None: from its beginning, or unknown."""
        offset: int | None = self._committed_offset[place]
        return offset

    def answered_at_ms(self, place: TP) -> int | None:
        """Return until when this partition's end is known, in Unix milliseconds; None: its first fetch is not answered.

        It is the time at which the newest fetch that was answered had been sent: what was written before is in the
        answer, or was read earlier.
        """
        return self._thread.answered_at_ms(place)

    def after_gap(self, place: TP, offset: int) -> int:
        """Return where reading goes on from an offset: further on, if those that follow hold no record.

        A transaction ends with an offset that nobody is given, and so does the log when nothing follows it.
        """
        gaps = self._thread.gaps.get(place, {})
        while offset in gaps:
            offset = gaps[offset]
        return offset

    def has_lost_its_group(self) -> bool:
        """Say whether this consumer will never again take part in a rebalance."""
        return self._thread.has_lost_its_group()

    def hold(self, places: Set[TP]) -> None:
        """Read nothing more from these partitions, and go on with all others.

        What was fetched before is still delivered. Faust's `pause_partitions` would throw that away and go on after it.
        Call it again now and then: at the end of a rebalance Faust goes on with all partitions that are assigned.
        """
        for place in places:
            super().on_buffer_full(place)
        released = self._held - places
        self._held = set(places)
        for place in released:
            self.on_buffer_drop(place)

    def on_buffer_drop(self, tp: TP) -> None:
        """Read on from a partition whose buffer has emptied, unless it is held."""
        if tp not in self._held:
            super().on_buffer_drop(tp)


class _Transport(Transport):
    Consumer = LogConsumer
    fetch_max_wait_ms: int


def create_app(settings: KafkaSettings, group: str, *, instance_id: str | None = None) -> faust.App:
    """Return an app that is not started yet.

    Args:
        settings: Which brokers, and how.
        group: Consumer group.
        instance_id: Stable name for static membership, or None.
    """
    session_s = settings.kafka_session_timeout_ms / 1000
    options: dict[str, Any] = {}
    if credentials := _credentials(settings):
        options["broker_credentials"] = credentials
    if instance_id:
        options["consumer_group_instance_id"] = instance_id
    app = faust.App(
        group,
        broker=[f"kafka://{server}" for server in settings.kafka_bootstrap_servers.split(",")],
        autodiscover=False,
        processing_guarantee="at_least_once",
        key_serializer="raw",
        value_serializer="raw",
        agent_supervisor=mode.CrashingSupervisor,
        # The default waits for every unacknowledged record at each rebalance and at SIGTERM; we hold them for a window.
        stream_wait_empty=False,
        stream_buffer_maxsize=128,
        broker_commit_interval=2.0,
        broker_max_poll_records=200,
        broker_session_timeout=session_s,
        broker_request_timeout=max(60.0, 2 * session_s),
        broker_heartbeat_interval=session_s / 10,
        # While everything is held nothing is polled; after this long aiokafka leaves the group and never comes back.
        broker_max_poll_interval=MAX_HOLD_S,
        consumer_auto_offset_reset="earliest",
        # So that a topic which was made anew is noticed within a minute; the default is five.
        consumer_metadata_max_age_ms=60_000,
        consumer_max_fetch_size=4 * 2**20,
        producer_request_timeout=30.0,
        producer_acks=-1,
        # Selects Faust's own assignor, which gives partition p of all our topics to the same worker. aiokafka's
        # round-robin would part impressions from their clicks.
        table_standby_replicas=1,
        topic_disable_leader=True,
        topic_allow_declare=False,
        store="memory://",
        web_enabled=False,
        **options,
    )
    transport = _Transport(app.conf.broker_consumer, app)
    transport.fetch_max_wait_ms = settings.kafka_fetch_max_wait_ms
    app.transport = transport
    return app


def _credentials(settings: KafkaSettings) -> SASLCredentials | SSLCredentials | None:
    protocol = settings.kafka_security_protocol
    context = None
    if protocol.endswith("SSL"):
        context = ssl.create_default_context(cafile=settings.kafka_ssl_cafile)
    if protocol.startswith("SASL") and settings.kafka_sasl_password is not None:
        return SASLCredentials(
            username=settings.kafka_sasl_username,
            password=settings.kafka_sasl_password.get_secret_value(),
            mechanism=settings.kafka_sasl_mechanism,
            ssl_context=context,
        )
    return None if context is None else SSLCredentials(context)


def aiokafka_options(settings: KafkaSettings) -> dict[str, Any]:
    """Return the connection options of an aiokafka client beside the app, such as our idempotent producer."""
    options: dict[str, Any] = {
        "bootstrap_servers": settings.kafka_bootstrap_servers.split(","),
        "security_protocol": settings.kafka_security_protocol,
    }
    if settings.kafka_security_protocol.endswith("SSL"):
        options["ssl_context"] = ssl.create_default_context(cafile=settings.kafka_ssl_cafile)
    if settings.kafka_sasl_mechanism and settings.kafka_sasl_password:
        options["sasl_mechanism"] = settings.kafka_sasl_mechanism
        options["sasl_plain_username"] = settings.kafka_sasl_username
        options["sasl_plain_password"] = settings.kafka_sasl_password.get_secret_value()
    return options


def run_worker(app: faust.App) -> None:
    """Run the app until SIGTERM, SIGINT or a crash. Does not return: it exits with 0, or 1 after a crash."""
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    worker = faust.Worker(app, loglevel=None, override_logging=False, redirect_stdouts=False, quiet=True)
    worker.execute_from_commandline()
