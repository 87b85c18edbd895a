"""The breaker opens at another schema, not at a bad line, and tells why."""

import pytest

from streams.breaker import MIN_EVENTS, Breaker


def observe(breaker: Breaker, num_good: int, num_bad: int, reason: str = "epoch: bad") -> None:
    breaker.observe(num_good, [reason] * num_bad)


def test_breaker_below_its_least_number_of_events_stays_closed() -> None:
    breaker = Breaker(0.1)
    observe(breaker, 0, MIN_EVENTS - 1)
    assert not breaker.is_open
    observe(breaker, 0, 1)
    assert breaker.is_open


@pytest.mark.parametrize(("num_bad", "is_open"), [(10, False), (11, True)])
def test_breaker_opens_at_more_than_the_share(num_bad: int, is_open: bool) -> None:
    breaker = Breaker(0.1, min_events=100)
    observe(breaker, 100 - num_bad, num_bad)
    assert breaker.is_open is is_open
    assert bool(breaker.cause) is is_open


def test_breaker_with_a_share_of_one_never_opens() -> None:
    breaker = Breaker(1.0, min_events=10)
    observe(breaker, 0, 1000)
    assert not breaker.is_open


def test_breaker_with_a_share_of_zero_opens_at_the_first_bad_event_that_is_judged() -> None:
    breaker = Breaker(0.0, min_events=10)
    observe(breaker, 1000, 0)
    assert not breaker.is_open
    observe(breaker, 9, 1)
    assert breaker.is_open


def test_breaker_that_opened_stays_open_with_its_first_cause() -> None:
    breaker = Breaker(0.1, min_events=10)
    observe(breaker, 0, 10)
    cause = breaker.cause
    observe(breaker, 10_000, 0)
    observe(breaker, 0, 10_000, "seed: bad")
    assert breaker.is_open
    assert breaker.cause == cause


def test_breaker_forgets_what_is_older_than_two_windows() -> None:
    breaker = Breaker(0.5, min_events=100)
    observe(breaker, 60, 40)
    for _ in range(50):  # were all of them counted, the share would stay far below
        observe(breaker, 100, 0)
    observe(breaker, 0, 100)
    assert not breaker.is_open  # half of the last 200
    observe(breaker, 0, 100)
    assert breaker.is_open
    assert breaker.cause.startswith("200 of the last 200 ")


def test_breaker_counts_the_bad_of_two_neighboring_windows_together() -> None:
    breaker = Breaker(0.1, min_events=100)
    observe(breaker, 92, 8)
    observe(breaker, 87, 13)
    assert breaker.is_open
    assert breaker.cause.startswith("21 of the last 200 ")


def test_cause_names_the_most_frequent_reason() -> None:
    breaker = Breaker(0.1, min_events=10)
    breaker.observe(2, ["epoch: bad", "seed: bad", "seed: bad", "", "epoch: bad", "seed: bad"])
    breaker.observe(2, [])
    assert breaker.cause == "6 of the last 10 events are bad, 3 of them for: seed: bad"


def test_bad_event_without_a_reason_is_bad_all_the_same() -> None:
    breaker = Breaker(0.1, min_events=10)
    breaker.observe(0, [""] * 10)
    assert breaker.cause == "10 of the last 10 events are bad, 10 of them for: ?"


def test_cause_groups_reasons_that_differ_in_numbers_and_names() -> None:
    breaker = Breaker(0.1, min_events=10)
    breaker.observe(0, [f"occurred_at_ms: {number} is {number}.5 ms ahead of 'd{number}'" for number in range(20)])
    assert breaker.is_open
    assert "20 of the last 20 events are bad, 20 of them for: occurred_at_ms: … is … ms ahead of …" in breaker.cause
