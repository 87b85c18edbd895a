"""Updates of a raw log follow from its examples alone."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.contracts.examples import EXAMPLE_SCHEMA, LabelKind, decode_table
from streams.example_spans import SpanCutter, SpanRule, canonical, due_ms
from tests.builders import Labeled, clicked, examples_value, shown

RULE = SpanRule(label_wait_ms=1_000, attribution_window_ms=10_000, span_ms=500, min_examples=3)


def table(*examples: Labeled) -> pa.Table:
    return decode_table(examples_value(examples))


def negative(name: str, time_ms: int, kind: LabelKind = LabelKind.PROVISIONAL) -> Labeled:
    return shown(name, time_ms), kind, None


def positive(name: str, time_ms: int, delay_ms: int, kind: LabelKind = LabelKind.FINAL) -> Labeled:
    return shown(name, time_ms), kind, clicked(name, time_ms + delay_ms, reward=2.0)


def rows(examples: pa.Table) -> list[tuple[Any, ...]]:
    names = ("decision_id", "label", "reward", "label_kind", "delay_ms")
    return sorted(tuple(row[name] for name in names) for row in examples.to_pylist())


def updates(cutter: SpanCutter, until_ms: int | None) -> list[tuple[int, list[str]]]:
    return [(span, examples.column("decision_id").to_pylist()) for span, examples in cutter.updates(until_ms)]


def test_click_after_the_wait_becomes_a_negative_and_a_late_positive() -> None:
    examples = table(positive("early", 100, 1_000), positive("late", 200, 1_001), negative("none", 300))
    assert rows(canonical(examples, RULE)) == [
        ("early", 1, 2.0, "final", 1_000),
        ("late", 0, 0.0, "provisional", None),
        ("late", 1, 2.0, "late_positive", 1_001),
        ("none", 0, 0.0, "provisional", None),
    ]
    assert canonical(examples, RULE).schema == EXAMPLE_SCHEMA


def test_nothing_is_late_where_the_wait_is_the_whole_window() -> None:
    rule = SpanRule(label_wait_ms=10_000, attribution_window_ms=10_000)
    examples = table(positive("a", 100, 9_000))
    assert canonical(examples, rule) is examples


def test_example_is_due_when_a_joiner_without_delay_would_let_it_go() -> None:
    late = LabelKind.LATE_POSITIVE
    examples = table(negative("a", 100), positive("b", 200, 5), positive("c", 300, 4_000, late))
    assert due_ms(examples, RULE).tolist() == [1_100, 1_200, 4_300]


def test_update_takes_whole_spans_until_it_has_enough_in_the_order_of_ids() -> None:
    cutter = SpanCutter(RULE)
    # Due at 1000, 1100 | 1500, 1600 | 2000
    cutter.add(
        table(negative("e", 0), negative("b", 100), negative("d", 500), negative("a", 600), negative("c", 1_000))
    )
    assert updates(cutter, 1_999) == []
    assert updates(cutter, 2_000) == [(3, ["a", "b", "d", "e"])]
    assert updates(cutter, 2_500) == [], "it may still grow"
    assert updates(cutter, None) == [(4, ["c"])]


def test_update_ends_with_an_attribution_window_however_few_it_has() -> None:
    cutter = SpanCutter(RULE)
    cutter.add(table(negative("a", 0), negative("b", 9_400), negative("c", 10_000)))
    # The window of the first, from 1000 to 11000, holds two of them.
    assert updates(cutter, 10_999) == []
    assert updates(cutter, 11_000) == [(20, ["a", "b"])]


def test_negative_stands_before_its_late_positive() -> None:
    rule = SpanRule(label_wait_ms=1_000, attribution_window_ms=10_000, span_ms=5_000, min_examples=1)
    cutter = SpanCutter(rule)
    cutter.add(table(positive("a", 0, 1_500)))
    ((_, examples),) = cutter.updates(None)
    assert examples.column("label").to_pylist() == [0, 1]


def test_example_that_comes_too_late_goes_to_a_later_update_and_is_counted() -> None:
    cutter = SpanCutter(RULE)
    cutter.add(table(*(negative(f"a{i}", i) for i in range(3))))
    assert len(updates(cutter, 5_000)) == 1
    cutter.add(table(negative("b", 0)))
    assert cutter.num_behind == 1
    assert updates(cutter, None) == [(3, ["b"])]


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 5))
def test_portions_and_partitions_do_not_change_the_updates(seed: int, num_partitions: int, min_examples: int) -> None:
    rng = np.random.default_rng(seed)
    rule = SpanRule(label_wait_ms=1_000, attribution_window_ms=10_000, span_ms=700, min_examples=min_examples)
    times = np.sort(rng.integers(0, 20_000, 25))
    late = rng.random(25) < 0.2
    examples = [
        positive(f"{hash((seed, i)) % 997}.{i}", int(t), 1_500) if is_late else negative(f"{i * 7 % 25}.{i}", int(t))
        for i, (t, is_late) in enumerate(zip(times, late, strict=True))
    ]

    whole = SpanCutter(rule)
    whole.add(table(*examples))
    expected = updates(whole, None)

    cutter, found = SpanCutter(rule), []
    partition_N = rng.integers(0, num_partitions, 25)
    for until in range(0, 24_000, 3_000):
        for partition in range(num_partitions):
            due = [
                e
                for e, p in zip(examples, partition_N, strict=True)
                if p == partition and until <= e[0].occurred_at_ms < until + 3_000
            ]
            if due:
                cutter.add(table(*due))
        # Everything that was shown before has been added, and is due a wait later.
        found += updates(cutter, until + 3_000 + 1_000)
    assert found + updates(cutter, None) == expected
    assert cutter.num_behind == 0


@pytest.mark.parametrize("fault", [{"label_wait_ms": 11_000}, {"span_ms": 0}, {"min_examples": 0}])
def test_rule_that_cannot_be_is_refused(fault: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        SpanRule(**{"label_wait_ms": 1_000, "attribution_window_ms": 10_000, **fault})
