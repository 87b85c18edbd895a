"""Records as the join takes them: an event whose time cannot be is bad, with its line, and its neighbors are not."""

import json
from typing import Any

import msgspec
import pytest

from streams.attribution import Record
from streams.contracts.codec import END_OF_LOG_MS, encode_batch, encode_event
from streams.contracts.events import Click, Impression
from streams.contracts.settings import JoinSettings
from streams.contracts.topics import CLICKS, IMPRESSIONS
from streams.event_clock import JOIN_TOPICS, JoinTopic
from streams.impressions import ImpressionBatch
from streams.record_decoder import RecordDecoder
from tests.builders import clicked, shown

NOW_MS = 1_764_000_000_000
SKEW_MS, AGE_MS = 60_000, 86_400_000


def decoder(**changes: Any) -> RecordDecoder:
    values = {"max_future_skew_ms": SKEW_MS, "max_event_age_ms": AGE_MS}
    return RecordDecoder(JoinSettings(kafka_bootstrap_servers="localhost:9092", **values | changes))


def event(topic: JoinTopic, id_: str, time_ms: int) -> Impression | Click:
    return shown(id_, time_ms) if topic == IMPRESSIONS else clicked(id_, time_ms)


def ids(record: Record) -> list[str]:
    return record.events.ids if isinstance(record.events, ImpressionBatch) else [e.decision_id for e in record.events]


def test_record_keeps_its_offset_its_time_and_its_topic() -> None:
    for topic in JOIN_TOPICS:
        record = decoder().decode(topic, 7, NOW_MS, encode_batch([event(topic, "a", NOW_MS)]))
        assert (record.offset, record.timestamp_ms, record.topic, record.mark_ms) == (7, NOW_MS, topic, None)
        assert (ids(record), record.bad, record.num_events) == (["a"], [], 1)


@pytest.mark.parametrize("topic", JOIN_TOPICS)
@pytest.mark.parametrize(
    ("time_ms", "is_good"),
    [
        (NOW_MS + SKEW_MS, True),
        (NOW_MS + SKEW_MS + 1, False),
        (NOW_MS - AGE_MS, True),
        (NOW_MS - AGE_MS - 1, False),
        (NOW_MS // 1000, False),
        (0, False),
    ],
)
def test_event_is_good_up_to_both_bounds_of_its_time(topic: JoinTopic, time_ms: int, is_good: bool) -> None:
    record = decoder().decode(topic, 0, NOW_MS, encode_batch([event(topic, "a", time_ms)]))
    assert ids(record) == (["a"] if is_good else [])
    assert len(record.bad) == (not is_good)
    assert record.topic == topic  # a record without good events, too


@pytest.mark.parametrize("topic", JOIN_TOPICS)
def test_reason_says_how_far_the_time_is_off_and_which_setting_allows_it(topic: JoinTopic) -> None:
    def reason(time_ms: int) -> str:
        (bad,) = decoder().decode(topic, 0, NOW_MS, encode_batch([event(topic, "a", time_ms)])).bad
        return bad.reason

    ahead, old, seconds = NOW_MS + SKEW_MS + 5, NOW_MS - AGE_MS - 5, NOW_MS // 1000
    assert reason(ahead) == (
        f"occurred_at_ms: {ahead} is {SKEW_MS + 5} ms after its record was written; "
        f"at most {SKEW_MS} (GENCO_MAX_FUTURE_SKEW_MS)"
    )
    assert reason(old) == (
        f"occurred_at_ms: {old} is {AGE_MS + 5} ms before its record was written; "
        f"at most {AGE_MS} (GENCO_MAX_EVENT_AGE_MS)"
    )
    assert reason(seconds).startswith(f"occurred_at_ms: in seconds? {seconds} is ")


@pytest.mark.parametrize("topic", JOIN_TOPICS)
def test_age_of_zero_allows_any_age_and_no_time_ahead(topic: JoinTopic) -> None:
    value = encode_batch([event(topic, str(time_ms), time_ms) for time_ms in (0, 5, NOW_MS, NOW_MS + SKEW_MS + 1)])
    record = decoder(max_event_age_ms=0).decode(topic, 0, NOW_MS, value)
    assert ids(record) == ["0", "5", str(NOW_MS)]
    assert [bad.index for bad in record.bad] == [3]


@pytest.mark.parametrize("topic", JOIN_TOPICS)
def test_bounds_follow_the_time_of_the_record_alone(topic: JoinTopic) -> None:
    value = encode_batch([event(topic, "a", NOW_MS)])
    judge = decoder()
    for timestamp_ms, is_good in ((NOW_MS, True), (NOW_MS - SKEW_MS - 1, False), (NOW_MS + AGE_MS + 1, False)):
        assert bool(ids(judge.decode(topic, 0, timestamp_ms, value))) is is_good


@pytest.mark.parametrize("topic", JOIN_TOPICS)
def test_bad_time_is_told_with_the_line_as_it_came_and_its_place_among_bad_and_blank_lines(topic: JoinTopic) -> None:
    def line(id_: str, time_ms: int) -> bytes:
        # Spelled as nobody here would: what is sent back must be what came.
        return json.dumps(
            dict(reversed(msgspec.to_builtins(event(topic, id_, time_ms)).items())) | {"é": "x :"}
        ).encode()

    good, ahead, old = line("good", NOW_MS), line("ahead", NOW_MS + 10**7), line("old", 1_764_000_000)
    value = (
        b"\n \n" + ahead + b"\r\n" + b"no json\n\n" + good + b"\n" + old + b"\n{}\n" + good.replace(b"good", b"other")
    )
    record = decoder().decode(topic, 3, NOW_MS, value)
    assert ids(record) == ["good", "other"]
    found = {bad.index: bad for bad in record.bad}
    assert sorted(found) == [0, 1, 3, 4]
    assert len(record.bad) == 4
    assert found[0].line == ahead + b"\r"
    assert found[3].line == old
    assert "after its record" in found[0].reason
    assert "in seconds? " in found[3].reason
    assert found[1].line == b"no json"
    if isinstance(record.events, ImpressionBatch):
        assert list(record.events.lines) == [2, 5]
        assert record.events.times_ms.tolist() == [NOW_MS, NOW_MS]
    assert record.num_events == 6


@pytest.mark.parametrize("topic", JOIN_TOPICS)
def test_bad_time_in_a_batch_that_is_read_in_one_go_takes_its_own_line_alone(topic: JoinTopic) -> None:
    times = [NOW_MS, NOW_MS + 10**7, NOW_MS, 5, NOW_MS]
    events = [event(topic, str(number), time_ms) for number, time_ms in enumerate(times)]
    record = decoder().decode(topic, 0, NOW_MS, encode_batch(events))
    assert ids(record) == ["0", "2", "4"]
    assert [(bad.index, bad.line) for bad in record.bad] == [(place, encode_event(events[place])) for place in (1, 3)]


@pytest.mark.parametrize("topic", JOIN_TOPICS)
def test_two_events_on_a_line_with_bad_times_are_no_reason_to_stop(topic: JoinTopic) -> None:
    pair = encode_event(event(topic, "a", NOW_MS)) + encode_event(event(topic, "b", 5))
    record = decoder().decode(topic, 0, NOW_MS, pair + b"\n\n")
    assert ids(record) == []
    assert [(bad.index, bad.line) for bad in record.bad] == [(0, pair)]


@pytest.mark.parametrize("topic", JOIN_TOPICS)
@pytest.mark.parametrize("time_ms", [0, NOW_MS, END_OF_LOG_MS])
def test_mark_holds_no_events_whatever_its_value(topic: JoinTopic, time_ms: int) -> None:
    for value in (b"", b"x", encode_batch([event(topic, "a", 5)])):
        record = decoder().decode(topic, 9, NOW_MS, value, time_ms)
        assert (record.offset, record.topic, record.mark_ms, record.num_events) == (9, topic, time_ms, 0)


@pytest.mark.parametrize("topic", JOIN_TOPICS)
@pytest.mark.parametrize("value", [b"", b"\n\n", b"\xff\n\x00", b"[" * 5000, b"{}"])
def test_bytes_that_are_no_events_are_bad_lines(topic: JoinTopic, value: bytes) -> None:
    record = decoder().decode(topic, 0, NOW_MS, value)
    assert ids(record) == []
    assert [bad.line for bad in record.bad] == [line for line in value.split(b"\n") if line]
    assert record.topic == topic


def test_click_of_another_topic_is_no_impression() -> None:
    value = encode_batch([clicked("a", NOW_MS)])
    record = decoder().decode(IMPRESSIONS, 0, NOW_MS, value)
    assert (len(record.events), len(record.bad)) == (0, 1)
    assert decoder().decode(CLICKS, 0, NOW_MS, value).bad == []
