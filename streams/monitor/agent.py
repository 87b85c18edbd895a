"""`genco monitor`: the Faust agents around the `Monitor`.

It keeps nothing: each start reads the last attribution window of `examples` again, from a position that it commits
before Faust begins. What it learns from the registry comes from an `Outlook` that is handed in and asked in a thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import faust
import numpy as np
from aiokafka import AIOKafkaProducer
from faust.types import TP
from kafka import TopicPartition
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata

from streams.app import aiokafka_options, create_app, run_worker
from streams.clients import assign_whole_topic, check_topics, kafka_consumer
from streams.contracts.alerts import JOIN_RATE_DROP, Alert
from streams.contracts.examples import ExampleBatch, decode_examples
from streams.contracts.settings import MonitorSettings
from streams.contracts.topics import ALERTS, EXAMPLES
from streams.monitor.models import Model
from streams.monitor.monitor import Facts, Monitor, MonitorBounds
from streams.monitor.report import MonitorReport
from streams.telemetry import MetricsServer, now_ms
from streams.watchdog import Watchdog

logger = logging.getLogger(__name__)

RECENT_RECORDS: Final = 50
TOGETHER: Final = 5_000
"""So many examples are handed on at once, at the latest with the next tick."""
FALLBACK_RECORDS: Final = 2_000
"""Of a partition that are read again where the broker does not say which belong to the window."""
STALL_TIMEOUT_S: Final = 120.0
ADOPT_AFTER_TICKS: Final = 3
"""After so many ticks the alerts of a process before this one have been read."""


@dataclass(frozen=True, slots=True)
class Look:
    """What the registry says."""

    model: Model | None = None
    """The policy that serves, if it is another than at the last look."""
    is_held: bool = False
    exploration: float = 1.0
    refused: str = ""
    num_mismatched: int = 0
    num_recomputed: int = 0
    num_dead_letters: int = 0


class Outlook(Protocol):
    """Asks elsewhere."""

    def look(self, now_ms: int, recent: Sequence[ExampleBatch]) -> Look:
        """Return what the registry says; may take a while, and never raises.

        Args:
            now_ms: The time.
            recent: The newest records, for an audit of their propensities.
        """
        ...


class MonitorProcess:
    """The monitor, its clock and its output."""

    def __init__(self, settings: MonitorSettings, app: faust.App, outlook: Outlook, watchdog: Watchdog) -> None:
        self._settings = settings
        self._app = app
        self._outlook = outlook
        self._watchdog = watchdog
        self.monitor = Monitor(bounds_of(settings))
        self._report = MonitorReport(settings.model_id)
        self._recent: deque[ExampleBatch] = deque(maxlen=RECENT_RECORDS)
        self._waiting: dict[int, list[tuple[ExampleBatch, int]]] = {}
        self._num_waiting = 0
        self._reached: dict[int, int] = {}
        """Partition -> offset of the next record."""
        self._others: dict[str, Alert] = {}
        self._own: set[str] = set()
        self._ticks = 0
        self._producer: AIOKafkaProducer | None = None

    def assign(self, partitions: set[int]) -> None:
        """Watch these partitions."""
        self._reached = {}
        self._waiting.clear()
        self._num_waiting = 0
        self.monitor.assign(partitions, now_ms())

    def add(self, message: Any) -> None:
        """Take a record of `examples`; what cannot be read is left out."""
        self._reached[message.partition] = message.offset + 1
        try:
            batch = decode_examples(message.value or b"")
        except ValueError as error:
            logger.warning("record left out", extra={"offset": message.offset, "error": str(error)[:200]})
            return
        self._recent.append(batch)
        self._waiting.setdefault(message.partition, []).append((batch, round(message.timestamp * 1000)))
        self._num_waiting += len(batch)
        if self._num_waiting >= TOGETHER:
            self._hand_on()

    def _hand_on(self) -> None:
        """Let the monitor take what waits, the records of a partition together: small ones cost by the record."""
        for partition, records in self._waiting.items():
            written_N = np.repeat([written_ms for _, written_ms in records], [len(batch) for batch, _ in records])
            self.monitor.add(ExampleBatch.concat([batch for batch, _ in records]), partition, written_N, now_ms())
        self._waiting.clear()
        self._num_waiting = 0

    def add_alert(self, value: bytes) -> None:
        """Take a record of `alerts` that another process may have written."""
        try:
            alert = Alert.from_bytes(value)
        except ValueError as error:
            logger.warning("alert left out", extra={"error": str(error)[:200]})
            return
        if alert.model_id != self._settings.model_id or alert.is_heartbeat or alert.alert_id in self._own:
            return
        if alert.state == "firing":
            self._others[alert.alert_id] = alert
        else:
            self._others.pop(alert.alert_id, None)

    async def run(self) -> None:
        """Tick until the app stops."""
        self._producer = AIOKafkaProducer(
            **aiokafka_options(self._settings), acks="all", enable_idempotence=True, request_timeout_ms=30_000
        )
        await self._producer.start()
        self._watchdog.start()
        try:
            while not self._app.should_stop:
                await self._tick()
                await asyncio.sleep(self._settings.monitor_interval_ms / 1000)
        finally:
            self._watchdog.stop()
            await self._producer.stop()

    async def _tick(self) -> None:
        recent = list(self._recent)
        self._recent.clear()
        look = await asyncio.get_running_loop().run_in_executor(None, self._outlook.look, now_ms(), recent)
        if look.model is not None:
            self.monitor.set_model(look.model)
        foreign = next((a for a in self._others.values() if a.name == JOIN_RATE_DROP), None)
        facts = Facts(
            is_held=look.is_held,
            exploration=look.exploration,
            refused=look.refused,
            num_mismatched=look.num_mismatched,
            num_recomputed=look.num_recomputed,
            num_dead_letters=look.num_dead_letters,
            lag=self._lag(),
            known_cause=None if foreign is None else foreign.cause,
        )
        self._hand_on()
        now = now_ms()
        alerts = self.monitor.tick(now, facts)
        self._ticks += 1
        if self._ticks == ADOPT_AFTER_TICKS:
            alerts += self._end_of_predecessor(now)
        self._report.state(self.monitor, now)
        self._report.tell(alerts)
        await self._write([*alerts, *self._report.heartbeat(now)])
        self._watchdog.sign("ticks")

    def _lag(self) -> int:
        consumer = self._app.consumer
        ends = {partition: consumer.highwater(TP(EXAMPLES, partition)) for partition in self._reached}
        return sum(max(0, end - self._reached[partition]) for partition, end in ends.items() if end is not None)

    def _end_of_predecessor(self, now: int) -> list[Alert]:
        """Return the ends of alerts that a monitor before this one left firing: what still holds fires again."""
        ended = {key: alert for key, alert in self._others.items() if alert.name != JOIN_RATE_DROP}
        for key in ended:
            del self._others[key]
        changes = {"state": "resolved", "occurred_at_ms": now, "summary": "the monitor has started anew"}
        return [alert.model_copy(update=changes) for alert in ended.values()]

    async def _write(self, alerts: Iterable[Alert]) -> None:
        if self._producer is None:
            raise RuntimeError("the monitor writes before it was started")
        for alert in alerts:
            self._own.add(alert.alert_id)
            await self._producer.send_and_wait(ALERTS, alert.to_bytes(), key=alert.model_id.encode())


def bounds_of(settings: MonitorSettings) -> MonitorBounds:
    """Return what the monitor must know of the loop."""
    fields = (name.strip() for name in settings.monitor_ignored_fields.split(","))
    return MonitorBounds(
        model_id=settings.model_id,
        attribution_window_ms=settings.attribution_window_ms,
        label_wait_ms=settings.label_wait_ms,
        warm_examples=settings.monitor_warm_examples,
        stale_ms=settings.monitor_stale_ms,
        late_ms=settings.monitor_late_ms,
        ignored_fields=frozenset(fields),
    )


def create_monitor_app(settings: MonitorSettings, outlook: Outlook, watchdog: Watchdog) -> faust.App:
    """Return the app with its agents and its clock; `run_worker` runs it."""
    app = create_app(settings, settings.monitor_group)
    process = MonitorProcess(settings, app, outlook, watchdog)
    raw: dict[str, Any] = {"key_serializer": "raw", "value_serializer": "raw", "allow_empty": True}
    examples, alerts = app.topic(EXAMPLES, **raw), app.topic(ALERTS, **raw, acks=False)

    @app.agent(examples, concurrency=1)
    async def watch(stream: Any) -> None:
        async for event in stream.events():
            process.add(event.message)

    # Never acknowledged, so each start learns of the alerts that fire.
    @app.agent(alerts, concurrency=1)
    async def follow(stream: Any) -> None:
        async for event in stream.noack().events():
            process.add_alert(event.value or b"")

    @app.on_partitions_assigned.connect
    async def on_assigned(*args: Any, signal: Any = None, **_: Any) -> None:
        places: set[TP] = set(args[1])
        process.assign({place.partition for place in places if place.topic == EXAMPLES})

    @app.task  # type: ignore[untyped-decorator]  # faust leaves it untyped
    async def clock() -> None:
        await process.run()

    return app


def commit_window_back(settings: MonitorSettings, now: int) -> None:
    """Let the group begin one attribution window and label wait before now.

    Raises:
        UnreachableError: If no broker answers.
    """
    since_ms = now - settings.attribution_window_ms - settings.label_wait_ms
    consumer = kafka_consumer(settings, group_id=settings.monitor_group)
    try:
        places: list[TopicPartition] = assign_whole_topic(consumer, EXAMPLES)
        found = consumer.offsets_for_times(dict.fromkeys(places, since_ms))
        first, ends = consumer.beginning_offsets(places), consumer.end_offsets(places)
        # None: everything is older; or the broker looks up no times, as the embedded one.
        begins = {
            place: found[place].offset if found.get(place) else max(first[place], ends[place] - FALLBACK_RECORDS)
            for place in places
        }
        consumer.commit({place: OffsetAndMetadata(offset, "", -1) for place, offset in begins.items()})
    except KafkaError as error:
        # Such as another monitor in the group, which has read further anyway.
        logger.warning("begins where the group has stopped", extra={"error": str(error)[:200]})
    finally:
        consumer.close()


def run(settings: MonitorSettings, outlook: Outlook) -> None:
    """Run the monitor until SIGTERM. Does not return.

    Raises:
        ConfigurationError: If the topics are missing or their partition counts differ.
        OSError: If the metrics port is taken.
    """
    check_topics(settings)
    commit_window_back(settings, now_ms())
    metrics = MetricsServer(settings.metrics_host, settings.metrics_port) if settings.metrics_port else None
    try:
        run_worker(create_monitor_app(settings, outlook, Watchdog(STALL_TIMEOUT_S)))
    finally:
        if metrics is not None:
            metrics.close()
