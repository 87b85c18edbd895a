"""Impressions in columns are those that the careful decoder reads, and whatever it refuses is refused."""

import json
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streams.attribution import PartitionJoiner, Record
from streams.contracts.codec import (
    END_OF_LOG_MS,
    MAX_BATCH_EVENTS,
    MAX_LINE_BYTES,
    BadEvent,
    EventDecoder,
    encode_batch,
    encode_event,
)
from streams.contracts.events import Impression
from streams.contracts.examples import EXAMPLE_SCHEMA, LabelKind, decode_examples
from streams.contracts.settings import JoinSettings
from streams.impressions import Candidates, CandidatesCache, CandidatesShelf, ImpressionBatch, ImpressionDecoder
from tests.builders import examples_value, shown
from tests.strategies import identifiers, impressions

SETTINGS = JoinSettings(kafka_bootstrap_servers="localhost:9092", idle_timeout_ms=0)
EXACT = EventDecoder(Impression)
TWO_SLOTS: dict[str, Any] = {
    "candidates": {"title": ["t1", "t2"], "image": ["i1", "i9"]},
    "creative": {"title": "t2", "image": "i9"},
    "slot_propensities": {"title": 0.5, "image": 0.25},
    "propensity": 0.125,
}


def raw(**changes: Any) -> dict[str, Any]:
    """Return an impression as JSON writes it."""
    found: dict[str, Any] = msgspec.to_builtins(shown("d", **TWO_SLOTS))
    return found | changes


def line(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()


GOOD = line(raw())


def careful(value: bytes) -> tuple[list[Impression], list[BadEvent]]:
    """Read each line for itself, which needs no cleverness."""
    events, bad = [], []
    for place, text in enumerate([part for part in value.split(b"\n") if part and not part.isspace()]):
        decoded = EXACT.decode_batch(text)
        assert len(decoded.events) + len(decoded.bad) == 1
        events += decoded.events
        bad += [BadEvent(place, found.reason, found.line) for found in decoded.bad]
    return events, bad


def as_values(value: bytes) -> list[dict[str, Any]]:
    """Return the examples of a record one by one; the order of slots is part of them, and so is the type of a value."""
    batch = decode_examples(value)
    columns = {
        name: column if isinstance(column := getattr(batch, name), list) else column.tolist()
        for name in EXAMPLE_SCHEMA.names
    }
    examples = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    for found in examples:
        for name in ("candidates", "creative"):
            found[name] = list(found[name].items())
        found["context"] = [(key, type(entry), entry) for key, entry in found["context"].items()]
    return examples


def values_of(batch: ImpressionBatch) -> list[dict[str, Any]]:
    """Return the examples that leave when nothing is clicked: in the order of their times, the first of each id."""
    joiner = PartitionJoiner(SETTINGS)
    joiner.add(Record(0, 0, batch), 0)
    for record in (Record(1, 0, ImpressionBatch.empty(), [], END_OF_LOG_MS), Record(0, 0, [], [], END_OF_LOG_MS)):
        joiner.add(record, 0)
    output = joiner.take_output()
    shelf = CandidatesShelf()
    return [] if output is None else [found for part in output.records for found in as_values(part.encode(shelf))]


def expected_of(events: Iterable[Impression]) -> list[dict[str, Any]]:
    """Return what `values_of` must be."""
    first: dict[str, Impression] = {}
    for event in events:
        first.setdefault(event.decision_id, event)
    in_time = sorted(first.values(), key=lambda event: event.occurred_at_ms)
    return as_values(examples_value([(event, LabelKind.PROVISIONAL, None) for event in in_time]))


def check(value: bytes) -> None:
    """Decode a record as the careful decoder does: new, again, and with all of its candidates known."""
    events, bad = careful(value)
    decoder = ImpressionDecoder()
    expected = expected_of(events)
    bad_lines = {event.index for event in bad}
    for _ in range(3):
        batch, refused = decoder.decode(value)
        assert refused == bad
        assert batch.ids == [event.decision_id for event in events]
        assert batch.times_ms.tolist() == [event.occurred_at_ms for event in events]
        assert list(batch.lines) == [place for place in range(len(events) + len(bad)) if place not in bad_lines]
        assert values_of(batch) == expected


# -- what is accepted --------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.lists(impressions(), max_size=4))
def test_valid_impressions_give_the_columns_of_their_values(events: list[Impression]) -> None:
    check(encode_batch(events))


def test_quick_way_is_taken_for_what_we_write() -> None:
    value = encode_batch([shown(str(number), **TWO_SLOTS) for number in range(3)])
    for written in (value, value.rstrip(b"\n")):
        batch = ImpressionDecoder()._all_good(written)
        assert batch is not None
        assert batch.ids == ["0", "1", "2"]


def in_order(names: list[str], mapping: dict[str, Any]) -> dict[str, Any]:
    return {name: mapping[name] for name in names}


Spelling = Callable[[dict[str, Any]], bytes]
SPELLINGS: dict[str, Spelling] = {
    "compact": line,
    "spaced": lambda fields: json.dumps(fields).encode(),
    "space before a colon": lambda fields: json.dumps(fields, separators=(",", " :")).encode(),
    "tab before a colon": lambda fields: json.dumps(fields, separators=("\t,", "\t: ")).encode(),
    "fields in another order": lambda fields: line(dict(reversed(fields.items()))),
    "unknown field": lambda fields: line(fields | {"x": {"y": [":", {"z": None}]}}),
    "unknown field, and a key hidden by a space": lambda fields: line(fields | {"x": 1}).replace(
        b'"seed":', b'"seed" :'
    ),
    "slots of the candidates in another order": lambda fields: line(
        fields | {"candidates": dict(reversed(fields["candidates"].items()))}
    ),
    "slots of the creative in another order": lambda fields: line(
        fields | {"creative": dict(reversed(fields["creative"].items()))}
    ),
    "slots of the propensities in another order": lambda fields: line(
        fields | {"slot_propensities": dict(reversed(fields["slot_propensities"].items()))}
    ),
    "key escaped": lambda fields: line(fields).replace(b'"seed"', b'"\\u0073eed"'),
    "blank around": lambda fields: b" \t" + line(fields) + b" \r",
    "pretty": lambda fields: json.dumps(fields, indent=1).encode(),
    "broken after a comma": lambda fields: line(fields).replace(b',"seed"', b',\n"seed"'),
    "broken after a brace": lambda fields: line(fields).replace(b'"creative":{', b'"creative":\n{'),
    "key twice": lambda fields: line(fields).replace(b'"epoch":', b'"epoch":0,"epoch":'),
    "key twice, hidden by a space": lambda fields: (
        line(fields).replace(b'"epoch":', b'"epoch":0,"epoch":').replace(b'"seed":', b'"seed" :')
    ),
    "key twice, hidden by a tab": lambda fields: line(fields).replace(b'"epoch":', b'"epoch"\t:0,"epoch":'),
    "key twice, hidden by a carriage return": lambda fields: line(fields).replace(b'"epoch":', b'"epoch"\r:0,"epoch":'),
    "key twice, and colons in a text": lambda fields: line(fields | {"context": {"a:b": ":", '":': '":"'}}).replace(
        b'"epoch":', b'"epoch":0,"epoch":'
    ),
    "slot twice": lambda fields: line(fields).replace(b'"candidates":{', b'"candidates":{"x":["y"],"x":["y"],'),
    "candidates twice": lambda fields: line(fields).replace(b'"candidates":', b'"candidates":[],"candidates":'),
    "colons in the context": lambda fields: line(fields | {"context": {"a:b": ":", '":': '":"'}}),
    "wrong product": lambda fields: line(fields | {"propensity": fields["propensity"] * 0.9}),
    "element not among the candidates": lambda fields: line(
        fields | {"creative": dict.fromkeys(fields["creative"], "<none>")}
    ),
    "slot without candidates": lambda fields: line(fields | {"creative": fields["creative"] | {"<slot>": "x"}}),
    "slot without propensity": lambda fields: line(fields | {"slot_propensities": {}}),
    "empty list of candidates": lambda fields: line(
        fields | {"candidates": {slot: [] for slot in fields["candidates"]}}
    ),
    "candidates of another type": lambda fields: line(fields | {"candidates": {"title": "t1"}}),
    "no candidates": lambda fields: line({name: fields[name] for name in fields if name != "candidates"}),
    "control character among the candidates": lambda fields: line(fields).replace(
        b'"candidates":{"', b'"candidates":{"\x01'
    ),
    "not UTF-8 among the candidates": lambda fields: line(fields).replace(b'"candidates":{"', b'"candidates":{"\xff'),
    "not UTF-8": lambda fields: line(fields | {"product_id": "<id>"}).replace(b"<id>", b"\xc0\x80"),
    "byte order mark": lambda fields: b"\xef\xbb\xbf" + line(fields),
    "NaN": lambda fields: line(fields | {"propensity": float("nan")}),
    "infinity": lambda fields: line(fields | {"context": {"a": float("inf")}}),
    "huge number": lambda fields: line(fields | {"seed": 2**63}),
    "huger number": lambda fields: line(fields | {"epoch": 10**400}),
    "huge number in the context": lambda fields: line(fields | {"context": {"a": 2**53 + 1}}),
    "deep": lambda fields: line(fields | {"x": 1})[:-2] + b"[" * 5000 + b"]" * 5000 + b"}",
    "deep candidates": lambda fields: line(fields | {"candidates": 1}).replace(
        b'"candidates":1', b'"candidates":' + b"[" * 5000 + b"]" * 5000
    ),
    "cut": lambda fields: line(fields)[:-9],
    "another version": lambda fields: line(fields | {"schema_version": 2}),
    "a click": lambda fields: line(
        {name: fields[name] for name in ("schema_version", "decision_id", "occurred_at_ms")}
    ),
}
OTHER_LINES = [b"", b" ", b"\r", b"\x0b", b"{}", b"[]", b"null", b"x", b"\xff", b"\x00"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling_is_read_as_the_careful_decoder_reads_it(spelling: str) -> None:
    spelled = SPELLINGS[spelling](raw())
    for value in (
        spelled,
        spelled + b"\n",
        GOOD + b"\n" + spelled,
        spelled + b"\n\n" + GOOD + b"\n" + spelled + b"\r\n",
    ):
        check(value)


GLUES = [b"\n", b"\n", b"\n", b"\n\n", b"\r\n", b"", b" "]


@st.composite
def records(draw: st.DrawFn) -> bytes:
    """Lines of many spellings, mostly one each, sometimes two on a line or a blank one between."""
    value = draw(st.sampled_from([b"", b"", b"", b"\n", b"\xef\xbb\xbf"]))
    # One fault at most, mostly: two would mask each other.
    spellings = st.sampled_from(["compact"] * len(SPELLINGS) + list(SPELLINGS))
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.integers(0, 9)) == 0:
            value += draw(st.sampled_from(OTHER_LINES))
        else:
            event = draw(st.one_of(impressions(), st.builds(lambda id_: shown(id_, **TWO_SLOTS), identifiers)))
            value += SPELLINGS[draw(spellings)](msgspec.to_builtins(event))
        value += draw(st.sampled_from(GLUES))
    return value


@settings(max_examples=250)
@given(records())
@example(GOOD + GOOD + b"\n\n")
@example(SPELLINGS["slots of the propensities in another order"](raw()))
def test_any_record_is_read_as_the_careful_decoder_reads_it(value: bytes) -> None:
    check(value)


@pytest.mark.parametrize(
    "value",
    [
        GOOD + GOOD + b"\n\n",
        GOOD + b" " + GOOD + b"\n\n",
        b"\n" + GOOD + GOOD,
        GOOD + GOOD + b"\n\n" + GOOD,
        GOOD + b"\r" + GOOD + b"\n\r\n",
        GOOD.replace(b',"seed"', b',\n"seed"') + GOOD,
        GOOD.replace(b'"creative":{', b'"creative":\n{') + GOOD,
        GOOD + GOOD.replace(b'"creative":{', b'"creative":\n{'),
    ],
    ids=["blank after", "space", "blank before", "blank between", "returns", "comma", "brace", "second"],
)
def test_two_on_a_line_are_bad_where_another_line_makes_up_the_number(value: bytes) -> None:
    check(value)
    decoded = EXACT.decode_batch(value)  # it has a quick way of its own
    assert (decoded.events, decoded.bad) == careful(value)


@pytest.mark.parametrize(
    "spelling", ["slots of the propensities in another order", "slots of the creative in another order"]
)
def test_propensities_stay_with_their_slots_in_whatever_order_they_come(spelling: str) -> None:
    batch, bad = ImpressionDecoder().decode(SPELLINGS[spelling](raw()))
    assert bad == []
    (found,) = values_of(batch)
    assert found["slot_propensities"] == {"title": 0.5, "image": 0.25}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"creative": {"a": "x"}}, {"creative": {"b": "x", "c": "x"}}),
        ({"slot_propensities": {"a": 1.0}}, {"slot_propensities": {"b": 1.0, "c": 1.0}}),
        (
            {"creative": {"a": "x"}, "slot_propensities": {"a": 1.0}},
            {"creative": {"b": "x", "c": "x"}, "slot_propensities": {"b": 1.0, "c": 1.0}},
        ),
    ],
)
def test_slots_of_one_impression_are_not_taken_for_those_of_the_next(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    # One slot less in one, one more in the other: the names one after the other are the same.
    def card(slots: str) -> dict[str, Any]:
        return {
            "candidates": {slot: ["x"] for slot in slots},
            "creative": dict.fromkeys(slots, "x"),
            "slot_propensities": dict.fromkeys(slots, 1.0),
        }

    value = encode_batch([shown("1", **card("ab") | first), shown("2", **card("c") | second)])
    check(value)
    _, bad = ImpressionDecoder().decode(value)
    assert len(bad) == 2


def test_line_of_the_largest_size_is_read_and_a_larger_one_is_bad() -> None:
    for size in (MAX_LINE_BYTES, MAX_LINE_BYTES + 1):
        large = GOOD[:-1] + b" " * (size - len(GOOD)) + b"}"
        assert len(large) == size
        check(GOOD + b"\n" + large + b"\n" + GOOD)
        _, bad = ImpressionDecoder().decode(large)
        assert len(bad) == (size > MAX_LINE_BYTES)


def test_record_larger_than_a_line_is_taken_in_one_go() -> None:
    value = b"\n".join([GOOD] * (MAX_LINE_BYTES // len(GOOD) + 2))
    batch = ImpressionDecoder()._all_good(value)
    assert batch is not None
    assert len(batch) == value.count(b"\n") + 1


def test_events_beyond_the_limit_of_a_record_are_bad() -> None:
    small = encode_event(shown("d"))
    decoder = ImpressionDecoder()
    batch, bad = decoder.decode(b"\n".join([small] * MAX_BATCH_EVENTS))
    assert (len(batch), bad) == (MAX_BATCH_EVENTS, [])
    batch, bad = decoder.decode(b"\n".join([small] * (MAX_BATCH_EVENTS + 2)))
    assert len(batch) == MAX_BATCH_EVENTS
    assert [(event.index, event.line) for event in bad] == [(MAX_BATCH_EVENTS, small), (MAX_BATCH_EVENTS + 1, small)]
    assert bad[0].reason.startswith(f"batch: more than {MAX_BATCH_EVENTS} events")


# -- batches -----------------------------------------------------------------------------------------------------------


def test_batch_of_chosen_rows_holds_them_in_the_chosen_order() -> None:
    events = [shown(str(number), 1000 + number, context={"n": number}) for number in range(4)]
    batch, _ = ImpressionDecoder().decode(b"bad\n" + encode_batch(events))
    for rows in ([2, 0], [], [3]):
        chosen = batch.take(rows)
        assert len(chosen) == len(rows)
        assert chosen.ids == [events[row].decision_id for row in rows]
        assert chosen.times_ms.tolist() == [1000 + row for row in rows]
        assert list(chosen.lines) == [row + 1 for row in rows]
        assert values_of(chosen) == expected_of([events[row] for row in rows])


def test_empty_batch_has_no_impressions() -> None:
    batch = ImpressionBatch.empty()
    assert len(batch) == len(batch.times_ms) == 0
    assert values_of(batch) == []


# -- candidates that come again ----------------------------------------------------------------------------------------


def text(name: str, size: int = 1) -> bytes:
    return line({"slot": [name * size]})


def test_candidates_are_kept_parsed_from_their_second_batch_on() -> None:
    cache = CandidatesCache()
    first = cache.get(text("a"))
    assert first.parsed == {"slot": ["a"]}  # for the batch that brings them
    assert cache.get(text("a")) is first
    cache.settle()
    assert first.parsed is None
    assert first.slots() == {"slot": ["a"]}
    assert cache.get(text("a")) is first
    cache.settle()
    assert first.parsed == {"slot": ["a"]}
    assert [set(members) for members in first.members] == [{"a"}]  # type: ignore[call-overload]


def test_oldest_candidates_are_let_go_when_their_texts_are_too_many_bytes() -> None:
    size = len(text("a"))
    cache = CandidatesCache(max_bytes=2 * size)
    old = cache.get(text("a"))
    cache.settle()
    assert cache.get(text("a")) is old
    kept = [cache.get(text("b")), cache.get(text("c"))]
    assert old.parsed is not None  # until the batch is complete
    cache.settle()
    assert old.parsed is None
    assert old.slots() == {"slot": ["a"]}  # whoever has them still can use them
    assert [cache.get(text(name)) for name in "bc"] == kept
    assert cache.get(text("a")) is not old


def test_candidates_larger_than_the_cache_are_read_and_not_kept() -> None:
    cache = CandidatesCache(max_bytes=50)
    for _ in range(2):
        large = cache.get(text("x", 100))
        cache.settle()
        assert large.slots() == {"slot": ["x" * 100]}
    assert cache.get(text("x", 100)) is not large
    cache.settle()
    assert cache._num_bytes == 0


@pytest.mark.parametrize("bad", [b"", b"{}", b"[]", b'{"a":[]}', b'{"a":[""]}', b'{"":["a"]}', b'{"a":[1]}', b"\xff"])
def test_text_that_is_no_candidates_is_refused_and_not_kept(bad: bytes) -> None:
    cache = CandidatesCache()
    with pytest.raises((msgspec.MsgspecError, UnicodeDecodeError)):
        cache.get(bad)
    cache.settle()
    assert cache._num_bytes == 0
    with pytest.raises((msgspec.MsgspecError, UnicodeDecodeError)):
        cache.get(bad)


def test_refused_record_leaves_no_candidates_parsed_for_good() -> None:
    decoder = ImpressionDecoder()
    value = GOOD + b"\n" + line(raw(propensity=0.9))
    for _ in range(2):
        decoder.decode(value)
    assert decoder._cache._new == []


def candidates(name: str, *, is_parsed: bool = True) -> Candidates:
    found = Candidates(line({"title": [name, f"{name}2"], name: ["x"]}))
    if is_parsed:
        found.keep_parsed()
    return found


def directly(found: list[Candidates]) -> list[Any]:
    return [list(json.loads(each.text).items()) for each in found]


def column(shelf: CandidatesShelf, found: list[Candidates]) -> list[Any]:
    array = shelf.column(found)
    array.validate(full=True)
    rows: list[Any] = array.to_pylist()
    return rows


def test_shelf_gives_the_column_that_would_be_made_without_it() -> None:
    shelf = CandidatesShelf()
    a, b, c = (candidates(name) for name in "abc")
    once = candidates("d", is_parsed=False)
    for found in ([], [a], [a, a, b], [b, a], [c, a, c], [a, once, b], [once, once], [once], [b, c, a]):
        assert column(shelf, found) == directly(found)


def test_shelf_makes_only_once_what_comes_again_and_again() -> None:
    shelf = CandidatesShelf()
    a, b, once = candidates("a"), candidates("b"), candidates("c", is_parsed=False)
    shelf.column([a, b])
    made = shelf._array
    shelf.column([b, a, a])
    shelf.column([b, once])
    assert shelf._array is made
    assert set(shelf._places) == {a, b}


def test_shelf_keeps_what_the_cache_has_let_go_of() -> None:
    shelf = CandidatesShelf()
    a = candidates("a")
    shelf.column([a])
    a.let_go()
    assert column(shelf, [a, a]) == directly([a, a])


def test_full_shelf_begins_anew() -> None:
    many = [candidates(f"name-{number}") for number in range(20)]
    size = len(many[0].text)
    shelf = CandidatesShelf(max_bytes=5 * size)
    for start in range(20):
        found = (many + many)[start : start + 3]
        assert column(shelf, found) == directly(found)
        assert len(shelf._array) == len(shelf._places)
        assert sum(len(each.text) for each in shelf._places) == shelf._num_bytes <= 5 * size + 5
    assert column(shelf, many) == directly(many)  # more than it can hold at once
    assert shelf._num_bytes == 0
