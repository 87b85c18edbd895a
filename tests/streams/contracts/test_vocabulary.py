"""No two names share a row, memory is bounded, names in use stay, and a restored vocabulary goes on alike."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from streams.contracts.vocabulary import Vocabulary

NAMES = st.sampled_from([f"n{i}" for i in range(12)])
ROWS = 5


class Against(RuleBasedStateMachine):
    """A vocabulary beside a plain model of it: which names have rows, since when, and which the catalog holds."""

    @initialize(min_seen=st.integers(1, 3))
    def start(self, min_seen: int) -> None:
        self.names = Vocabulary[str](ROWS, min_seen=min_seen)
        self.row_of: dict[str, int] = {}
        self.seen_ms: dict[str, int] = {}
        self.sightings: Counter[str] = Counter()
        self.catalog: set[str] = set()
        self.now_ms = 0

    def free(self) -> list[int]:
        return sorted(set(range(ROWS)) - set(self.row_of.values()))

    @rule(name=NAMES, step=st.integers(0, 3), seen=st.integers(1, 3))
    def sight(self, name: str, step: int, seen: int) -> None:
        self.now_ms += step
        self.sightings[name] += seen
        row = self.names.row(name, self.now_ms, seen=seen)
        if name in self.row_of:
            assert row == self.row_of[name]
        elif row >= 0:
            assert row == self.free()[0]
            assert self.sightings[name] >= self.names.min_seen
            self.row_of[name] = row
        else:
            # 12 names in a table of 5: a count may fall, so enough sightings may be too few; without a filter never.
            assert not self.free() or self.names.min_seen > 1
        if row >= 0:
            self.seen_ms[name] = self.now_ms

    @rule(names=st.sets(NAMES, max_size=4))
    def pin(self, names: set[str]) -> None:
        self.names.pin(sorted(names), self.now_ms)
        for name in sorted(names):
            if name not in self.row_of and self.free():
                self.row_of[name] = self.free()[0]
        self.seen_ms |= {name: self.now_ms for name in self.catalog | names if name in self.row_of}
        self.catalog = {name for name in names if name in self.row_of}

    @rule(rows=st.lists(st.integers(-1, ROWS), max_size=4))
    def touch(self, rows: list[int]) -> None:
        self.names.touch(np.array(rows, np.int64), self.now_ms)
        self.seen_ms |= {name: self.now_ms for name, row in self.row_of.items() if row in rows}

    @rule(age_ms=st.integers(0, 6))
    def expire(self, age_ms: int) -> None:
        freed = self.names.expire(self.now_ms - age_ms)
        old = {n for n in self.row_of if self.seen_ms[n] < self.now_ms - age_ms and n not in self.catalog}
        assert freed == sorted(self.row_of[name] for name in old)
        for name in old:
            del self.row_of[name]
            self.sightings[name] = 0

    @rule()
    def restart(self) -> None:
        state = json.loads(json.dumps(self.names.state()))
        again = Vocabulary[str](ROWS, min_seen=self.names.min_seen)
        again.restore(**state)
        assert again.state() == self.names.state()
        self.names = again

    @invariant()
    def rows_are_those_of_the_model(self) -> None:
        if hasattr(self, "names"):
            want = {row: name for name, row in self.row_of.items()}
            assert {row: name for row, name in enumerate(self.names.names) if name is not None} == want
            assert len(self.names) == len(self.row_of)


Against.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAgainst = Against.TestCase


def test_name_gets_its_row_when_it_was_seen_often_enough() -> None:
    names = Vocabulary[str](3, min_seen=3)
    assert [names.row("a", 0), names.row("a", 0), names.row("a", 0)] == [-1, -1, 0]
    assert names.row("b", 0, seen=3) == 1
    assert names.unknown == {"rare": 2}


def test_names_of_the_catalog_need_no_sightings() -> None:
    names = Vocabulary[str](3, min_seen=3)
    names.pin(["a"], 0)
    assert (names.get("a"), names.get("b")) == (0, -1)


def test_flood_of_junk_moves_nobody_and_is_bounded() -> None:
    names = Vocabulary[str](100, min_seen=3)
    for name in range(60):
        names.row(f"used-{name}", 0, seen=3)
    for number in range(20_000):
        names.row(f"junk-{number}", 1)
        names.row(f"used-{number % 60}", 1)
    assert [names.get(f"used-{name}") for name in range(60)] == list(range(60))
    assert len(names) == 60
    assert len(names.state()["waiting"]) <= 100  # type: ignore[arg-type]
    assert names.unknown["rare"] == 20_000


def test_name_that_is_seen_often_gets_through_a_flood() -> None:
    names = Vocabulary[str](100, min_seen=3)
    rows = []
    for number in range(5_000):
        names.row(f"junk-{number}", 0)
        if number % 20 == 0:  # one in 21, more than one in 101
            rows.append(names.row("new", 0))
    assert rows[-1] == 0
    assert rows.index(0) < 10


def test_full_vocabulary_counts_and_takes_the_next_when_a_row_falls_free() -> None:
    names = Vocabulary[str](2)
    assert [names.row(name, now_ms) for now_ms, name in enumerate("abcb")] == [0, 1, -1, 1]
    assert names.unknown == {"full": 1}
    assert names.expire(before_ms=2) == [0]
    assert names.names == (None, "b")
    assert names.row("c", 5) == 0


def test_name_that_the_catalog_dropped_expires_later() -> None:
    names = Vocabulary[str](2)
    names.pin(["a", "b"], 0)
    assert names.expire(before_ms=1_000) == []
    names.pin(["b"], 2_000)
    assert names.expire(before_ms=2_000) == []
    assert names.expire(before_ms=2_001) == [0]


def test_stored_vocabulary_that_does_not_fit_is_refused() -> None:
    names = Vocabulary[str](3)
    for name in "abc":
        names.row(name, 0)
    with pytest.raises(ValueError, match="3 rows; the limit is 2"):
        Vocabulary[str](2).restore(**names.state())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit is 0"):
        Vocabulary[str](0)


@given(st.lists(st.tuples(NAMES, st.integers(0, 9)), max_size=60))
@settings(max_examples=50, deadline=None)
def test_same_calls_give_the_same_rows(calls: list[tuple[str, int]]) -> None:
    def play() -> dict[str, object]:
        names = Vocabulary[str](4, min_seen=2)
        for name, now_ms in calls:
            names.row(name, now_ms)
            names.expire(now_ms - 5)
        return names.state()

    assert play() == play()
