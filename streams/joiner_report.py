"""What the joiner tells about itself: metrics, and the log lines that an engineer on call reads."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from typing import Final

from prometheus_client import Counter, Gauge

from streams.attribution import CLICK_BUCKETS, IMPRESSION_BUCKETS, Ledger, Output, PartitionJoiner
from streams.contracts.alerts import Alert
from streams.contracts.examples import LabelKind
from streams.contracts.topics import CLICKS, IMPRESSIONS
from streams.join_guard import JoinGuard
from streams.rereading import Rereading

logger = logging.getLogger(__name__)

REREADING_EVERY_S: Final = 2.0
TROUBLE_AFTER_S: Final = 10.0
TROUBLE_EVERY_S: Final = 60.0

_events = Gauge("genco_joiner_events", "Events of this process's partitions by bucket", ["topic", "bucket"])
_imbalance = Gauge("genco_joiner_ledger_imbalance", "Events in no bucket or in two; must be 0")
_watermark = Gauge("genco_watermark_timestamp_seconds", "Event time a partition is complete up to", ["partition"])
_open = Gauge("genco_join_pending_examples", "Impressions inside their window, and clicks waiting for theirs")
_bytes = Gauge("genco_join_pending_bytes", "About the memory that they take")
_held = Gauge("genco_join_held_partitions", "Partitions of topics that are not read at the moment, to bound the memory")
_broken = Gauge("genco_join_breaker_open", "1 after too many bad events: nothing is read until a restart")
_to_reread = Gauge("genco_join_records_to_reread", "Records of the last window still to be read again after a start")
_rate_share = Gauge("genco_join_click_share", "Clicks over expected ones since they ceased; 1 while all is well")
_rate_known = Gauge("genco_join_click_rate_known", "1 once enough clicks were seen to notice when they cease")
_holds = Gauge("genco_join_holds", "Partitions whose clicks have ceased, by what becomes of them", ["state"])
_examples = Counter("genco_joiner_examples_total", "Examples acknowledged by the broker", ["label_kind", "label"])
_lost = Counter("genco_join_records_lost_total", "Records that retention removed before they were joined", ["topic"])


class JoinerReport:
    """Tells about the partitions of one process. Its times are of the monotonic clock."""

    def __init__(self, limit_mib: int) -> None:
        self._limit_mib = limit_mib
        self._full_since: float | None = None
        self._full_at = 0.0
        self._rereading_at = 0.0
        self._breaker_at = 0.0

    def written(self, output: Output) -> None:
        """Count examples that the broker has acknowledged."""
        for record in output.records:
            kind = record.kind_without_click
            _examples.labels("unknown" if kind is LabelKind.UNKNOWN else "final", 1).inc(record.num_positive)
            _examples.labels(kind.value, 0).inc(len(record) - record.num_positive)
        _examples.labels("late_positive", 1).inc(len(output.late))

    def lost(self, topic: str, partition: int, first: int, count: int) -> None:
        """Tell that records are gone which nobody has joined."""
        _lost.labels(topic).inc(count)
        logger.error(
            "records were removed by retention before they were joined",
            extra={"topic": topic, "partition": partition, "first": first, "count": count},
        )

    def state(self, partitions: Mapping[int, PartitionJoiner], num_held: int) -> None:
        """Set the gauges."""
        total = Ledger()
        for partition, joiner in partitions.items():
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
        _open.set(sum(joiner.num_open for joiner in partitions.values()))
        _bytes.set(sum(joiner.num_bytes for joiner in partitions.values()))
        _held.set(num_held)

    def guard(self, guard: JoinGuard) -> None:
        """Set the gauges of what the guard knows."""
        outage = guard.shared.outage
        _rate_share.set(1.0 if outage is None or not outage.expected else outage.observed / outage.expected)
        _rate_known.set(guard.shared.is_armed)
        holds = [gate.hold for gate in guard.gates.values() if gate.hold is not None]
        _holds.labels("held").set(sum(hold.is_holding for hold in holds))
        _holds.labels("unknown").set(sum(not hold.is_holding for hold in holds))

    def alert(self, alert: Alert) -> None:
        """Tell that clicks have ceased, that they still have, or that they come again."""
        tell = logger.critical if alert.state == "firing" else logger.warning
        tell(f"{alert.name}: {alert.summary}", extra={"alert_id": alert.alert_id, **alert.evidence})

    def memory(self, *, is_full: bool, joiners: Iterable[PartitionJoiner]) -> None:
        """Tell when the memory limit has stopped the reading for longer than a moment."""
        now = time.monotonic()
        if not is_full:
            self._full_since = None
            return
        if self._full_since is None:
            self._full_since = now
            self._full_at = now + TROUBLE_AFTER_S
        if now < self._full_at:
            return
        self._full_at = now + TROUBLE_EVERY_S
        num_open = num_bytes = 0
        for joiner in joiners:
            num_open += joiner.num_open
            num_bytes += joiner.num_bytes
        logger.error(
            "nothing more is read: the open impressions take all the memory they may. Raise GENCO_JOIN_MEMORY_MB, "
            "start more joiners, or shorten GENCO_ATTRIBUTION_WINDOW_MS",
            extra={
                "seconds": round(now - self._full_since),
                "open": num_open,
                "mib": num_bytes >> 20,
                "limit_mib": self._limit_mib,
            },
        )

    def breaker(self, cause: str | None) -> None:
        """Tell that the breaker is open, now and every minute."""
        now = time.monotonic()
        _broken.set(cause is not None)
        if cause is None or now < self._breaker_at:
            return
        self._breaker_at = now + TROUBLE_EVERY_S
        logger.critical(
            "nothing more is read, and nothing is acknowledged: too many events are bad. If a client changed its "
            "schema, mend the client or upgrade the joiner, and start it again: it reads them again. To let them go to "
            "the dead letters, start it with GENCO_DEAD_LETTER_MAX_SHARE=1",
            extra={"cause": cause},
        )

    def rereading(self, rereading: Rereading, num_open: int) -> None:
        """Tell how far the state of the last owner is rebuilt, every two seconds, and when it is complete."""
        now = time.monotonic()
        progress = rereading.progress(now)
        _to_reread.set(progress.num_records - progress.num_read)
        if progress.is_complete:
            logger.info(
                f"recovered in {progress.seconds:.1f} s: {progress.num_records} records of the last window read again, "
                f"{num_open} impressions open",
                extra={"records": progress.num_records, "seconds": round(progress.seconds, 1), "open": num_open},
            )
        elif now >= self._rereading_at:
            self._rereading_at = now + REREADING_EVERY_S
            left = "?" if progress.seconds_left is None else f"{progress.seconds_left:.0f}"
            logger.info(
                f"recovering: {progress.num_read} of {progress.num_records} records of the last window read again "
                f"({100 * progress.num_read // progress.num_records} %), about {left} s left",
                extra={"records": progress.num_records, "read": progress.num_read},
            )
