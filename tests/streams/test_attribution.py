"""The joiner: every rule for itself, and all of them together against a slow model that is obviously right."""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from streams.attribution import CLICK_BUCKETS, IMPRESSION_BUCKETS, Output, PartitionJoiner, Record
from streams.contracts.codec import END_OF_LOG_MS, BadEvent, encode_batch
from streams.contracts.decision_ids import make_decision_id
from streams.contracts.events import Click, Impression
from streams.contracts.examples import LabelKind, example_batch_of
from streams.contracts.settings import JoinSettings
from streams.contracts.topics import CLICKS, IMPRESSIONS
from streams.event_clock import JOIN_TOPICS, EventClock, JoinTopic
from streams.impressions import CandidatesShelf, ImpressionDecoder
from streams.record_decoder import RecordDecoder
from tests.builders import clicked, shown

FINAL, PROVISIONAL, LATE = LabelKind.FINAL, LabelKind.PROVISIONAL, LabelKind.LATE_POSITIVE
KEY = b"k" * 32
WINDOW, WAIT = 10_000, 2_000


@cache
def join_settings(**changes: Any) -> JoinSettings:
    """Return settings, which never change: reading the environment for them takes longer than a whole schedule."""
    values = {
        "kafka_bootstrap_servers": "localhost:9092",
        "attribution_window_ms": WINDOW,
        "label_wait_ms": WAIT,
        "idle_timeout_ms": 0,
    }
    return JoinSettings(**values | changes)


@dataclass(frozen=True)
class Written:
    """One example as it stands in Kafka."""

    decision_id: str
    occurred_at_ms: int
    kind: LabelKind
    label: int
    reward: float
    delay_ms: int | None


WRITTEN_COLUMNS = ["decision_id", "occurred_at_ms", "label_kind", "label", "reward", "delay_ms"]


def written(output: Output) -> list[Written]:
    """Return the examples of an output, from the bytes of its records."""
    shelf = CandidatesShelf()
    values = [record.encode(shelf) for record in output.records] + [value for _, value in output.late.encode(shelf)]
    found = []
    for value in values:
        # Not `decode_examples`: what it reads beside takes a fifth of the time of the thousands of schedules.
        columns = example_batch_of(value).select(WRITTEN_COLUMNS).to_pydict()
        columns["label_kind"] = map(LabelKind, columns["label_kind"])
        found += [Written(*row) for row in zip(*columns.values(), strict=True)]
    return found


class Bench:
    """A joiner and the two topics that feed it; each record is written when it is read."""

    def __init__(self, **changes: Any) -> None:
        self.settings = join_settings(**changes)
        self.joiner = PartitionJoiner(self.settings)
        self.decoder = ImpressionDecoder()
        self.offsets: Counter[str] = Counter()
        self.now_ms = 0
        self.emitted: list[Written] = []
        self.finished: dict[JoinTopic, int] = {}

    def add(
        self,
        topic: JoinTopic,
        events: Iterable[Impression | Click] = (),
        *,
        bad: Iterable[BadEvent] = (),
        mark_ms: int | None = None,
        written_at_ms: int | None = None,
    ) -> int:
        events = list(events)
        newest = max((event.occurred_at_ms for event in events), default=0)
        offset = self.offsets[topic]
        self.offsets[topic] += 1
        batch: Any = events
        if topic == IMPRESSIONS:
            batch, none = self.decoder.decode(encode_batch(events))
            assert none == []
        timestamp_ms = newest if written_at_ms is None else written_at_ms
        self.joiner.add(Record(offset, timestamp_ms, batch, list(bad), mark_ms), self.now_ms)
        return offset

    def show(self, *events: Impression, **options: Any) -> int:
        return self.add(IMPRESSIONS, events, **options)

    def click(self, *events: Click, **options: Any) -> int:
        return self.add(CLICKS, events, **options)

    def mark(self, time_ms: int, topics: Iterable[JoinTopic] = JOIN_TOPICS) -> None:
        for topic in topics:
            self.add(topic, mark_ms=time_ms)

    def pump(self, caught_up: Iterable[JoinTopic] = ()) -> list[tuple[str, LabelKind, int]]:
        """Advance, write, acknowledge; return what was written as (id, kind, label)."""
        self.joiner.advance(dict.fromkeys(caught_up, self.now_ms))
        output = self.joiner.take_output()
        examples = []
        if output is not None:
            examples = written(output)
            self.emitted += examples
            self.joiner.acknowledge(output.number)
        self.finished |= self.joiner.take_finished()
        assert self.joiner.ledger().imbalance == 0
        return [(e.decision_id, e.kind, e.label) for e in examples]

    def is_finished(self, topic: JoinTopic, offset: int) -> bool:
        return self.finished.get(topic, -1) >= offset

    def mark_and_pump(self, time_ms: int) -> list[tuple[str, LabelKind, int]]:
        self.mark(time_ms)
        return self.pump()

    def buckets(self) -> tuple[dict[str, int], dict[str, int]]:
        ledger = self.joiner.ledger()
        assert set(ledger.impressions) <= set(IMPRESSION_BUCKETS)
        assert set(ledger.clicks) <= set(CLICK_BUCKETS)
        return (
            {name: count for name, count in ledger.impressions.items() if count},
            {name: count for name, count in ledger.clicks.items() if count},
        )


# -- labels ------------------------------------------------------------------------------------------------------------


def test_impression_without_click_leaves_as_provisional_negative_after_the_label_wait() -> None:
    bench = Bench()
    bench.show(shown("a", 1000))
    assert bench.mark_and_pump(1000 + WAIT - 1) == []
    assert bench.buckets() == ({"pending": 1}, {})
    assert bench.mark_and_pump(1000 + WAIT) == [("a", PROVISIONAL, 0)]
    assert bench.buckets() == ({"expired": 1}, {})
    assert bench.mark_and_pump(1000 + WINDOW + 1) == []
    assert bench.buckets() == ({"expired": 1}, {})
    assert bench.emitted[0].delay_ms is None


def test_click_within_the_label_wait_makes_a_final_positive() -> None:
    bench = Bench()
    bench.show(shown("a", 1000))
    bench.click(clicked("a", 1500, reward=2.5))
    assert bench.pump() == []  # not before its moment
    assert bench.buckets() == ({"pending": 1}, {"joined": 1})
    assert bench.mark_and_pump(1000 + WAIT) == [("a", FINAL, 1)]
    assert bench.buckets() == ({"joined": 1}, {"joined": 1})
    (example,) = bench.emitted
    assert (example.reward, example.label) == (2.5, 1)
    assert example.delay_ms == 500
    assert bench.mark_and_pump(1000 + WINDOW + 1) == []


def test_click_after_the_label_wait_corrects_the_provisional_negative_at_once() -> None:
    bench = Bench()
    bench.show(shown("a", 1000))
    assert bench.mark_and_pump(1000 + WAIT) == [("a", PROVISIONAL, 0)]
    bench.click(clicked("a", 1000 + WINDOW - 1))
    assert bench.pump() == [("a", LATE, 1)]
    assert bench.buckets() == ({"joined": 1}, {"joined": 1})
    assert bench.emitted[-1].delay_ms == WINDOW - 1
    assert bench.mark_and_pump(1000 + 2 * WINDOW) == []


def test_click_of_the_last_millisecond_of_the_window_counts() -> None:
    bench = Bench()
    bench.show(shown("a", 1000))
    bench.click(clicked("a", 1000 + WINDOW))
    assert bench.buckets()[1] == {"joined": 1}


@pytest.mark.parametrize("id_", ["a", make_decision_id(1, 1000, 1, KEY)])
def test_click_after_the_window_is_late_while_its_impression_is_open(id_: str) -> None:
    bench = Bench()
    bench.show(shown(id_, 1000))
    bench.click(clicked(id_, 1000 + WINDOW + 1))
    assert bench.buckets() == ({"pending": 1}, {"late": 1})
    assert bench.mark_and_pump(END_OF_LOG_MS - 1) == [(id_, PROVISIONAL, 0)]
    assert bench.buckets() == ({"expired": 1}, {"late": 1})


def test_late_click_does_not_keep_a_click_in_time_from_counting() -> None:
    bench = Bench()
    bench.show(shown("a", 1000))
    bench.click(clicked("a", 1000 + WINDOW + 1), clicked("a", 1100))
    assert bench.buckets()[1] == {"late": 1, "joined": 1}


def test_click_whose_impression_has_left_is_late() -> None:
    id_ = make_decision_id(1, 1000, 1, KEY)
    bench = Bench()
    bench.show(shown(id_, 1000))
    bench.mark_and_pump(1000 + WINDOW + 1)
    bench.click(clicked(id_, 1000 + WINDOW - 1))
    assert bench.pump() == []
    assert bench.buckets() == ({"expired": 1}, {"pending": 1})  # for all we know its impression is still to come
    bench.mark_and_pump(1000 + 3 * WINDOW)
    assert bench.buckets()[1] in ({"late": 1}, {"orphan": 1})
    assert len(bench.emitted) == 1


def test_click_before_its_impression_waits_for_it() -> None:
    for id_ in ("a", make_decision_id(1, 1000, 1, KEY)):
        bench = Bench()
        bench.click(clicked(id_, 1500))
        assert bench.pump() == []
        assert bench.buckets() == ({}, {"pending": 1})
        bench.show(shown(id_, 1000))
        assert bench.buckets() == ({"pending": 1}, {"joined": 1})
        assert bench.mark_and_pump(1000 + WAIT) == [(id_, FINAL, 1)]


def test_click_that_waited_for_an_impression_of_long_ago_is_late() -> None:
    bench = Bench()
    bench.click(clicked("a", 1000 + WINDOW + 1))
    bench.show(shown("a", 1000))
    assert bench.buckets() == ({"pending": 1}, {"late": 1})


def test_click_without_impression_is_an_orphan_when_its_window_has_passed() -> None:
    bench = Bench()
    bench.click(clicked("a", 1000))
    bench.mark_and_pump(1000 + WINDOW - 1)
    assert bench.buckets() == ({}, {"pending": 1})
    assert bench.joiner.num_open == 1
    bench.mark_and_pump(1000 + WINDOW + 1)
    assert bench.buckets() == ({}, {"orphan": 1})
    assert bench.joiner.num_open == 0


def test_duplicate_impression_is_dropped() -> None:
    bench = Bench()
    bench.show(shown("a", 1000), shown("a", 1000))
    bench.show(shown("a", 1001))
    assert bench.mark_and_pump(1001 + WAIT) == [("a", PROVISIONAL, 0)]
    bench.show(shown("a", 1000))
    assert bench.pump() == []
    assert bench.buckets() == ({"expired": 1, "duplicate": 3}, {})
    assert bench.emitted[0].occurred_at_ms == 1000


def test_duplicate_click_is_dropped_before_and_after_its_impression() -> None:
    bench = Bench()
    bench.click(clicked("a", 1100, reward=7), clicked("a", 1100))
    assert bench.pump() == []
    bench.show(shown("a", 1000))
    bench.click(clicked("a", 1200))
    assert bench.mark_and_pump(1000 + WAIT) == [("a", FINAL, 1)]
    bench.click(clicked("a", 1300))
    assert bench.pump() == []
    assert bench.buckets() == ({"joined": 1}, {"joined": 1, "duplicate": 3})
    assert (bench.emitted[0].reward, bench.emitted[0].delay_ms) == (7, 100)


def test_click_after_a_late_positive_is_a_duplicate() -> None:
    bench = Bench()
    bench.show(shown("a", 1000))
    bench.mark_and_pump(1000 + WAIT)
    bench.click(clicked("a", 4000))
    assert bench.pump() == [("a", LATE, 1)]
    bench.click(clicked("a", 4000))
    assert bench.pump() == []
    assert bench.buckets() == ({"joined": 1}, {"joined": 1, "duplicate": 1})


def test_label_wait_of_the_whole_window_makes_every_label_final() -> None:
    bench = Bench(label_wait_ms=WINDOW)
    bench.show(shown("a", 1000), shown("b", 1000))
    bench.click(clicked("a", 1000 + WINDOW - 1))
    assert bench.mark_and_pump(1000 + WINDOW - 1) == []
    assert bench.mark_and_pump(1000 + WINDOW) == [("a", FINAL, 1), ("b", FINAL, 0)]


def test_label_wait_of_zero_emits_when_the_watermark_reaches_the_impression() -> None:
    bench = Bench(label_wait_ms=0)
    bench.show(shown("a", 1000))
    assert bench.mark_and_pump(999) == []
    assert bench.mark_and_pump(1000) == [("a", PROVISIONAL, 0)]
    bench.click(clicked("a", 1001))
    assert bench.pump() == [("a", LATE, 1)]


def test_positives_and_negatives_of_a_moment_leave_together_in_order_of_time() -> None:
    bench = Bench()
    bench.show(shown("neg-1", 1000), shown("pos-2", 1400), shown("neg-3", 1600), shown("pos-4", 2700))
    bench.show(shown("pos-0", 900))
    bench.click(clicked("pos-2", 1500), clicked("pos-0", 1000), clicked("pos-4", 2800))
    assert bench.pump() == []  # three clicks are known, none of their impressions leaves before its neighbors
    assert bench.mark_and_pump(1600 + WAIT) == [
        ("pos-0", FINAL, 1),
        ("neg-1", PROVISIONAL, 0),
        ("pos-2", FINAL, 1),
        ("neg-3", PROVISIONAL, 0),
    ]
    assert bench.mark_and_pump(2700 + WAIT) == [("pos-4", FINAL, 1)]


def test_impression_of_the_past_leaves_at_once_and_is_not_lost() -> None:
    bench = Bench()
    bench.mark_and_pump(100_000)
    bench.show(shown("a", 1000))
    assert bench.pump() == [("a", PROVISIONAL, 0)]
    assert bench.buckets() == ({"expired": 1}, {})


def test_impression_of_the_past_waits_for_its_click_as_long_as_one_in_time() -> None:
    bench = Bench()
    bench.mark_and_pump(100_000)
    bench.show(shown("a", 1000))
    assert bench.pump() == [("a", PROVISIONAL, 0)]
    bench.mark_and_pump(100_000 + WINDOW)
    assert not bench.is_finished(IMPRESSIONS, 1)
    bench.click(clicked("a", 1500))
    assert bench.pump() == [("a", LATE, 1)]
    assert bench.buckets() == ({"joined": 1}, {"joined": 1})
    bench.mark_and_pump(100_000 + WINDOW + 1)
    assert bench.is_finished(IMPRESSIONS, 1)
    assert bench.joiner.num_open == 0


def test_click_of_the_past_waits_for_its_impression_as_long_as_one_in_time() -> None:
    bench = Bench()
    bench.mark_and_pump(100_000)
    bench.click(clicked("a", 1500))
    bench.mark_and_pump(100_000 + WINDOW)
    bench.show(shown("a", 1000))
    assert bench.pump() == [("a", FINAL, 1)]
    assert bench.buckets() == ({"joined": 1}, {"joined": 1})


def test_click_of_the_past_is_no_more_in_time_for_having_waited() -> None:
    bench = Bench()
    bench.mark_and_pump(100_000)
    bench.show(shown("a", 1000))
    bench.click(clicked("a", 1000 + WINDOW + 1))
    assert bench.buckets()[1] == {"late": 1}


# -- the clock ---------------------------------------------------------------------------------------------------------


def test_watermark_is_the_older_of_the_two_topics_and_never_goes_back() -> None:
    bench = Bench()
    bench.show(shown("a", 5000))
    bench.pump()
    assert bench.joiner.watermark_ms is None  # nothing is known of the clicks
    bench.click(clicked("b", 3000))
    bench.pump()
    assert bench.joiner.watermark_ms == 3000
    bench.click(clicked("c", 9000))
    bench.pump()
    assert bench.joiner.watermark_ms == 5000
    bench.show(shown("d", 100))
    bench.pump()
    assert bench.joiner.watermark_ms == 5000


@pytest.mark.parametrize("caught_up", [(), (CLICKS,), JOIN_TOPICS])
def test_without_idle_timeout_the_wall_clock_moves_nothing(caught_up: tuple[JoinTopic, ...]) -> None:
    bench = Bench(idle_timeout_ms=0)
    bench.show(shown("a", 1000))
    bench.now_ms = 10**9
    assert bench.pump(caught_up) == []
    assert bench.joiner.watermark_ms is None
    bench.click(clicked("b", 1000))
    bench.now_ms = 2 * 10**9
    assert bench.pump(caught_up) == []
    assert bench.joiner.watermark_ms == 1000


def test_idle_topics_follow_the_wall_clock() -> None:
    bench = Bench(idle_timeout_ms=500)
    bench.now_ms = 70_000
    bench.show(shown("a", 1000))
    assert bench.pump(JOIN_TOPICS) == []
    assert bench.joiner.watermark_ms == 1000 - 500
    bench.now_ms += WAIT + 499
    assert bench.pump(JOIN_TOPICS) == []
    assert bench.joiner.watermark_ms == 1000 + WAIT - 1
    bench.now_ms += 1
    assert bench.pump(JOIN_TOPICS) == [("a", PROVISIONAL, 0)]


def test_topic_that_has_more_to_read_holds_the_watermark() -> None:
    bench = Bench(idle_timeout_ms=500)
    bench.show(shown("a", 1000))
    bench.now_ms = 10**6
    for caught_up in ((), (IMPRESSIONS,)):
        assert bench.pump(caught_up) == []
        assert bench.joiner.watermark_ms is None
    bench.click(clicked("b", 1200))
    bench.now_ms = 2 * 10**6
    assert bench.pump((IMPRESSIONS,)) == []
    assert bench.joiner.watermark_ms == 1000


def test_topic_read_to_its_end_trails_a_busy_one_by_the_idle_timeout() -> None:
    bench = Bench(idle_timeout_ms=500)
    bench.show(shown("a", 1000))
    bench.show(shown("b", 1000 + WAIT + 500))
    bench.now_ms = 10**6  # the busy topic has more to read: the wall clock does not count
    assert bench.pump((CLICKS,)) == [("a", PROVISIONAL, 0)]
    assert bench.joiner.watermark_ms == 1000 + WAIT


def test_click_within_the_idle_timeout_on_its_way_still_counts() -> None:
    bench = Bench(idle_timeout_ms=500)
    bench.show(shown("a", 1000))
    bench.now_ms = WINDOW + 499  # the window's end, and 499 ms on its way
    bench.pump(JOIN_TOPICS)
    bench.click(clicked("a", 1000 + WINDOW))
    assert bench.pump(JOIN_TOPICS) == [("a", LATE, 1)]


def test_clock_knows_nothing_before_the_first_event() -> None:
    clock = EventClock(500)
    everything = dict.fromkeys(JOIN_TOPICS, 10**9)
    assert clock.advance(everything) is None
    clock.observe(IMPRESSIONS, 5000, 10**9)
    assert clock.advance(everything) == 4500
    clock.reset()
    assert clock.advance(everything) is None
    assert clock.watermark_ms is None


def test_silent_broker_stops_the_watermark_with_its_last_answer() -> None:
    clock = EventClock(500)
    clock.observe(IMPRESSIONS, 5000, 100)
    assert clock.advance({IMPRESSIONS: 1100, CLICKS: 700}) == 5000 + 600 - 500
    assert clock.advance({IMPRESSIONS: 9999, CLICKS: 700}) == 5000 + 600 - 500
    assert clock.advance({IMPRESSIONS: 9999, CLICKS: 1100}) == 5000 + 1000 - 500


def test_answer_from_before_the_newest_event_vouches_for_no_later_time() -> None:
    clock = EventClock(500)
    clock.observe(CLICKS, 1000, 300)
    clock.observe(IMPRESSIONS, 5000, 4000)
    # What was clicked in the three seconds since is in Kafka, and nobody has read it.
    assert clock.advance({CLICKS: 1000}) == 5000 - 3000 - 500
    assert clock.advance({IMPRESSIONS: 4100, CLICKS: 3900}) == 5000 - 100 - 500
    assert clock.advance({IMPRESSIONS: 4100, CLICKS: 1000}) == 5000 - 100 - 500  # never back


def test_event_ahead_of_its_record_moves_the_clock_no_further_than_the_record() -> None:
    bench = Bench()
    bench.click(clicked("b", 90_000))
    bench.show(shown("a", 40_000), written_at_ms=5_000)  # within what a clock may be ahead
    bench.pump()
    assert bench.joiner.watermark_ms == 5_000


@pytest.mark.parametrize(
    ("seen", "leads"),
    [({}, (0, 0)), ({IMPRESSIONS: 500}, (500, 0)), ({IMPRESSIONS: 500, CLICKS: 800}, (0, 300))],
)
def test_lead_tells_which_topic_is_ahead(seen: dict[JoinTopic, int], leads: tuple[int, int]) -> None:
    clock = EventClock(0)
    for topic, time_ms in seen.items():
        clock.observe(topic, time_ms, 0)
    assert (clock.lead_ms(IMPRESSIONS), clock.lead_ms(CLICKS)) == leads


# -- marks -------------------------------------------------------------------------------------------------------------


def test_mark_moves_the_clock_of_its_own_topic() -> None:
    bench = Bench()
    bench.show(shown("a", 1000))
    bench.mark(9_000, [IMPRESSIONS])
    assert bench.pump() == []
    bench.mark(1000 + WAIT, [CLICKS])
    assert bench.pump() == [("a", PROVISIONAL, 0)]
    bench.mark(5, [CLICKS])
    bench.pump()
    assert bench.joiner.watermark_ms == 1000 + WAIT
    assert bench.buckets() == ({"expired": 1}, {})


def test_end_of_log_decides_everything_and_hands_back_every_record() -> None:
    bench = Bench()
    bench.show(shown("a", 1000), shown("b", 1000))
    bench.click(clicked("a", 1001), clicked("nobody", 1001))
    bench.mark(END_OF_LOG_MS, [CLICKS])
    assert bench.pump() == []
    assert bench.finished == {}
    bench.mark(END_OF_LOG_MS, [IMPRESSIONS])
    assert bench.pump() == [("a", FINAL, 1), ("b", PROVISIONAL, 0)]
    assert bench.finished == {CLICKS: 1, IMPRESSIONS: 1}
    assert bench.buckets() == ({"joined": 1, "expired": 1}, {"joined": 1, "orphan": 1})
    assert bench.joiner.num_open == 0


def test_second_log_may_begin_at_an_earlier_time() -> None:
    bench = Bench()
    bench.show(shown("a", 10**6))
    bench.mark_and_pump(END_OF_LOG_MS)
    assert bench.joiner.watermark_ms is None
    bench.show(shown("b", 1000))
    bench.click(clicked("b", 5000))
    assert bench.pump() == []
    assert bench.joiner.watermark_ms == 1000  # of the second log
    assert bench.mark_and_pump(END_OF_LOG_MS) == [("b", FINAL, 1)]
    assert bench.buckets() == ({"expired": 1, "joined": 1}, {"joined": 1})


@pytest.mark.parametrize("first", JOIN_TOPICS)
def test_topic_that_is_a_log_ahead_waits_for_the_other(first: JoinTopic) -> None:
    bench = Bench()
    second = CLICKS if first == IMPRESSIONS else IMPRESSIONS
    logs: dict[JoinTopic, list[list[Any]]] = {
        IMPRESSIONS: [[shown("a", 10**6), shown("x", 10**6)], [shown("b", 1000)], [shown("c", 500)]],
        CLICKS: [[clicked("a", 10**6 + 1)], [clicked("b", 1001)], [clicked("c", 501)]],
    }
    for events in logs[first]:
        bench.add(first, events)
        bench.mark(END_OF_LOG_MS, [first])
    bench.add(first, bad=[BadEvent(0, "event: bad", b"x")])
    bench.pump()
    assert bench.finished == {}
    ledger = bench.joiner.ledger()
    consumed = ledger.consumed_impressions if first == IMPRESSIONS else ledger.consumed_clicks
    assert consumed == (5 if first == IMPRESSIONS else 4)
    for events in logs[second]:
        bench.add(second, events)
        bench.mark(END_OF_LOG_MS, [second])
        bench.pump()
    labels = {e.decision_id: (e.kind, e.label) for e in bench.emitted}
    assert labels == {"a": (FINAL, 1), "x": (PROVISIONAL, 0), "b": (FINAL, 1), "c": (FINAL, 1)}
    dead = {"dead_letter": 1}
    impressions, clicks = bench.buckets()
    assert impressions == {"joined": 3, "expired": 1} | (dead if first == IMPRESSIONS else {})
    assert clicks == {"joined": 3} | (dead if first == CLICKS else {})
    assert bench.finished == {topic: 6 if topic == first else 5 for topic in JOIN_TOPICS}


# -- dead letters ------------------------------------------------------------------------------------------------------


def test_bad_lines_go_to_the_dead_letters_with_their_place() -> None:
    bench = Bench()
    lines = [BadEvent(0, "event: truncated", b"{"), BadEvent(3, "epoch: missing", b"{}")]
    offset = bench.show(shown("a", 1000), bad=lines)
    bench.joiner.advance({})
    output = bench.joiner.take_output()
    assert output is not None
    assert [(d.topic, d.offset, d.event) for d in output.bad] == [(IMPRESSIONS, offset, bad) for bad in lines]
    assert output.records == []
    assert len(output.late) == 0
    assert bench.buckets() == ({"pending": 1, "dead_letter": 2}, {})
    assert bench.joiner.take_output() is None


def test_record_of_bad_lines_alone_is_handed_back_when_its_dead_letters_are_acknowledged() -> None:
    bench = Bench()
    bench.click(bad=[BadEvent(0, "event: bad", b"x")])
    bench.joiner.advance({})
    output = bench.joiner.take_output()
    assert output is not None
    assert bench.joiner.take_finished() == {}
    bench.joiner.acknowledge(output.number)
    assert bench.joiner.take_finished() == {CLICKS: 0}


# -- acknowledgement ---------------------------------------------------------------------------------------------------


def test_record_is_handed_back_only_when_all_its_decisions_have_left_the_window() -> None:
    bench = Bench()
    bench.show(shown("a", 1000), shown("b", 4000))
    bench.click(clicked("c", 2000))
    bench.mark_and_pump(2000 + WINDOW - 1)
    assert bench.finished == {}
    bench.mark_and_pump(4000 + WINDOW - 1)
    assert bench.finished == {CLICKS: 2}  # the record and two marks behind it
    bench.mark_and_pump(4000 + WINDOW + 1)
    assert bench.is_finished(IMPRESSIONS, 0)


def test_records_are_handed_back_in_the_order_of_their_offsets() -> None:
    bench = Bench()
    bench.show(shown("new", 9000))
    bench.show(shown("old", 1000))
    bench.show()  # an empty record needs nothing, but those before it do
    bench.mark_and_pump(1000 + WINDOW + 1)
    assert IMPRESSIONS not in bench.finished
    bench.mark_and_pump(9000 + WINDOW + 1)
    assert bench.finished[IMPRESSIONS] == 4


def test_record_is_not_handed_back_before_the_output_made_from_it_is_acknowledged() -> None:
    bench = Bench()
    bench.show(shown("a", 1000))
    bench.mark(1000 + WAIT)
    bench.joiner.advance({})
    first = bench.joiner.take_output()
    bench.click(clicked("a", 5000))
    bench.mark(1000 + WINDOW + 1)
    bench.joiner.advance({})
    second = bench.joiner.take_output()
    assert first is not None
    assert second is not None
    assert second.number == first.number + 1
    assert IMPRESSIONS not in bench.joiner.take_finished()
    bench.joiner.acknowledge(first.number)
    assert IMPRESSIONS not in bench.joiner.take_finished()  # its late positive is not at the broker
    bench.joiner.acknowledge(second.number)
    assert bench.joiner.take_finished()[IMPRESSIONS] >= 0
    assert bench.joiner.take_finished() == {}


def test_record_is_not_handed_back_while_its_examples_are_not_even_taken() -> None:
    bench = Bench()
    bench.show(shown("a", 1000))
    bench.mark(1000 + WINDOW + 1)
    bench.joiner.advance({})
    assert IMPRESSIONS not in bench.joiner.take_finished()
    output = bench.joiner.take_output()
    assert output is not None
    assert IMPRESSIONS not in bench.joiner.take_finished()
    bench.joiner.acknowledge(output.number)
    assert IMPRESSIONS in bench.joiner.take_finished()


def test_older_acknowledgement_takes_nothing_back() -> None:
    bench = Bench()
    for number in (1, 2):
        time_ms = number * 3 * WINDOW
        bench.show(shown(str(number), time_ms))
        bench.mark(time_ms + WINDOW + 1)
        bench.joiner.advance({})
        assert bench.joiner.take_output() is not None
    bench.joiner.acknowledge(2)
    bench.joiner.acknowledge(1)
    assert bench.joiner.take_finished()[IMPRESSIONS] == 3


# -- a slow model that is obviously right ------------------------------------------------------------------------------

JITTERS = (1, 2, 1_000)
"""Events stand in their topics less than so many milliseconds out of order: with 1 in order, ties apart."""
SKEW = 300
"""A browser's clock may be that far behind the server's."""
ACTIONS = ("read", "read", "read", "advance", "take", "acknowledge", "finish", "commit")


def strongest_labels(log: list[Impression | Click]) -> dict[str, int]:
    """What must come out, from the words of the design: for each decision that was shown, was it clicked in time?"""
    labels: dict[str, int] = {}
    for impression in log:
        if isinstance(impression, Impression):
            labels[impression.decision_id] = int(
                any(
                    isinstance(click, Click)
                    and click.decision_id == impression.decision_id
                    and click.occurred_at_ms <= impression.occurred_at_ms + WINDOW
                    for click in log
                )
            )
    return labels


@dataclass
class Topics:
    """What stands in the two topics of one partition."""

    records: dict[JoinTopic, list[Record]] = field(default_factory=lambda: {topic: [] for topic in JOIN_TOPICS})
    good: list[Impression | Click] = field(default_factory=list)
    num_events: Counter[str] = field(default_factory=Counter)
    bad: set[tuple[str, int, bytes]] = field(default_factory=set)
    events: dict[tuple[JoinTopic, int], list[Any]] = field(default_factory=dict)
    """Of each record, those that are too far ahead included."""
    decoder: RecordDecoder = field(default_factory=lambda: RecordDecoder(join_settings()))


def random_events(rng: random.Random, name: str, jitter: int) -> list[Impression | Click]:
    """Decisions with their clicks: in time, too late, none, several, without an impression."""
    events: list[Impression | Click] = []
    for number in range(rng.randint(1, 12)):
        time_ms = 50_000 + rng.randrange(3 * WINDOW)
        genuine = make_decision_id(number, time_ms, rng.getrandbits(32), KEY)
        decision_id = genuine if rng.random() < 0.5 else f"{name}-{number}"
        if rng.random() < 0.9:
            events.append(shown(decision_id, time_ms))
        for _ in range(rng.choice([0, 0, 1, 1, 2])):
            latest = WINDOW + 1 - jitter  # later, and the disorder of the topic may let the watermark pass first
            delay = rng.choice([rng.randint(-SKEW, latest), latest, WINDOW + 1, WINDOW + 1 + rng.randrange(WINDOW)])
            events.append(clicked(decision_id, time_ms + delay, reward=rng.randint(0, 5)))
    return events


def random_topics(rng: random.Random, num_logs: int) -> Topics:
    topics = Topics()
    for number in range(num_logs):
        jitter = rng.choice(JITTERS)
        events = random_events(rng, f"log{number}", jitter)
        topics.good += events
        for topic in JOIN_TOPICS:
            kind = Impression if topic == IMPRESSIONS else Click
            own = [event for event in events if isinstance(event, kind)]
            order = sorted(own, key=lambda event: event.occurred_at_ms + rng.randrange(jitter))
            _write(rng, topics, topic, list(order))
    return topics


def _write(rng: random.Random, topics: Topics, topic: JoinTopic, events: list[Any]) -> None:
    for event in [event for event in events if rng.random() < 0.25]:
        # The same event once more, anywhere after the first: a producer that tried again, or much later.
        events.insert(rng.randrange(events.index(event) + 1, len(events) + 1), event)
    records = topics.records[topic]

    def append(events: list[Any], bad: list[bytes], mark_ms: int | None) -> None:
        offset = records[-1].offset + rng.randint(1, 3) if records else rng.randrange(5)
        newest = max((event.occurred_at_ms for event in events), default=0)
        if rng.random() < 0.1 and mark_ms is None:
            ahead = (shown if topic == IMPRESSIONS else clicked)(f"ahead-{offset}", newest + 60_001)
            events = [*events, ahead]
            topics.bad.add((topic, offset, f'"ahead-{offset}"'.encode()))
        for line in bad:
            topics.bad.add((topic, offset, line))
        topics.num_events[topic] += len(events) + len(bad)
        value = encode_batch(events) + b"\n".join(bad)
        topics.events[topic, offset] = events
        records.append(topics.decoder.decode(topic, offset, newest, value, mark_ms))

    while events:
        size = rng.randint(1, 4)
        bad = [b"bad-%d" % n for n in range(rng.choice([0, 0, 0, 1, 2]))]
        append(events[:size], bad, None)
        del events[:size]
        if rng.random() < 0.2:
            append([], [], min((event.occurred_at_ms for event in events), default=60_000))
    append([], [], END_OF_LOG_MS)


class Schedule:
    """Reads the topics in a random order of calls, crashes included, and checks what must hold at every step."""

    def __init__(self, rng: random.Random, topics: Topics, wait_ms: int) -> None:
        self.rng = rng
        self.topics = topics
        self.settings = join_settings(label_wait_ms=wait_ms)
        self.joiner = PartitionJoiner(self.settings)
        self.position: Counter[JoinTopic] = Counter()
        self.finished: Counter[JoinTopic] = Counter()
        self.committed: Counter[JoinTopic] = Counter()
        self.in_flight: list[Output] = []
        self.written: list[Written] = []
        self.dead: list[tuple[str, int, bytes]] = []
        self.num_crashes = 0

    def step(self, action: str) -> None:
        match action:
            case "read":
                topic = self.rng.choice(JOIN_TOPICS)
                for _ in range(self.rng.randint(1, 3)):
                    self.read(topic)
            case "advance":
                # Without an idle timeout neither of the two may matter.
                caught_up = [topic for topic in JOIN_TOPICS if self.rng.random() < 0.5]
                self.joiner.advance({topic: self.rng.randrange(10**6) for topic in caught_up})
            case "take":
                output = self.joiner.take_output()
                if output is not None:
                    self.in_flight.append(output)
            case "acknowledge":
                for _ in range(self.rng.randint(0, len(self.in_flight))):
                    output = self.in_flight.pop(0)
                    self.write(output)
                    self.joiner.acknowledge(output.number)
            case "finish":
                self.finish()
            case "commit":
                # Both topics in one request; what is finished later is read again after a crash.
                self.committed = self.finished.copy()
            case "crash":
                self.crash()

    def read(self, topic: JoinTopic) -> None:
        if self.position[topic] < len(self.topics.records[topic]):
            self.joiner.add(self.topics.records[topic][self.position[topic]], self.rng.randrange(10**6))
            self.position[topic] += 1

    def write(self, output: Output) -> None:
        assert output.records or output.late or output.bad
        self.written += written(output)
        for letter in output.bad:
            for topic, offset, mark in self.topics.bad:
                if (topic, offset) == (letter.topic, letter.offset) and mark in letter.event.line:
                    self.dead.append((topic, offset, mark))

    def finish(self) -> None:
        for topic, offset in self.joiner.take_finished().items():
            records = self.topics.records[topic]
            assert offset in [record.offset for record in records[self.finished[topic] :]], "not in order"
            while self.finished[topic] < len(records) and records[self.finished[topic]].offset <= offset:
                self.check_finished(records[self.finished[topic]])
                self.finished[topic] += 1

    def check_finished(self, record: Record) -> None:
        written = {example.decision_id for example in self.written}
        for event in self.topics.events[record.topic, record.offset]:
            if event.occurred_at_ms > record.timestamp_ms + 60_000:
                continue
            if isinstance(event, Impression):
                assert event.decision_id in written, "finished before its example is at the broker"
            assert self.can_have_passed(event.occurred_at_ms + WINDOW), "finished inside its window"
        dead = set(self.dead)
        for topic, offset, mark in self.topics.bad:
            if (topic, offset) == (record.topic, record.offset):
                assert (topic, offset, mark) in dead, "finished before its dead letter is at the broker"

    def can_have_passed(self, time_ms: int) -> bool:
        """Whether something in each topic, as far as it was ever read, is that new."""
        return all(
            any(
                (record.mark_ms or 0) >= time_ms
                or any(e.occurred_at_ms >= time_ms for e in self.topics.events[topic, record.offset])
                for record in self.topics.records[topic][: self.position[topic]]
            )
            for topic in JOIN_TOPICS
        )

    def crash(self) -> None:
        """Another joiner goes on from the committed offsets. What was in flight is at the broker, or it is not."""
        for output in self.in_flight:
            if self.rng.random() < 0.5:
                self.write(output)
        self.in_flight.clear()
        self.joiner = PartitionJoiner(self.settings)
        self.finished = self.committed.copy()
        self.position = self.committed.copy()
        self.num_crashes += 1

    def drain(self) -> None:
        for topic in self.rng.sample(JOIN_TOPICS, 2):
            while self.position[topic] < len(self.topics.records[topic]):
                self.read(topic)
        for action in ("advance", "take"):
            self.step(action)
        for output in self.in_flight:
            self.write(output)
            self.joiner.acknowledge(output.number)
        self.in_flight.clear()
        self.finish()

    def labels(self) -> dict[str, int]:
        labels: dict[str, int] = {}
        for example in self.written:
            labels[example.decision_id] = max(labels.get(example.decision_id, 0), example.label)
        return labels


def check_outcome(schedule: Schedule) -> None:
    """What must hold after the end of the log, crashes or not."""
    topics = schedule.topics
    assert schedule.labels() == strongest_labels(topics.good)
    assert set(schedule.dead) == topics.bad
    assert schedule.finished == {topic: len(topics.records[topic]) for topic in JOIN_TOPICS}
    assert schedule.joiner.num_open == 0
    ledger = schedule.joiner.ledger()
    assert ledger.imbalance == 0
    assert ledger.impressions["pending"] == ledger.clicks["pending"] == 0
    assert min((*ledger.impressions.values(), *ledger.clicks.values()), default=0) >= 0
    for example in schedule.written:
        assert (example.kind is LATE) <= (example.label == 1)
        assert (example.kind is PROVISIONAL) <= (example.label == 0)
        assert (example.delay_ms is None) == (example.label == 0)
        assert (example.delay_ms or 0) <= WINDOW


def check_without_crash(seed: int) -> None:
    rng = random.Random(seed)
    topics = random_topics(rng, num_logs=rng.randint(1, 3))
    schedule = Schedule(rng, topics, wait_ms=rng.choice([0, 1, WAIT, WINDOW - 1, WINDOW]))
    for _ in range(rng.randint(0, 80)):
        schedule.step(rng.choice(ACTIONS))
    schedule.drain()
    check_outcome(schedule)
    ledger = schedule.joiner.ledger()
    # Counted here, not taken from the ledger: every event that stands in the topics is in one bucket.
    assert ledger.impressions.total() == ledger.consumed_impressions == topics.num_events[IMPRESSIONS]
    assert ledger.clicks.total() == ledger.consumed_clicks == topics.num_events[CLICKS]
    assert ledger.impressions["dead_letter"] == sum(topic == IMPRESSIONS for topic, _, _ in topics.bad)
    assert ledger.clicks["dead_letter"] == sum(topic == CLICKS for topic, _, _ in topics.bad)
    assert ledger.impressions["joined"] >= sum(strongest_labels(topics.good).values())
    num_first = sum(example.kind is not LATE for example in schedule.written)
    assert num_first == ledger.impressions["joined"] + ledger.impressions["expired"]


def check_with_crashes(seed: int) -> int:
    rng = random.Random(seed)
    topics = random_topics(rng, num_logs=rng.randint(1, 3))
    schedule = Schedule(rng, topics, wait_ms=rng.choice([0, 1, WAIT, WINDOW - 1, WINDOW]))
    for _ in range(rng.randint(1, 5)):
        for _ in range(rng.randint(0, 50)):
            schedule.step(rng.choice(ACTIONS))
        schedule.step("crash")
    schedule.drain()
    check_outcome(schedule)
    return schedule.num_crashes


seeds = st.integers(0, 2**63)


@hypothesis_settings(max_examples=500, deadline=None)
@given(seeds)
def test_any_interleaving_gives_the_labels_of_the_model(seed: int) -> None:
    check_without_crash(seed)


@hypothesis_settings(max_examples=500, deadline=None)
@given(seeds)
def test_any_crash_leaves_the_labels_of_the_model(seed: int) -> None:
    check_with_crashes(seed)


@pytest.mark.long
def test_thousands_of_schedules_give_the_labels_of_the_model() -> None:
    num_crashes = 0
    for seed in range(5_000):
        check_without_crash(seed)
        num_crashes += check_with_crashes(seed)
    assert num_crashes > 5_000


# -- corners --------------------------------------------------------------------------------------------------------


def test_click_of_the_last_millisecond_counts_in_the_second_record_of_that_millisecond() -> None:
    bench = Bench()
    bench.show(shown("a", 1000), shown("b", 1000 + WINDOW))
    bench.click(clicked("other", 1000 + WINDOW))
    bench.pump()
    bench.click(clicked("a", 1000 + WINDOW))  # in order, and `> window` is what late means
    assert bench.pump() == [("a", LATE, 1)]


@pytest.mark.parametrize("first", JOIN_TOPICS)
def test_crash_between_the_two_ends_of_a_log_does_not_join_the_next_log_wrongly(first: JoinTopic) -> None:
    second = CLICKS if first == IMPRESSIONS else IMPRESSIONS
    before = Bench()
    before.mark(10**6)  # nothing for long in this partition, as in a log with few decisions
    before.mark(END_OF_LOG_MS, [first])
    before.pump()
    after = Bench()  # reads again what was not handed back
    if not before.is_finished(first, 1):
        after.mark(END_OF_LOG_MS, [first])
    after.mark(END_OF_LOG_MS, [second])
    after.show(shown("a", 1000))
    after.click(clicked("a", 1001))
    after.mark(1000 + 3 * WINDOW)
    after.pump()
    after.mark_and_pump(END_OF_LOG_MS)
    assert [(e.decision_id, e.label) for e in after.emitted] == [("a", 1)]


@pytest.mark.parametrize("click_is_read_first", [True, False])
def test_click_a_little_before_its_impression_survives_a_crash_before_the_label(click_is_read_first: bool) -> None:
    before = Bench(label_wait_ms=WINDOW)
    if click_is_read_first:
        before.click(clicked("a", 1000))
        before.show(shown("a", 1500))  # the clocks of browser and server differ
    else:
        before.show(shown("a", 1500))
        before.click(clicked("a", 1000))
    before.mark_and_pump(1000 + WINDOW + 100)
    assert before.emitted == []
    after = Bench(label_wait_ms=WINDOW)
    if not before.is_finished(CLICKS, 0):
        after.click(clicked("a", 1000))
    after.show(shown("a", 1500))
    after.mark_and_pump(END_OF_LOG_MS)
    assert [e.label for e in after.emitted] == [1]


def test_each_waiting_click_of_a_decision_waits_its_own_window() -> None:
    bench = Bench()
    bench.click(clicked("a", 1000), clicked("a", 5000))
    bench.mark_and_pump(1000 + WINDOW + 1)
    assert bench.buckets() == ({}, {"orphan": 1, "pending": 1})
    bench.show(shown("a", 4900))
    assert bench.pump() == [("a", FINAL, 1)]
    assert bench.buckets() == ({"joined": 1}, {"orphan": 1, "joined": 1})


def test_order_of_reading_does_not_change_the_label_of_a_card_shown_long_after_its_decision() -> None:
    id_ = make_decision_id(1, 1000, 1, KEY)
    impression, click = shown(id_, 1000 + WINDOW // 2), clicked(id_, 1000 + WINDOW + 1)
    labels = []
    for click_first in (False, True):
        bench = Bench()
        if click_first:
            bench.click(click)
        bench.show(impression)
        if not click_first:
            bench.click(click)
        labels.append([label for _, _, label in bench.mark_and_pump(END_OF_LOG_MS)])
    assert labels == [[1], [1]]


def test_late_click_that_waits_does_not_drop_a_click_in_time() -> None:
    bench = Bench()
    bench.click(clicked("a", 1000 + WINDOW + 1), clicked("a", 1100))
    bench.show(shown("a", 1000))
    assert bench.mark_and_pump(1000 + WAIT) == [("a", FINAL, 1)]
