"""Impressions and clicks of which a test knows what must become of them, written to Kafka from a thread.

What is expected is worked out here, from what was sent and from nothing else: 1 if a decision was clicked within the
window, else 0. Clicks are never near the edges of the label wait or the window, where it would depend on timing.
"""

import heapq
import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from streams.clients import kafka_producer
from streams.contracts.codec import encode_event
from streams.contracts.events import Impression
from streams.contracts.settings import JoinSettings
from streams.contracts.topics import CLICKS, IMPRESSIONS
from tests.builders import clicked, shown

TICK_S = 0.05
BAD_LINES = (b"not json", b'{"schema_version":1}', b'{"schema_version":7,"decision_id":"x"}')

Parts = dict[tuple[str, int], list[bytes]]


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What the traffic is made of; shares of the impressions."""

    rate: int = 1_500
    """Impressions a second."""
    quick: float = 0.08
    """Clicked within the label wait."""
    slow: float = 0.05
    """Clicked after it, within the window."""
    outside: float = 0.02
    """Clicked after the window, which is no click."""
    early: float = 0.02
    """Impression that reaches Kafka a second after its click."""
    repeated: float = 0.02
    """Sent twice, as are so many clicks."""
    orphans: float = 0.005
    """Clicks of nothing."""
    bad: float = 0.002
    """Lines that cannot be read, of either topic."""
    slow_until: float = 0.6
    """Slow clicks come at this share of the window at the latest: the rest is for what holds them up on their way."""


@dataclass
class Sent:
    """What was written, and what must come of it."""

    expected: dict[str, int] = field(default_factory=dict)
    """Strongest label by decision."""
    events: Counter[str] = field(default_factory=Counter)
    """Events by topic, bad ones included."""
    num_bad: int = 0

    def plus(self, other: "Sent") -> "Sent":
        """Return both together."""
        labels = {i: max(self.expected.get(i, 0), other.expected.get(i, 0)) for i in self.expected | other.expected}
        return Sent(labels, self.events + other.events, self.num_bad + other.num_bad)


class Traffic:
    """Writes events whose time is now, until it is closed; then the clicks that are due later.

    Args:
        settings: Where, with the window and the label wait.
        prefix: Of the decision ids, no other test's.
        seed: Of everything that is drawn.
        mix: What to write.
    """

    def __init__(self, settings: JoinSettings, prefix: str, *, seed: int, mix: Mix | None = None) -> None:
        self._settings = settings
        self._prefix = prefix
        self._mix = mix or Mix()
        self._random = random.Random(seed)
        self._window_s = settings.attribution_window_ms / 1000
        self._wait_s = settings.label_wait_ms / 1000
        self._later: list[tuple[float, int, str, int, bytes]] = []
        self._number = 0
        self._stop = threading.Event()
        self._failure: list[Exception] = []
        self.sent = Sent()
        self._thread = threading.Thread(target=self._run, name="traffic", daemon=True)

    def __enter__(self) -> "Traffic":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(1)

    def close(self, timeout_s: float = 60.0) -> Sent:
        """Write no more impressions, wait until their clicks are written, and return what was sent."""
        self._stop.set()
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the traffic does not end"
        assert not self._failure, self._failure
        return self.sent

    def _run(self) -> None:
        try:
            self._write()
        except Exception as error:  # noqa: BLE001 - told by close
            self._failure.append(error)

    def _write(self) -> None:
        # Through a broker that is away for a while.
        producer = kafka_producer(self._settings, max_block_ms=60_000)
        futures = []
        begun, num_due = time.monotonic(), 0.0
        while not (self._stop.is_set() and not self._later):
            now = time.time()
            records: Parts = {}
            if not self._stop.is_set():
                num_due = (time.monotonic() - begun) * self._mix.rate
                while self._number < num_due:
                    self._shopper(now, records)
            while self._later and self._later[0][0] <= now:
                _, _, topic, partition, line = heapq.heappop(self._later)
                records.setdefault((topic, partition), []).append(line)
            for (topic, partition), lines in records.items():
                futures.append(producer.send(topic, value=b"\n".join(lines), partition=partition))
                self.sent.events[topic] += len(lines)
            time.sleep(TICK_S)
        producer.flush(timeout=60)
        for future in futures:
            future.get(timeout=60)  # raises what it failed of
        producer.close(timeout=10)

    def _shopper(self, now: float, records: Parts) -> None:
        """Show one card, and plan what happens to it."""
        mix, draw = self._mix, self._random
        self._number += 1
        decision_id = f"{self._prefix}-{self._number}"
        partition = draw.randrange(self._settings.partitions)
        shown_ms = int(now * 1000)
        line = encode_event(shown(decision_id, shown_ms))
        kind = draw.random()
        clicked_s: float | None = None
        shown_s = 0.0
        if kind < mix.quick:
            clicked_s = draw.uniform(0.05, 0.7) * self._wait_s
        elif (kind := kind - mix.quick) < mix.slow:
            clicked_s = draw.uniform(1.3 * self._wait_s, mix.slow_until * self._window_s)
        elif (kind := kind - mix.slow) < mix.outside:
            clicked_s = draw.uniform(1.15, 1.3) * self._window_s
        elif kind - mix.outside < mix.early:
            clicked_s, shown_s = 0.1, 1.0
        self.sent.expected[decision_id] = int(clicked_s is not None and clicked_s < self._window_s)
        if shown_s:
            self._plan(now + shown_s, IMPRESSIONS, partition, line)
        else:
            records.setdefault((IMPRESSIONS, partition), []).append(line)
        if draw.random() < mix.repeated:
            self._plan(now + draw.uniform(0.1, 0.4) * self._window_s, IMPRESSIONS, partition, line)
        if clicked_s is not None:
            self._click(decision_id, now, clicked_s, partition)
            if draw.random() < mix.repeated:
                self._click(decision_id, now, clicked_s, partition)
        if draw.random() < mix.orphans:
            self._click(f"{decision_id}-nobody", now, 0.2, partition)
        if draw.random() < mix.bad:
            self.sent.num_bad += 1
            self._plan(now, draw.choice((IMPRESSIONS, CLICKS)), partition, draw.choice(BAD_LINES))

    def _click(self, decision_id: str, now: float, after_s: float, partition: int) -> None:
        line = encode_event(clicked(decision_id, int((now + after_s) * 1000)))
        self._plan(now + after_s, CLICKS, partition, line)

    def _plan(self, at: float, topic: str, partition: int, line: bytes) -> None:
        heapq.heappush(self._later, (at, len(self._later) + self._number * 16, topic, partition, line))


def write_log(settings: JoinSettings, records: list[tuple[str, int, list[Any]]]) -> Sent:
    """Write records of events, bytes or structs, and wait for the broker; no label is expected of bytes."""
    sent = Sent()
    producer = kafka_producer(settings)
    futures = []
    for topic, partition, events in records:
        lines = [event if isinstance(event, bytes) else encode_event(event) for event in events]
        futures.append(producer.send(topic, value=b"\n".join(lines), partition=partition))
        sent.events[topic] += len(lines)
        sent.num_bad += sum(isinstance(event, bytes) for event in events)
        for event in events:
            if isinstance(event, Impression):
                sent.expected.setdefault(event.decision_id, 0)
            elif not isinstance(event, bytes):
                sent.expected[event.decision_id] = 1
    producer.flush(timeout=60)
    for future in futures:
        future.get(timeout=60)
    producer.close(timeout=10)
    return sent


def old_schema(line: bytes) -> bytes:
    """Return an event whose client has renamed a field."""
    event = json.loads(line)
    event["at"] = event.pop("occurred_at_ms")
    return json.dumps(event).encode()
