"""Examples leave with the right labels, in records that a broker takes, and what they take in memory is counted."""

import random
import string
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streams.attribution import Output, PartitionJoiner, Record
from streams.contracts.codec import END_OF_LOG_MS, encode_batch
from streams.contracts.events import Click, Impression
from streams.contracts.examples import NO_DELAY, LabelKind, decode_examples
from streams.contracts.impressions import encode_impressions
from streams.contracts.settings import JoinSettings
from streams.contracts.topics import IMPRESSIONS
from streams.event_clock import JOIN_TOPICS, JoinTopic
from streams.example_records import EXAMPLES_PER_RECORD, RECORD_BYTES, ExampleRecord, LatePositives
from streams.impressions import CandidatesShelf, ImpressionBatch, ImpressionDecoder
from tests.builders import clicked, shown

FINAL, PROVISIONAL = LabelKind.FINAL, LabelKind.PROVISIONAL
WINDOW, WAIT = 10_000, 2_000
BROKER_BYTES = 2**20 - 1024
"""What a record may have with its headers, if nobody told the broker otherwise."""


def join_settings(**changes: Any) -> JoinSettings:
    values = {"attribution_window_ms": WINDOW, "label_wait_ms": WAIT, "idle_timeout_ms": 0}
    return JoinSettings(kafka_bootstrap_servers="localhost:9092", **values | changes)


SETTINGS = join_settings()
FINAL_SETTINGS = join_settings(label_wait_ms=WINDOW)


def record_of(
    events: Sequence[Impression], clicks: Iterable[Click] = (), kind: LabelKind = PROVISIONAL
) -> ExampleRecord:
    """Return the one record in which these leave."""
    joiner = PartitionJoiner(FINAL_SETTINGS if kind is FINAL else SETTINGS)
    batch, bad = ImpressionDecoder().decode(encode_batch(events))
    assert bad == []
    joiner.add(Record(0, 10**6, batch), 0)
    joiner.add(Record(0, 10**6, list(clicks)), 0)
    joiner.add(Record(1, 0, ImpressionBatch.empty(), [], 10**6), 0)
    joiner.add(Record(1, 0, [], [], 10**6), 0)
    joiner.advance({})
    output = joiner.take_output()
    assert output is not None
    (record,) = output.records
    return record


Labels = list[tuple[str, str, int, float, int | None]]


def labels(value: bytes) -> Labels:
    """Return id, kind, label, reward and delay of each example of a record."""
    found = decode_examples(value)
    return [
        (id_, kind, label, reward, None if delay == NO_DELAY else delay)
        for id_, kind, label, reward, delay in zip(
            found.decision_id,
            found.label_kind,
            found.label.tolist(),
            found.reward.tolist(),
            found.delay_ms.tolist(),
            strict=True,
        )
    ]


def late_labels(late: LatePositives, shelf: CandidatesShelf) -> list[Labels]:
    records = []
    for number, value in late.encode(shelf):
        records.append(labels(value))
        assert len(records[-1]) == number
    return records


# -- labels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PROVISIONAL, FINAL])
def test_record_decodes_to_the_labels_of_its_clicks(kind: LabelKind) -> None:
    events = [shown(id_, 1000 + place) for place, id_ in enumerate("abcd")]
    record = record_of(events, [clicked("d", 1503, reward=0.0), clicked("b", 801, reward=2.5)], kind)
    assert (len(record), record.num_positive, record.clicked) == (4, 2, {1, 3})
    assert labels(record.encode(CandidatesShelf())) == [
        ("a", kind.value, 0, 0.0, None),
        ("b", "final", 1, 2.5, -200),  # its click came before it: two clocks
        ("c", kind.value, 0, 0.0, None),
        ("d", "final", 1, 0.0, 500),  # a click is one whatever it is worth
    ]


def test_record_keeps_everything_that_its_impressions_say() -> None:
    events = [
        shown(
            str(number),
            1000 + number,
            product_id=f"p{number}",
            context={"n": number, "x": 0.5, "yes": True, "text": "é:"},
            candidates={"title": ["t1", f"t{number}"], "image": ["i"]},
            creative={"title": f"t{number}", "image": "i"},
            slot_propensities={"title": 0.5, "image": 0.25},
            propensity=0.125,
            model_id="m",
            epoch=number,
            policy_version=2 * number,
            source="uniform",
            holdout=number % 2 == 0,
            seed=2**63 - 1 - number,
            survival_probability=0.75,
        )
        for number in range(3)
    ]
    found = decode_examples(record_of(events).encode(CandidatesShelf()))
    for name in Impression.__struct_fields__:
        if name != "schema_version":
            column = getattr(found, name)
            values = column if isinstance(column, list) else column.tolist()
            assert values == [getattr(event, name) for event in events], name


def test_record_is_encoded_once_and_gives_its_columns_away() -> None:
    record = record_of([shown(str(number)) for number in range(200)])
    shelf = CandidatesShelf()
    before = record.num_bytes
    assert record.counted_bytes == before
    value = record.encode(shelf)
    assert record.encode(shelf) is value
    assert record.num_bytes < before
    assert record.num_bytes >= len(value)
    assert record.counted_bytes == before  # its owner's to change


def test_row_of_a_key_is_found() -> None:
    record = record_of([shown("a"), shown("b")])
    assert [record.row_of(key) for key in reversed(record.keys.tolist())] == [1, 0]


# -- late positives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_encoded", [True, False])
def test_late_positives_are_the_rows_of_their_clicks(is_encoded: bool) -> None:
    shelf = CandidatesShelf()
    first = record_of([shown(id_, 1000) for id_ in "abc"], [clicked("a", 1100)])
    second = record_of([shown(id_, 2000, context={"of": id_}) for id_ in "de"])
    if is_encoded:
        for record in (first, second):
            record.encode(shelf)
    late = LatePositives()
    assert not late
    for record, row, click in ((first, 2, clicked("c", 5000, reward=3)), (second, 1, clicked("e", 1900)),
                               (first, 1, clicked("b", 7000))):  # fmt: skip
        late.add(record, row, click)
    assert len(late) == 3
    assert late_labels(late, shelf) == [
        [
            ("c", "late_positive", 1, 3.0, 4000),
            ("b", "late_positive", 1, 1.0, 6000),
            ("e", "late_positive", 1, 1.0, -100),
        ]
    ]
    ((_, value),) = late.encode(shelf)
    assert decode_examples(value).context == [{}, {}, {"of": "e"}]
    assert labels(first.encode(shelf))[0] == ("a", "final", 1, 1.0, 100)  # the record itself stays as it was


def test_late_positives_of_many_records_are_split_at_the_number_of_examples() -> None:
    late = LatePositives()
    each = EXAMPLES_PER_RECORD // 2
    for number in range(3):
        record = record_of([shown(f"{number}-{row}") for row in range(each)])
        for row in range(each):
            late.add(record, row, clicked(f"{number}-{row}"))
    found = late_labels(late, CandidatesShelf())
    assert [len(record) for record in found] == [2 * each, each]
    assert [entry[0] for record in found for entry in record] == [f"{n}-{row}" for n in range(3) for row in range(each)]


def large(id_: str, time_ms: int, num_bytes: int, *, length: int = 60, **changes: Any) -> Impression:
    """Return an impression whose candidates take about so many bytes and cannot be compressed."""
    rng = random.Random(id_)
    elements: list[str] = []
    for _ in range(num_bytes // (length + 3)):
        elements.append("".join(rng.choices(string.ascii_letters + string.digits, k=length)))
    slots = {f"slot-{start}": elements[start : start + 1000] for start in range(0, len(elements), 1000)}
    creative = {slot: found[0] for slot, found in slots.items()}
    return shown(
        id_, time_ms, candidates=slots, creative=creative, slot_propensities=dict.fromkeys(slots, 1.0), **changes
    )


def test_late_positives_of_many_records_are_split_at_their_bytes() -> None:
    late = LatePositives()
    for number in range(5):
        late.add(record_of([large(str(number), 1000, RECORD_BYTES // 4)]), 0, clicked(str(number)))
    values = list(late.encode(CandidatesShelf()))
    assert [number for number, _ in values] == [3, 2]  # a little more than a fourth each
    assert max(len(value) for _, value in values) <= BROKER_BYTES


def test_late_positive_that_is_too_large_for_others_goes_alone() -> None:
    late = LatePositives()
    for number, size in enumerate((1000, 240_000, 240_000, 240_000, 240_000, 1000)):
        late.add(record_of([large(str(number), 1000, size)]), 0, clicked(str(number)))
    assert [[entry[0] for entry in record] for record in late_labels(late, CandidatesShelf())] == [
        ["0", "1", "2", "3"],
        ["4", "5"],
    ]


# -- as the joiner makes them ------------------------------------------------------------------------------------------


class Bench:
    """A joiner, and the outputs that it made."""

    def __init__(self, encode: Callable[[Sequence[Any]], bytes] = encode_batch) -> None:
        self.encode = encode
        self.joiner = PartitionJoiner(SETTINGS)
        self.decoder = ImpressionDecoder()
        self.shelf = CandidatesShelf()
        self.outputs: list[Output] = []
        self.offset = 0

    def add(self, topic: JoinTopic, events: Iterable[Impression | Click] = (), *, mark_ms: int | None = None) -> None:
        events = list(events)
        batch: Any = events
        if topic == IMPRESSIONS:
            batch, bad = self.decoder.decode(self.encode(events)) if events else (ImpressionBatch.empty(), [])
            assert bad == []
        self.joiner.add(Record(self.offset, 10**6, batch, [], mark_ms), 0)
        self.offset += 1

    def mark(self, time_ms: int) -> None:
        for topic in JOIN_TOPICS:
            self.add(topic, mark_ms=time_ms)

    def take(self) -> list[bytes]:
        """Return the values of the next output."""
        self.joiner.advance({})
        output = self.joiner.take_output()
        if output is None:
            return []
        self.outputs.append(output)
        values = [record.encode(self.shelf) for record in output.records]
        return values + [value for _, value in output.late.encode(self.shelf)]


def ids_of(values: Iterable[bytes]) -> list[str]:
    return [id_ for value in values for id_ in decode_examples(value).decision_id]


def check_large(batches: Sequence[Sequence[Impression]]) -> list[bytes]:
    """Let impressions leave and be clicked late; every record must be one that a broker takes, and none be missing."""
    in_columns = check_large_as(encode_impressions, batches)
    return check_large_as(encode_batch, batches) + in_columns


def check_large_as(encode: Callable[[Sequence[Any]], bytes], batches: Sequence[Sequence[Impression]]) -> list[bytes]:
    bench = Bench(encode)
    for events in batches:
        bench.add(IMPRESSIONS, events)
    everything = sorted(event.decision_id for events in batches for event in events)
    bench.mark(9_000)
    first = bench.take()
    assert sorted(ids_of(first)) == everything
    bench.add("clicks", [clicked(event.decision_id, 8_000) for events in batches for event in events])
    late = bench.take()
    assert sorted(ids_of(late)) == everything
    for value in first + late:
        assert len(value) <= BROKER_BYTES
    for record in bench.outputs[0].records:
        assert len(record) <= EXAMPLES_PER_RECORD
        assert record.times_ms.tolist() == decode_examples(record.encode(bench.shelf)).occurred_at_ms.tolist()
    return first


def test_records_of_large_candidates_are_small_enough_for_a_broker() -> None:
    values = check_large([[large(f"{k}-{i}", 1000 + i, 110_000) for i in range(7)] for k in range(2)])
    assert len(values) >= 4


def test_records_of_many_short_element_ids_are_small_enough_for_a_broker() -> None:
    # In Arrow they take a fourth more than in JSON.
    check_large([[large(f"{k}-{i}", 1000 + i, 120_000, length=1) for i in range(4)] for k in range(4)])


def test_records_of_rows_of_very_different_sizes_are_small_enough_for_a_broker() -> None:
    check_large(
        [
            [large(f"{k}-{i}", 1000, 120_000) for i in range(6)] + [shown(f"{k}-s{i}", 1001) for i in range(150)]
            for k in range(2)
        ]
    )


def test_records_of_very_different_contexts_are_small_enough_for_a_broker() -> None:
    rng = random.Random(7)

    def context() -> dict[str, str]:
        return {f"{n}": "".join(rng.choices(string.ascii_letters, k=256)) for n in range(64)}

    check_large(
        [
            [shown(f"{k}-{i}", 1000, context=context()) for i in range(40)]
            + [shown(f"{k}-s{i}", 1001) for i in range(300)]
            for k in range(3)
        ]
    )


def test_split_record_keeps_rows_clicks_and_order_together() -> None:
    bench = Bench()
    for k in range(2):
        events = [large(f"{k}-{i}", 1000 + i, 120_000) for i in range(6)]
        bench.add(IMPRESSIONS, [*events, *[shown(f"{k}-s{i}", 1010 + i) for i in range(150)]])
    names = [f"{k}-{i}" for k in range(2) for i in (0, 3, 5)] + ["0-s7", "1-s149"]
    bench.add("clicks", [clicked(name, 1200, reward=place) for place, name in enumerate(names)])
    bench.mark(4_000)
    found = [entry for value in bench.take() for entry in labels(value)]
    assert {name: reward for name, _, label, reward, _ in found if label} == {
        name: float(place) for place, name in enumerate(names)
    }
    assert len(found) == len({entry[0] for entry in found}) == 312
    ledger = bench.joiner.ledger()
    assert (ledger.impressions["joined"], ledger.impressions["expired"]) == (8, 304)
    assert ledger.imbalance == 0


def test_record_holds_no_more_than_its_number_of_examples() -> None:
    bench = Bench()
    for k in range(3):
        bench.add(IMPRESSIONS, [shown(f"{k}-{i}", 1000 + i) for i in range(EXAMPLES_PER_RECORD - 100)])
    bench.mark(4_000)
    values = bench.take()
    assert [len(decode_examples(value)) for value in values] == [EXAMPLES_PER_RECORD, EXAMPLES_PER_RECORD, 200]


# -- memory ------------------------------------------------------------------------------------------------------------


def test_memory_grows_with_what_is_open_and_shrinks_when_it_is_encoded() -> None:
    bench = Bench()
    assert bench.joiner.num_bytes == 0
    bench.add(IMPRESSIONS, [large(str(i), 1000, 5_000) for i in range(20)])
    waiting = bench.joiner.num_bytes
    assert waiting > 20 * 5_000
    bench.mark(4_000)
    bench.take()
    assert bench.joiner.num_bytes <= 1.01 * waiting  # an output that nobody has acknowledged may not be encoded yet
    bench.joiner.acknowledge(1)
    (record,) = bench.outputs[0].records
    assert bench.joiner.num_bytes == record.counted_bytes == record.num_bytes
    bench.mark(30_000)
    bench.joiner.advance({})
    assert bench.joiner.num_bytes == 0


def test_waiting_click_takes_memory_until_its_window_has_passed() -> None:
    bench = Bench()
    bench.add("clicks", [clicked("a", 1000), clicked("b", 1000)])
    one = bench.joiner.num_bytes / 2
    assert one > 0
    bench.add(IMPRESSIONS, [shown("a", 1000)])
    with_impression = bench.joiner.num_bytes
    assert with_impression != 2 * one
    bench.mark(12_000)
    bench.take()
    assert bench.joiner.num_bytes == 0


steps = st.lists(
    st.one_of(
        st.tuples(st.just("show"), st.integers(0, 40), st.integers(1, 30)),
        st.tuples(st.just("click"), st.integers(0, 40), st.integers(0, 200)),
        st.tuples(st.just("mark"), st.integers(0, 60), st.just(0)),
        st.tuples(st.just("take"), st.just(0), st.just(0)),
        st.tuples(st.just("encode"), st.just(0), st.just(0)),
        st.tuples(st.just("acknowledge"), st.just(0), st.integers(1, 2)),
    ),
    max_size=40,
)


@settings(max_examples=200)
@given(steps, st.booleans())
# Closed between its encoding and its acknowledgement; and before both.
@example([("show", 1, 30), ("mark", 9, 0), ("take", 0, 0), ("encode", 0, 0), ("mark", 60, 0), ("take", 0, 0)], True)
@example([("show", 1, 30), ("mark", 9, 0), ("take", 0, 0), ("mark", 60, 0), ("take", 0, 0), ("encode", 0, 0)], True)
def test_memory_is_back_at_nothing_when_all_is_closed_and_acknowledged_in_any_order(
    steps: list[tuple[str, int, int]], acknowledge_before_the_end: bool
) -> None:
    bench = Bench()
    joiner, count, acknowledged = bench.joiner, 0, 0
    unencoded: list[Output] = []
    for action, time_s, number in steps:
        match action:
            case "show":
                count += number
                bench.add(IMPRESSIONS, [shown(f"{count - i}", time_s * 500 + i) for i in range(number)])
            case "click":
                bench.add("clicks", [clicked(f"{number}", time_s * 500)])
            case "mark":
                bench.mark(time_s * 500)
            case "take":
                joiner.advance({})
                if (output := joiner.take_output()) is not None:
                    unencoded.append(output)
            case "encode":
                for output in unencoded:
                    for record in output.records:
                        record.encode(bench.shelf)
                unencoded.clear()
            case "acknowledge" if not unencoded and joiner._unacknowledged:
                acknowledged = min(acknowledged + number, joiner._unacknowledged[-1].number)
                joiner.acknowledge(acknowledged)
        assert joiner.num_bytes >= 0
        assert (joiner.num_bytes > 0) == (joiner.num_open > 0)

    def acknowledge_all() -> None:
        joiner.advance({})
        if (output := joiner.take_output()) is not None:
            unencoded.append(output)
        for output in unencoded:
            for record in output.records:
                record.encode(bench.shelf)
        unencoded.clear()
        if joiner._unacknowledged:
            joiner.acknowledge(joiner._unacknowledged[-1].number)

    if acknowledge_before_the_end:
        acknowledge_all()
    bench.mark(END_OF_LOG_MS)
    assert (joiner.num_bytes, joiner.num_open) == (0, 0)
    acknowledge_all()
    assert (joiner.num_bytes, joiner.num_open) == (0, 0)
    assert not joiner._unacknowledged
