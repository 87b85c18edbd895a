"""The topic table: what each topic holds, how it is keyed and how long it is kept.

`impressions`, `clicks`, `examples` and `dead_letters` have equal partition counts: partition p of `examples` is joined
from partition p of the other two, and no two partitions ever meet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

IMPRESSIONS: Final = "impressions"
CLICKS: Final = "clicks"
EXAMPLES: Final = "examples"
DEAD_LETTERS: Final = "dead_letters"
CATALOG: Final = "catalog"
UPDATES: Final = "updates"
CONTROL: Final = "control"
ALERTS: Final = "alerts"

JOINED: Final = (IMPRESSIONS, CLICKS, EXAMPLES, DEAD_LETTERS)
"""Topics whose partition counts must be equal."""


@dataclass(frozen=True, slots=True)
class Topic:
    """One row of the table."""

    name: str
    holds: str
    partitioned: bool
    """Has as many partitions as configured; else exactly one."""
    compacted: bool = False
    retention_hours: int | None = 72
    """None: kept for ever."""
    append_time: bool = False
    """Records carry the broker's time, not their producer's: one clock against which those of the events are judged."""


TOPICS: Final = {
    topic.name: topic
    for topic in (
        Topic(IMPRESSIONS, "NDJSON batches of Impression", partitioned=True, append_time=True),
        Topic(CLICKS, "NDJSON batches of Click", partitioned=True, append_time=True),
        Topic(EXAMPLES, "one Arrow IPC record batch of labeled impressions a record", partitioned=True),
        Topic(DEAD_LETTERS, "what could not be read, with reason and origin", partitioned=True, retention_hours=720),
        Topic(CATALOG, "Element, Product by kind/id", partitioned=False, compacted=True, retention_hours=None),
        Topic(UPDATES, "updates: bounds, seeds, steps", partitioned=False, retention_hours=None),
        Topic(CONTROL, "pointers, pins, freezes and their audit", partitioned=False, retention_hours=None),
        Topic(ALERTS, "alerts with cause and evidence", partitioned=False, retention_hours=720),
    )
}


def partition_counts(partitions: int) -> dict[str, int]:
    """Return the partition count of every topic when the joined ones have `partitions`."""
    return {topic.name: partitions if topic.partitioned else 1 for topic in TOPICS.values()}
