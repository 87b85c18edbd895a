"""Clicks that cease, through guard and joiners in virtual time: what turns negative, what is held, what comes after."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from streams.attribution import PartitionJoiner, Record
from streams.contracts.codec import encode_batch
from streams.contracts.events import Click
from streams.contracts.examples import LabelKind, decode_examples
from streams.contracts.settings import JoinSettings
from streams.event_clock import JOIN_TOPICS
from streams.impressions import CandidatesShelf, ImpressionDecoder
from streams.join_alerts import alert_of
from streams.join_guard import JoinGuard, Notice
from streams.join_hold import Gate, Hold, read_state, saved_state
from tests.builders import clicked, shown

WINDOW, WAIT = 30_000, 6_000
"""So a bin is 100 ms."""
RATE, CTR, DELAY_MS = 100, 0.15, 1_000
STEP_MS = 400


def join_settings(**changes: Any) -> JoinSettings:
    values = {
        "kafka_bootstrap_servers": "localhost:9092",
        "attribution_window_ms": WINDOW,
        "label_wait_ms": WAIT,
        "join_hold_max_ms": 60_000,
    }
    return JoinSettings(**values | changes)


@dataclass
class Loop:
    """Servers, Kafka and a joiner, in steps of 400 ms."""

    settings: JoinSettings = field(default_factory=join_settings)
    partitions: int = 2
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(1))
    now_ms: int = 1_000_000
    rate: float = RATE
    broken: set[int] = field(default_factory=set)
    """Partitions whose clicks are not delivered."""

    def __post_init__(self) -> None:
        self.log: list[tuple[int, int, Record]] = []
        self.stuck: dict[int, list[Click]] = defaultdict(list)
        self.coming: dict[int, list[tuple[int, Click]]] = defaultdict(list)
        self.would_click: set[str] = set()
        self.labels: dict[str, tuple[LabelKind, int]] = {}
        self.kinds: dict[str, list[LabelKind]] = defaultdict(list)
        self.shown_ms: dict[str, int] = {}
        self.notices: list[Notice] = []
        self.shelf, self.decoder = CandidatesShelf(), ImpressionDecoder()
        self.offset = 0
        self.start({})

    def start(self, saved: dict[int, str]) -> None:
        """Become a new process that owns all partitions."""
        self.guard = JoinGuard(self.settings, range(self.partitions))
        self.guard.restore(saved)
        self.joiners = {
            partition: PartitionJoiner(self.settings, self.guard.feed_of(partition), self.guard.gates[partition])
            for partition in range(self.partitions)
        }

    def restart(self) -> None:
        """Crash, and read everything of the last window again."""
        self.start({partition: self.guard.saved(partition) for partition in self.joiners})
        hold = self.guard.gates[0].hold
        begin_ms = (self.now_ms if hold is None else hold.at_ms) - WINDOW
        for read_at_ms, partition, record in self.log:
            if read_at_ms >= begin_ms:
                self.joiners[partition].add(record, read_at_ms)
                self.pump(read_at_ms)

    def _write(self, partition: int, events: Any) -> None:
        record = Record(self.offset, self.now_ms, events)
        self.offset += 1
        self.log.append((self.now_ms, partition, record))
        self.joiners[partition].add(record, self.now_ms)

    def go_on(self, seconds: float) -> None:
        for _ in range(round(1000 * seconds / STEP_MS)):
            for partition in range(self.partitions):
                self._show(partition)
            for partition, click in self.coming.pop(self.now_ms // STEP_MS, ()):
                if partition in self.broken:
                    self.stuck[partition].append(click)
                else:
                    self._write(partition, [click])
            self.now_ms += STEP_MS
            self.pump(self.now_ms)

    def _show(self, partition: int) -> None:
        count = self.rng.poisson(self.rate * STEP_MS / 1000 / self.partitions)
        events = [shown(f"{partition}-{self.offset}-{number}", self.now_ms) for number in range(count)]
        if not events:
            return
        batch, _ = self.decoder.decode(encode_batch(events))
        for event in events:
            self.shown_ms[event.decision_id] = event.occurred_at_ms
            if self.rng.random() < CTR:
                clicked_ms = self.now_ms + int(self.rng.exponential(DELAY_MS))
                self.would_click.add(event.decision_id)
                self.coming[clicked_ms // STEP_MS].append((partition, clicked(event.decision_id, clicked_ms)))
        self._write(partition, batch)

    def pump(self, read_at_ms: int) -> None:
        read_until = dict.fromkeys(JOIN_TOPICS, read_at_ms)
        clocks = {p: joiner.read_clock(read_until) for p, joiner in self.joiners.items()}
        decided = {p: joiner.watermark_ms for p, joiner in self.joiners.items()}
        self.notices += self.guard.step(clocks, decided, self.now_ms)
        for joiner in self.joiners.values():
            joiner.advance(read_until)
            if (output := joiner.take_output()) is None:
                continue
            values = [record.encode(self.shelf) for record in output.records]
            values += [value for _, value in output.late.encode(self.shelf)]
            for value in values:
                batch = decode_examples(value)
                for id_, kind, label in zip(batch.decision_id, batch.label_kind, batch.label.tolist(), strict=True):
                    self.kinds[id_].append(LabelKind(kind))
                    if label >= self.labels.get(id_, (kind, -1))[1]:
                        self.labels[id_] = LabelKind(kind), label
            joiner.acknowledge(output.number)
            assert joiner.ledger().imbalance == 0

    def deliver(self, partition: int | None = None) -> None:
        """What was stuck comes at once."""
        for number in range(self.partitions) if partition is None else (partition,):
            if self.stuck[number]:
                self._write(number, self.stuck.pop(number))

    @property
    def false_negatives(self) -> set[str]:
        """Impressions that were clicked and left as negatives."""
        return {
            id_
            for id_, (kind, label) in self.labels.items()
            if kind is LabelKind.PROVISIONAL and not label and id_ in self.would_click
        }

    def firing(self) -> list[Notice]:
        return [notice for notice in self.notices if notice.end is None]

    def ended(self) -> list[Notice]:
        return [notice for notice in self.notices if notice.end is not None]


BOTH = {0, 1}


def outage(loop: Loop, seconds: float = 12, partitions: set[int] = BOTH) -> Notice:
    """Learn from healthy traffic, then break the clicks."""
    loop.go_on(12)
    assert not loop.notices
    loop.broken = set(partitions)
    loop.go_on(seconds)
    assert len({notice.alert_id for notice in loop.firing()}) == 1
    return loop.firing()[0]


def test_the_watermark_is_held_in_time_and_nothing_more_turns_negative() -> None:
    loop = Loop()
    stopped_ms = loop.now_ms + 12_000
    notice = outage(loop)
    assert notice.partitions == (0, 1)
    # 51 clicks at 15 a second, and what the watermark is behind.
    assert stopped_ms < notice.began_at_ms < stopped_ms + 6_000
    false, bound = len(loop.false_negatives), notice.outage.false_negatives_at_most
    assert false <= bound
    before = len(loop.labels)
    loop.go_on(10)
    assert len(loop.labels) == before
    assert len(loop.false_negatives) == false
    alert = alert_of(loop.firing()[-1], loop.settings, 3, loop.now_ms)
    assert alert.cause == "join broken"
    assert alert.evidence["false_negatives_at_most"] == bound
    assert "accept-clicks" in alert.actions[0]


def test_late_clicks_arrive_as_positives_and_the_loop_goes_on() -> None:
    loop = Loop()
    outage(loop)
    loop.broken = set()
    loop.deliver()
    loop.go_on(15)
    assert [notice.end for notice in loop.ended()] == ["late clicks have come"]
    assert not loop.guard.has_hold
    loop.go_on(12)
    assert LabelKind.UNKNOWN not in {kind for kind, _ in loop.labels.values()}
    decided = {id_ for id_ in loop.would_click if loop.shown_ms[id_] < loop.now_ms - 20_000}
    assert decided
    assert {loop.labels[id_][1] for id_ in decided} == {1}
    assert not loop.firing()[1:] or loop.firing()[-1].alert_id == loop.firing()[0].alert_id


def test_what_was_shown_while_clicks_were_lost_leaves_as_unknown() -> None:
    loop = Loop()
    notice = outage(loop)
    mended_ms = loop.now_ms
    loop.broken = set()
    loop.go_on(30)
    assert [found.end for found in loop.ended()] == ["clicks come again, those of the outage are lost"]
    assert len(loop.false_negatives) <= notice.outage.false_negatives_at_most + 3  # clicked just after they came again
    unknown = [loop.shown_ms[id_] for id_, (kind, _) in loop.labels.items() if kind is LabelKind.UNKNOWN]
    assert min(unknown) >= notice.held_at_ms - WAIT
    assert mended_ms - 1000 <= max(unknown) <= mended_ms + 2_500
    # Neither label of that time is learned, not even the clicks of it that came.
    assert {loop.labels[id_][1] for id_, (kind, _) in loop.labels.items() if kind is LabelKind.UNKNOWN} == {0, 1}
    loop.go_on(40)
    assert loop.guard.gates[0].hold is None
    assert len(loop.firing()) == 1


def test_one_partition_without_clicks_is_held_alone() -> None:
    loop = Loop(partitions=3, rate=300)
    notice = outage(loop, partitions={1})
    assert notice.partitions == (1,)
    held = {id_ for id_ in loop.shown_ms if id_ not in loop.labels and loop.shown_ms[id_] < loop.now_ms - WAIT - 2_000}
    assert {id_.partition("-")[0] for id_ in held} == {"1"}
    loop.broken = set()
    loop.deliver()
    loop.go_on(15)
    assert not loop.guard.has_hold


def test_a_hold_that_lasts_too_long_lets_go_without_a_lesson_and_ends_when_clicks_return() -> None:
    loop = Loop(settings=join_settings(join_hold_max_ms=5_000))
    notice = outage(loop, 30)
    assert not loop.firing()[-1].is_holding
    assert len(loop.labels) > 20 * RATE
    assert len(loop.false_negatives) <= notice.outage.false_negatives_at_most
    loop.broken = set()
    loop.go_on(30)
    assert len(loop.ended()) == 1
    assert len(loop.false_negatives) <= notice.outage.false_negatives_at_most + 3
    newest = [id_ for id_ in loop.labels if loop.shown_ms[id_] > loop.now_ms - 15_000]
    assert newest
    assert LabelKind.UNKNOWN not in {loop.labels[id_][0] for id_ in newest}


def test_a_hold_under_which_nothing_more_is_read_ends_too() -> None:
    """Memory is full: event time stands still, and only the wall clock goes on."""
    loop = Loop()
    outage(loop)
    clocks = {p: joiner.read_clock({}) for p, joiner in loop.joiners.items()}
    assert all(gate.hold is not None and gate.hold.is_holding for gate in loop.guard.gates.values())
    loop.guard.step(clocks, clocks, loop.now_ms + 60_000)
    assert not any(gate.hold is None or gate.hold.is_holding for gate in loop.guard.gates.values())
    open_before = loop.joiners[0].num_bytes
    loop.go_on(1)
    assert loop.joiners[0].num_bytes < open_before
    assert {kind for kind, _ in loop.labels.values()} >= {LabelKind.UNKNOWN}


def test_an_operator_accepts_that_the_world_has_changed() -> None:
    loop = Loop()
    notice = outage(loop)
    assert loop.guard.accept(notice.began_at_ms - 1) == []  # of another outage
    (ended,) = loop.guard.accept(notice.began_at_ms + 1)
    assert ended.end == "accepted by an operator"
    loop.go_on(20)
    assert not loop.guard.has_hold
    assert LabelKind.UNKNOWN not in {kind for kind, _ in loop.labels.values()}
    assert len(loop.false_negatives) > notice.outage.false_negatives_at_most


@pytest.mark.parametrize("mended", [False, True])
def test_a_restart_neither_fires_nor_forgets(mended: bool) -> None:
    loop = Loop()
    outage(loop)
    false, at_ms = len(loop.false_negatives), loop.guard.gates[0].hold
    loop.restart()
    assert loop.guard.gates[0].hold == at_ms
    loop.go_on(5)
    assert len(loop.false_negatives) == false
    assert len({notice.alert_id for notice in loop.firing()}) == 1
    loop.broken = set()
    if mended:
        loop.deliver()
    loop.go_on(30)
    assert not loop.guard.has_hold
    assert len({notice.alert_id for notice in loop.firing()}) == 1
    if mended:
        assert LabelKind.UNKNOWN not in {kind for kind, _ in loop.labels.values()}
        assert not loop.false_negatives
    else:
        assert len(loop.false_negatives) <= false + 3


def test_a_restart_in_healthy_traffic_raises_nothing_and_knows_the_rate() -> None:
    loop = Loop()
    loop.go_on(12)
    loop.restart()
    assert loop.guard.shared.is_armed
    loop.go_on(20)
    assert loop.notices == []
    assert not loop.false_negatives


def test_two_hours_of_healthy_traffic_raise_nothing() -> None:
    """The guard alone, with the defaults of production; a rush every ten minutes."""
    settings = JoinSettings(kafka_bootstrap_servers="localhost:9092")
    guard = JoinGuard(settings, range(2))
    rng = np.random.default_rng(5)
    for second in range(7_200):
        rate = 400 if second % 600 < 60 else 40
        for partition in range(2):
            feed = guard.feed_of(partition)
            times = second * 1000 + np.sort(rng.integers(0, 1000, rng.poisson(rate / 2)))
            feed.shown(times)
            for shown_ms in times[rng.random(len(times)) < 0.02].tolist():
                feed.clicked(shown_ms, shown_ms + 500)
        clocks = dict.fromkeys(range(2), (second + 1) * 1000)
        assert guard.step(clocks, clocks, second * 1000) == []
    assert guard.shared.is_armed


# -- the gate ----------------------------------------------------------------------------------------------------------

HOLD = Hold("x", True, since_ms=90, at_ms=100, began_at_ms=7)


def test_without_a_hold_everything_passes() -> None:
    assert list(Gate(1000, 50).steps(77)) == [(77, True)]


def test_a_gate_steps_through_a_hold_in_the_same_way_before_and_after_a_restart() -> None:
    gate = Gate(1000, 50)
    gate.hold = HOLD
    assert list(gate.steps(90)) == [(90, True)]
    assert list(gate.steps(500)) == [(100, True)]
    gate.hold = HOLD.unknown_until(2**60)
    assert list(gate.steps(500)) == [(100, True), (500, False)]
    gate.hold = HOLD.unknown_until(300)
    assert list(gate.steps(320)) == [(100, True), (320, False)]
    assert list(gate.steps(500)) == [(100, True), (350, False), (500, True)]
    assert list(gate.steps(90)) == [(90, True)]  # read again
    assert gate.hold is not None
    assert list(gate.steps(1351)) == [(100, True), (350, False), (1351, True)]
    assert gate.hold is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rate": 3, "hold": {"x": 1}}', "offset note of somebody else"])
def test_notes_that_are_none_count_as_nothing(text: str) -> None:
    assert read_state(text) == ({}, None)


def test_a_note_brings_everything_back_and_is_short() -> None:
    guard = JoinGuard(join_settings(), [0])
    guard.own[0].clicks_A[:] = 123456.789
    guard.own[0].shown_A[:] = 98765432.1
    guard.gates[0].hold = HOLD.unknown_until(2**60)
    note = guard.saved(0)
    assert len(note) < 1000
    learned, hold = read_state(note)
    assert hold == guard.gates[0].hold
    assert saved_state(learned, hold) == note
