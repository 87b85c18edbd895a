"""`JoinRateDrop`: watches the clicks of a process's partitions, and holds their watermarks when they cease.

Each partition is watched by itself, and all together: one click collector that dies may take one partition's clicks and
no others', while partitions with few clicks tell sooner together. An outage that only all together show holds all of
them, one of a single partition holds that. Several processes watch each its own; none knows of the others.

A hold ends by itself: when clicks certainly come again and at least `LOST_BELOW` of all expected ones have come, or a
label wait has passed since then and they have not. After `join_hold_max_ms` it lets go what it holds, as unknown. What
was learned of the click rate, and the hold itself, travel with the committed offsets, so whoever owns a partition next
goes on from there. Pure: times and watermarks are arguments.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from streams.contracts.settings import JoinSettings
from streams.join_hold import FOR_EVER_MS, Gate, Hold, read_state, saved_state
from streams.join_rate import LOST_BELOW, JoinRate, Outage

REPEAT_MS: Final = 60_000
"""An outage that goes on is told again this often, with its newest numbers."""

End = Literal["late clicks have come", "clicks come again, those of the outage are lost", "accepted by an operator"]


@dataclass(frozen=True, slots=True)
class Notice:
    """What is to be told of an outage."""

    alert_id: str
    partitions: tuple[int, ...]
    outage: Outage
    began_at_ms: int
    """Of the hold, by the wall clock."""
    held_at_ms: int
    """Event time of the earliest watermark held."""
    is_holding: bool
    """The watermarks stand still; else what leaves is unknown."""
    end: End | None = None
    """How it has ended, if it has."""


class PartitionWatch:
    """Feeds a partition's events to its own watch and to the one for all."""

    def __init__(self, own: JoinRate, shared: JoinRate) -> None:
        self._watches = own, shared

    def shown(self, times_ms: NDArray[np.int64]) -> None:
        """Note impressions."""
        for watch in self._watches:
            watch.shown(times_ms)

    def clicked(self, shown_ms: int, clicked_ms: int) -> None:
        """Note a click that met its impression."""
        for watch in self._watches:
            watch.clicked(shown_ms, clicked_ms)


class JoinGuard:
    """Guards the partitions of one assignment.

    Args:
        settings: Those of the joiner.
        partitions: Which ones.
    """

    def __init__(self, settings: JoinSettings, partitions: Collection[int]) -> None:
        self._max_hold_ms = settings.join_hold_max_ms
        self._wait_ms = settings.label_wait_ms
        watch = partial(JoinRate, settings.label_wait_ms, settings.join_drop_ratio, len(partitions) + 1)
        self.shared = watch()
        self.own = {partition: watch() for partition in sorted(partitions)}
        self.gates = {partition: Gate(settings.attribution_window_ms, settings.label_wait_ms) for partition in self.own}
        self._told_at_ms: dict[str, int] = {}

    def restore(self, saved: Mapping[int, str]) -> None:
        """Go on from what the partitions' last owners have saved; call it before the first `step`."""
        for partition, text in saved.items():
            learned, hold = read_state(text)
            self.own[partition].learn_from(learned)
            self.shared.learn_from(learned)
            self.gates[partition].hold = hold
            if hold is not None and not hold.is_over:
                watch = self._watch_of(partition, hold)
                if watch.outage is None:
                    watch.begin_outage(hold.since_ms, hold.at_ms)

    def saved(self, partition: int) -> str:
        """Return what the partition's next owner needs, less than 1,000 bytes."""
        return saved_state(self.own[partition].learned(), self.gates[partition].hold)

    def feed_of(self, partition: int) -> PartitionWatch:
        """Return what is to be told of the partition's events."""
        return PartitionWatch(self.own[partition], self.shared)

    @property
    def has_hold(self) -> bool:
        """Whether any partition has one that is not over."""
        return any(gate.hold is not None and not gate.hold.is_over for gate in self.gates.values())

    def step(
        self, clocks_ms: Mapping[int, int | None], decided_ms: Mapping[int, int | None], now_ms: int
    ) -> list[Notice]:
        """Judge what has been read, begin and end holds.

        Args:
            clocks_ms: Of each partition the time up to which both topics have been read.
            decided_ms: Of each partition the time up to which impressions have been decided.
            now_ms: The wall clock.
        """
        for partition, clock_ms in clocks_ms.items():
            if clock_ms is not None:
                self.own[partition].advance(clock_ms)
        # A partition without a clock has had no events, perhaps never will.
        if known := [clock_ms for clock_ms in clocks_ms.values() if clock_ms is not None]:
            self.shared.advance(min(known))
        notices = self._end(now_ms)
        self._begin(decided_ms, now_ms)
        return [*notices, *self._tell(now_ms)]

    def accept(self, at_ms: int) -> list[Notice]:
        """End all holds that had begun by `at_ms` (wall clock): clicks come as the world wants it, so learn anew."""
        ended = [
            partition
            for partition, gate in self.gates.items()
            if gate.hold is not None and not gate.hold.is_over and gate.hold.began_at_ms <= at_ms
        ]
        return self._let_go(ended, "accepted by an operator")

    # -- beginning and ending --------------------------------------------------------------------------------------

    def _watch_of(self, partition: int, hold: Hold) -> JoinRate:
        return self.shared if hold.is_shared else self.own[partition]

    def _begin(self, decided_ms: Mapping[int, int | None], now_ms: int) -> None:
        for partition, watch in self.own.items():
            if watch.outage is not None and not self._is_held(partition):
                self._hold([partition], watch.outage, decided_ms, now_ms, is_shared=False)
        outage = self.shared.outage
        if outage is None or any(map(self._shares, self.own)):
            return
        free = [partition for partition in self.own if not self._is_held(partition)]
        if free:
            self._hold(free, outage, decided_ms, now_ms, is_shared=True)
        else:
            self.shared.end_outage()

    def _is_held(self, partition: int) -> bool:
        hold = self.gates[partition].hold
        return hold is not None and not hold.is_over

    def _shares(self, partition: int) -> bool:
        hold = self.gates[partition].hold
        return hold is not None and not hold.is_over and hold.is_shared

    def _hold(
        self,
        partitions: Sequence[int],
        outage: Outage,
        decided_ms: Mapping[int, int | None],
        now_ms: int,
        *,
        is_shared: bool,
    ) -> None:
        alert_id = f"JoinRateDrop-{partitions[0]}-{now_ms}"
        for partition in partitions:
            at_ms = decided_ms.get(partition)
            self.gates[partition].hold = Hold(
                alert_id, is_shared, outage.since_ms, outage.since_ms if at_ms is None else at_ms, now_ms
            )

    def _end(self, now_ms: int) -> list[Notice]:
        complete: list[int] = []
        lossy: list[int] = []
        for partition, gate in self.gates.items():
            hold = gate.hold
            if hold is None or hold.is_over:
                continue
            watch = self._watch_of(partition, hold)
            if watch.has_recovered and watch.share_recovered >= LOST_BELOW:
                complete.append(partition)
            elif watch.has_recovered and watch.recovered_bins * watch.bin_ms >= self._wait_ms:
                lossy.append(partition)
            elif hold.is_holding and now_ms - hold.began_at_ms >= self._max_hold_ms:
                gate.hold = hold.unknown_until(FOR_EVER_MS)
                self._told_at_ms.pop(hold.alert_id, None)
        return [
            *self._let_go(complete, "late clicks have come"),
            *self._let_go(lossy, "clicks come again, those of the outage are lost"),
        ]

    def _let_go(self, partitions: list[int], end: End) -> list[Notice]:
        notices = self._notices(partitions, end)
        for partition in partitions:
            gate = self.gates[partition]
            hold = gate.hold
            if hold is None:
                continue
            watch = self._watch_of(partition, hold)
            resumed_ms = watch.resumed_ms
            if end == "clicks come again, those of the outage are lost" and resumed_ms is not None:
                gate.hold = hold.unknown_until(resumed_ms)
            elif hold.is_holding:
                gate.hold = None
            else:  # some of it has left as unknown
                gate.hold = hold.unknown_until(resumed_ms or hold.at_ms)
            forget = end == "accepted by an operator"
            self.own[partition].end_outage(forget=forget)
            if hold.is_shared and not any(map(self._shares, self.own)):
                self.shared.end_outage(forget=forget)
        return notices

    # -- telling ---------------------------------------------------------------------------------------------------

    def _tell(self, now_ms: int) -> list[Notice]:
        due = []
        for partition, gate in self.gates.items():
            hold = gate.hold
            if hold is None or hold.is_over:
                continue
            if now_ms - self._told_at_ms.get(hold.alert_id, -REPEAT_MS) >= REPEAT_MS:
                due.append(partition)
        notices = self._notices(due, None)
        self._told_at_ms |= {notice.alert_id: now_ms for notice in notices}
        return notices

    def _notices(self, partitions: Iterable[int], end: End | None) -> list[Notice]:
        by_alert: dict[str, list[tuple[int, Hold]]] = {}
        for partition in partitions:
            hold = self.gates[partition].hold
            if hold is not None:
                by_alert.setdefault(hold.alert_id, []).append((partition, hold))
        notices = []
        for alert_id, held in by_alert.items():
            partition, hold = held[0]
            outage = self._watch_of(partition, hold).outage
            if outage is None:
                continue
            notices.append(
                Notice(
                    alert_id,
                    tuple(partition for partition, _ in held),
                    outage,
                    min(hold.began_at_ms for _, hold in held),
                    min(hold.at_ms for _, hold in held),
                    any(hold.is_holding for _, hold in held),
                    end,
                )
            )
        return notices
