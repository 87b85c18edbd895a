"""Our consumer on the real base of Faust, without a broker: what is held is not lost."""

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from faust.types import TP

from streams.app import MAX_HOLD_S, LogConsumer, _ConsumerThread, create_app
from streams.contracts.settings import KafkaSettings
from streams.contracts.topics import CLICKS, IMPRESSIONS

SHOWN, CLICKED = TP(IMPRESSIONS, 0), TP(CLICKS, 0)
BOTH = {SHOWN, CLICKED}


@pytest.fixture
def consumer() -> Iterator[LogConsumer]:
    """A consumer with two partitions, and in each three records that were fetched."""
    with asyncio.Runner() as runner:
        asyncio.set_event_loop(runner.get_loop())
        app = create_app(KafkaSettings(kafka_bootstrap_servers="127.0.0.1:1"), "group")

        def ignore(*_: Any) -> None:
            return None

        found = app.transport.create_consumer(ignore, on_partitions_revoked=ignore, on_partitions_assigned=ignore)
        assert isinstance(found, LogConsumer)
        found._set_active_tps(set(BOTH))
        app.flow_control.resume()
        yield found
        found._thread.thread_loop.close()
        asyncio.set_event_loop(None)


def deliver(consumer: LogConsumer, monkeypatch: pytest.MonkeyPatch, during: Any) -> list[tuple[str, int]]:
    """Return what reaches the streams of three records fetched for each partition; `during` comes after the first."""
    monkeypatch.setattr(consumer, "highwater", lambda place: 3)
    monkeypatch.setattr(consumer, "_to_message", lambda place, record: SimpleNamespace(offset=record))

    async def fetched(active_partitions: set[TP], **_: Any) -> dict[TP, list[int]]:
        return {place: [0, 1, 2] for place in sorted(active_partitions)}

    monkeypatch.setattr(consumer, "_getmany", fetched)

    async def read() -> list[tuple[str, int]]:
        found = []
        async for place, record in consumer.getmany(1.0):
            if not found:
                during()
            found.append((place.topic, record.offset))
        return found

    loop: asyncio.AbstractEventLoop = consumer.loop
    return loop.run_until_complete(read())


def test_held_partition_is_not_fetched_and_released_it_is_again(consumer: LogConsumer) -> None:
    consumer.hold({SHOWN})
    assert consumer._get_active_partitions() == {CLICKED}
    consumer.hold({CLICKED})
    assert consumer._get_active_partitions() == {SHOWN}
    consumer.hold(set())
    assert consumer._get_active_partitions() == BOTH


def test_buffer_that_empties_does_not_release_what_is_held(consumer: LogConsumer) -> None:
    consumer.on_buffer_full(SHOWN)
    consumer.hold({SHOWN})
    consumer.on_buffer_drop(SHOWN)
    assert consumer._get_active_partitions() == {CLICKED}
    consumer.hold(set())
    assert consumer._get_active_partitions() == BOTH


def test_buffer_that_is_full_is_released_by_faust_alone_when_nothing_is_held(consumer: LogConsumer) -> None:
    consumer.on_buffer_full(CLICKED)
    consumer.hold({SHOWN})
    consumer.hold(set())
    assert consumer._get_active_partitions() == {SHOWN}
    consumer.on_buffer_drop(CLICKED)
    assert consumer._get_active_partitions() == BOTH


def test_hold_is_renewed_after_faust_has_resumed_all_partitions(consumer: LogConsumer) -> None:
    consumer.hold({SHOWN})
    consumer.resume_partitions(BOTH)  # as at the end of each rebalance
    assert consumer._get_active_partitions() == BOTH
    consumer.hold({SHOWN})
    assert consumer._get_active_partitions() == {CLICKED}


def test_records_that_were_fetched_before_a_hold_are_delivered(
    consumer: LogConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = deliver(consumer, monkeypatch, during=lambda: consumer.hold(BOTH))
    assert sorted(found) == [(topic, record) for topic in (CLICKS, IMPRESSIONS) for record in range(3)]
    assert consumer._get_active_partitions() == set()


def test_pause_of_faust_would_lose_records_that_were_fetched(
    consumer: LogConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Should this ever fail, Faust has mended it, and `hold` can be what `pause_partitions` is.
    found = deliver(consumer, monkeypatch, during=lambda: consumer.pause_partitions(BOTH))
    assert len(found) == 1


def test_app_that_reads_nothing_for_hours_stays_in_its_group() -> None:
    app = create_app(KafkaSettings(kafka_bootstrap_servers="localhost:9092"), "group")
    assert app.conf.broker_max_poll_interval == MAX_HOLD_S


def test_reading_goes_on_after_offsets_that_hold_no_record(consumer: LogConsumer) -> None:
    consumer._thread._note_gaps(SHOWN, 3, [3, 4, 7, 10])
    assert [consumer.after_gap(SHOWN, offset) for offset in (3, 4, 5, 7, 8)] == [3, 4, 7, 7, 10]
    # The log goes on without a record.
    consumer._thread._note_gaps(SHOWN, 10, [12])
    assert consumer.after_gap(SHOWN, 8) == 12
    assert consumer.after_gap(CLICKED, 5) == 5


def test_log_that_was_cut_ends_the_process(consumer: LogConsumer, monkeypatch: pytest.MonkeyPatch) -> None:
    consumer._read_offset[CLICKED] = 7
    with pytest.raises(RuntimeError, match="clicks partition 0: offset 0 came after 7: the broker has lost records"):
        deliver(consumer, monkeypatch, lambda: None)


def test_records_wait_until_streams_take_them_again(consumer: LogConsumer, monkeypatch: pytest.MonkeyPatch) -> None:
    flow, taken_while = consumer.app.flow_control, []

    def pause() -> None:
        flow.suspend()
        consumer.loop.call_later(0.1, lambda: (taken_while.append("suspended"), flow.resume()))

    found = deliver(consumer, monkeypatch, pause)
    # The pause came after the first record: nothing else was handed on before its end, and nothing is missing.
    assert taken_while == ["suspended"]
    assert sorted(found) == [(topic, offset) for topic in (CLICKS, IMPRESSIONS) for offset in range(3)]


class AnsweredConsumer:
    """An aiokafka consumer that has taken in an answer for one partition."""

    def assignment(self) -> set[TopicPartition]:
        return {TopicPartition("clicks", 0)}

    def last_poll_timestamp(self, _: TopicPartition) -> int:
        return 5_000


def test_end_of_a_partition_is_known_for_the_time_before_the_fetch_was_sent() -> None:
    thread = object.__new__(_ConsumerThread)
    thread._consumer = AnsweredConsumer()
    thread.asked_ms = {TP("clicks", 0): 3_000}
    # Sent at 3,000, and taken in two seconds later: what was written meanwhile need not be in the answer.
    assert thread.answered_at_ms(TP("clicks", 0)) == 3_000
    assert thread.answered_at_ms(TP("clicks", 1)) is None
    thread.asked_ms = {}
    assert thread.answered_at_ms(TP("clicks", 0)) == 5_000


class SeekingConsumer:
    """An aiokafka consumer of four partitions, two of which have committed offsets."""

    def __init__(self) -> None:
        self.rewound: set[TopicPartition] = set()

    async def seek_to_committed(self) -> dict[TopicPartition, int | None]:
        offsets = (None, 7, 0, 3)
        return {TopicPartition(CLICKS, partition): offset for partition, offset in enumerate(offsets)}

    async def seek_to_beginning(self, *places: TopicPartition) -> None:
        self.rewound.update(places)


def test_partition_of_which_nothing_was_committed_is_read_from_its_beginning_after_a_rebalance() -> None:
    thread = object.__new__(_ConsumerThread)
    thread._consumer = consumer = SeekingConsumer()
    offsets = asyncio.run(thread._seek_to_committed())
    assert list(offsets.values()) == [None, 7, 0, 3]
    # aiokafka alone would leave them where they stand, behind what it has handed out.
    assert consumer.rewound == {TopicPartition(CLICKS, 0), TopicPartition(CLICKS, 2)}


def test_records_fetched_before_a_rebalance_are_not_handed_on_after_it(
    consumer: LogConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, app = consumer.app.flow_control, consumer.app

    def rebalance() -> None:
        flow.suspend()
        consumer.loop.call_later(0.05, lambda: (setattr(app, "consumer_generation_id", 7), flow.resume()))

    # The first record was handed on before it; the rest is read again.
    assert len(deliver(consumer, monkeypatch, rebalance)) == 1
