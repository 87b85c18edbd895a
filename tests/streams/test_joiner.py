"""The joiner between a consumer and a producer that a test plays: what is written, what is committed, what is held."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import KafkaError
from faust.types import TP

import streams.joiner as module
from streams.contracts.alerts import Alert
from streams.contracts.codec import encode_batch, encode_mark
from streams.contracts.dead_letters import DeadLetter
from streams.contracts.events import Click, Impression
from streams.contracts.examples import decode_examples
from streams.contracts.settings import JoinSettings
from streams.contracts.topics import ALERTS, CLICKS, DEAD_LETTERS, EXAMPLES, IMPRESSIONS
from streams.event_clock import JOIN_TOPICS, JoinTopic
from streams.joiner import Joiner
from streams.watchdog import Watchdog
from tests.builders import clicked, shown

WINDOW, WAIT = 10_000, 2_000
NOW_MS = 1_000_000
"""Of both clocks; their difference is what matters."""


@dataclass
class Consumer:
    """Stands for `LogConsumer`: the places of the logs, what is held, and what was committed."""

    committed: dict[TP, int] = field(default_factory=dict)
    """At the assignment."""
    earliest: dict[TP, int] = field(default_factory=dict)
    ends: dict[TP, int] = field(default_factory=dict)
    answered_ms: int | None = NOW_MS
    gaps: dict[TP, tuple[int, int]] = field(default_factory=dict)
    """Offsets without a record: where they begin and end."""
    held: set[TP] = field(default_factory=set)
    commits: list[dict[TP, int]] = field(default_factory=list)
    notes: dict[TP, str] = field(default_factory=dict)
    """Beside the committed offsets."""
    takes_commits: bool = True
    is_member: bool = True
    during_commit: Callable[[], None] | None = None

    def hold(self, places: frozenset[TP]) -> None:
        self.held = set(places)

    def highwater(self, place: TP) -> int | None:
        return self.ends.get(place)

    async def earliest_offsets(self, *places: TP) -> dict[TP, int]:
        return {place: self.earliest.get(place, 0) for place in places}

    def committed_at_assignment(self, place: TP) -> int | None:
        return self.committed.get(place)

    def answered_at_ms(self, place: TP) -> int | None:
        return self.answered_ms

    def after_gap(self, place: TP, offset: int) -> int:
        begin, end = self.gaps.get(place, (offset, offset))
        return end if offset == begin else offset

    def has_lost_its_group(self) -> bool:
        return not self.is_member

    async def commit_positions(self, offsets: Mapping[TP, int], notes: Mapping[TP, str] | None = None) -> bool:
        if self.during_commit is not None:
            self.during_commit()
        if self.takes_commits:
            self.commits.append(dict(offsets))
            self.notes |= {place: (notes or {}).get(place, "") for place in offsets}
        return self.takes_commits

    async def committed_notes(self, places: Set[TP]) -> dict[TP, str]:
        return {place: self.notes[place] for place in places if place in self.notes}


@dataclass
class Producer:
    """Takes records, and acknowledges them at once or when it is told to."""

    acknowledges: bool = True
    sent: list[tuple[str, int, bytes, Any]] = field(default_factory=list)
    waiting: list[asyncio.Future[None]] = field(default_factory=list)
    during_send: Callable[[], None] | None = None

    async def send(
        self, topic: str, value: bytes, *, partition: int, headers: Any = None, key: bytes | None = None
    ) -> Awaitable[None]:
        self.sent.append((topic, partition, value, headers))
        if self.during_send is not None:
            self.during_send()
        delivery: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.acknowledges:
            delivery.set_result(None)
        else:
            self.waiting.append(delivery)
        return delivery

    def acknowledge(self) -> None:
        for delivery in self.waiting:
            delivery.set_result(None)
        self.waiting.clear()

    def ids(self) -> list[str]:
        """Return the examples that were sent."""
        return [
            id_ for topic, _, value, _ in self.sent if topic == EXAMPLES for id_ in decode_examples(value).decision_id
        ]


class Bench:
    """A joiner with partition 0 (and others), whose logs a test writes."""

    def __init__(self, *, partitions: int = 1, **changes: Any) -> None:
        values = {
            "attribution_window_ms": WINDOW,
            "label_wait_ms": WAIT,
            "idle_timeout_ms": 0,
            "max_event_age_ms": 0,
        }
        self.consumer, self.producer = Consumer(), Producer()
        self.ended: list[int] = []
        self.watchdog = Watchdog(60.0, end=self.ended.append)
        app: Any = SimpleNamespace(consumer=self.consumer)
        self.joiner = Joiner(
            JoinSettings(kafka_bootstrap_servers="127.0.0.1:1", **values | changes), app, self.watchdog
        )
        self.joiner._producer = self.producer  # type: ignore[assignment]
        self.offsets: dict[TP, int] = {}
        self.joiner.assign(set(range(partitions)))
        for partition in range(partitions):
            for topic in JOIN_TOPICS:
                self.consumer.ends[TP(topic, partition)] = 0

    def add(
        self,
        topic: JoinTopic,
        *events: Impression | Click,
        value: bytes | None = None,
        partition: int = 0,
        offset: int | None = None,
        headers: Any = None,
        time_ms: int = 10**7,
    ) -> None:
        place = TP(topic, partition)
        if offset is None:
            offset = self.offsets.get(place, 0)
        if place not in self.offsets:
            self.consumer.committed.setdefault(place, offset)
        self.offsets[place] = offset + 1
        if place in self.consumer.ends:
            self.consumer.ends[place] = max(self.consumer.ends[place], offset + 1)
        self.joiner.add(
            SimpleNamespace(
                topic=topic,
                partition=partition,
                offset=offset,
                headers=headers,
                timestamp=time_ms / 1000,
                value=encode_batch(events) if value is None else value,
            )
        )

    def mark(self, time_ms: int, partition: int = 0) -> None:
        value, headers = encode_mark(time_ms)
        for topic in JOIN_TOPICS:
            self.add(topic, value=value, headers=headers, partition=partition)

    async def pump(self, times: int = 1) -> None:
        for _ in range(times):
            await self.joiner.pump()

    @contextmanager
    def pumping(self) -> Iterator[asyncio.Task[None]]:
        """Pump once in the background, and leave nothing running."""
        task = asyncio.create_task(self.joiner.pump())
        try:
            yield task
        finally:
            task.cancel()


async def until(condition: Callable[[], Any]) -> None:
    """Wait for something that needs a few rounds of the loop, or a moment of the encoder's thread."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    pytest.fail("it has not come about in ten seconds")


@dataclass
class Clock:
    """The wall clock and the monotonic one, which go together."""

    now_ms: int = NOW_MS


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "now_ms", lambda: found.now_ms)
    monkeypatch.setattr(module, "monotonic_ms", lambda: found.now_ms)
    monkeypatch.setattr(module, "COMMIT_EVERY_S", 0.0)
    return found


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


SHOWN, CLICKED = TP(IMPRESSIONS, 0), TP(CLICKS, 0)


# -- writing and committing --------------------------------------------------------------------------------------------


def test_examples_are_written_to_the_partition_of_their_impressions() -> None:
    async def main() -> None:
        bench = Bench(partitions=3)
        for partition in (2, 0):
            bench.add(IMPRESSIONS, shown(f"of-{partition}"), partition=partition)
            bench.mark(1000 + WAIT, partition)
        await bench.pump()
        assert [(topic, partition) for topic, partition, _, _ in bench.producer.sent] == [(EXAMPLES, 0), (EXAMPLES, 2)]
        assert bench.producer.ids() == ["of-0", "of-2"]

    run(main())


def test_nothing_is_committed_before_the_deliveries_are_acknowledged() -> None:
    async def main() -> None:
        bench = Bench()
        bench.producer.acknowledges = False
        bench.add(IMPRESSIONS, shown("a"))
        bench.add(IMPRESSIONS, value=b"bad")
        bench.mark(1000 + WINDOW + 1)
        with bench.pumping() as pump:
            await until(lambda: len(bench.producer.waiting) == 2)  # an example and a dead letter
            for _ in range(20):
                await asyncio.sleep(0)
            assert not pump.done()
            assert bench.consumer.commits == []
            bench.producer.waiting.pop(0).set_result(None)
            for _ in range(20):
                await asyncio.sleep(0)
            assert not pump.done()
            assert bench.consumer.commits == []
            bench.producer.acknowledge()
            await pump
        assert bench.consumer.commits == [{SHOWN: 3, CLICKED: 1}]  # the marks behind them, too

    run(main())


def test_delivery_that_fails_ends_the_pump_and_nothing_is_committed() -> None:
    async def main() -> None:
        bench = Bench()
        bench.producer.acknowledges = False
        bench.add(IMPRESSIONS, shown("a"))
        bench.mark(1000 + WINDOW + 1)
        with bench.pumping() as pump:
            await until(lambda: bench.producer.waiting)
            bench.producer.waiting[0].set_exception(ConnectionError("the broker is away"))
            with pytest.raises(ConnectionError):
                await pump
        assert bench.consumer.commits == []

    run(main())


def test_record_is_committed_only_after_its_window() -> None:
    async def main() -> None:
        bench = Bench()
        bench.add(IMPRESSIONS, shown("a"))
        bench.mark(1000 + WAIT)
        await bench.pump()
        assert bench.producer.ids() == ["a"]
        bench.mark(1000 + WINDOW)
        await bench.pump()
        assert all(SHOWN not in commit for commit in bench.consumer.commits)
        bench.mark(1000 + WINDOW + 1)
        await bench.pump()
        assert bench.consumer.commits[-1][SHOWN] >= 1

    run(main())


def test_commit_that_failed_comes_again_and_one_that_succeeded_does_not() -> None:
    async def main() -> None:
        bench = Bench()
        bench.consumer.takes_commits = False
        bench.add(IMPRESSIONS, shown("a"))
        bench.mark(1000 + WINDOW + 1)
        await bench.pump(2)
        assert bench.consumer.commits == []
        bench.consumer.takes_commits = True
        await bench.pump(3)
        assert len(bench.consumer.commits) == 1
        assert SHOWN in bench.consumer.commits[0]

    run(main())


def test_commits_are_as_far_apart_as_they_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMMIT_EVERY_S", 3600.0)

    async def main() -> None:
        bench = Bench()
        for number in range(3):
            time_ms = 1000 + 3 * WINDOW * number
            bench.add(IMPRESSIONS, shown(str(number), time_ms))
            bench.mark(time_ms + WINDOW + 1)
            await bench.pump()
        assert bench.producer.ids() == ["0", "1", "2"]
        assert len(bench.consumer.commits) == 1

    run(main())


def test_bad_line_is_written_to_the_dead_letters_with_its_place() -> None:
    async def main() -> None:
        bench = Bench(partitions=2)
        bench.add(CLICKS, offset=41, partition=1, value=encode_batch([clicked("a")]) + b'{"x":1}')
        await bench.pump()
        ((topic, partition, value, headers),) = bench.producer.sent
        assert (topic, partition) == (DEAD_LETTERS, 1)
        letter = DeadLetter.decode(value, headers)
        assert (letter.topic, letter.partition, letter.offset, letter.index) == (CLICKS, 1, 41, 1)
        assert letter.line == b'{"x":1}'

    run(main())


def test_late_positive_is_written_after_its_record_was_encoded() -> None:
    async def main() -> None:
        bench = Bench()
        bench.add(IMPRESSIONS, shown("a"))
        bench.mark(1000 + WAIT)
        await bench.pump()
        bench.add(CLICKS, clicked("a", 5000))
        await bench.pump()
        kinds = [decode_examples(value).label_kind for _, _, value, _ in bench.producer.sent]
        assert kinds == [["provisional"], ["late_positive"]]

    run(main())


# -- a rebalance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("partitions", [{0}, set()])
def test_rebalance_during_a_write_acknowledges_and_commits_nothing(partitions: set[int]) -> None:
    async def main() -> None:
        bench = Bench()
        bench.producer.acknowledges = False
        bench.add(IMPRESSIONS, shown("a"))
        bench.mark(1000 + WINDOW + 1)
        before = bench.joiner._partitions[0]
        with bench.pumping() as pump:
            await until(lambda: bench.producer.waiting)
            bench.joiner.assign(partitions)
            bench.producer.acknowledge()
            await pump
        assert bench.consumer.commits == []
        assert before.take_finished() == {}  # not acknowledged: the next owner writes it again
        assert all(joiner._acknowledged == 0 for joiner in bench.joiner._partitions.values())  # nor anything of theirs
        await bench.pump(2)
        assert bench.consumer.commits == []
        assert bench.producer.ids() == ["a"]

    run(main())


def test_rebalance_while_examples_are_encoded_sends_nothing_more() -> None:
    async def main() -> None:
        bench = Bench(partitions=2)
        for partition in range(2):
            bench.add(IMPRESSIONS, shown(f"of-{partition}"), partition=partition)
            bench.mark(1000 + WINDOW + 1, partition)
        bench.producer.during_send = lambda: bench.joiner.assign({1})
        await bench.pump()
        assert bench.producer.ids() == ["of-0"]
        assert bench.consumer.commits == []

    run(main())


def test_commit_during_which_a_rebalance_came_does_not_count_for_the_new_assignment() -> None:
    async def main() -> None:
        bench = Bench()
        bench.add(IMPRESSIONS, shown("a"))
        bench.mark(1000 + WINDOW + 1)
        bench.consumer.during_commit = lambda: bench.joiner.assign({0})
        await bench.pump()
        assert bench.joiner._committed == {}

    run(main())


def test_new_assignment_reads_again_and_writes_again() -> None:
    async def main() -> None:
        bench = Bench()
        for _ in range(2):
            bench.joiner.assign({0})
            bench.offsets.clear()
            bench.add(IMPRESSIONS, shown("a"))
            bench.mark(1000 + WAIT)
            await bench.pump()
        assert bench.producer.ids() == ["a", "a"]

    run(main())


@pytest.mark.parametrize("topic", JOIN_TOPICS)
def test_record_of_a_partition_that_is_not_assigned_is_ignored(topic: JoinTopic) -> None:
    async def main() -> None:
        bench = Bench()
        bench.add(topic, value=b"bad", partition=7, offset=5)
        bench.add(topic, value=b"bad", partition=7, offset=3)  # not even its offsets matter
        await bench.pump()
        assert bench.producer.sent == []
        assert bench.joiner._partitions.keys() == {0}
        assert bench.joiner._next_offset == {}

    run(main())


@pytest.mark.parametrize("topic", JOIN_TOPICS)
@pytest.mark.parametrize("second", [4, 3, 6])
def test_record_that_does_not_follow_the_one_before_it_ends_the_process(topic: JoinTopic, second: int) -> None:
    async def main() -> None:
        bench = Bench()
        bench.add(topic, offset=4)
        with pytest.raises(RuntimeError, match=f"{topic} partition 0: offset {second} came, expected 5: the consumer"):
            bench.add(topic, offset=second)
        bench.consumer.gaps[TP(topic, 0)] = (5, 9)
        bench.add(topic, offset=9)

    run(main())


@pytest.mark.parametrize("topic", JOIN_TOPICS)
def test_first_record_that_is_not_where_reading_began_ends_the_process(topic: JoinTopic) -> None:
    async def main() -> None:
        for gap, committed, expected in (((0, 0), 3, 3), ((0, 0), None, 0), ((3, 4), 3, 3)):
            bench = Bench()
            place = TP(topic, 0)
            bench.consumer.gaps[place] = gap
            bench.consumer.committed |= {} if committed is None else {place: committed}
            bench.offsets[place] = 5  # so that the bench does not commit what it adds
            bench.add(topic)
            with pytest.raises(RuntimeError, match=f"{topic} partition 0: offset 5 came first, expected {expected}"):
                await bench.pump()

    run(main())


def test_first_record_may_come_after_offsets_that_hold_none() -> None:
    async def main() -> None:
        bench = Bench()
        bench.consumer.gaps[TP(CLICKS, 0)] = (3, 5)
        bench.consumer.committed[TP(CLICKS, 0)] = 3
        bench.add(CLICKS, offset=5)
        await bench.pump()
        assert bench.joiner._start[TP(CLICKS, 0)] == 3

    run(main())


def test_topics_have_offsets_of_their_own() -> None:
    async def main() -> None:
        bench = Bench(partitions=2)
        bench.add(IMPRESSIONS, offset=100)
        bench.add(CLICKS, offset=3)
        bench.add(IMPRESSIONS, offset=2, partition=1)
        assert bench.joiner._next_offset == {SHOWN: 101, CLICKED: 4, TP(IMPRESSIONS, 1): 3}

    run(main())


# -- the breaker -------------------------------------------------------------------------------------------------------


def break_it(bench: Bench) -> None:
    bench.add(CLICKS, value=b"\n".join([b"{}"] * 600))


def test_open_breaker_holds_all_places_at_once_and_commits_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        bench = Bench(partitions=2)
        bench.add(IMPRESSIONS, shown("a"))
        bench.mark(1000 + WINDOW + 1)
        assert bench.consumer.held == set()
        break_it(bench)
        everything = {TP(topic, partition) for topic in JOIN_TOPICS for partition in range(2)}
        assert bench.consumer.held == everything  # before anything more is read
        with caplog.at_level(logging.CRITICAL):
            await bench.pump(2)
        assert bench.consumer.held == everything
        assert bench.consumer.commits == []
        assert bench.producer.ids() == ["a"]  # what was decided is written all the same
        assert sum(topic == DEAD_LETTERS for topic, _, _, _ in bench.producer.sent) == 600

    run(main())
    (logged,) = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    assert logged.__dict__["cause"].startswith("clicks: 600 of the last 600 events are bad")


def test_open_breaker_stays_open_over_a_rebalance() -> None:
    async def main() -> None:
        bench = Bench()
        break_it(bench)
        bench.joiner.assign({0})
        assert bench.consumer.held == set()  # Faust resumes everything now
        await bench.pump()
        assert bench.consumer.held == {SHOWN, CLICKED}
        assert bench.consumer.commits == []

    run(main())


def test_breaker_does_not_open_with_a_share_of_one() -> None:
    async def main() -> None:
        bench = Bench(dead_letter_max_share=1)
        break_it(bench)
        await bench.pump()
        assert bench.consumer.held == set()
        assert len(bench.producer.sent) == 600

    run(main())


# -- where the logs begin and end --------------------------------------------------------------------------------------


def test_topic_is_read_to_its_end_when_the_broker_has_answered_that() -> None:
    async def main() -> None:
        bench = Bench()
        await bench.pump()
        bench.consumer.answered_ms = NOW_MS - 300
        assert bench.joiner._read_until_ms(0) == dict.fromkeys(JOIN_TOPICS, NOW_MS - 300)
        bench.consumer.ends[SHOWN] = 1
        assert bench.joiner._read_until_ms(0).keys() == {CLICKS}
        bench.add(IMPRESSIONS, shown("a"))
        assert bench.joiner._read_until_ms(0).keys() == set(JOIN_TOPICS)
        bench.consumer.answered_ms = NOW_MS + 500  # the wall clock was set back
        assert bench.joiner._read_until_ms(0) == dict.fromkeys(JOIN_TOPICS, NOW_MS)
        bench.consumer.answered_ms = None
        assert bench.joiner._read_until_ms(0) == {}

    run(main())


def test_nothing_is_read_to_its_end_while_it_is_held() -> None:
    async def main() -> None:
        bench = Bench()
        await bench.pump()
        assert bench.joiner._read_until_ms(0).keys() == set(JOIN_TOPICS)
        break_it(bench)
        assert bench.joiner._read_until_ms(0) == {}

    run(main())


@pytest.mark.parametrize(("is_held", "moved_ms"), [(False, 5000), (True, 0)])
def test_watermark_follows_the_wall_clock_only_where_nothing_is_held(
    clock: Clock, is_held: bool, moved_ms: int
) -> None:
    async def main() -> None:
        bench = Bench(idle_timeout_ms=500)
        bench.add(IMPRESSIONS, shown("a", 1000))
        await bench.pump()
        if is_held:
            break_it(bench)
        clock.now_ms += 5000
        bench.consumer.answered_ms = clock.now_ms
        await bench.pump()
        assert bench.joiner._partitions[0].watermark_ms == 1000 + moved_ms - 500

    run(main())


def test_records_that_retention_removed_are_told_with_their_number(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        bench = Bench()
        bench.consumer.committed = {SHOWN: 10, CLICKED: 25}
        bench.consumer.earliest = {SHOWN: 17, CLICKED: 25}
        bench.consumer.ends |= {SHOWN: 40, CLICKED: 25}
        with caplog.at_level(logging.ERROR):
            await bench.pump(2)

    run(main())
    (logged,) = [record for record in caplog.records if "removed by retention" in record.message]
    assert {name: logged.__dict__[name] for name in ("topic", "partition", "first", "count")} == {
        "topic": IMPRESSIONS,
        "partition": 0,
        "first": 10,
        "count": 7,
    }


def test_log_without_committed_offsets_has_lost_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        bench = Bench()
        bench.consumer.earliest = {SHOWN: 17, CLICKED: 3}
        bench.consumer.ends |= {SHOWN: 40, CLICKED: 3}
        await bench.pump()
        assert bench.joiner._start == {SHOWN: 17, CLICKED: 3}

    run(main())
    assert "removed by retention" not in caplog.text


def test_log_that_ends_before_what_was_read_is_an_error() -> None:
    async def main() -> None:
        bench = Bench()
        bench.consumer.committed = {SHOWN: 5, CLICKED: 31}
        bench.consumer.ends |= {SHOWN: 5, CLICKED: 30}
        with pytest.raises(RuntimeError, match=r"clicks partition 0 was read up to offset 31, but its log ends at 30"):
            await bench.pump()

    run(main())


def test_place_of_a_log_is_asked_for_until_it_is_known() -> None:
    async def main() -> None:
        bench = Bench()
        ends, bench.consumer.ends = bench.consumer.ends, {}
        await bench.pump()
        assert bench.joiner._start == {}
        bench.consumer.ends = ends
        await bench.pump()
        assert bench.joiner._start == {SHOWN: 0, CLICKED: 0}

    run(main())


def test_recovery_is_told_when_what_was_there_at_the_start_has_been_read(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        bench = Bench()
        bench.consumer.ends |= {SHOWN: 3}
        bench.add(IMPRESSIONS, shown("a"))
        await bench.pump()
        assert "recovering: 1 of 3 records" in caplog.text
        bench.add(IMPRESSIONS, shown("b"))
        bench.add(IMPRESSIONS, shown("c"))
        await bench.pump(2)

    with caplog.at_level(logging.INFO):
        run(main())
    (done,) = [record.message for record in caplog.records if record.message.startswith("recovered")]
    assert "3 records of the last window read again, 3 impressions open" in done


# -- memory ------------------------------------------------------------------------------------------------------------


def test_full_memory_holds_all_but_the_clicks_that_are_behind() -> None:
    async def main() -> None:
        bench = Bench(partitions=2, join_memory_mb=16, attribution_window_ms=10**6)
        slots = {"s": [f"{number:0100}" for number in range(1000)]}
        for number in range(50):
            events = [
                shown(
                    f"{number}-{n}",
                    5_000,
                    candidates=slots,
                    creative={"s": slots["s"][0]},
                    slot_propensities={"s": 1.0},
                )
                for n in range(4)
            ]
            bench.add(IMPRESSIONS, *events)
        bench.add(CLICKS, clicked("x", 9_000), partition=1)
        await bench.pump()
        assert bench.consumer.held == {TP(topic, n) for topic in JOIN_TOPICS for n in range(2)} - {CLICKED}

    run(main())


# -- signs of life -----------------------------------------------------------------------------------------------------


def test_joiner_without_partitions_gives_all_signs() -> None:
    async def main() -> None:
        bench = Bench()
        bench.joiner.assign(set())
        await bench.pump()
        assert bench.watchdog._signs.keys() == {"event loop", "commits", "group membership", "fetches"}

    run(main())


def test_sign_is_missing_for_what_does_not_go_on() -> None:
    async def main() -> None:
        bench = Bench()
        await bench.pump()

        async def signs() -> set[str]:
            bench.watchdog._signs.clear()
            await bench.pump()
            return set(bench.watchdog._signs)

        everything = {"event loop", "commits", "group membership", "fetches"}
        assert await signs() == everything - {"fetches"}  # the broker has not answered again
        bench.consumer.answered_ms = NOW_MS + 1
        assert await signs() == everything
        bench.consumer.is_member = False
        bench.consumer.takes_commits = False
        bench.add(IMPRESSIONS, shown("a"))
        bench.mark(1000 + WINDOW + 1)
        assert await signs() == {"event loop", "fetches"}

    run(main())


# -- clicks that cease -------------------------------------------------------------------------------------------------


class Ceasing:
    """A joiner whose clicks cease after twelve seconds; a tenth of the impressions are clicked at once."""

    def __init__(self, clock: Clock, **changes: Any) -> None:
        self.clock = clock
        self.bench = Bench(idle_timeout_ms=500, join_hold_max_ms=60_000, **changes)
        self.number = 0

    async def go_on(self, seconds: int, *, with_clicks: bool) -> None:
        for _ in range(10 * seconds):
            now_ms = self.clock.now_ms
            ids = [str(self.number + i) for i in range(20)]
            self.number += 20
            self.bench.add(IMPRESSIONS, *[shown(id_, now_ms) for id_ in ids], time_ms=now_ms)
            if with_clicks:
                self.bench.add(CLICKS, *[clicked(id_, now_ms) for id_ in ids[:2]], time_ms=now_ms)
            self.clock.now_ms += 100
            self.bench.consumer.answered_ms = self.clock.now_ms
            await self.bench.pump()

    def alerts(self) -> list[Alert]:
        return [Alert.from_bytes(value) for topic, _, value, _ in self.bench.producer.sent if topic == ALERTS]


def test_when_clicks_cease_the_joiner_holds_tells_and_keeps_the_hold_beside_its_offset(clock: Clock) -> None:
    async def main() -> None:
        scene = Ceasing(clock)
        await scene.go_on(12, with_clicks=True)
        assert scene.alerts() == []
        await scene.go_on(6, with_clicks=False)
        alert = scene.alerts()[0]
        assert (alert.name, alert.cause, alert.state) == ("JoinRateDrop", "join broken", "firing")
        sent = len(scene.bench.producer.ids())
        await scene.go_on(2, with_clicks=False)
        assert len(scene.bench.producer.ids()) == sent
        note = scene.bench.consumer.notes[CLICKED]
        assert alert.alert_id in note

        heir = Ceasing(clock)
        heir.number = 10**6
        heir.bench.consumer.notes[CLICKED] = note
        await heir.go_on(6, with_clicks=False)
        assert heir.bench.producer.ids() == []
        await heir.go_on(12, with_clicks=True)
        assert heir.bench.producer.ids() != []
        assert (heir.alerts()[-1].alert_id, heir.alerts()[-1].state) == (alert.alert_id, "resolved")

    run(main())


def test_nothing_is_decided_before_the_notes_beside_the_offsets_are_read(clock: Clock) -> None:
    async def main() -> None:
        scene = Ceasing(clock)

        async def silent(_: Set[TP]) -> dict[TP, str]:
            raise KafkaError("away")

        heard, scene.bench.consumer.committed_notes = scene.bench.consumer.committed_notes, silent  # type: ignore[method-assign]
        await scene.go_on(5, with_clicks=True)
        assert scene.bench.producer.ids() == []
        scene.bench.consumer.committed_notes = heard  # type: ignore[method-assign]
        await scene.bench.pump()
        assert len(scene.bench.producer.ids()) >= 20 * 20

    run(main())


def test_an_operator_accepts_the_click_rate(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        scene = Ceasing(clock)
        accepted: list[int] = [0]
        monkeypatch.setattr(scene.bench.joiner._desk, "accepted_ms", lambda: accepted[0])
        await scene.go_on(12, with_clicks=True)
        await scene.go_on(8, with_clicks=False)
        sent = len(scene.bench.producer.ids())
        accepted[0] = clock.now_ms
        await scene.go_on(2, with_clicks=False)
        assert len(scene.bench.producer.ids()) > sent + 60
        assert scene.bench.joiner._guard is not None
        assert not scene.bench.joiner._guard.has_hold

    run(main())


@pytest.mark.parametrize("changes", [{"idle_timeout_ms": 0}, {"join_drop_ratio": 0.0}])
def test_clicks_are_not_watched_where_that_was_not_asked_for(changes: dict[str, Any]) -> None:
    assert Bench(**{"idle_timeout_ms": 500, **changes}).joiner._guard is None
