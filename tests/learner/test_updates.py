"""The backlog: whole records, in order, and the same bounds give the same examples."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.updates import Backlog, PendingRecord, Update, concat, effective, in_order
from streams.contracts.examples import EXAMPLE_SCHEMA, ExampleBatch, decode_examples, encode_examples
from tests.builders import changed


def batch(num: int, name: str = "d") -> ExampleBatch:
    columns: dict[str, list[object]] = {}
    for field in EXAMPLE_SCHEMA:
        kind = str(field.type)
        value: object = "x" if kind == "string" else {} if kind.startswith("map") else 1
        columns[field.name] = [value] * num
    columns["decision_id"] = [f"{name}-{n}" for n in range(num)]
    columns["context"] = ["{}"] * num
    columns["propensity"] = columns["survival_probability"] = columns["reward"] = [1.0] * num
    columns["holdout"] = [False] * num
    return decode_examples(encode_examples(columns))


BATCHES = [batch(num) for num in range(6)]


def record(partition: int, offset: int, num: int = 2) -> PendingRecord:
    return PendingRecord(partition, offset, BATCHES[num])


def backlog(*records: PendingRecord, learned_until: dict[int, int] | None = None) -> Backlog:
    made = Backlog(learned_until or {})
    for item in records:
        made.add(item)
    return made


def places(records: list[PendingRecord]) -> list[tuple[int, int]]:
    return [(item.partition, item.offset) for item in records]


def test_partition_that_was_never_learned_may_begin_anywhere() -> None:
    made = backlog(record(0, 17))
    assert made.next_offset == {0: 18}
    assert made.num_examples == 2


def test_next_record_must_have_the_next_offset() -> None:
    made = backlog(record(0, 5), learned_until={0: 5, 1: 3})
    for offset in (5, 4, 7):
        with pytest.raises(ValueError, match=rf"examples\[0\]: offset {offset} came; expected 6"):
            made.add(record(0, offset))
    with pytest.raises(ValueError, match=r"examples\[1\]: offset 0 came; expected 3"):
        made.add(record(1, 0))
    made.add(record(0, 6))
    assert (made.num_examples, made.next_offset) == (4, {0: 7, 1: 3})


def test_backlog_does_not_change_the_offsets_it_was_given() -> None:
    learned = {0: 5}
    made = backlog(record(0, 5), learned_until=learned)
    assert learned == {0: 5}
    made.clear(learned)
    made.add(record(0, 5))
    assert learned == {0: 5}


def test_bounds_take_whole_records_of_the_partitions_in_turn() -> None:
    made = backlog(*(record(p, o) for p in (1, 0) for o in (10, 11, 12)))
    assert made.bounds(1) == {0: 11}
    assert made.bounds(2) == {0: 11}
    assert made.bounds(3) == {0: 11, 1: 11}
    assert made.bounds(5) == {0: 12, 1: 11}
    assert made.bounds(1000) == {0: 13, 1: 13}
    assert made.num_examples == 12  # asking takes nothing


def test_bounds_of_nothing_are_empty() -> None:
    assert Backlog({0: 7}).bounds(100) == {}
    made = backlog(record(0, 0))
    assert made.bounds(0) == {}
    made.take({0: 1})
    assert made.bounds(100) == {}


def test_bounds_pass_over_records_without_examples() -> None:
    # A record that could not be read is in the log as an empty one: an update must go past it.
    made = backlog(record(0, 0, 0), record(0, 1, 0), record(0, 2, 1))
    assert made.bounds(1) == {0: 3}
    assert backlog(record(0, 0, 0)).bounds(10) == {0: 1}


def test_take_returns_the_records_before_the_bounds_by_partition_and_offset() -> None:
    made = backlog(*(record(p, o) for p in (2, 0, 1) for o in (0, 1, 2)))
    assert places(made.take({2: 1, 0: 2})) == [(0, 0), (0, 1), (2, 0)]
    assert made.num_examples == 12
    assert places(made.take({2: 1, 0: 2})) == []
    assert made.bounds(10**6) == {0: 3, 1: 3, 2: 3}
    assert places(made.take({7: 5})) == []


def test_holds_says_whether_everything_before_is_here_or_learned() -> None:
    made = backlog(record(0, 5), learned_until={0: 5, 1: 9})
    assert made.holds({})
    assert made.holds({0: 6, 1: 9})
    assert not made.holds({0: 7})
    assert not made.holds({0: 6, 1: 10})
    assert not made.holds({2: 1})
    made.take({0: 6})
    assert made.holds({0: 6})


def test_skip_goes_on_at_another_offset() -> None:
    made = backlog(record(0, 0))
    made.skip_to(0, 50)
    with pytest.raises(ValueError, match="expected 50"):
        made.add(record(0, 1))
    made.add(record(0, 50))
    assert places(made.take({0: 51})) == [(0, 0), (0, 50)]


def test_clear_forgets_what_waits() -> None:
    made = backlog(record(0, 0), record(1, 0))
    made.clear({0: 0})
    assert (made.num_examples, made.bounds(10), made.next_offset) == (0, {}, {0: 0})
    made.add(record(0, 0))
    assert made.num_examples == 2


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=30),
    st.lists(st.integers(1, 12), min_size=1, max_size=30),
)
def test_updates_cover_every_record_once_in_order(sizes: list[tuple[int, int]], limits: list[int]) -> None:
    made = Backlog({})
    expected: dict[int, list[int]] = {}
    for partition, num in sizes:
        offset = len(expected.setdefault(partition, []))
        expected[partition].append(offset)
        made.add(record(partition, offset, num))
    got: dict[int, list[int]] = {}
    for limit in [*limits, 10**6]:
        until = made.bounds(limit)
        assert made.holds(until)
        taken = made.take(until)
        total = sum(len(item.examples) for item in taken)
        assert total < limit + 5  # by less than one record more
        for item in taken:
            got.setdefault(item.partition, []).append(item.offset)
    assert got == expected
    assert made.num_examples == 0


def test_concat_joins_what_there_is() -> None:
    assert concat([]) is None
    assert concat([record(0, 0, 0)]) is None
    joined = concat([PendingRecord(0, 0, batch(2, "a")), record(0, 1, 0), PendingRecord(1, 0, batch(1, "b"))])
    assert joined is not None
    assert joined.decision_id == ["a-0", "a-1", "b-0"]


def test_update_survives_the_topic() -> None:
    update = Update(number=3, until={0: 5, 11: 2**40}, catalog_until=7)
    assert Update.from_bytes(update.model_dump_json().encode()) == update
    known = b'{"number":1,"until":{"0":1},"catalog_until":0,"future":true}'
    assert Update.from_bytes(known) == Update(number=1, until={0: 1}, catalog_until=0)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"x",
        b"\xff",
        b"[]",
        b"{}",
        b'{"number":0,"until":{},"catalog_until":0}',
        b'{"number":1,"until":{"0":-1},"catalog_until":0}',
        b'{"number":1,"until":{"a":1},"catalog_until":0}',
        b'{"number":1,"until":{"0":1}}',
    ],
)
def test_what_is_no_update_is_refused(value: bytes) -> None:
    with pytest.raises(ValueError, match="not a record of the topic updates"):
        Update.from_bytes(value)


def test_update_of_another_schema_version_is_refused() -> None:
    with pytest.raises(ValueError, match="not a record"):
        Update.from_bytes(b'{"schema_version":2,"number":1,"until":{"0":1},"catalog_until":0}')


def update(number: int, epoch: int) -> Update:
    return Update(number=number, until={0: number}, catalog_until=0, epoch=epoch)


def numbers(updates: list[Update]) -> list[tuple[int, int]]:
    return [(found.number, found.epoch) for found in updates]


def test_what_a_learner_recorded_after_its_successor_does_not_count() -> None:
    recorded = [update(1, 1), update(2, 2), update(2, 1), update(3, 1), update(3, 2)]
    assert numbers(effective(recorded)) == [(1, 1), (2, 2), (3, 2)]


def test_what_a_successor_has_not_seen_is_replaced_by_its_own() -> None:
    # It began after update 1; the paused learner woke up and recorded 2 and 3 before the successor's first.
    recorded = [update(1, 1), update(2, 1), update(3, 1), update(2, 2), update(3, 2)]
    assert numbers(effective(recorded)) == [(1, 1), (2, 2), (3, 2)]


def test_epoch_before_the_first_one_read_is_known() -> None:
    assert numbers(effective([update(5, 1), update(5, 2)], epoch=2)) == [(5, 2)]


def test_update_of_an_earlier_release_has_no_epoch_and_no_count() -> None:
    old = Update.from_bytes(b'{"schema_version": 1, "number": 3, "until": {"0": 7}, "catalog_until": 2}')
    assert (old.epoch, old.num_examples) == (0, None)
    assert effective([old]) == [old]


def test_count_is_what_take_will_return() -> None:
    waiting = backlog(record(0, 0, 3), record(0, 1, 2), record(1, 0, 5))
    until = {0: 1, 1: 1, 2: 4}
    assert waiting.count(until) == 8 == sum(len(item.examples) for item in waiting.take(until))
    assert waiting.count({0: 2}) == 2


def test_examples_stand_in_the_order_of_decision_id_a_negative_first() -> None:
    found = ExampleBatch.concat([batch(2, "b"), batch(3, "a"), batch(2, "b")])
    ordered = in_order(changed(found, label={0: 1, 1: 1, 5: 0, 6: 0}))
    assert list(ordered.decision_id) == ["a-0", "a-1", "a-2", "b-0", "b-0", "b-1", "b-1"]
    assert ordered.label.tolist()[3:] == [0, 1, 0, 1]
