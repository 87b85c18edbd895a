"""`genco join`: the Faust agent around `PartitionJoiner`.

The agent only decodes records and hands them to the joiner of their partition. Every `emit_linger_ms` the pump moves
the watermarks on, writes what was decided with our own idempotent producer (Faust's has no idempotence), and
acknowledges in order. Nothing is acknowledged before the examples made from it are.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import faust
from aiokafka import AIOKafkaProducer
from prometheus_client import Counter, Gauge

from streams.app import aiokafka_options, create_app, run_worker
from streams.attribution import (
    CLICK_BUCKETS,
    IMPRESSION_BUCKETS,
    JOIN_TOPICS,
    DeadLetter,
    JoinTopic,
    LabeledImpression,
    Ledger,
    PartitionJoiner,
    Record,
)
from streams.clients import COMPRESSION, check_topics
from streams.contracts.codec import EventDecoder, encode_context, mark_of, split_to_fit
from streams.contracts.dead_letters import DeadLetter as DeadLetterRecord
from streams.contracts.events import Click, Impression
from streams.contracts.examples import encode_examples
from streams.contracts.settings import JoinSettings
from streams.contracts.topics import CLICKS, DEAD_LETTERS, EXAMPLES, IMPRESSIONS
from streams.telemetry import MetricsServer, now_ms

logger = logging.getLogger(__name__)

EXAMPLES_PER_RECORD = 500

_events = Gauge("genco_joiner_events", "Events of this process's partitions by bucket", ["topic", "bucket"])
_imbalance = Gauge("genco_joiner_ledger_imbalance", "Events in no bucket or in two; must be 0")
_watermark = Gauge("genco_watermark_timestamp_seconds", "Event time a partition is complete up to", ["partition"])
_open = Gauge("genco_join_pending_examples", "Impressions inside their window, and clicks waiting for theirs")
_examples = Counter("genco_joiner_examples_total", "Examples acknowledged by the broker", ["label_kind", "label"])

T = TypeVar("T")


class Joiner:
    """The joiners of the partitions that this process owns."""

    def __init__(self, settings: JoinSettings, app: faust.App) -> None:
        self._settings = settings
        self._app = app
        self._producer: AIOKafkaProducer | None = None
        self._impressions = EventDecoder(Impression)
        self._clicks = EventDecoder(Click)
        self._partitions: dict[int, PartitionJoiner] = {}
        self._held: dict[tuple[str, int, int], faust.EventT[Any]] = {}
        self._last_offset: dict[tuple[str, int], int] = {}
        self._generation = 0

    def reset(self) -> None:
        """Forget all partitions: after a rebalance they are read again from what was acknowledged."""
        self._generation += 1
        self._partitions.clear()
        self._held.clear()
        self._last_offset.clear()

    def add(self, event: faust.EventT[Any]) -> None:
        """Hand one record to the joiner of its partition."""
        message = event.message
        topic: JoinTopic = IMPRESSIONS if message.topic == IMPRESSIONS else CLICKS
        place = (topic, message.partition)
        if message.offset <= self._last_offset.get(place, -1):
            raise RuntimeError(
                f"{topic} partition {message.partition}: offset {message.offset} came after "
                f"{self._last_offset[place]} without a rebalance"
            )
        self._last_offset[place] = message.offset
        value = event.value or b""
        batch = self._impressions.decode_batch(value) if topic == IMPRESSIONS else self._clicks.decode_batch(value)
        mark_ms = mark_of(list(dict(message.headers or ()).items()))
        record = Record(topic, message.offset, int(message.timestamp * 1000), batch, mark_ms)
        self._held[topic, message.partition, message.offset] = event
        joiner = self._partitions.get(message.partition)
        if joiner is None:
            joiner = self._partitions[message.partition] = PartitionJoiner(self._settings)
        joiner.add(record, now_ms())

    async def start(self) -> None:
        """Connect the producer."""
        self._producer = AIOKafkaProducer(
            **aiokafka_options(self._settings),
            acks="all",
            enable_idempotence=True,
            compression_type=COMPRESSION,
            max_request_size=4 * 2**20,
            request_timeout_ms=30_000,
        )
        await self._producer.start()

    async def stop(self) -> None:
        """Close the producer."""
        if self._producer is not None:
            await self._producer.stop()

    async def pump(self) -> None:
        """Decide, write, acknowledge, once for each partition."""
        generation = self._generation
        for partition, joiner in list(self._partitions.items()):
            caught_up = [topic for topic in JOIN_TOPICS if await self._is_caught_up(topic, partition)]
            if generation != self._generation:
                return
            joiner.advance(now_ms(), caught_up)
            output = joiner.take_output()
            if output is not None:
                await self._write(partition, output.examples, output.dead_letters)
                if generation != self._generation:
                    # A rebalance came while we wrote; the next owner writes the same again, which changes nothing.
                    return
                joiner.acknowledge(output.number)
                for example in output.examples:
                    _examples.labels(example.kind, int(example.click is not None)).inc()
            for topic, offset in joiner.take_finished():
                self._held.pop((topic, partition, offset)).ack()
        self._observe()

    async def _is_caught_up(self, topic: JoinTopic, partition: int) -> bool:
        consumer = self._app.consumer
        tp = faust.types.TP(topic, partition)
        highwater: int | None = consumer.highwater(tp)  # None until the first fetch has answered
        if highwater is None:
            return False
        last = self._last_offset.get((topic, partition))
        # Nothing read since the assignment: only the client knows where reading began.
        position = await consumer.position(tp) if last is None else last + 1
        return position is not None and position >= highwater

    async def _write(
        self, partition: int, examples: Sequence[LabeledImpression], dead_letters: Sequence[DeadLetter]
    ) -> None:
        if self._producer is None:
            raise RuntimeError("the joiner writes before it was started")
        sent = []
        for chunk in _chunks(examples, EXAMPLES_PER_RECORD):
            for _, value in split_to_fit(chunk, _encode):
                sent.append(await self._producer.send(EXAMPLES, value, partition=partition))
        for letter in dead_letters:
            bad = letter.bad
            value, headers = DeadLetterRecord(
                letter.topic, partition, letter.offset, bad.index, bad.reason, bad.line, len(bad.line)
            ).encode()
            sent.append(await self._producer.send(DEAD_LETTERS, value, partition=partition, headers=headers))
        for delivery in sent:
            await delivery

    def _observe(self) -> None:
        total = Ledger()
        for partition, joiner in self._partitions.items():
            ledger = joiner.ledger()
            total.impressions.update(ledger.impressions)
            total.clicks.update(ledger.clicks)
            total.consumed_impressions += ledger.consumed_impressions
            total.consumed_clicks += ledger.consumed_clicks
            if joiner.watermark_ms is not None:
                _watermark.labels(partition).set(joiner.watermark_ms / 1000)
        for bucket in IMPRESSION_BUCKETS:
            _events.labels(IMPRESSIONS, bucket).set(total.impressions[bucket])
        for bucket in CLICK_BUCKETS:
            _events.labels(CLICKS, bucket).set(total.clicks[bucket])
        _imbalance.set(total.imbalance)
        _open.set(sum(joiner.num_open for joiner in self._partitions.values()))


def example_columns(examples: Sequence[LabeledImpression]) -> dict[str, list[Any]]:
    """Return the columns of `EXAMPLE_SCHEMA` for labeled impressions."""
    impressions = [example.impression for example in examples]
    columns: dict[str, list[Any]] = {
        name: [getattr(impression, name) for impression in impressions]
        for name in Impression.__struct_fields__
        if name not in ("schema_version", "context")
    }
    columns["context"] = [encode_context(impression.context) for impression in impressions]
    columns["label"] = [int(example.click is not None) for example in examples]
    columns["reward"] = [0.0 if example.click is None else example.click.reward for example in examples]
    columns["label_kind"] = [example.kind.value for example in examples]
    columns["delay_ms"] = [example.delay_ms for example in examples]
    return columns


def _encode(examples: Sequence[LabeledImpression]) -> bytes:
    return encode_examples(example_columns(examples))


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def create_joiner_app(settings: JoinSettings) -> faust.App:
    """Return the app with its agent and its pump; `run_worker` runs it."""
    app = create_app(settings, settings.joiner_group, instance_id=settings.joiner_instance_id)
    joiner = Joiner(settings, app)
    topic = app.topic(IMPRESSIONS, CLICKS, key_serializer="raw", value_serializer="raw", allow_empty=True)

    @app.agent(topic, concurrency=1)
    async def join(stream: Any) -> None:
        async for event in stream.noack().events():
            joiner.add(event)

    @app.on_partitions_revoked.connect
    async def on_revoked(*_args: Any, signal: Any = None, **_: Any) -> None:
        joiner.reset()

    @app.on_partitions_assigned.connect
    async def on_assigned(*args: Any, signal: Any = None, **_: Any) -> None:
        assigned = args[1]
        joiner.reset()
        owned = {topic: {tp.partition for tp in assigned if tp.topic == topic} for topic in JOIN_TOPICS}
        logger.info("partitions assigned", extra={"partitions": sorted(owned[IMPRESSIONS])})
        if owned[IMPRESSIONS] != owned[CLICKS]:
            raise RuntimeError(
                f"impressions and clicks were assigned apart: {owned}; all joiners must be of one version"
            )

    @app.task  # type: ignore[untyped-decorator]  # faust leaves it untyped
    async def pump() -> None:
        await joiner.start()
        try:
            while not app.should_stop:
                await joiner.pump()
                await asyncio.sleep(settings.emit_linger_ms / 1000)
        finally:
            await joiner.stop()

    return app


def run(settings: JoinSettings) -> None:
    """Run the joiner until SIGTERM. Does not return.

    Raises:
        ConfigurationError: If the topics are missing or their partition counts differ.
        OSError: If the metrics port is taken.
    """
    check_topics(settings)
    metrics = MetricsServer(settings.metrics_host, settings.metrics_port) if settings.metrics_port else None
    try:
        run_worker(create_joiner_app(settings))
    finally:
        if metrics is not None:
            metrics.close()
