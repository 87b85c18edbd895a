"""Impressions in columns: the same is accepted and refused as in NDJSON, and nothing that is wrong passes as sound."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.contracts.codec import MAX_BATCH_EVENTS, EventDecoder, encode_batch, lines_of
from streams.contracts.events import Impression
from streams.contracts.impressions import (
    COLUMN_NAMES,
    COLUMN_SCHEMA,
    IMPRESSION_SCHEMA,
    batch_of,
    encode_impressions,
    is_columnar,
    is_sound,
    read_impressions,
)
from tests.builders import shown

GOLDEN = Path(__file__).resolve().parents[2] / "data" / "v1"
DECODER = EventDecoder(Impression)
IDS = ["t1", "t2", "é" * 128, 'quo"te', "a:b", "back\\slash", "line\nbreak", "商品"]
CONTEXTS: list[dict[str, Any]] = [
    {},
    {"device": "ios", "hour": 13, "price": -3.5, "returning": True, "whole": 2.0},
    {"big": 2**53, "text": "", "line": "a\nb\u2028c", "colon": "a:b"},
]


def some(rng: random.Random, number: int) -> Impression:
    """Return a valid impression, odd in many ways."""
    slots = rng.sample(["title", "image", "tag", "z:1"], rng.randint(1, 4))
    candidates = {slot: rng.sample(IDS, rng.randint(1, 5)) for slot in slots}
    propensities = {slot: rng.choice([1.0, 0.5, 1e-3]) for slot in slots}
    product = 1.0
    for value in propensities.values():
        product *= value
    return shown(
        f"{number}.{rng.choice(IDS)}"[:128],
        rng.choice([0, 1_764_000_000_123, 4_102_444_799_999]),
        product_id=rng.choice(IDS),
        context=rng.choice(CONTEXTS),
        candidates=candidates,
        creative={slot: rng.choice(ids) for slot, ids in candidates.items()},
        slot_propensities=propensities,
        propensity=product,
        epoch=rng.choice([0, 2**53 - 1]),
        source=rng.choice(["policy", "last_good", "uniform"]),
        holdout=rng.random() < 0.5,
        seed=rng.choice([0, 2**63 - 1]),
        survival_probability=rng.choice([1.0, 1e-6]),
    )


@given(st.integers(0, 2**32), st.integers(1, 20))
def test_what_is_written_is_read(seed: int, count: int) -> None:
    rng = random.Random(seed)
    impressions = [some(rng, number) for number in range(count)]
    value = encode_impressions(impressions)
    assert is_columnar(value)
    decoded = DECODER.decode_batch(value)
    assert (decoded.events, decoded.bad) == (impressions, [])
    assert DECODER.decode_batch(b"\n".join(lines_of(value))).events == impressions
    assert batch_of(value).equals(read_impressions(value))


@given(st.integers(0, 2**32))
def test_json_and_columns_hold_the_same(seed: int) -> None:
    rng = random.Random(seed)
    impressions = [some(rng, number) for number in range(5)]
    assert not is_columnar(encode_batch(impressions))
    assert DECODER.decode_batch(encode_batch(impressions)).events == impressions


def test_ordinary_impressions_are_sound() -> None:
    impressions = [
        shown(
            f"7.0192f3c4a5b67c8d{number:04x}.1c9f5d41a07be362",
            1_764_000_000_123 + number,
            context={"device": "ios", "hour": number % 24, "price": 0.5},
            candidates={"title": ["t1", "t2"], "image": ["i1", "i9", "i3"]},
            creative={"title": "t2", "image": "i9"},
            slot_propensities={"title": 0.31, "image": 0.08},
            propensity=0.31 * 0.08,
        )
        for number in range(50)
    ]
    assert is_sound(read_impressions(encode_impressions(impressions)))
    # Cards of one record may have other slots than their neighbors.
    assert is_sound(read_impressions(encode_impressions([*impressions, shown("a")])))


def test_no_impressions_are_no_sound_batch() -> None:
    value = encode_impressions([])
    assert not is_sound(read_impressions(value))
    decoded = DECODER.decode_batch(value)
    assert (decoded.events, decoded.bad) == ([], [])


# -- what is wrong -----------------------------------------------------------------------------------------------------


def value_of(columns: dict[str, Any], schema: pa.Schema = IMPRESSION_SCHEMA) -> bytes:
    sink = pa.BufferOutputStream()
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return bytes(sink.getvalue())


def columns_of(*impressions: Impression) -> dict[str, Any]:
    columns: dict[str, Any] = read_impressions(encode_impressions(list(impressions))).to_pydict()
    return columns


def two_slots(decision_id: str) -> Impression:
    return shown(
        decision_id,
        candidates={"a": ["x", "y"], "b": ["z"]},
        creative={"a": "x", "b": "z"},
        slot_propensities={"a": 0.5, "b": 0.5},
        propensity=0.25,
    )


FAULTS: list[tuple[str, Any, str]] = [
    ("decision_id", "", "decision_id"),
    ("decision_id", "x" * 129, "decision_id"),
    ("decision_id", None, "decision_id"),
    ("occurred_at_ms", -1, "occurred_at_ms"),
    ("occurred_at_ms", 4_102_444_800_000, "occurred_at_ms"),
    ("product_id", "", "product_id"),
    ("context", "{", "event"),
    ("context", "[]", "context"),
    ("context", '{"a": null}', "context"),
    ("context", '{"a":1,"a":2}', "a"),
    ("context", '{"a":1},{"b":2}', "event"),
    ("context", None, "context"),
    ("context", '{"' + "k" * 65 + '":1}', "context"),
    ("candidates", [("a", ["x"]), ("b", [])], "candidates"),
    ("candidates", [("a", ["x"]), ("b", None)], "candidates"),
    ("candidates", [("a", ["x"]), ("b", [None])], "candidates"),
    ("candidates", [("a", ["x"]), ("b", ["z" * 129])], "candidates"),
    ("candidates", [("a", ["x"])], "creative"),
    ("candidates", [], "candidates"),
    ("candidates", [("a", ["x"]), ("a", ["x"])], "a"),
    ("creative", [("a", "x"), ("b", "nobody")], "creative.b"),
    ("creative", [("a", "x"), ("c", "z")], "creative"),
    ("creative", [("a", "x"), ("a", "x")], "a"),
    ("creative", [("a", None), ("b", "z")], "creative"),
    ("slot_propensities", [("a", 0.5), ("b", 0.0)], "slot_propensities"),
    ("slot_propensities", [("a", 0.5), ("b", float("nan"))], "slot_propensities"),
    ("slot_propensities", [("a", 0.5), ("b", None)], "slot_propensities"),
    ("slot_propensities", [("a", 0.5)], "slot_propensities"),
    ("propensity", 0.26, "propensity"),
    ("propensity", float("inf"), "propensity"),
    ("epoch", -1, "epoch"),
    ("policy_version", 2**53, "policy_version"),
    ("source", "somebody", "source"),
    ("seed", -1, "seed"),
    ("survival_probability", 0.0, "survival_probability"),
    ("survival_probability", 1.5, "survival_probability"),
    ("holdout", None, "holdout"),
]


@pytest.mark.parametrize(("name", "wrong", "field"), FAULTS, ids=[f"{n}-{w!r}"[:40] for n, w, _ in FAULTS])
def test_wrong_value_is_one_bad_line_among_good_neighbors(name: str, wrong: Any, field: str) -> None:
    columns = columns_of(two_slots("before"), two_slots("wrong"), two_slots("after"))
    columns[name][1] = wrong
    # Other programs need not declare what they never leave out.
    schema = pa.schema([field.with_nullable(True) for field in IMPRESSION_SCHEMA], metadata=IMPRESSION_SCHEMA.metadata)
    value = value_of(columns, schema)
    assert not is_sound(read_impressions(value))
    decoded = DECODER.decode_batch(value)
    assert [event.decision_id for event in decoded.events] == ["before", "after"]
    [bad] = decoded.bad
    assert bad.index == 1
    assert bad.reason.startswith(field), bad.reason
    assert b"\n" not in bad.line
    # The line says the same when it comes as JSON.
    assert [again.reason for again in DECODER.decode_batch(bad.line).bad] == [bad.reason]


def test_slots_in_another_order_are_accepted() -> None:
    columns = columns_of(two_slots("a"))
    columns["creative"][0] = [("b", "z"), ("a", "x")]
    decoded = DECODER.decode_batch(value_of(columns))
    assert decoded.bad == []
    assert list(decoded.events[0].creative) == ["b", "a"]


def test_context_over_two_lines_stays_one_event() -> None:
    columns = columns_of(two_slots("a"))
    columns["context"][0] = '{"a":\n1}'
    [line] = lines_of(value_of(columns))
    assert b"\n" not in line
    assert DECODER.decode_batch(value_of(columns)).events[0].context == {"a": 1}


def test_too_many_events_in_a_record_are_refused_from_the_limit_on() -> None:
    columns = columns_of(two_slots("a"))
    many = {name: values * (MAX_BATCH_EVENTS + 2) for name, values in columns.items()}
    decoded = DECODER.decode_batch(value_of(many))
    assert (len(decoded.events), [bad.index for bad in decoded.bad]) == (
        MAX_BATCH_EVENTS,
        [MAX_BATCH_EVENTS, MAX_BATCH_EVENTS + 1],
    )


def test_column_that_this_version_does_not_know_is_ignored() -> None:
    impression = two_slots("a")
    schema = IMPRESSION_SCHEMA.append(pa.field("new", pa.string()))
    value = value_of(columns_of(impression) | {"new": ["?"]}, schema)
    assert is_sound(read_impressions(value))
    assert DECODER.decode_batch(value).events == [impression]
    assert batch_of(value).schema.names == COLUMN_NAMES


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"\xff\xff\xff\xff", "no Arrow stream"),
        (encode_impressions([shown("a")])[:200], "no Arrow stream"),
        (value_of(columns_of(shown("a")), COLUMN_SCHEMA), "schema_version"),
        (
            value_of(columns_of(shown("a")), COLUMN_SCHEMA.with_metadata({"genco.schema_version": "2"})),
            "schema_version: '2'",
        ),
        (value_of(columns_of(shown("a")), IMPRESSION_SCHEMA.remove(3)), "lacks the column"),
    ],
    ids=["head", "cut", "no version", "another version", "column missing"],
)
def test_unreadable_record_is_one_bad_event(value: bytes, reason: str) -> None:
    decoded = DECODER.decode_batch(value)
    assert decoded.events == []
    [bad] = decoded.bad
    assert (bad.index, bad.line) == (0, value)
    assert reason in bad.reason


@given(st.integers(0, 2**32))
def test_flipped_bits_never_raise_and_never_pass_as_another_batch_of_faults(seed: int) -> None:
    rng = random.Random(seed)
    value = bytearray(encode_impressions([two_slots(str(number)) for number in range(4)]))
    for _ in range(rng.randint(1, 3)):
        value[rng.randrange(4, len(value))] ^= 1 << rng.randrange(8)
    try:
        batch = read_impressions(bytes(value))
    except ValueError:
        batch = None
    if batch is not None and is_sound(batch):
        assert DECODER.decode_batch(bytes(value)).bad == []


def test_bytes_of_the_first_release_still_load() -> None:
    columnar = DECODER.decode_batch((GOLDEN / "impressions.arrow").read_bytes())
    lines = DECODER.decode_batch((GOLDEN / "impressions.ndjson").read_bytes())
    assert columnar.bad == []
    assert columnar.events == lines.events
