"""The audit balances on a loop that works, and shows each kind of fault as an imbalance."""

from collections.abc import Iterable
from typing import Any

import pytest

from genco.audit import AUDITED, Audit
from streams.contracts.codec import END_OF_LOG_MS, encode_batch, encode_mark
from streams.contracts.dead_letters import DeadLetter, encode_replayed
from streams.contracts.examples import LabelKind
from streams.contracts.topics import CLICKS, DEAD_LETTERS, EXAMPLES, IMPRESSIONS
from tests.builders import Labeled, clicked, examples_value, shown

WINDOW, WAIT = 10_000, 2_000
FINAL, PROVISIONAL, LATE = LabelKind.FINAL, LabelKind.PROVISIONAL, LabelKind.LATE_POSITIVE


class Loop:
    """What stands in the topics of a loop; each test breaks one thing in it."""

    def __init__(self) -> None:
        self.impressions = [shown("clicked"), shown("not"), shown("late"), shown("corrected"), shown("not")]
        self.clicks = [
            clicked("clicked"),
            clicked("clicked", 1501),
            clicked("late", 1000 + WINDOW + 1),
            clicked("corrected", 1000 + WINDOW),
            clicked("nobody"),
            clicked("nobody"),
        ]
        self.bad_lines = {IMPRESSIONS: [b"{"], CLICKS: [b"x", b"y"]}
        self.examples: list[tuple[str, LabelKind, int]] = [
            ("clicked", FINAL, 1),
            ("not", PROVISIONAL, 0),
            ("late", PROVISIONAL, 0),
            ("corrected", PROVISIONAL, 0),
            ("corrected", LATE, 1),
        ]
        self.num_dead_letters = 3

    def example(self, decision_id: str, kind: LabelKind, label: int) -> Labeled:
        return shown(decision_id), kind, clicked(decision_id) if label else None

    def records(self) -> Iterable[tuple[str, bytes, Any]]:
        for topic, events in ((IMPRESSIONS, self.impressions), (CLICKS, self.clicks)):
            yield topic, encode_batch(events[:2]), ()
            yield topic, encode_batch(events[2:]) + b"\n".join(self.bad_lines[topic]), ()
            yield topic, *encode_mark(END_OF_LOG_MS)
        for row in self.examples:
            yield EXAMPLES, examples_value([self.example(*row)]), ()
        for _ in range(self.num_dead_letters):
            yield DEAD_LETTERS, b"x", ()

    def ledger(self, *, drained: bool = True, backwards: bool = False) -> dict[str, Any]:
        audit = Audit(WINDOW, WAIT)
        records = list(self.records())
        for offset, (topic, value, headers) in enumerate(reversed(records) if backwards else records):
            audit.feed(topic, 0, offset, value, headers)
        return audit.ledger(drained=drained)


BALANCED = {
    "impressions": {"joined": 2, "expired": 2, "pending": 0, "duplicate": 1, "dead_letter": 1},
    "clicks": {"joined": 2, "pending": 0, "late": 1, "duplicate": 2, "orphan": 1, "dead_letter": 2},
    "imbalance": 0,
}


@pytest.mark.parametrize("backwards", [False, True])
def test_right_loop_balances_in_any_order(backwards: bool) -> None:
    assert Loop().ledger(backwards=backwards) == BALANCED
    assert set(AUDITED) == {IMPRESSIONS, CLICKS, EXAMPLES, DEAD_LETTERS}


def test_examples_written_twice_change_nothing() -> None:
    loop = Loop()
    loop.examples += [*loop.examples, ("corrected", PROVISIONAL, 0)]
    assert loop.ledger() == BALANCED


def test_loop_under_way_has_pending_and_no_imbalance() -> None:
    loop = Loop()
    loop.examples = [("corrected", PROVISIONAL, 0)]
    loop.num_dead_letters = 0
    ledger = loop.ledger(drained=False)
    assert ledger["imbalance"] == 0
    assert ledger["impressions"] == {"joined": 0, "expired": 1, "pending": 3, "duplicate": 1, "dead_letter": 1}


@pytest.mark.parametrize("lost", [0, 1])
def test_lost_example_is_an_imbalance(lost: int) -> None:
    loop = Loop()
    del loop.examples[lost]
    ledger = loop.ledger()
    assert ledger["imbalance"] == 1
    assert ledger["impressions"]["pending"] == 1


def test_lost_late_positive_is_an_imbalance() -> None:
    loop = Loop()
    loop.examples.remove(("corrected", LATE, 1))
    assert loop.ledger()["imbalance"] == 1


def test_click_that_was_lost_on_its_way_through_the_joiner_is_an_imbalance() -> None:
    loop = Loop()
    loop.examples[0] = ("clicked", PROVISIONAL, 0)
    assert loop.ledger()["imbalance"] == 1


@pytest.mark.parametrize("decision_id", ["not", "late"])
def test_positive_without_a_click_in_time_is_an_imbalance(decision_id: str) -> None:
    loop = Loop()
    loop.examples.append((decision_id, LATE, 1))
    assert loop.ledger()["imbalance"] == 1


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("decision_id", ["out of nothing", "nobody"])
def test_example_out_of_nothing_is_an_imbalance(decision_id: str, label: int) -> None:
    loop = Loop()
    loop.examples.append((decision_id, FINAL, label))
    assert loop.ledger()["imbalance"] == 1


@pytest.mark.parametrize("num", [2, 4, 0])
def test_lost_or_invented_dead_letter_is_an_imbalance(num: int) -> None:
    loop = Loop()
    loop.num_dead_letters = num
    assert loop.ledger()["imbalance"] == abs(3 - num)


def test_faults_add_up() -> None:
    loop = Loop()
    loop.examples = [("clicked", PROVISIONAL, 0), ("phantom", FINAL, 1)]
    loop.num_dead_letters = 0
    # a wrong label, three lost examples, a phantom, three lost dead letters
    assert loop.ledger()["imbalance"] == 1 + 3 + 1 + 3


def test_dead_letter_written_again_after_a_crash_is_no_imbalance() -> None:
    loop = Loop()
    loop.bad_lines = {IMPRESSIONS: [b"{"], CLICKS: []}
    audit = Audit(WINDOW, WAIT)
    loop.num_dead_letters = 0
    for offset, (topic, value, headers) in enumerate(loop.records()):
        audit.feed(topic, 0, offset, value, headers)
    origin = [("topic", b"impressions"), ("partition", b"0"), ("offset", b"1"), ("index", b"3")]
    audit.feed(DEAD_LETTERS, 0, 0, b"{", origin)
    audit.feed(DEAD_LETTERS, 0, 1, b"{", origin)
    assert audit.ledger(drained=True)["imbalance"] == 0


def audited_dead_letters(*letters: tuple[bytes, Any]) -> int:
    """Return the imbalance of a loop with three bad lines, of which these letters tell."""
    loop = Loop()
    loop.num_dead_letters = 0
    audit = Audit(WINDOW, WAIT)
    for offset, (topic, value, headers) in enumerate(loop.records()):
        audit.feed(topic, 0, offset, value, headers)
    for offset, (value, headers) in enumerate(letters):
        audit.feed(DEAD_LETTERS, 0, offset, value, headers)
    imbalance: int = audit.ledger(drained=True)["imbalance"]
    return imbalance


def dead_letter(line: bytes, **changes: Any) -> tuple[bytes, list[tuple[str, bytes]]]:
    values = {"partition": 0, "offset": 1, "index": 3, "reason": "r", "length": len(line)} | changes
    return DeadLetter(topic=IMPRESSIONS, line=line, **values).encode()


def test_marks_of_replayed_letters_are_no_dead_letters() -> None:
    letters = [dead_letter(b"x", index=index) for index in range(3)]
    marks = [encode_replayed(offset) for offset in range(3)]
    assert audited_dead_letters(*letters, *marks) == 0
    assert audited_dead_letters(*letters[:2], *marks) == 1


def test_dead_letter_written_again_by_another_version_counts_once() -> None:
    line = b"x" * 5_000
    value, headers = dead_letter(line, reason="in other words")
    others = [dead_letter(line, index=index) for index in (4, 5)]
    old = (line[:4096], [header for header in headers if header[0] != "length"])
    assert audited_dead_letters(dead_letter(line), (value, headers), old, *others) == 0


def test_dead_letters_without_a_place_in_their_record_differ_by_their_lines() -> None:
    skewed = [dead_letter(line, index=-1) for line in (b"a", b"b", b"c", b"a")]
    assert audited_dead_letters(*skewed) == 0
    assert audited_dead_letters(*skewed[1:]) == 0
    assert audited_dead_letters(*skewed[2:]) == 1


# -- freshness ---------------------------------------------------------------------------------------------------------


def audit_of(rows: list[tuple[str, LabelKind, int]], times_ms: list[int], *, partition: int = 0) -> Audit:
    audit = Audit(WINDOW, WAIT)
    for offset, (row, time_ms) in enumerate(zip(rows, times_ms, strict=True)):
        decision_id, kind, label = row
        example = (shown(decision_id, time_ms), kind, clicked(decision_id, time_ms) if label else None)
        audit.feed(EXAMPLES, partition, offset, examples_value([example]))
    return audit


def test_freshness_is_swap_minus_impression_minus_label_wait() -> None:
    audit = audit_of([("a", FINAL, 1)], [1000])
    assert audit.freshness() == {"p50": None, "p95": None}
    audit.feed_swaps([{"swapped_at_ms": 1000 + WAIT + 1500, "trained_through": {"0": 1}}])
    assert audit.freshness() == {"p50": 1.5, "p95": 1.5}


def test_example_counts_at_the_first_swap_that_covers_it() -> None:
    audit = audit_of([("a", FINAL, 1), ("b", PROVISIONAL, 0), ("c", FINAL, 0)], [1000, 2000, 3000])
    swaps = [
        {"swapped_at_ms": 3000 + WAIT, "trained_through": {"0": 1}},  # a alone: 2 s
        {"swapped_at_ms": 6000 + WAIT, "trained_through": {"0": 2, "5": 9}},  # b: 4 s
        {"swapped_at_ms": 7000 + WAIT, "trained_through": {"0": 2}},  # nothing new
    ]
    audit.feed_swaps(swaps)
    assert [group.tolist() for group in audit.freshness_s] == [[2.0], [4.0]]
    audit.feed_swaps(swaps)  # again: changes nothing
    assert [group.tolist() for group in audit.freshness_s] == [[2.0], [4.0]]
    assert audit.freshness() == {"p50": 3.0, "p95": 3.9}
    assert audit.freshness(since=1) == {"p50": 4.0, "p95": 4.0}
    assert audit.freshness(since=2) == {"p50": None, "p95": None}


def test_late_positives_do_not_count_as_stale_examples() -> None:
    audit = audit_of([("a", PROVISIONAL, 0), ("a", LATE, 1)], [1000, 1000])
    audit.feed_swaps([{"swapped_at_ms": 9000 + WAIT, "trained_through": {"0": 2}}])
    assert audit.freshness() == {"p50": 8.0, "p95": 8.0}
    assert sum(len(group) for group in audit.freshness_s) == 1


def test_partitions_have_offsets_of_their_own() -> None:
    audit = audit_of([("a", FINAL, 1)], [1000], partition=3)
    audit.feed_swaps([{"swapped_at_ms": 9000, "trained_through": {"0": 10}}])
    assert audit.freshness() == {"p50": None, "p95": None}
    audit.feed_swaps([{"swapped_at_ms": 1000 + WAIT, "trained_through": {"3": 1}}])
    assert audit.freshness() == {"p50": 0.0, "p95": 0.0}


def test_counts_of_consumed_events_and_kinds() -> None:
    audit = Audit(WINDOW, WAIT)
    for offset, (topic, value, headers) in enumerate(Loop().records()):
        audit.feed(topic, 0, offset, value, headers)
    assert (audit.consumed[IMPRESSIONS], audit.consumed[CLICKS], audit.consumed[EXAMPLES]) == (6, 8, 5)
    assert audit.num_decided == 4
    assert audit.label_kinds == {"final": 1, "provisional": 3, "late_positive": 1}
