"""Routes, records, load shedding with known probability, and the bookkeeping of every event's fate."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kafka.errors import KafkaConnectionError, KafkaTimeoutError, MessageSizeTooLargeError, UnknownProducerIdError

from serving.event_log import (
    COLUMNS_FROM,
    EventLog,
    RouteRotation,
    records,
    survival_probability,
)
from serving.metrics import ServingMetrics, totals
from streams.contracts.catalog import Element
from streams.contracts.codec import MAX_RECORD_BYTES, EventDecoder
from streams.contracts.decision_ids import make_decision_id
from streams.contracts.events import Click, Impression
from streams.contracts.impressions import is_columnar

KEY = b"k" * 32
NOW_MS = 1_764_000_000_000
MakeLog = Callable[..., EventLog]


def impression(route: int = 0, number: int = 0, padding: int = 0) -> Impression:
    return Impression(
        schema_version=1,
        decision_id=make_decision_id(route, NOW_MS + number, number, KEY),
        occurred_at_ms=NOW_MS + number,
        # Random, or it would take no room when it is compressed.
        product_id="p" + random.Random(number).randbytes(padding // 2).hex(),
        context={},
        candidates={"title": ["t1"]},
        creative={"title": "t1"},
        slot_propensities={"title": 1.0},
        propensity=1.0,
        model_id="default",
        epoch=0,
        policy_version=0,
        source="uniform",
        holdout=True,
        seed=number,
        survival_probability=1.0,
    )


def click(route: int = 0, number: int = 0) -> Click:
    decision_id = make_decision_id(route, NOW_MS + number, number, KEY)
    return Click(schema_version=1, decision_id=decision_id, occurred_at_ms=NOW_MS + number)


def wait_until(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


# -- pure ------------------------------------------------------------------------------------------


def test_records_group_by_partition_of_the_route_and_carry_the_newest_time() -> None:
    events = [click(9, 1), impression(5, 3), impression(1, 2), click(5, 4), impression(4, 1)]
    made = list(records(events, num_partitions=4, batch_size=10))
    assert [(r.topic, r.partition, r.num_events, r.newest_ms - NOW_MS) for r in made] == [
        ("impressions", 1, 2, 3),
        ("impressions", 0, 1, 1),
        ("clicks", 1, 2, 4),
    ]
    decoded = EventDecoder(Impression).decode_batch(made[0].value)
    assert [e.seed for e in decoded.events] == [3, 2]
    assert not decoded.bad


def test_records_hold_at_most_a_batch_and_lose_nothing() -> None:
    made = list(records([impression(0, n) for n in range(25)], num_partitions=4, batch_size=10))
    assert [r.num_events for r in made] == [10, 10, 5]


def test_records_stay_below_the_brokers_limit() -> None:
    made = list(records([impression(0, n, padding=200_000) for n in range(20)], num_partitions=1, batch_size=256))
    assert sum(r.num_events for r in made) == 20
    assert max(len(r.value) for r in made) <= MAX_RECORD_BYTES
    assert len(made) > 1


@pytest.mark.parametrize(("count", "columns"), [(COLUMNS_FROM - 1, False), (COLUMNS_FROM, True)])
def test_well_filled_records_of_impressions_are_in_columns(count: int, columns: bool) -> None:
    impressions = [impression(0, n) for n in range(count)]
    [record] = records(impressions, num_partitions=1, batch_size=256)
    assert is_columnar(record.value) is columns
    assert EventDecoder(Impression).decode_batch(record.value).events == impressions
    clicks = list(records([click(0, n) for n in range(count)], num_partitions=1, batch_size=256))
    assert not is_columnar(clicks[0].value)


def test_route_stays_for_a_batch_or_a_linger_time_then_rotates() -> None:
    rotation = RouteRotation(range(10, 13), batch_size=4, linger_ms=100)
    assert [rotation.take(1, 0) for _ in range(5)] == [10, 10, 10, 10, 11]
    assert rotation.take(1, 99) == 11
    assert rotation.take(1, 100) == 12
    assert rotation.take(64, 100) == 10  # a call larger than a batch still gets one route
    assert rotation.take(1, 101) == 11
    assert rotation.take(1, 5_000) == 12


@pytest.mark.parametrize(
    ("waiting", "expected"), [(0, 1.0), (799, 1.0), (800, 1.0), (875, 0.5), (935, 0.1), (950, 0.0), (1000, 0.0)]
)
def test_survival_probability_falls_from_the_high_water_mark_to_none(waiting: int, expected: float) -> None:
    assert survival_probability(waiting, 1000) == pytest.approx(expected)


@pytest.mark.parametrize("capacity", [100, 300, 1000, 50_000, 99_999])
def test_survival_is_a_probability_at_every_fill(capacity: int) -> None:
    assert all(0.0 <= survival_probability(waiting, capacity) <= 1.0 for waiting in range(capacity + 1))


# -- load shedding ---------------------------------------------------------------------------------


def test_overloaded_log_samples_impressions_and_the_survivors_stand_for_all(
    make_event_log: MakeLog, metrics: ServingMetrics
) -> None:
    log = make_event_log(queue_size=10_000, rng=np.random.default_rng(3))  # not started: nothing leaves
    num_offered = 10_200
    for number in range(num_offered):
        log.offer_impression(impression(0, number))
    kept = list(log._events)
    dropped = totals(metrics.events_dropped)
    assert len(kept) + sum(dropped.values()) == num_offered
    assert dropped[("impressions", "overload")] == sum(dropped.values())
    weights = np.array([1 / e.survival_probability for e in kept])
    assert weights[:8000].tolist() == [1.0] * 8000
    assert weights[-1] > 1.5
    # Horvitz-Thompson: the weights sum to what was offered. Six standard deviations, so this fails once in 10^9 seeds.
    sd = float(np.sqrt(np.sum(weights**2 - weights)))
    assert 0 < abs(weights.sum() - num_offered) < 6 * sd


def test_survival_is_the_frequency_of_surviving(make_event_log: MakeLog) -> None:
    log = make_event_log(queue_size=1000, rng=np.random.default_rng(5))
    log._num_waiting = 875  # held there: p = 0.5
    kept = 0
    for number in range(4000):
        if log.offer_impression(impression(0, number)):
            assert log._events[-1].survival_probability == pytest.approx(0.5)
            kept += 1
            log._num_waiting -= 1
    assert abs(kept - 2000) < 6 * np.sqrt(1000)  # six standard deviations


def test_full_log_drops_clicks_last_and_counts_the_cause(make_event_log: MakeLog, metrics: ServingMetrics) -> None:
    log = make_event_log(queue_size=100)
    log._num_waiting = 95
    assert not log.offer_impression(impression())
    assert all(log.offer_click(click(0, n)) for n in range(5))
    assert not log.offer_click(click(0, 6))
    assert totals(metrics.events_dropped) == {("impressions", "full"): 1, ("clicks", "full"): 1}


# -- the thread ------------------------------------------------------------------------------------


def test_events_arrive_in_batches_and_are_counted(
    make_event_log: MakeLog, producer: Any, metrics: ServingMetrics
) -> None:
    log = make_event_log()
    for number in range(25):
        log.offer_impression(impression(6, number))
    log.offer_click(click(6, 1))
    log.start()
    assert log.flush(5.0) == 0
    assert [(s["topic"], s["partition"]) for s in producer.sent] == [("impressions", 2)] * 3 + [("clicks", 2)]
    assert producer.sent[0]["timestamp_ms"] == NOW_MS + 9
    assert totals(metrics.events_acknowledged) == {("impressions",): 25, ("clicks",): 1}
    assert log.fault is None


def test_routes_are_those_of_this_server(make_event_log: MakeLog) -> None:
    log = make_event_log(routes=range(40, 44), batch_size=1)
    assert {log.current_route(1, NOW_MS) for _ in range(8)} == {40, 41, 42, 43}


def test_new_elements_are_written_once_and_before_their_impressions(make_event_log: MakeLog, producer: Any) -> None:
    log = make_event_log()
    element = Element(element_id="t9", slot="title", text="new")
    log.offer_impression(impression())
    log.offer_elements([element, element])
    log.offer_elements([element])
    log.start()
    assert log.flush(5.0) == 0
    assert [s["topic"] for s in producer.sent] == ["catalog", "impressions"]
    assert producer.sent[0]["key"] == b"element/t9"
    assert Element.model_validate_json(producer.sent[0]["value"]) == element


def test_element_that_was_not_delivered_is_announced_again(make_event_log: MakeLog, producer: Any) -> None:
    log = make_event_log()
    producer.failure = KafkaTimeoutError("expired")
    log.start()
    element = Element(element_id="t9", slot="title")
    log.offer_elements([element])
    wait_until(lambda: len(producer.sent) == 1 and log.num_waiting == 0)
    producer.failure = None
    log.offer_elements([element])
    assert log.flush(5.0) == 0
    assert len(producer.sent) == 2


def test_unreachable_kafka_delays_but_loses_nothing(make_event_log: MakeLog, producer: Any) -> None:
    reachable = threading.Event()
    tried = threading.Event()

    def connect() -> Any:
        tried.set()
        if not reachable.is_set():
            raise KafkaConnectionError("refused")
        return producer

    log = make_event_log(connect=connect)
    log.start()
    assert tried.wait(5)
    log.offer_impression(impression())
    assert log.flush(0.05) == 1
    wait_until(lambda: "KafkaConnectionError" in (log.fault or ""))
    reachable.set()
    assert log.flush(10.0) == 0
    assert log.fault is None


def test_unequal_partition_counts_are_no_connection(make_event_log: MakeLog, producer: Any) -> None:
    producer.partitions["clicks"] = 3
    log = make_event_log()
    log.start()
    wait_until(lambda: "must have as many" in (log.fault or ""))
    assert not producer.sent


def test_failed_delivery_is_counted_not_silent(make_event_log: MakeLog, producer: Any, metrics: ServingMetrics) -> None:
    producer.failure = KafkaTimeoutError("expired")
    log = make_event_log()
    log.start()
    log.offer_impression(impression())
    assert log.flush(5.0) == 0
    assert totals(metrics.events_dropped) == {("impressions", "delivery"): 1}
    assert totals(metrics.events_acknowledged).get(("impressions",), 0) == 0


def test_broken_producer_is_replaced(make_event_log: MakeLog, producer: Any) -> None:
    made: list[Any] = []

    def connect() -> Any:
        made.append(producer)
        return producer

    producer.failure = UnknownProducerIdError()
    log = make_event_log(connect=connect)
    log.start()
    log.offer_impression(impression())
    wait_until(lambda: len(made) >= 2)
    producer.failure = None
    log.offer_impression(impression(0, 1))
    assert log.flush(5.0) == 0


def test_record_that_could_not_be_handed_over_goes_to_the_next_producer(make_event_log: MakeLog, producer: Any) -> None:
    producer.send_failure = KafkaTimeoutError("no metadata")
    log = make_event_log()
    log.start()
    log.offer_impression(impression())
    wait_until(lambda: "no metadata" in (log.fault or ""))
    assert log.num_waiting == 1
    producer.send_failure = None
    assert log.flush(10.0) == 0
    assert len(producer.sent) == 1


def test_record_that_is_too_large_is_counted_and_stops_nobody(
    make_event_log: MakeLog, producer: Any, metrics: ServingMetrics
) -> None:
    producer.send_failure = MessageSizeTooLargeError("5 MB")
    log = make_event_log()
    log.start()
    log.offer_impression(impression())
    assert log.flush(5.0) == 0
    assert totals(metrics.events_dropped) == {("impressions", "too_large"): 1}


def test_silent_kafka_is_told_by_readiness(
    make_event_log: MakeLog, producer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.event_log.STALLED_S", 0.05)
    producer.acknowledges = False
    log = make_event_log()
    log.start()
    log.offer_impression(impression())
    wait_until(lambda: "acknowledged nothing" in (log.fault or ""))
    producer.futures[0].resolve()
    assert log.fault is None


def test_close_delivers_what_waits(make_event_log: MakeLog, producer: Any) -> None:
    log = make_event_log(linger_ms=10_000)
    log.start()
    wait_until(lambda: log.fault is None)
    log.offer_impression(impression())
    assert log.close(5.0) == 0
    assert len(producer.sent) == 1
    assert producer.closed


def test_close_counts_what_was_lost(make_event_log: MakeLog, producer: Any, metrics: ServingMetrics) -> None:
    producer.acknowledges = False
    log = make_event_log()
    log.start()
    log.offer_impression(impression())
    log.offer_click(click())
    started = time.monotonic()
    assert log.close(0.3) == 2
    assert time.monotonic() - started < 2.0
    assert totals(metrics.events_dropped) == {("impressions", "shutdown"): 1, ("clicks", "shutdown"): 1}


def test_every_event_has_one_fate_under_concurrent_load(
    make_event_log: MakeLog, producer: Any, metrics: ServingMetrics
) -> None:
    log = make_event_log(queue_size=300, batch_size=16, linger_ms=1)
    log.start()

    def offer(thread: int) -> None:
        for number in range(1000):
            log.offer_impression(impression(log.current_route(1, NOW_MS + number), 1000 * thread + number))

    threads = [threading.Thread(target=offer, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.flush(10.0) == 0
    decoded = [EventDecoder(Impression).decode_batch(record["value"]) for record in producer.sent]
    assert [bad for batch in decoded for bad in batch.bad] == []
    sent = [event for batch in decoded for event in batch.events]
    dropped = sum(totals(metrics.events_dropped).values())
    assert len({e.decision_id for e in sent}) == len(sent)
    assert len(sent) + dropped == 4000
    assert totals(metrics.events_acknowledged)[("impressions",)] == len(sent)


def test_changed_credentials_make_another_producer_and_lose_nothing(make_event_log: MakeLog, producer: Any) -> None:
    state = {"stale": False, "made": 0}

    def connect() -> Any:
        state["stale"] = False
        state["made"] += 1
        return producer

    log = make_event_log(connect=connect, is_stale=lambda: state["stale"])
    log.start()
    log.offer_impression(impression(number=1))
    assert log.flush(5.0) == 0
    state["stale"] = True
    wait_until(lambda: state["made"] == 2)
    log.offer_impression(impression(number=2))
    assert log.flush(5.0) == 0
    assert len(producer.sent) == 2
    assert producer.closed
