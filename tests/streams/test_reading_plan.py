"""Nothing is held while there is room, what is ahead when it becomes tight, at the limit all but the clicks."""

import pytest
from faust.types import TP

from streams.contracts.topics import CLICKS, IMPRESSIONS
from streams.reading_plan import TIGHT, Reading, places_to_hold

LEAD_MS = 1000
SHOWN, CLICKED = TP(IMPRESSIONS, 3), TP(CLICKS, 3)


def held(
    memory_share: float,
    *,
    lead_of_impressions_ms: int = 0,
    lead_of_clicks_ms: int = 0,
    at_end: frozenset[TP] = frozenset(),
    is_stopped: bool = False,
) -> set[str]:
    """Return the topics that are held of a partition."""
    readings = [
        Reading(SHOWN, lead_of_impressions_ms, CLICKED in at_end),
        Reading(CLICKED, lead_of_clicks_ms, SHOWN in at_end),
    ]
    found = places_to_hold(readings, max_lead_ms=LEAD_MS, memory_share=memory_share, is_stopped=is_stopped)
    return {place.topic for place in found}


def test_nothing_is_held_while_there_is_room() -> None:
    assert held(TIGHT - 0.01, lead_of_impressions_ms=10**9) == set()
    assert held(TIGHT - 0.01, lead_of_clicks_ms=10**9) == set()


@pytest.mark.parametrize("memory_share", [TIGHT, 0.99])
def test_topic_that_is_ahead_waits_for_the_other_when_memory_is_tight(memory_share: float) -> None:
    assert held(memory_share, lead_of_impressions_ms=LEAD_MS) == set()
    assert held(memory_share, lead_of_impressions_ms=LEAD_MS + 1) == {IMPRESSIONS}
    assert held(memory_share, lead_of_clicks_ms=LEAD_MS + 1) == {CLICKS}


def test_topic_that_is_ahead_does_not_wait_for_one_without_more_to_read() -> None:
    assert held(0.9, lead_of_impressions_ms=10**9, at_end=frozenset({CLICKED})) == set()
    assert held(0.9, lead_of_clicks_ms=10**9, at_end=frozenset({SHOWN})) == set()
    assert held(0.9, lead_of_clicks_ms=10**9, at_end=frozenset({CLICKED})) == {CLICKS}


@pytest.mark.parametrize("at_end", [frozenset(), frozenset({SHOWN}), frozenset({CLICKED})])
def test_at_the_limit_only_clicks_that_hold_the_watermark_are_read(at_end: frozenset[TP]) -> None:
    assert held(1.0, lead_of_impressions_ms=5, at_end=at_end) == {IMPRESSIONS}
    assert held(1.0, at_end=at_end) == {IMPRESSIONS}
    assert held(1.0, lead_of_clicks_ms=5, at_end=at_end) == {IMPRESSIONS, CLICKS}


@pytest.mark.parametrize(("clicks_share", "expected"), [(0.4, {IMPRESSIONS, CLICKS}), (0.6, {CLICKS})])
def test_at_the_limit_impressions_are_read_while_only_their_clicks_take_it(
    clicks_share: float, expected: set[str]
) -> None:
    readings = [Reading(SHOWN, 0, False, is_behind=True), Reading(CLICKED, 5, False)]
    found = places_to_hold(readings, max_lead_ms=LEAD_MS, memory_share=1.5, is_stopped=False, clicks_share=clicks_share)
    assert {place.topic for place in found} == expected


@pytest.mark.parametrize("memory_share", [0.0, 0.7, 1.5])
def test_stopped_reading_holds_everything(memory_share: float) -> None:
    assert held(memory_share, is_stopped=True) == {IMPRESSIONS, CLICKS}


def test_partitions_are_judged_one_by_one() -> None:
    readings = [Reading(TP(IMPRESSIONS, number), number * 600, other_is_at_end=False) for number in range(4)]
    found = places_to_hold(readings, max_lead_ms=LEAD_MS, memory_share=0.6, is_stopped=False)
    assert found == {TP(IMPRESSIONS, 2), TP(IMPRESSIONS, 3)}
    assert places_to_hold([], max_lead_ms=0, memory_share=2.0, is_stopped=True) == frozenset()
