"""The learner's own thread: it takes records of `examples`, updates the model, publishes, and checkpoints.

The order that makes a crash harmless: record the update in the topic `updates`, apply it, publish, checkpoint, and only
then let Kafka's offsets be committed. On start the newest checkpoint is loaded, the updates recorded after it are
repeated, and the records before its offsets are skipped. So nothing is learned twice and nothing is lost.

Torch runs here, away from the event loop that keeps the consumer group alive.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import redis
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from prometheus_client import Counter, Gauge, Histogram

from learner.checkpoint import CheckpointStore
from learner.online import OnlineLearner, UpdateReport
from learner.publisher import Fence, Outcome, Publisher
from learner.updates import Backlog, PendingRecord, Update, concat
from streams.clients import assign_whole_topic, kafka_consumer, kafka_producer, redis_client, require_redis
from streams.contracts.catalog import Catalog
from streams.contracts.examples import ExampleBatch, LabelKind, decode_examples
from streams.contracts.settings import LearnSettings
from streams.contracts.topics import CATALOG, UPDATES
from streams.telemetry import now_ms

logger = logging.getLogger(__name__)

_trained = Counter("genco_train_examples_total", "Examples learned")
_skipped = Counter("genco_train_examples_skipped_total", "Examples not learned", ["reason"])
_step = Histogram("genco_train_step_duration_seconds", "One update, from examples to a publishable snapshot")
_published = Counter("genco_publish_total", "Snapshots by what became of them", ["result"])
_log_loss = Gauge("genco_log_loss", "Log loss of the newest update's examples before they were learned")
_entropy = Gauge("genco_normalized_entropy_ratio", "Log loss over that of the running click rate; below 1 is knowledge")
_calibration = Gauge("genco_calibration_ratio", "Mean predicted over mean observed click rate")
_lease = Gauge("genco_lease_held", "1 while this process may publish")
_checkpointed = Gauge("genco_checkpoint_last_success_timestamp_seconds", "When the last checkpoint was complete")
_lost = Counter("genco_events_lost_total", "Records that retention removed before they were learned", ["reason"])


@dataclass(frozen=True, slots=True)
class InboxRecord:
    """A record of `examples` as the consumer read it."""

    partition: int
    offset: int
    value: bytes
    acknowledge: Callable[[], Any]
    """Lets the offset be committed; called on the event loop."""


@dataclass(frozen=True, slots=True)
class SeekRequest:
    """A record before those that came is needed: the checkpoint is older than the committed offset."""

    partition: int
    offset: int


class LeaseHeldError(RuntimeError):
    """Another learner of the same model is running."""


class Worker:
    """Runs the learner in a thread. Everything it needs from Kafka comes through `inbox`."""

    MAX_BACKLOG = 20_000
    """Waiting examples; beyond it `is_full` asks the consumer to stop reading."""

    def __init__(self, settings: LearnSettings, learner: OnlineLearner) -> None:
        self._settings = settings
        self._learner = learner
        self._checkpoints = CheckpointStore(settings.checkpoint_dir)
        self.inbox: queue.SimpleQueue[InboxRecord | None] = queue.SimpleQueue()
        """None: a rebalance, everything not yet checkpointed comes again."""
        self.acknowledgements: deque[Callable[[], Any]] = deque()
        """Offsets that may be committed; the event loop empties it."""
        self.seeks: deque[SeekRequest] = deque()
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="learner", daemon=True)
        self._learned_until: dict[int, int] = {}
        self._backlog = Backlog({})
        self._unacknowledged: deque[tuple[int, int, Callable[[], Any]]] = deque()
        self._planned: deque[Update] = deque()
        self._number = 0
        self._updates_until = 0
        self._catalog_until = 0
        self._catalog = Catalog()
        self._parent_sha256: str | None = None
        self._due_ms: list[np.ndarray[Any, np.dtype[np.int64]]] = []
        self._fence = Fence()
        self._is_alone = False
        self._lease_deadline = 0.0
        self._renewed_at = 0.0
        self._updated_at = 0.0
        self._checkpointed_at = 0.0
        self._asked_at = 0.0

    @property
    def is_full(self) -> bool:
        """Whether the consumer should wait before it reads on."""
        return self._backlog.num_examples > self.MAX_BACKLOG or self.inbox.qsize() > 200

    def start(self) -> None:
        """Load the newest checkpoint and start the thread.

        Raises:
            CheckpointError: If there are checkpoints and none can be read.
            ConfigurationError: If a topic is missing, or Redis refuses the password or evicts.
            UnreachableError: If Kafka or Redis does not answer.
        """
        client = redis_client(self._settings, timeout_s=2.0, retries=1)
        require_redis(client)
        self._updates_producer: KafkaProducer = kafka_producer(self._settings)
        self._catalog_consumer: KafkaConsumer = kafka_consumer(self._settings)
        assign_whole_topic(self._catalog_consumer, CATALOG)
        self._resume()
        # The lease of a learner that died runs out by itself.
        self._lease_deadline = time.monotonic() + 2 * self._settings.lease_ms / 1000
        self._publisher = Publisher(client, self._settings.model_id, self._settings.lease_ms, self._fence)
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Take a last checkpoint, give the lease back and end the thread."""
        self._stop.set()
        self._thread.join(timeout_s)
        self._updates_producer.close(timeout=2)
        self._catalog_consumer.close()

    def _run(self) -> None:
        try:
            self._updated_at = self._checkpointed_at = time.monotonic()
            while not self._stop.is_set():
                self._receive()
                # Two learners of one model would mix their updates: only the holder of the lease goes on.
                if self._keep_lease() and (update := self._next_update()) is not None:
                    self._apply(*update)
                if time.monotonic() - self._checkpointed_at >= self._settings.checkpoint_interval_ms / 1000:
                    self._checkpoint()
            self._checkpoint()
            if self._publisher.holds_lease:
                self._publisher.release()
        except BaseException as error:
            logger.exception("the learner's thread failed")
            self.failure = error

    # -- reading ---------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        """Move what has come into the backlog; wait a moment if nothing has."""
        try:
            item = self.inbox.get(timeout=0.02)
            while True:
                self._take_in(item)
                item = self.inbox.get_nowait()
        except queue.Empty:
            return

    def _take_in(self, item: InboxRecord | None) -> None:
        if item is None:
            self._backlog.clear(self._learned_until)
            self._unacknowledged.clear()
            return
        expected = self._backlog.next_offset.get(item.partition)
        if expected is not None and item.offset > expected:
            if time.monotonic() - self._asked_at > 5.0:
                self._asked_at = time.monotonic()
                self.seeks.append(SeekRequest(item.partition, expected))
            return
        if expected is not None and item.offset < expected:
            # Learned before the last checkpoint, or waiting already.
            if item.offset < self._learned_until.get(item.partition, 0):
                self.acknowledgements.append(item.acknowledge)
            return
        try:
            examples = decode_examples(item.value)
        except ValueError as error:
            _skipped.labels("unreadable").inc()
            logger.error(
                "record of examples cannot be read and is left out",
                extra={"partition": item.partition, "offset": item.offset, "error": str(error)},
            )
            examples = ExampleBatch.empty()
        self._backlog.add(PendingRecord(item.partition, item.offset, examples))
        self._unacknowledged.append((item.partition, item.offset, item.acknowledge))

    def records_lost(self, partition: int, earliest: int) -> None:
        """Go on at the earliest record that still exists. Called when a seek found its target removed."""
        expected = self._backlog.next_offset.get(partition, earliest)
        if earliest > expected:
            _lost.labels("retention").inc(earliest - expected)
            logger.error(
                "records of examples were removed by retention before they were learned",
                extra={"partition": partition, "first": expected, "count": earliest - expected},
            )
            self._backlog.skip_to(partition, earliest)

    # -- updating --------------------------------------------------------------------------------------------------

    def _next_update(self) -> tuple[Update, bool] | None:
        """Return the update that is due and whether it is recorded already, or None."""
        if self._planned:
            update = self._planned[0]
            if not self._backlog.holds(update.until):
                return None
            return self._planned.popleft(), True
        waited = time.monotonic() - self._updated_at >= self._settings.update_interval_ms / 1000
        if not (waited or self._backlog.num_examples >= self._settings.update_max_examples):
            return None
        until = self._backlog.bounds(self._settings.update_max_examples)
        if not until:
            return None
        self._read_catalog(None)
        return Update(number=self._number + 1, until=until, catalog_until=self._catalog_until), False

    def _apply(self, update: Update, recorded: bool) -> None:
        if recorded:
            self._read_catalog(update.catalog_until)
        else:
            delivery = self._updates_producer.send(UPDATES, update.model_dump_json().encode())
            self._updates_until = delivery.get(timeout=30).offset + 1
        records = self._backlog.take(update.until)
        started = time.monotonic()
        self._updated_at = started
        batch = concat(records)
        self._number = update.number
        self._learned_until |= update.until
        if batch is None:
            return
        try:
            report = self._learner.update(batch)
        except FloatingPointError as error:
            _skipped.labels("not_finite").inc(len(batch))
            logger.error("a batch was left out", extra={"update": self._number, "error": str(error)})
            return
        self._observe(report)
        first = np.array([kind != LabelKind.LATE_POSITIVE for kind in batch.label_kind], np.bool_)
        self._due_ms.append(batch.occurred_at_ms[first] + self._settings.label_wait_ms)
        self._publish()
        _step.observe(time.monotonic() - started)

    def _observe(self, report: UpdateReport) -> None:
        _trained.inc(report.num_learned)
        for reason, count in report.skipped.items():
            _skipped.labels(reason).inc(count)
        for gauge, name in ((_log_loss, "log_loss"), (_entropy, "normalized_entropy"), (_calibration, "calibration")):
            value = report.metrics.get(name)
            if value is not None:
                gauge.set(value)

    def _read_catalog(self, until: int | None) -> None:
        """Apply the catalog's records: those before an offset, or all there are."""
        deadline = time.monotonic() + 30
        place = TopicPartition(CATALOG, 0)
        while until is None or self._catalog_until < until:
            found: dict[TopicPartition, Sequence[Any]] = self._catalog_consumer.poll(
                timeout_ms=0 if until is None else 200, max_records=500
            )
            changed = False
            for record in found.get(place, ()):
                if record.offset < self._catalog_until:
                    continue
                try:
                    self._catalog.apply(record.key, record.value)
                    changed = True
                except ValueError as error:
                    logger.error("catalog record left out", extra={"offset": record.offset, "error": str(error)})
                self._catalog_until = record.offset + 1
            if changed:
                self._learner.apply_catalog(self._catalog.elements, self._catalog.products)
            if until is None and not found:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"catalog: offset {until} was known once and cannot be read; is the topic intact?")

    # -- publishing ------------------------------------------------------------------------------------------------

    def _keep_lease(self) -> bool:
        """Tell whether this learner is the only one of its model: it holds the lease, or Redis cannot say otherwise.

        Raises:
            LeaseHeldError: If another learner holds it, for longer than one that died could.
        """
        if time.monotonic() - self._renewed_at < self._settings.lease_ms / 3000:
            return self._is_alone
        self._renewed_at = time.monotonic()
        try:
            if not (self._publisher.holds_lease and self._publisher.renew()):
                self._is_alone = self._publisher.acquire()
                if self._is_alone:
                    logger.info("this learner publishes now", extra={"epoch": self._fence.epoch})
                elif time.monotonic() > self._lease_deadline:
                    raise LeaseHeldError(
                        f"another learner of the model {self._settings.model_id} is running; stop it first, "
                        "or learn another model with GENCO_MODEL_ID"
                    )
        except redis.RedisError as error:
            logger.warning("Redis does not answer; training goes on", extra={"error": str(error)})
        _lease.set(self._publisher.holds_lease)
        return self._is_alone

    def _publish(self) -> None:
        due_ms = np.concatenate(self._due_ms) if self._due_ms else np.empty(0, np.int64)
        snapshot = self._learner.snapshot(
            model_id=self._settings.model_id,
            epoch=self._fence.epoch,
            version=self._number,
            parent_sha256=self._parent_sha256,
            trained_through={str(partition): offset for partition, offset in sorted(self._learned_until.items())},
            due_ms_quantiles=[float(q) for q in np.quantile(due_ms, np.linspace(0, 1, 11))] if len(due_ms) else [],
            created_at_ms=now_ms(),
            signing_key=self._settings.signing_key_bytes(),
        )
        verdict = snapshot.manifest.gate
        if not verdict.accepted:
            _published.labels("refused").inc()
            logger.warning("the gate refused a snapshot", extra={"version": self._number, "reasons": verdict.reasons})
        if not self._publisher.holds_lease:
            _published.labels("no_lease").inc()
            return
        try:
            self._publisher.show(snapshot.manifest)
            if not verdict.accepted:
                return
            outcome = self._publisher.publish(snapshot)
        except redis.RedisError as error:
            _published.labels("redis_error").inc()
            logger.warning("publication failed, the next one follows", extra={"error": str(error)})
            return
        _published.labels(outcome.value).inc()
        if outcome is Outcome.PUBLISHED:
            self._parent_sha256 = snapshot.manifest.sha256
            self._due_ms.clear()
        else:
            logger.warning("snapshot not published", extra={"version": self._number, "outcome": outcome})

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        self._checkpointed_at = time.monotonic()
        if not self._learned_until:
            return
        tensors, state = self._learner.state()
        self._checkpoints.save(
            self._number,
            tensors,
            {
                "learner": state,
                "number": self._number,
                "learned_until": {str(partition): offset for partition, offset in self._learned_until.items()},
                "updates_until": self._updates_until,
                "catalog_until": self._catalog_until,
                "parent_sha256": self._parent_sha256,
                "epoch": self._fence.epoch,
                "revision": self._fence.revision,
            },
        )
        _checkpointed.set_to_current_time()
        waiting: deque[tuple[int, int, Callable[[], Any]]] = deque()
        for partition, offset, acknowledge in self._unacknowledged:
            if offset < self._learned_until.get(partition, 0):
                self.acknowledgements.append(acknowledge)
            else:
                waiting.append((partition, offset, acknowledge))
        self._unacknowledged = waiting

    def _resume(self) -> None:
        checkpoint = self._checkpoints.load_newest()
        if checkpoint is not None:
            state = checkpoint.state
            self._number = state["number"]
            self._learned_until = {int(partition): offset for partition, offset in state["learned_until"].items()}
            self._updates_until = state["updates_until"]
            self._parent_sha256 = state["parent_sha256"]
            self._fence = Fence(state["epoch"], state["revision"])
            # The catalog is read again from its beginning: it is compacted, so this is short.
            self._read_catalog(state["catalog_until"])
            self._learner.restore(checkpoint.tensors, state["learner"])
        self._backlog = Backlog(self._learned_until)
        recorded, self._updates_until = recorded_updates(self._settings, self._updates_until)
        self._planned = deque(update for update in recorded if update.number > self._number)
        logger.info(
            "learner starts",
            extra={"update": self._number, "learned_until": self._learned_until, "to_repeat": len(self._planned)},
        )


def recorded_updates(settings: LearnSettings, since: int) -> tuple[list[Update], int]:
    """Return the updates recorded at this offset of the topic and after it, and the offset that comes next."""
    consumer = kafka_consumer(settings)
    try:
        (place,) = assign_whole_topic(consumer, UPDATES)
        begin, end = consumer.beginning_offsets([place])[place], consumer.end_offsets([place])[place]
        consumer.seek(place, max(since, begin))
        found: list[Update] = []
        while consumer.position(place) < end:
            found.extend(Update.from_bytes(record.value) for record in consumer.poll(timeout_ms=500).get(place, ()))
        return found, max(since, end)
    finally:
        consumer.close()
