"""Which examples each update learned: recorded in the topic `updates` before the update is applied.

An update covers, for each partition of `examples`, the records between two offsets. When updates fall due depends on
timing, what they do does not: repeating the recorded updates over the same topic gives the same weights. A learner that
starts again from a checkpoint therefore first repeats those recorded after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from streams.contracts.examples import ExampleBatch

Offset = Annotated[int, Field(ge=0)]


class Update(BaseModel):
    """One record of the topic `updates`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: Literal[1] = 1
    number: Annotated[int, Field(ge=1)]
    """1 for the first update of the model, then one more each."""
    until: dict[int, Offset]
    """For each partition of `examples`, the offset of the first record that is not in this update."""
    catalog_until: Offset
    """Offset of the first record of `catalog` that was not known."""
    epoch: Annotated[int, Field(ge=0)] = 0
    """Fencing token of the learner that recorded it."""
    num_examples: Annotated[int, Field(ge=0)] | None = None
    """Examples between the bounds; what is learned from them, generator steps included, follows from them alone."""

    @classmethod
    def from_bytes(cls, value: bytes) -> Update:
        """Read a record.

        Raises:
            ValueError: If it is none.
        """
        try:
            return cls.model_validate_json(value)
        except ValidationError as error:
            raise ValueError(f"not a record of the topic updates: {error.errors()[0]['msg']}") from None


def effective(recorded: Iterable[Update], epoch: int = 0) -> list[Update]:
    """Return the updates that count, in the order of the topic.

    A learner that was paused until another took its place may wake up and record updates that its successor has not
    seen; the larger epoch holds, as it does for snapshots.

    Args:
        recorded: In the order of the topic.
        epoch: That of the newest update before them.
    """
    found: list[Update] = []
    for update in recorded:
        if update.epoch < epoch:
            continue
        epoch = update.epoch
        while found and found[-1].number >= update.number:
            found.pop()
        found.append(update)
    return found


@dataclass(frozen=True, slots=True)
class PendingRecord:
    """A record of `examples` that is not learned yet."""

    partition: int
    offset: int
    examples: ExampleBatch


class Backlog:
    """The records of `examples` that wait for an update, in order for each partition."""

    def __init__(self, learned_until: dict[int, int]) -> None:
        self.next_offset = dict(learned_until)
        """For each partition, the offset that must come next."""
        self._records: dict[int, deque[PendingRecord]] = {}
        self.num_examples = 0

    def add(self, record: PendingRecord) -> None:
        """Take the next record of a partition.

        Raises:
            ValueError: If another offset must come first.
        """
        expected = self.next_offset.get(record.partition, record.offset)
        if record.offset != expected:
            raise ValueError(f"examples[{record.partition}]: offset {record.offset} came; expected {expected}")
        self._records.setdefault(record.partition, deque()).append(record)
        self.next_offset[record.partition] = record.offset + 1
        self.num_examples += len(record.examples)

    def skip_to(self, partition: int, offset: int) -> None:
        """Go on at another offset: records before it are not read, or exist no more."""
        self.next_offset[partition] = offset

    def clear(self, learned_until: dict[int, int]) -> None:
        """Forget what waits: it will be read again."""
        self._records.clear()
        self.num_examples = 0
        self.next_offset = dict(learned_until)

    def bounds(self, max_examples: int) -> dict[int, int]:
        """Return where an update of about `max_examples` ends: whole records, the partitions in turn.

        Empty if nothing waits.
        """
        until: dict[int, int] = {}
        queues = {partition: deque(records) for partition, records in sorted(self._records.items()) if records}
        taken = 0
        while queues and taken < max_examples:
            for partition in list(queues):
                record = queues[partition].popleft()
                until[partition] = record.offset + 1
                taken += len(record.examples)
                if not queues[partition]:
                    del queues[partition]
                if taken >= max_examples:
                    break
        return until

    def count(self, until: dict[int, int]) -> int:
        """Return how many examples wait before these offsets."""
        return sum(
            len(record.examples)
            for partition, offset in until.items()
            for record in self._records.get(partition, ())
            if record.offset < offset
        )

    def holds(self, until: Mapping[int, int]) -> bool:
        """Tell whether everything before these offsets is here or learned."""
        return all(self.next_offset.get(partition, 0) >= offset for partition, offset in until.items())

    def take(self, until: dict[int, int]) -> list[PendingRecord]:
        """Remove and return the records before these offsets, by partition and offset."""
        taken: list[PendingRecord] = []
        for partition, offset in sorted(until.items()):
            waiting = self._records.get(partition, deque())
            while waiting and waiting[0].offset < offset:
                taken.append(waiting.popleft())
        self.num_examples -= sum(len(record.examples) for record in taken)
        return taken


def concat(records: Iterable[PendingRecord]) -> ExampleBatch | None:
    """Return the examples of the records one after the other, or None if there are none."""
    batches = [record.examples for record in records if len(record.examples)]
    return ExampleBatch.concat(batches) if batches else None


def in_order(batch: ExampleBatch) -> ExampleBatch:
    """Return the batch in the order of decision id, a negative before its late positive.

    Learning is a sum over the examples, and sums are rounded in the order in which they are made. The archive keeps
    the order of the log only within an hour, so an update has an order of its own.
    """
    keys = [("decision_id", "ascending"), ("label", "ascending")]
    return batch.take(pc.sort_indices(batch.columns.select([name for name, _ in keys]), sort_keys=keys).to_numpy())
