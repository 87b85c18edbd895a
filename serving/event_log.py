"""The event log: a bounded queue, and one thread that writes it to Kafka in well-filled records.

The request path only appends. When Kafka is slow or gone the queue fills: from 80 % on, impressions are dropped with a
probability that rises to 1 and stands, as its complement, on every survivor, so that estimates stay unbiased; clicks,
rarer and worth more, keep the last 5 % for themselves. Every event that is lost is counted with its cause. An event
counts as waiting until Kafka has acknowledged it, so the memory of the producer is bounded too.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec
import numpy as np
from kafka.errors import KafkaError, KafkaTimeoutError, MessageSizeTooLargeError

from serving.metrics import ServingMetrics
from streams.contracts.catalog import Element, catalog_key
from streams.contracts.codec import encode_batch, split_to_fit
from streams.contracts.decision_ids import route_of
from streams.contracts.events import Click, Event, Impression
from streams.contracts.impressions import encode_impressions
from streams.contracts.settings import ConfigurationError
from streams.contracts.topics import CATALOG, CLICKS, IMPRESSIONS

logger = logging.getLogger(__name__)

HIGH_WATER: Final = 0.8
"""Share of the queue from which impressions are dropped."""
CLICKS_ONLY: Final = 0.95
"""Share of the queue from which no impression is taken."""
"""Below the brokers' default limit of 1 MB, even where nothing can be compressed."""
COLUMNS_FROM: Final = 32
"""Impressions in a record from which columns pay: their schema takes a kilobyte or two."""
STALLED_S: Final = 5.0
"""Without an acknowledgement for so long, while events wait, the log counts as disconnected."""
CATALOG_TIMEOUT_S: Final = 5.0
MAX_ANNOUNCED: Final = 100_000
_MAX_BACKOFF_S: Final = 5.0
_CLOSE_S: Final = 1.0


class Producer(Protocol):
    """What is used of kafka-python's producer."""

    def send(
        self,
        topic: str,
        value: bytes | None = None,
        key: bytes | None = None,
        *,
        partition: int | None = None,
        timestamp_ms: int | None = None,
    ) -> Any:
        """Queue a record; return a future with add_callback and add_errback."""
        ...

    def partitions_for(self, topic: str) -> set[int]:
        """Return the partitions of a topic."""
        ...

    def close(self, timeout: float | None = None) -> None:
        """Close, waiting so long for what is under way."""
        ...


@dataclass(frozen=True, slots=True)
class Record:
    """One Kafka record to write."""

    topic: str
    partition: int
    value: bytes
    newest_ms: int
    num_events: int


def survival_probability(waiting: int, capacity: int) -> float:
    """Return the probability with which an impression is kept: 1 up to the high-water mark, then falling to 0."""
    if waiting < HIGH_WATER * capacity:
        return 1.0
    left = (CLICKS_ONLY * capacity - waiting) / ((CLICKS_ONLY - HIGH_WATER) * capacity)
    # Rounding alone would bring more than 1 at the mark itself, which every reader refuses.
    return min(1.0, max(0.0, left))


def records(events: Iterable[Event], num_partitions: int, batch_size: int) -> Iterator[Record]:
    """Group events by topic and partition into records of at most `batch_size` events."""
    groups: dict[tuple[str, int], list[Event]] = {}
    for event in events:
        topic = IMPRESSIONS if isinstance(event, Impression) else CLICKS
        groups.setdefault((topic, route_of(event.decision_id) % num_partitions), []).append(event)
    # Impressions first: a click is then rarely read before its impression.
    for (topic, partition), group in sorted(groups.items(), key=lambda item: item[0][0] != IMPRESSIONS):
        is_worth_columns = topic == IMPRESSIONS and min(len(group), batch_size) >= COLUMNS_FROM
        encode: Callable[[Sequence[Any]], bytes] = encode_impressions if is_worth_columns else encode_batch
        for start in range(0, len(group), batch_size):
            for part, value in split_to_fit(group[start : start + batch_size], encode):
                newest_ms = max(event.occurred_at_ms for event in part)
                yield Record(topic, partition, value, newest_ms, len(part))


class RouteRotation:
    """Gives one route to the decisions of a while, then the next: what is written together then lies together.

    Args:
        routes: Those of this server.
        batch_size: So many decisions end a turn,
        linger_ms: or so much time.
        start: Where in the range to begin; random, so that servers do not move in step.
    """

    def __init__(self, routes: range, batch_size: int, linger_ms: int, start: int = 0) -> None:
        self._routes = routes
        self._batch_size = batch_size
        self._linger_ms = linger_ms
        self._turn = start
        self._given = 0
        self._since_ms = 0

    def take(self, num_decisions: int, now_ms: int) -> int:
        """Return the route for so many decisions made now."""
        is_over = self._given + num_decisions > self._batch_size or now_ms - self._since_ms >= self._linger_ms
        if is_over and self._given > 0:
            self._turn += 1
            self._given = 0
        if self._given == 0:
            self._since_ms = now_ms
        self._given += num_decisions
        return self._routes[self._turn % len(self._routes)]


class EventLog:
    """Takes events from the request path and brings them to Kafka.

    Args:
        connect: Makes a producer; may fail, and is tried again.
        routes: That this server gives to its decisions.
        queue_size: Events that may wait.
        linger_ms: Events are collected this long into one record.
        batch_size: At most so many events in one record.
        metrics: Counts every event by topic and fate.
        rng: Decides which impressions survive an overload.
        is_stale: Whether a producer made now would have other credentials than the one that writes.
    """

    def __init__(
        self,
        *,
        connect: Callable[[], Producer],
        routes: range,
        queue_size: int,
        linger_ms: int,
        batch_size: int,
        metrics: ServingMetrics,
        rng: np.random.Generator,
        is_stale: Callable[[], bool] = lambda: False,
    ) -> None:
        self._connect = connect
        self._is_stale = is_stale
        self._capacity = queue_size
        self._linger_s = linger_ms / 1000
        self._batch_size = batch_size
        self._metrics = metrics
        self._rng = rng
        self._rotation = RouteRotation(routes, batch_size, linger_ms, start=int(rng.integers(len(routes))))
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)
        self._events: deque[Event] = deque()
        self._elements: deque[Element] = deque()
        self._announced: dict[str, None] = {}
        self._unsent: deque[Record] = deque()
        self._accepted = {topic: metrics.events_accepted.labels(topic) for topic in (IMPRESSIONS, CLICKS, CATALOG)}
        self._waiting: dict[str, int] = {IMPRESSIONS: 0, CLICKS: 0, CATALOG: 0}
        self._num_waiting = 0
        self._last_progress = time.monotonic()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._is_closed = False
        self._is_connected = False
        self._needs_producer = False
        self._fault: str | None = "no connection to Kafka yet"
        self._thread = threading.Thread(target=self._run, name="genco-event-log", daemon=True)
        metrics.event_queue.set_function(lambda: self.num_waiting)

    # -- called by requests ----------------------------------------------------------------------

    def current_route(self, num_decisions: int, now_ms: int) -> int:
        """Return the route that decisions made now should carry."""
        with self._lock:
            return self._rotation.take(num_decisions, now_ms)

    def offer_impression(self, impression: Impression) -> bool:
        """Queue an impression, or drop it with the probability that the load asks for."""
        with self._lock:
            survival = survival_probability(self._num_waiting, self._capacity)
            if survival == 1.0:
                self._append(IMPRESSIONS, impression)
                return True
            if survival > self._rng.random():
                self._append(IMPRESSIONS, msgspec.structs.replace(impression, survival_probability=survival))
                return True
        self._dropped(IMPRESSIONS, 1, "overload" if survival > 0 else "full")
        return False

    def offer_click(self, click: Click) -> bool:
        """Queue a click; return False if not even a click has room."""
        with self._lock:
            has_room = self._num_waiting < self._capacity
            if has_room:
                self._append(CLICKS, click)
        if not has_room:
            self._dropped(CLICKS, 1, "full")
        return has_room

    def offer_elements(self, elements: Sequence[Element]) -> None:
        """Queue elements for the catalog, each once; they are acknowledged before later impressions are written."""
        num_dropped = 0
        with self._lock:
            for element in elements:
                if element.element_id in self._announced:
                    continue
                if self._num_waiting >= CLICKS_ONLY * self._capacity:
                    num_dropped += 1
                    continue
                if len(self._announced) >= MAX_ANNOUNCED:
                    del self._announced[next(iter(self._announced))]
                self._announced[element.element_id] = None
                self._elements.append(element)
                self._count_in(CATALOG)
        if num_dropped:
            self._dropped(CATALOG, num_dropped, "full")

    # -- state -----------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Events that Kafka has not acknowledged yet."""
        return self._num_waiting

    @property
    def fault(self) -> str | None:
        """Why events are not delivered at the moment, or None."""
        if not self._is_connected:
            return self._fault or "no connection to Kafka"
        silent_s = time.monotonic() - self._last_progress
        if self._num_waiting and silent_s > STALLED_S:
            return f"Kafka has acknowledged nothing for {silent_s:.0f} s while {self._num_waiting} events wait"
        return None

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connect and write from a thread; returns at once."""
        self._thread.start()

    def flush(self, timeout_s: float) -> int:
        """Wait until Kafka has acknowledged everything; return how many events still wait."""
        self._wake.set()
        with self._settled:
            self._settled.wait_for(lambda: self._num_waiting == 0, timeout_s)
            return self._num_waiting

    def close(self, timeout_s: float) -> int:
        """Flush, end the thread, and count what is left as lost; return its number."""
        deadline = time.monotonic() + timeout_s
        if self._thread.is_alive():
            self.flush(timeout_s)
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(max(0.1, deadline - time.monotonic()))
        with self._lock:
            left = {topic: number for topic, number in self._waiting.items() if number}
            self._is_closed = True
            self._waiting, self._num_waiting = dict.fromkeys(self._waiting, 0), 0
        for topic, number in left.items():
            self._dropped(topic, number, "shutdown")
        if left:
            logger.error("events were not delivered before the shutdown", extra=left)
        return sum(left.values())

    # -- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        backoff_s = 0.2
        while not self._stopping.is_set():
            producer: Producer | None = None
            try:
                producer = self._connect()
                num_partitions = _num_partitions(producer)
                self._is_connected, self._needs_producer, self._fault = True, False, None
                self._last_progress = time.monotonic()
                backoff_s = 0.2
                logger.info("event log connected", extra={"partitions": num_partitions})
                self._write(producer, num_partitions)
            except (KafkaError, OSError, ConfigurationError) as error:
                self._fault = f"{type(error).__name__}: {error}"
                logger.warning("event log has no connection; trying again", extra={"cause": self._fault})
            except Exception as error:
                # A bug, ours or the library's: the events wait, readiness tells.
                self._fault = f"{type(error).__name__}: {error}"
                logger.exception("event log failed; connecting anew")
            self._is_connected = False
            if producer is not None:
                _close(producer)
            self._stopping.wait(backoff_s)
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    def _write(self, producer: Producer, num_partitions: int) -> None:
        """Write what is queued, each linger time or batch size, until told to stop or another producer is needed."""
        while not self._needs_producer:
            if self._is_stale():
                logger.info("the password of Kafka has changed; connecting anew")
                return
            is_last = self._stopping.is_set()
            self._write_elements(producer)
            with self._lock:
                events = list(self._events)
                self._events.clear()
            # Kept over a reconnect: what could not be handed to this producer goes to the next.
            self._unsent.extend(records(events, num_partitions, self._batch_size))
            while self._unsent:
                self._send(producer, self._unsent[0])
                self._unsent.popleft()
            if is_last:
                return
            self._wake.wait(self._linger_s)
            self._wake.clear()

    def _write_elements(self, producer: Producer) -> None:
        """Write new elements and wait for the acknowledgements: impressions that name them are written after them."""
        futures = []
        while self._elements:
            element = self._elements[0]
            value = element.model_dump_json().encode()
            future = producer.send(CATALOG, value=value, key=catalog_key(element), partition=0)
            self._elements.popleft()
            future.add_callback(self._on_acknowledged, CATALOG, 1)
            future.add_errback(self._on_failed, CATALOG, 1, element.element_id)
            futures.append(future)
        deadline = time.monotonic() + CATALOG_TIMEOUT_S
        for future in futures:
            try:
                future.get(timeout=max(0.0, deadline - time.monotonic()))
            except KafkaError as error:
                logger.warning("new elements are not in the catalog yet", extra={"cause": str(error)})
                return

    def _send(self, producer: Producer, record: Record) -> None:
        try:
            future = producer.send(
                record.topic, value=record.value, partition=record.partition, timestamp_ms=record.newest_ms
            )
        except MessageSizeTooLargeError:
            self._settle(record.topic, record.num_events)
            self._dropped(record.topic, record.num_events, "too_large")
            return
        future.add_callback(self._on_acknowledged, record.topic, record.num_events)
        future.add_errback(self._on_failed, record.topic, record.num_events, None)

    # -- called by the producer's thread ---------------------------------------------------------

    def _on_acknowledged(self, topic: str, num_events: int, _: Any) -> None:
        self._last_progress = time.monotonic()
        self._metrics.events_acknowledged.labels(topic).inc(num_events)
        self._settle(topic, num_events)

    def _on_failed(self, topic: str, num_events: int, element_id: str | None, error: BaseException) -> None:
        self._dropped(topic, num_events, "delivery")
        self._settle(topic, num_events)
        if element_id is not None:
            self._announced.pop(element_id, None)
        # A timeout mends itself when the broker is back; after anything else the producer may refuse all that follows.
        if not isinstance(error, KafkaTimeoutError):
            self._needs_producer = True
        logger.error("events were not delivered", extra={"topic": topic, "events": num_events, "cause": str(error)})

    # -- counting --------------------------------------------------------------------------------

    def _append(self, topic: str, event: Event) -> None:
        self._events.append(event)
        self._count_in(topic)
        if len(self._events) == self._batch_size:
            self._wake.set()

    def _count_in(self, topic: str) -> None:
        if self._num_waiting == 0:
            self._last_progress = time.monotonic()
        self._waiting[topic] += 1
        self._num_waiting += 1
        self._accepted[topic].inc()

    def _settle(self, topic: str, num_events: int) -> None:
        with self._settled:
            if self._is_closed:
                return
            self._waiting[topic] -= num_events
            self._num_waiting -= num_events
            if self._num_waiting == 0:
                self._settled.notify_all()

    def _dropped(self, topic: str, num_events: int, cause: str) -> None:
        self._metrics.events_dropped.labels(topic, cause).inc(num_events)


def _num_partitions(producer: Producer) -> int:
    """Return the partition count of the joined topics.

    Raises:
        ConfigurationError: If no broker answers, a topic is missing, or the counts differ: impressions and their clicks
            would never meet.
    """
    try:
        counts = {topic: len(producer.partitions_for(topic) or ()) for topic in (IMPRESSIONS, CLICKS, CATALOG)}
    except KafkaTimeoutError as error:
        raise ConfigurationError(
            f"Kafka does not tell the partitions of {IMPRESSIONS}, {CLICKS} and {CATALOG} ({error}); either no broker "
            "answers at GENCO_KAFKA_BOOTSTRAP_SERVERS, or create the topics with: genco topics"
        ) from None
    missing = [topic for topic, count in counts.items() if count == 0]
    if missing:
        raise ConfigurationError(f"topics {', '.join(missing)} do not exist; create them with: genco topics")
    if counts[IMPRESSIONS] != counts[CLICKS]:
        raise ConfigurationError(
            f"impressions has {counts[IMPRESSIONS]} partitions and clicks {counts[CLICKS]}; they must have as many"
        )
    return counts[IMPRESSIONS]


def _close(producer: Producer) -> None:
    try:
        producer.close(timeout=_CLOSE_S)
    except KafkaError as error:
        # Its futures have been counted, or are counted when they fail; its thread is a daemon.
        logger.warning("the producer did not close in time", extra={"cause": str(error)})
