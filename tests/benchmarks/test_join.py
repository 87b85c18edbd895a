"""The traffic of `genco bench join` is genuine, and its check finds what is missing, doubled or wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.broker import BenchmarkError
from benchmarks.join_check import ExampleCheck, WrongExamplesError
from benchmarks.processes import Sample, steady, watch
from benchmarks.traffic import _KEY, KafkaRecord, Traffic, TrafficOptions
from genco.services import ManagedProcess
from streams.contracts.codec import END_OF_LOG_MS, EventDecoder, encode_batch, mark_of
from streams.contracts.decision_ids import route_of, verify_decision_id
from streams.contracts.events import Click, Impression
from streams.contracts.examples import EXAMPLE_SCHEMA, encode_examples
from streams.contracts.impressions import encode_impressions, is_columnar
from streams.contracts.topics import CLICKS, IMPRESSIONS

FIRST_MS = 1_764_000_000_000
COUNT = 12_000


def traffic(*, columnar: bool = False, varied: bool = False) -> Traffic:
    return Traffic(TrafficOptions(impressions=COUNT, first_ms=FIRST_MS, columnar=columnar, varied=varied))


def decoded(records: Sequence[KafkaRecord], topic: str, kind: Any) -> list[tuple[int, Any]]:
    """Return partition and event of a topic's records, which must hold no bad event."""
    decoder = EventDecoder(kind)
    found = []
    for record in records:
        if record.topic == topic:
            batch = decoder.decode_batch(record.value)
            assert batch.bad == []
            encode = encode_impressions if is_columnar(record.value) else encode_batch
            assert encode(batch.events) == record.value  # what `serving` would have written
            found += [(record.partition, event) for event in batch.events]
    return found


@pytest.mark.parametrize("varied", [False, True])
def test_traffic_is_what_serving_would_write(varied: bool) -> None:
    log = traffic(varied=varied)
    records = list(log.batches())
    impressions = decoded(records, IMPRESSIONS, Impression)
    clicks = decoded(records, CLICKS, Click)
    assert sorted(event.decision_id for _, event in impressions) == sorted(log.ids)
    assert len(set(log.ids)) == COUNT
    for partition, event in (*impressions, *clicks):
        verify_decision_id(event.decision_id, _KEY)
        assert route_of(event.decision_id) % 4 == partition
    for events in (impressions, clicks):
        for p in range(4):
            times = [event.occurred_at_ms for partition, event in events if partition == p]
            assert all(a <= b for a, b in pairwise(times))
    assert 700 < sum(len(r.value) for r in records if r.topic == IMPRESSIONS) / COUNT < 900


def test_columns_hold_the_same_impressions_as_lines() -> None:
    columnar, lines = list(traffic(columnar=True).batches()), list(traffic().batches())
    assert decoded(columnar, IMPRESSIONS, Impression) == decoded(lines, IMPRESSIONS, Impression)
    assert all(is_columnar(record.value) == (record.topic == IMPRESSIONS) for record in columnar)


def test_clicks_come_seconds_later_and_some_too_late() -> None:
    log = traffic()
    share = len(log.clicked) / COUNT
    assert 0.01 < share < 0.03
    assert 0.1 < (log.delays_ms > 5_000).mean() < 0.3
    assert 0 < log.joined(5_000).sum() < log.joined(30_000).sum() <= len(log.clicked)


def test_candidates_repeat_unless_they_are_varied() -> None:
    def num_lists(log: Traffic) -> int:
        impressions = decoded(list(log.batches()), IMPRESSIONS, Impression)
        return len({tuple(event.candidates["title"]) for _, event in impressions})

    assert num_lists(traffic()) <= 200
    assert num_lists(traffic(varied=True)) == COUNT


def test_the_same_options_give_the_same_log() -> None:
    assert list(traffic().batches()) == list(traffic().batches())


def test_log_ends_in_every_partition_of_both_topics() -> None:
    marks = list(traffic().end_marks())
    assert {(mark.topic, mark.partition) for mark in marks} == {(t, p) for t in (IMPRESSIONS, CLICKS) for p in range(4)}
    assert all(mark_of(mark.headers) == END_OF_LOG_MS for mark in marks)


def test_single_events_are_those_of_the_batches_with_key_and_time() -> None:
    log = traffic()
    batched = [(r.topic, line) for r in log.batches() for line in r.value.splitlines()]
    single = list(log.single_events(IMPRESSIONS, CLICKS))
    assert sorted((r.topic, r.value) for r in single) == sorted(batched)
    event = EventDecoder(Impression).decode_batch(single[5].value).events[0]
    assert (single[5].key, single[5].timestamp_ms) == (event.decision_id.encode(), event.occurred_at_ms)


IDS = [f"1.{number:020x}.0" for number in range(4)]
JOINED = np.array([False, True, True, False])
# Decision 2 is corrected: its click came after the label wait.
GOOD = [(0, 0, "provisional"), (1, 1, "final"), (2, 0, "provisional"), (3, 0, "final"), (2, 1, "late_positive")]


def examples(rows: Sequence[tuple[int, int, str]]) -> bytes:
    impression = decoded(list(traffic().batches())[:1], IMPRESSIONS, Impression)[0][1]
    columns: dict[str, list[Any]] = {
        name: [getattr(impression, name, None)] * len(rows) for name in EXAMPLE_SCHEMA.names
    }
    columns["decision_id"] = [IDS[number] if number < len(IDS) else "1.unknown.0" for number, _, _ in rows]
    columns["context"] = ["{}"] * len(rows)
    columns["label"] = [label for _, label, _ in rows]
    columns["reward"] = [float(label) for _, label, _ in rows]
    columns["label_kind"] = [kind for _, _, kind in rows]
    columns["delay_ms"] = [6_000 if label else None for _, label, _ in rows]
    return encode_examples(columns)


def verdict(rows: Sequence[tuple[int, int, str]]) -> tuple[int, int, int]:
    check = ExampleCheck(IDS, JOINED)
    check.add(examples(rows[:2]))
    check.add(examples(rows[2:]))
    found = check.verdict()
    return found.first_labels, found.positives, found.corrections


def test_check_counts_what_is_right() -> None:
    assert verdict(GOOD) == (4, 2, 1)


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        (GOOD[:3] + GOOD[4:], "1 have no example"),
        ([*GOOD, GOOD[0]], "1 have more than one first label"),
        (GOOD[:4], "1 were clicked within the window and have no positive"),
        ([*GOOD, (0, 1, "late_positive")], "1 are positive without a click"),
        ([*GOOD, (2, 1, "late_positive")], "1 have more than one positive"),
        ([*GOOD, (0, 0, "late_positive")], "1 have a correction that is no positive"),
        ([*GOOD, (4, 0, "final")], "never sent"),
    ],
)
def test_check_finds_what_is_wrong(rows: Sequence[tuple[int, int, str]], fault: str) -> None:
    with pytest.raises(WrongExamplesError, match=fault):
        verdict(rows)


def test_check_refuses_what_is_no_example() -> None:
    with pytest.raises(WrongExamplesError, match="cannot be read"):
        ExampleCheck(IDS, JOINED).add(b"nothing")


def test_steady_rate_leaves_out_the_start() -> None:
    samples = [Sample(0.0, 0), Sample(5.0, 100, 2.0), Sample(6.0, 400, 2.5), Sample(7.0, 900, 3.0), Sample(8.0, 900, 3)]
    found = steady(samples)
    assert (found.rate, found.seconds, found.done, found.cpu_s) == (400.0, 2.0, 800, 1.0)


def test_work_between_two_looks_is_measured_from_the_first() -> None:
    assert steady([Sample(0.0, 0), Sample(3.0, 0), Sample(4.0, 100)]).rate == 25.0


def test_work_before_the_first_look_is_no_rate() -> None:
    with pytest.raises(BenchmarkError, match="more --impressions"):
        steady([Sample(0.0, 100)])


@pytest.mark.parametrize(
    ("code", "message"), [("print('I give up')", "ended with code 0.*I give up"), ("input()", "no progress")]
)
def test_process_that_ends_or_stalls_is_told(code: str, message: str, tmp_path: Path) -> None:
    process = ManagedProcess("it", [sys.executable, "-c", code], log_path=tmp_path / "log", hold_stdin=True)
    with process, pytest.raises(BenchmarkError, match=message):
        watch(process, lambda: Sample(0.0, 1), 2, every_s=0.01, stall_s=1.0)


def test_too_few_impressions_are_refused() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "genco", "bench", "join", "--impressions", "10"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert "2000" in result.stderr
