"""The ledger of a whole loop, counted from the topics alone.

The audit reads `impressions`, `clicks`, `examples` and `dead_letters` beside the joiner and works out by itself what
must have become of every event. It shares only the decoder with it, so a lost click, a wrong label or an example out of
nothing shows as `imbalance`, whatever crashed in between. Freshness is measured the same way: from the offsets that a
swapped snapshot was trained through, example by example.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from streams.contracts.codec import EventDecoder, mark_of
from streams.contracts.dead_letters import CUT_BYTES, ORIGIN_HEADERS, replayed_of
from streams.contracts.events import Click, Impression
from streams.contracts.topics import CLICKS, DEAD_LETTERS, EXAMPLES, IMPRESSIONS

AUDITED: Final = (IMPRESSIONS, CLICKS, EXAMPLES, DEAD_LETTERS)


@dataclass(slots=True)
class _Decision:
    """What the topics say about one decision."""

    shown_at_ms: int | None = None
    clicks_ms: list[int] = field(default_factory=list)
    label: int | None = None
    """Strongest label among its examples."""


@dataclass(slots=True)
class _Waiting:
    """Examples of one record that no server serves yet: the offset, and when each was due to be learned."""

    offset: int
    due_ms: NDArray[np.int64]


class Audit:
    """Feed it every record of the audited topics, in any interleaving."""

    def __init__(
        self,
        attribution_window_ms: int,
        label_wait_ms: int,
        max_future_skew_ms: int = 60_000,
        max_event_age_ms: int = 0,
    ) -> None:
        self._window_ms = attribution_window_ms
        self._max_skew_ms = max_future_skew_ms
        self._max_age_ms = max_event_age_ms
        self._wait_ms = label_wait_ms
        self._decisions: dict[str, _Decision] = {}
        self._impressions = EventDecoder(Impression)
        self._clicks = EventDecoder(Click)
        self.consumed: Counter[str] = Counter()
        self.num_decided = 0
        """Decisions with a label."""
        self._bad: Counter[str] = Counter()
        self._duplicate_impressions = 0
        self._dead_letters: set[tuple[Any, ...]] = set()
        self.label_kinds: Counter[str] = Counter()
        self._waiting: dict[int, deque[_Waiting]] = {}
        self.freshness_s: list[NDArray[np.float64]] = []

    def feed(
        self,
        topic: str,
        partition: int,
        offset: int,
        value: bytes | None,
        headers: Sequence[Any] = (),
        timestamp_ms: int | None = None,
    ) -> None:
        """Take one record; `timestamp_ms` is its own time, against which the clocks of its events are judged."""
        if topic == DEAD_LETTERS:
            if replayed_of(headers) is None:
                self._feed_dead_letter(partition, offset, value or b"", headers)
        elif topic == EXAMPLES:
            self._feed_examples(partition, offset, value or b"")
        elif mark_of(headers) is None:
            believed = (-math.inf, math.inf)
            if timestamp_ms is not None:
                earliest_ms = timestamp_ms - self._max_age_ms if self._max_age_ms else -math.inf
                believed = (earliest_ms, timestamp_ms + self._max_skew_ms)
            if topic == IMPRESSIONS:
                self._feed_impressions(value or b"", *believed)
            else:
                self._feed_clicks(value or b"", *believed)

    def _feed_dead_letter(self, partition: int, offset: int, value: bytes, headers: Sequence[Any]) -> None:
        # One that a crash made the joiner write again has the same origin and content; another version may have given
        # another reason and kept less of the line.
        named = tuple(sorted((name, bytes(v or b"")) for name, v in headers if name in ORIGIN_HEADERS))
        self._dead_letters.add((named or (partition, offset), value[:CUT_BYTES]))

    def _feed_impressions(self, value: bytes, earliest_ms: float, latest_ms: float) -> None:
        decoded = self._impressions.decode_batch(value)
        self.consumed[IMPRESSIONS] += len(decoded.events) + len(decoded.bad)
        self._bad[IMPRESSIONS] += len(decoded.bad)
        for impression in decoded.events:
            if not earliest_ms <= impression.occurred_at_ms <= latest_ms:
                self._bad[IMPRESSIONS] += 1
                continue
            decision = self._decisions.setdefault(impression.decision_id, _Decision())
            if decision.shown_at_ms is None:
                decision.shown_at_ms = impression.occurred_at_ms
            else:
                self._duplicate_impressions += 1

    def _feed_clicks(self, value: bytes, earliest_ms: float, latest_ms: float) -> None:
        decoded = self._clicks.decode_batch(value)
        self.consumed[CLICKS] += len(decoded.events) + len(decoded.bad)
        self._bad[CLICKS] += len(decoded.bad)
        for click in decoded.events:
            if not earliest_ms <= click.occurred_at_ms <= latest_ms:
                self._bad[CLICKS] += 1
                continue
            self._decisions.setdefault(click.decision_id, _Decision()).clicks_ms.append(click.occurred_at_ms)

    def _feed_examples(self, partition: int, offset: int, value: bytes) -> None:
        with pa.ipc.open_stream(value) as reader:
            table = reader.read_all()
        ids = table.column("decision_id").to_pylist()
        labels = table.column("label").to_pylist()
        kinds = table.column("label_kind").to_pylist()
        for decision_id, label in zip(ids, labels, strict=True):
            decision = self._decisions.setdefault(decision_id, _Decision())
            self.num_decided += decision.label is None
            decision.label = label if decision.label is None else max(decision.label, label)
        self.consumed[EXAMPLES] += len(ids)
        self.label_kinds.update(kinds)
        first = np.array([kind != "late_positive" for kind in kinds], np.bool_)
        due_ms = table.column("occurred_at_ms").to_numpy()[first] + self._wait_ms
        self._waiting.setdefault(partition, deque()).append(_Waiting(offset, due_ms))

    def feed_swaps(self, swaps: Iterable[Mapping[str, Any]]) -> None:
        """Take a server's swaps, oldest first; those that were fed before change nothing.

        Args:
            swaps: When it began to serve a snapshot (`swapped_at_ms`), and `trained_through`: through which offsets.
        """
        for swap in swaps:
            for name, until in swap["trained_through"].items():
                waiting = self._waiting.get(int(name), deque())
                while waiting and waiting[0].offset < until:
                    served = waiting.popleft()
                    self.freshness_s.append((swap["swapped_at_ms"] - served.due_ms) / 1000.0)

    def freshness(self, since: int = 0) -> dict[str, float | None]:
        """Return median and 95th percentile, in seconds, over the examples served so far.

        Freshness of an example: when a server swapped to a snapshot trained through it, minus the time of its
        impression and the label wait.

        Args:
            since: Leave out so many of the first groups.
        """
        seconds = np.concatenate(self.freshness_s[since:]) if self.freshness_s[since:] else np.empty(0)
        if not len(seconds):
            return {"p50": None, "p95": None}
        return {"p50": round(float(np.quantile(seconds, 0.5)), 3), "p95": round(float(np.quantile(seconds, 0.95)), 3)}

    def ledger(self, *, drained: bool) -> dict[str, Any]:
        """Return the bucket of every event, and how many stand where they should not.

        Args:
            drained: Nothing is on its way any more: an impression without an example, or a click in time whose
                decision is still negative, is then counted as an imbalance.
        """
        impressions: Counter[str] = Counter(duplicate=self._duplicate_impressions, dead_letter=self._bad[IMPRESSIONS])
        clicks: Counter[str] = Counter(dead_letter=self._bad[CLICKS])
        imbalance = 0
        for decision in self._decisions.values():
            if decision.shown_at_ms is None:
                if decision.clicks_ms:
                    # Its impression may still be on its way.
                    clicks["orphan" if drained else "pending"] += 1
                    clicks["duplicate"] += len(decision.clicks_ms) - 1
                if decision.label is not None and drained:
                    imbalance += 1  # an example of an impression that nobody sent
                continue
            in_time = sum(t - decision.shown_at_ms <= self._window_ms for t in decision.clicks_ms)
            clicks["joined"] += in_time > 0
            clicks["duplicate"] += max(in_time - 1, 0)
            clicks["late"] += len(decision.clicks_ms) - in_time
            if decision.label is None:
                impressions["pending"] += 1
                imbalance += drained
            elif decision.label:
                impressions["joined"] += 1
                imbalance += in_time == 0 and drained
            else:
                impressions["expired"] += 1
                imbalance += in_time > 0 and drained
        if drained:
            imbalance += abs(len(self._dead_letters) - self._bad.total())
        imbalance += abs(impressions.total() - self.consumed[IMPRESSIONS]) + abs(clicks.total() - self.consumed[CLICKS])
        return {
            "impressions": {k: impressions[k] for k in ("joined", "expired", "pending", "duplicate", "dead_letter")},
            "clicks": {k: clicks[k] for k in ("joined", "pending", "late", "duplicate", "orphan", "dead_letter")},
            "imbalance": imbalance,
        }
