"""Events survive the way through NDJSON; hostile bytes end as bad events in their places, not as exceptions."""

import json
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.contracts.codec import (
    END_OF_LOG_MS,
    MARK_HEADER,
    MAX_BATCH_EVENTS,
    MAX_LINE_BYTES,
    EventDecoder,
    encode_batch,
    encode_context,
    encode_event,
    encode_mark,
    has_no_other_keys,
    mark_of,
)
from streams.contracts.events import MAX_CANDIDATES, MAX_CONTEXT_FIELDS, MAX_SLOTS, Click, Impression, impression_fault
from tests.strategies import clicks, context_values, identifiers, impressions

IMPRESSIONS = EventDecoder(Impression)
CLICKS = EventDecoder(Click)

VALID: dict[str, Any] = {
    "schema_version": 1,
    "decision_id": "7.0192f3c4a5b67c8d9e0f.1c9f5d41a07be362",
    "occurred_at_ms": 1_764_000_000_123,
    "product_id": "p123",
    "context": {"device": "ios", "hour": 13},
    "candidates": {"title": ["t1", "t2"], "image": ["i1", "i9"]},
    "creative": {"title": "t2", "image": "i9"},
    "slot_propensities": {"title": 0.5, "image": 0.25},
    "propensity": 0.125,
    "model_id": "default",
    "epoch": 3,
    "policy_version": 42,
    "source": "policy",
    "holdout": False,
    "seed": 8127,
    "survival_probability": 1.0,
}
VALID_CLICK: dict[str, Any] = {"schema_version": 1, "decision_id": "d1", "occurred_at_ms": 5, "reward": 2.5}


def line(raw: dict[str, Any]) -> bytes:
    return json.dumps(raw, separators=(",", ":"), ensure_ascii=False).encode()


GOOD = line(VALID)
GOOD_CLICK = line(VALID_CLICK)

# -- round trips -------------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(st.lists(impressions(), max_size=5))
def test_impressions_survive_a_round_trip(events: list[Impression]) -> None:
    decoded = IMPRESSIONS.decode_batch(encode_batch(events))
    assert decoded.bad == []
    assert decoded.events == events
    for before, after in zip(events, decoded.events, strict=True):
        # Equal mappings may differ in order, and the order of slots has a meaning.
        for name in ("context", "candidates", "creative", "slot_propensities"):
            assert list(getattr(after, name)) == list(getattr(before, name))
        # 1 == 1.0 == True, but they are different features.
        assert [type(value) for value in after.context.values()] == [type(v) for v in before.context.values()]


@settings(max_examples=100)
@given(st.lists(clicks, max_size=5))
def test_clicks_survive_a_round_trip(events: list[Click]) -> None:
    decoded = CLICKS.decode_batch(encode_batch(events))
    assert (decoded.events, decoded.bad) == (events, [])


@settings(max_examples=100)
@given(st.lists(st.one_of(impressions()), min_size=1, max_size=4))
def test_batch_is_one_line_for_each_event(events: list[Impression]) -> None:
    value = encode_batch(events)
    assert value.splitlines() == value.rstrip(b"\n").split(b"\n") == [encode_event(event) for event in events]


def test_click_without_reward_is_worth_one() -> None:
    decoded = CLICKS.decode_batch(b'{"schema_version":1,"decision_id":"d1","occurred_at_ms":5}')
    assert decoded.events == [Click(schema_version=1, decision_id="d1", occurred_at_ms=5, reward=1.0)]


def test_batch_of_nothing_is_empty() -> None:
    for value in (b"", b"\n", b" \n\t\n"):
        for decoder in (IMPRESSIONS, CLICKS):
            decoded = decoder.decode_batch(value)
            assert (decoded.events, decoded.bad) == ([], [])


def test_blank_lines_and_carriage_returns_between_events_are_no_events() -> None:
    decoded = IMPRESSIONS.decode_batch(b"\r\n" + GOOD + b"\r\n\r\n" + GOOD + b"\n\n" + b"{}")
    assert len(decoded.events) == 2
    assert [bad.index for bad in decoded.bad] == [2]


# -- each fault: its field, its reason, its place, and neighbors that are not touched ---------------------------------


def without(field: str) -> bytes:
    return line({name: value for name, value in VALID.items() if name != field})


def replaced(old: bytes, new: bytes) -> bytes:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


BAD_IMPRESSIONS = {
    "truncated": (GOOD[:-40], "event: "),
    "no object": (b"[1,2]", "event: Expected `object`"),
    "null": (b"null", "event: Expected `object`"),
    "text": (b"hello", "event: "),
    "two values": (GOOD + b"x", "event: "),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, "event: "),
    "NUL": (b"\x00", "event: "),
    "wrong type": (line(VALID | {"epoch": "3"}), "epoch: Expected `int`, got `str`"),
    "float for an integer": (line(VALID | {"occurred_at_ms": 1.5}), "occurred_at_ms: Expected `int`"),
    "boolean for a number": (line(VALID | {"propensity": True}), "propensity: Expected `float`, got `bool`"),
    "number for a boolean": (line(VALID | {"holdout": 1}), "holdout: Expected `bool`"),
    "nested context": (line(VALID | {"context": {"a": {"b": 1}}}), r"context\[...\]: Expected"),
    "null in the context": (line(VALID | {"context": {"a": None}}), r"context\[...\]: Expected"),
    "empty id": (line(VALID | {"decision_id": ""}), "decision_id: Expected `str` of length >= 1"),
    "long id": (line(VALID | {"decision_id": "x" * 129}), "decision_id: Expected `str` of length <= 128"),
    "negative time": (line(VALID | {"occurred_at_ms": -1}), "occurred_at_ms: Expected `int` >= 0"),
    "microseconds": (line(VALID | {"occurred_at_ms": 1_764_000_000_123_000}), "occurred_at_ms: Expected `int` <"),
    "unknown source": (line(VALID | {"source": "guess"}), "source: Invalid enum value 'guess'"),
    "future version": (line(VALID | {"schema_version": 2}), "schema_version: Invalid enum value 2"),
    "version as text": (line(VALID | {"schema_version": "1"}), "schema_version: "),
    "propensity of zero": (line(VALID | {"propensity": 0.0}), "propensity: Expected `float` > 0"),
    "propensity above one": (line(VALID | {"propensity": 1.01}), "propensity: Expected `float` <= 1"),
    "slot propensity of zero": (
        line(VALID | {"slot_propensities": {"title": 0.0, "image": 1.0}}),
        r"slot_propensities\[...\]: Expected `float` > 0",
    ),
    "survival of zero": (line(VALID | {"survival_probability": 0}), "survival_probability: Expected `float` > 0"),
    "propensity that is not the product": (
        line(VALID | {"propensity": 0.125 * (1 + 3e-6)}),
        "propensity: .*expected the product of slot_propensities, 0.125",
    ),
    "propensity that is far less than the product": (line(VALID | {"propensity": 1e-9}), "propensity: "),
    "creative not among the candidates": (
        line(VALID | {"creative": {"title": "t3", "image": "i9"}}),
        "creative.title: 't3' is not among its candidates",
    ),
    "creative of another slot": (line(VALID | {"creative": {"title": "i9", "image": "i9"}}), "creative.title: 'i9'"),
    "creative lacks a slot": (line(VALID | {"creative": {"title": "t2"}}), "creative: slots are"),
    "creative has a slot more": (
        line(VALID | {"creative": {"title": "t2", "image": "i9", "tag": "x"}}),
        "creative: slots are",
    ),
    "propensities of other slots": (
        line(VALID | {"slot_propensities": {"title": 0.5, "tag": 0.25}}),
        "slot_propensities: slots are",
    ),
    "no slots": (
        line(VALID | {"candidates": {}, "creative": {}, "slot_propensities": {}, "propensity": 1.0}),
        "candidates: ",
    ),
    "no candidates": (line(VALID | {"candidates": {"title": [], "image": ["i9"]}}), r"candidates\[...\]: "),
    "too many candidates": (
        line(VALID | {"candidates": {"title": ["t2"] * (MAX_CANDIDATES + 1), "image": ["i9"]}}),
        r"candidates\[...\]: ",
    ),
    "too many slots": (line(VALID | {"candidates": {str(n): ["t"] for n in range(MAX_SLOTS + 1)}}), "candidates: "),
    "too much context": (line(VALID | {"context": {str(n): n for n in range(MAX_CONTEXT_FIELDS + 1)}}), "context: "),
    "duplicate key": (replaced(b'"epoch":3', b'"epoch":3,"epoch":3'), "epoch: key stands twice"),
    "duplicate key, other value": (replaced(b'"propensity":', b'"propensity":1,"propensity":'), "propensity: key stan"),
    "duplicate key, one of them escaped": (replaced(b'"seed":', b'"\\u0073eed":1,"seed":'), "seed: key stands twice"),
    "duplicate key in the context": (replaced(b'"hour":13', b'"hour":13,"hour":14'), "hour: key stands twice"),
    "duplicate key in the context, escaped": (
        replaced(b'"hour":13', b'"a":1,"\\u0061":2'),
        "a: key stands twice",
    ),
    "duplicate slot": (replaced(b'"title":"t2"', b'"title":"t1","title":"t2"'), "title: key stands twice"),
    "duplicate slot of the candidates": (
        replaced(b'"image":[', b'"image":["i8"],"image":['),
        "image: key stands twice",
    ),
    "duplicate slot propensity": (replaced(b'"title":0.5', b'"title":0.1,"title":0.5'), "title: key stands twice"),
    "duplicate key in an unknown field": (GOOD[:-1] + b',"x":{"y":1,"y":2}}', "y: key stands twice"),
    "duplicate unknown field": (GOOD[:-1] + b',"x":1,"x":2}', "x: key stands twice"),
    "duplicate key and colons in texts": (
        replaced(b'"ios","hour":13', b'"a\\":b:c","k\\":":1,"hour":13,"hour":13'),
        "hour: key stands twice",
    ),
    "duplicate key and an escaped colon": (
        replaced(b'"ios","hour":13', b'"\\u003a","\\u003a":1,"hour":13,"hour":13'),
        "hour: key stands twice",
    ),
    "NaN": (replaced(b'"propensity":0.125', b'"propensity":NaN'), "event: JSON is malformed"),
    "NaN in the context": (replaced(b"13", b"NaN"), "event: JSON is malformed"),
    "NaN in an unknown field": (GOOD[:-1] + b',"x":NaN}', "event: JSON is malformed"),
    "Infinity": (replaced(b'"seed":8127', b'"seed":Infinity'), "event: JSON is malformed"),
    "-Infinity": (replaced(b"13", b"-Infinity"), "event: JSON is malformed"),
    "float beyond its range": (replaced(b"13", b"1e999"), "context.*: Number out of range"),
    "huge integer": (replaced(b'"seed":8127', b'"seed":9223372036854775808'), "seed: "),
    "huger integer": (replaced(b'"seed":8127', b'"seed":' + b"9" * 5000), "seed: "),
    "huge integer in the context": (replaced(b"13", b"9007199254740993"), r"context\[...\]: "),
    "huger integer in the context": (replaced(b"13", b"9" * 5000), r"context\[...\]: "),
    "deep nesting": (nested(100_000), "event: "),
    "deep objects": (b'{"a":' * 30_000, "event: nested too deeply"),
    "deep nesting in a known field": (replaced(b"13", nested(50_000)), r"context\[...\]: "),
    "deep nesting in an unknown field": (GOOD[:-1] + b',"x":' + nested(50_000) + b"}", "event: nested too deeply"),
    "not UTF-8": (replaced(b"p123", b"p\xff\xfe"), "event: .*(UTF-8|utf-8)"),
    "overlong UTF-8": (replaced(b"p123", b"p\xc0\x80"), "event: .*(UTF-8|utf-8)"),
    "half of a surrogate pair": (replaced(b"p123", b"\\ud800"), "event: "),
    "control character in a text": (replaced(b"p123", b"p\x01"), "event: "),
    "a click": (GOOD_CLICK, "event: Object missing required field `product_id`"),
} | {f"without {name}": (without(name), f"event: Object missing required field `{name}`") for name in VALID}


@pytest.mark.parametrize("case", BAD_IMPRESSIONS)
def test_bad_impression_says_its_field_and_spoils_no_neighbor(case: str) -> None:
    bad_line, reason = BAD_IMPRESSIONS[case]
    expected = IMPRESSIONS.decode_batch(GOOD).events[0]
    for value, index, num_good in (
        (bad_line, 0, 0),
        (GOOD + b"\n" + bad_line, 1, 1),
        (bad_line + b"\n" + GOOD, 0, 1),
        (GOOD + b"\n\n" + bad_line + b"\n" + GOOD + b"\n", 1, 2),
    ):
        decoded = IMPRESSIONS.decode_batch(value)
        assert [bad.index for bad in decoded.bad] == [index]
        assert re.match(reason, decoded.bad[0].reason), decoded.bad[0].reason
        assert decoded.bad[0].line == bad_line
        assert len(decoded.bad[0].reason) < 1000
        assert decoded.events == [expected] * num_good


BAD_CLICKS = {
    "truncated": (GOOD_CLICK[:-3], "event: "),
    "future version": (line(VALID_CLICK | {"schema_version": 2}), "schema_version: "),
    "without id": (b'{"schema_version":1,"occurred_at_ms":5}', "event: Object missing required field `decision_id`"),
    "negative reward": (line(VALID_CLICK | {"reward": -0.5}), "reward: "),
    "too large a reward": (line(VALID_CLICK | {"reward": 1.1e9}), "reward: "),
    "reward of null": (line(VALID_CLICK | {"reward": None}), "reward: Expected `float`, got `null`"),
    "duplicate key": (b'{"reward":9,' + GOOD_CLICK[1:], "reward: key stands twice"),
    "duplicate key with spaces": (b'{"reward" : 9,' + GOOD_CLICK[1:], "reward: key stands twice"),
    "duplicate key, escaped": (b'{"\\u0072eward":9,' + GOOD_CLICK[1:], "reward: key stands twice"),
    "duplicate key in an unknown field": (GOOD_CLICK[:-1] + b',"x":[{"y":1,"y":1}]}', "y: key stands twice"),
    "deep nesting in an unknown field": (GOOD_CLICK[:-1] + b',"x":' + nested(50_000) + b"}", "event: nested too"),
    "not UTF-8": (GOOD_CLICK.replace(b"d1", b"\xff"), "event: "),
    "NaN": (GOOD_CLICK.replace(b"2.5", b"NaN"), "event: "),
}


@pytest.mark.parametrize("case", BAD_CLICKS)
def test_bad_click_says_its_field_and_spoils_no_neighbor(case: str) -> None:
    bad_line, reason = BAD_CLICKS[case]
    decoded = CLICKS.decode_batch(b"\n".join([GOOD_CLICK, bad_line, GOOD_CLICK]))
    assert [(bad.index, bad.line) for bad in decoded.bad] == [(1, bad_line)]
    assert re.match(reason, decoded.bad[0].reason), decoded.bad[0].reason
    assert len(decoded.events) == 2


@pytest.mark.parametrize("extra", [b',"x":1}', b',"x":{"y":[1,{"z":null}]}}', b',"x":"a\\":b"}', b',"":""}'])
def test_unknown_field_is_ignored(extra: bytes) -> None:
    expected = IMPRESSIONS.decode_batch(GOOD).events
    assert IMPRESSIONS.decode_batch(GOOD[:-1] + extra).events == expected
    assert CLICKS.decode_batch(GOOD_CLICK[:-1] + extra).events == CLICKS.decode_batch(GOOD_CLICK).events


def test_spaces_order_and_escapes_of_json_do_not_matter() -> None:
    expected = IMPRESSIONS.decode_batch(GOOD).events
    shuffled = dict(reversed(VALID.items()))
    for value in (
        json.dumps(VALID).encode(),
        json.dumps(VALID, separators=(" ,\t", " :\t")).encode(),
        json.dumps(shuffled).encode(),
        GOOD.replace(b'"seed"', b'"\\u0073\\u0065ed"'),
        GOOD.replace(b'"p123"', b'"\\u0070123"'),
    ):
        decoded = IMPRESSIONS.decode_batch(value)
        assert (decoded.events, decoded.bad) == (expected, [])


def test_propensity_may_differ_from_the_product_by_rounding() -> None:
    assert IMPRESSIONS.decode_batch(line(VALID | {"propensity": 0.125 * (1 + 5e-7)})).bad == []
    assert IMPRESSIONS.decode_batch(line(VALID | {"propensity": 0.125 * (1 - 5e-7)})).bad == []
    assert IMPRESSIONS.decode_batch(line(VALID | {"propensity": 0.125 * (1 - 3e-6)})).bad != []


def test_product_that_underflows_is_a_fault() -> None:
    slots = [f"s{n}" for n in range(32)]
    raw = VALID | {
        "candidates": {slot: ["e"] for slot in slots},
        "creative": dict.fromkeys(slots, "e"),
        "slot_propensities": dict.fromkeys(slots, 1e-12),
        "propensity": 1e-300,
    }
    assert [bad.reason.partition(":")[0] for bad in IMPRESSIONS.decode_batch(line(raw)).bad] == ["propensity"]


def test_oversized_line_is_bad_and_its_neighbors_are_not() -> None:
    large = GOOD[:-1] + b',"x":"' + b"y" * MAX_LINE_BYTES + b'"}'
    decoded = IMPRESSIONS.decode_batch(GOOD + b"\n" + large + b"\n" + GOOD)
    assert [(bad.index, bad.reason) for bad in decoded.bad] == [
        (1, f"event: {len(large)} bytes; at most {MAX_LINE_BYTES}")
    ]
    assert len(decoded.events) == 2
    for size, num_bad in ((MAX_LINE_BYTES, 0), (MAX_LINE_BYTES + 1, 1)):
        exact = GOOD[:-1] + b',"x":"' + b"y" * (size - len(GOOD) - 7) + b'"}'
        assert len(exact) == size
        assert len(IMPRESSIONS.decode_batch(exact).bad) == num_bad


def test_large_batch_of_small_lines_is_good() -> None:
    num = MAX_LINE_BYTES // len(GOOD) + 2
    decoded = IMPRESSIONS.decode_batch(b"\n".join([GOOD] * num))
    assert (len(decoded.events), decoded.bad) == (num, [])


def test_events_beyond_the_limit_of_a_batch_are_bad() -> None:
    click = b'{"schema_version":1,"decision_id":"d","occurred_at_ms":5}'
    assert CLICKS.decode_batch(b"\n".join([click] * MAX_BATCH_EVENTS)).bad == []
    decoded = CLICKS.decode_batch(b"\n".join([click] * (MAX_BATCH_EVENTS + 2)))
    assert len(decoded.events) == MAX_BATCH_EVENTS
    assert [bad.index for bad in decoded.bad] == [MAX_BATCH_EVENTS, MAX_BATCH_EVENTS + 1]
    assert decoded.bad[0].reason.startswith("batch: more than 10000 events")


def test_bad_lines_count_towards_the_limit_of_a_batch() -> None:
    decoded = CLICKS.decode_batch(b"\n".join([b"x"] * MAX_BATCH_EVENTS + [GOOD_CLICK]))
    assert (decoded.events, len(decoded.bad)) == ([], MAX_BATCH_EVENTS + 1)


# -- hostile bytes -----------------------------------------------------------------------------------------------------


def lines_of(value: bytes) -> list[bytes]:
    return [part for part in value.split(b"\n") if part.strip()]


def check_conservation(decoder: EventDecoder[Any], value: bytes) -> None:
    """Every line ends in exactly one of the two lists, and a bad one knows its place."""
    decoded = decoder.decode_batch(value)
    if decoder is IMPRESSIONS and value[:4] == b"\xff" * 4:  # claims to be columns: whole or not at all
        assert decoded.events or [bad.line for bad in decoded.bad] == [value]
        return
    lines = lines_of(value)
    assert len(decoded.events) + len(decoded.bad) == len(lines)
    indices = [bad.index for bad in decoded.bad]
    assert indices == sorted(set(indices))
    for bad in decoded.bad:
        assert bad.line == lines[bad.index]
        assert ": " in bad.reason
        bad.reason.encode()  # it travels in a header
    good = [lines[n] for n in range(len(lines)) if n not in set(indices)]
    assert [event for part in good for event in decoder.decode_batch(part).events] == decoded.events


hostile_lines = st.one_of(
    st.binary(max_size=60).map(lambda data: data.replace(b"\n", b"")),
    st.sampled_from([GOOD, GOOD_CLICK, b"{}", b"", b" "]),
    st.sampled_from([bad for bad, _ in (*BAD_IMPRESSIONS.values(), *BAD_CLICKS.values()) if len(bad) < 2000]),
)


@settings(max_examples=200)
@given(st.lists(hostile_lines, max_size=6), st.sampled_from([IMPRESSIONS, CLICKS]))
def test_hostile_lines_end_in_exactly_one_list(lines: list[bytes], decoder: EventDecoder[Any]) -> None:
    check_conservation(decoder, b"\n".join(lines))


@settings(max_examples=200)
@given(st.binary(max_size=300), st.sampled_from([IMPRESSIONS, CLICKS]))
def test_any_bytes_end_in_exactly_one_list(value: bytes, decoder: EventDecoder[Any]) -> None:
    check_conservation(decoder, value)


TOKENS = [b'"', b":", b",", b"{", b"}", b"[", b"]", b"\\", b"\\u0061", b"0", b"1e999", b"-", b"null", b"\xff", b"\x00"]


@st.composite
def mutated(draw: st.DrawFn) -> tuple[EventDecoder[Any], bytes]:
    decoder, good = draw(st.sampled_from([(IMPRESSIONS, GOOD), (CLICKS, GOOD_CLICK)]))
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 3)):
            case 0:
                data[at : at + draw(st.integers(1, 20))] = b""
            case 1:
                data[at:at] = draw(st.sampled_from(TOKENS))
            case 2:
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=2))
            case _:
                start = draw(st.integers(0, len(data)))
                data[at:at] = data[start : start + draw(st.integers(1, 40))]
    return decoder, bytes(data).replace(b"\n", b"")


def is_strict_event(event_type: type[Any], part: bytes) -> bool:
    """A slow second opinion: msgspec for types and ranges, the json of Python for keys that stand twice."""

    def refuse(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    try:
        raw = json.loads(part, object_pairs_hook=refuse)
        event = msgspec.convert(raw, event_type)
        assert event == msgspec.json.decode(part, type=event_type)
        assert not isinstance(event, Impression) or impression_fault(event) is None
    except (ValueError, AssertionError, RecursionError):
        return False
    return True


@settings(max_examples=600)
@given(mutated())
def test_mutated_event_is_good_only_if_a_second_parser_says_so(case: tuple[EventDecoder[Any], bytes]) -> None:
    decoder, value = case
    check_conservation(decoder, value)
    good = decoder.decode_batch(value)
    if value.strip():
        assert bool(good.events) == is_strict_event(Impression if decoder is IMPRESSIONS else Click, value)


# -- the fast path and the careful one ---------------------------------------------------------------------------------


spellings = st.sampled_from(
    [
        lambda raw: line(raw),
        lambda raw: json.dumps(raw).encode(),
        lambda raw: json.dumps(raw | {"x": {"y": ":"}}).encode(),
        lambda raw: json.dumps(raw, separators=(", ", " :")).encode(),
        lambda raw: line(raw).replace(b'"epoch":', b'"epoch":0,"epoch":'),
        lambda raw: line(raw | {"epoch": -1}),
    ]
)


@st.composite
def batches(draw: st.DrawFn) -> bytes:
    lines = []
    for event in draw(st.lists(impressions(), max_size=3)):
        raw = msgspec.to_builtins(event)
        lines.append(draw(spellings)(raw))
    lines += draw(st.lists(st.sampled_from([GOOD, b"", b"\r", b"{}", b" "]), max_size=2))
    return draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"])).join(draw(st.permutations(lines)))


@settings(max_examples=300)
@given(batches())
def test_fast_path_agrees_with_the_careful_one(value: bytes) -> None:
    fast = IMPRESSIONS._all_good(value)
    careful = IMPRESSIONS._line_by_line(lines_of(value))
    if fast is not None:
        assert careful.bad == []
        assert fast == careful.events
    decoded = IMPRESSIONS.decode_batch(value)
    assert (decoded.events, decoded.bad) == (careful.events, careful.bad)


def test_fast_path_is_taken_for_what_we_write() -> None:
    events = IMPRESSIONS.decode_batch(b"\n".join([GOOD] * 3)).events
    assert IMPRESSIONS._all_good(encode_batch(events)) == events


@pytest.mark.parametrize(
    "value",
    [GOOD + GOOD, GOOD + b" " + GOOD, GOOD + b"\r" + GOOD, json.dumps(VALID, indent=1).encode()],
    ids=["glued", "space", "carriage return", "pretty-printed"],
)
def test_fast_path_takes_only_one_event_a_line(value: bytes) -> None:
    careful = IMPRESSIONS._line_by_line(lines_of(value))
    decoded = IMPRESSIONS.decode_batch(value)
    assert (decoded.events, len(decoded.bad)) == (careful.events, len(careful.bad))


@pytest.mark.parametrize("spaced", [b'"epoch":9,"epoch":3', b'"epoch":3,"x":{"y":1,"y":2}'])
def test_duplicate_key_is_found_when_another_key_has_a_space_before_its_colon(spaced: bytes) -> None:
    value = replaced(b'"epoch":3', spaced)
    surplus = value.count(b'":') - GOOD.count(b'":')
    for name in (b'"seed"', b'"source"', b'"holdout"')[:surplus]:
        value = value.replace(name + b":", name + b" :")
    assert [bad.reason.partition(": ")[2] for bad in IMPRESSIONS.decode_batch(value).bad] == [
        "key stands twice in one object"
    ]


@pytest.mark.parametrize(
    ("text", "num_keys", "is_sure"),
    [
        (b'{"a":1,"b":2}', 2, True),
        (b'{"a":1,"a":2}', 1, False),
        (b'{"a":1,"b":2}', 1, False),
        (b'{"a":"x:y","b":"z::"}', 2, True),  # colons in values
        (b'{"a":":","a":2}', 1, False),
        (b'{"a" :1,"b":2}', 2, True),  # as many colons as keys are proof, wherever they stand
        (b'{"a" :1,"b":":"}', 1, False),
        (b'{"a"\t:1,"b":2}', 1, False),
        (b'{"a"\r:1,"b":2}', 1, False),
        (b'{"a"\n:1,"b":2}', 1, False),
        (b'{"a": 1,"b": "x: y"}', 2, True),
        (b'{"a":"x :y","b":2}', 2, False),  # sure is something else
        (b'{"a":"\\":","b":2}', 2, False),
        (b"[]", 0, True),
    ],
)
def test_keys_are_counted_only_where_nothing_can_hide_one(text: bytes, num_keys: int, is_sure: bool) -> None:
    assert has_no_other_keys(text, num_keys) is is_sure


@given(st.dictionaries(st.sampled_from('ab:" '), st.sampled_from([1, ":", '":', " :", "x"]), max_size=4), st.data())
def test_key_that_is_not_counted_is_never_overlooked(mapping: dict[str, Any], data: st.DataObject) -> None:
    separators = st.sampled_from([":", " :", ": ", "\t:", "\r:", "\n:"])
    pairs = [json.dumps(key) + data.draw(separators) + json.dumps(found) for key, found in mapping.items()]
    text = ("{" + ",".join(pairs) + "}").encode()
    for fewer in range(len(pairs)):
        assert not has_no_other_keys(text, fewer)


# -- contexts and marks ------------------------------------------------------------------------------------------------


@given(st.dictionaries(identifiers, context_values, max_size=5))
def test_context_as_text_keeps_values_and_types(context: dict[str, Any]) -> None:
    back = json.loads(encode_context(context))
    assert back == context
    assert [type(v) for v in back.values()] == [type(v) for v in context.values()]


@pytest.mark.parametrize("time_ms", [0, 1, 1_764_000_000_123, END_OF_LOG_MS])
def test_mark_survives_a_round_trip(time_ms: int) -> None:
    value, headers = encode_mark(time_ms)
    assert value == b""
    assert mark_of(headers) == time_ms


def test_records_without_a_readable_mark_hold_events() -> None:
    assert mark_of(None) is None
    assert mark_of([]) is None
    assert mark_of([("other", b"5")]) is None
    assert mark_of([("other", b"5"), (MARK_HEADER, b"7")]) == 7
    for value in (b"", b"x", b"\xff", b"9" * 5000, b"1.5"):
        assert mark_of([(MARK_HEADER, value)]) is None


def test_mark_header_without_a_value_is_no_mark() -> None:
    assert mark_of([(MARK_HEADER, None)]) is None  # type: ignore[list-item]


@pytest.mark.parametrize(
    "line",
    [
        b'{"schema_version":1,"decision_id":"a","decision_id":"b","occurred_at_ms":1}',
        b'{"schema_version":1,"decision_id":"reward","decision_id":"b","occurred_at_ms":1}',
        b'{"schema_version":1,"decision_id":"a","occurred_at_ms":1,"reward":1,"reward":2}',
        b'{"schema_version":1,"schema_version":1,"decision_id":"\\"reward\\"","occurred_at_ms":1}',
        b'{"schema_version":1,"decision_id":"a","occurred_at_ms" :1,"reward" :2,"reward" :3}',
    ],
)
def test_click_with_a_key_twice_is_refused(line: bytes) -> None:
    [bad] = CLICKS.decode_batch(line).bad
    assert "key stands twice" in bad.reason


@pytest.mark.parametrize(
    "line",
    [
        b'{"schema_version":1,"decision_id":"a:b","occurred_at_ms":1}',
        b'{"schema_version":1,"decision_id":"a","occurred_at_ms":1,"reward":2.5}',
        b'{"schema_version":1,"decision_id":"a","occurred_at_ms":1,"other":{"x":1}}',
    ],
)
def test_click_with_each_key_once_is_accepted(line: bytes) -> None:
    decoded = CLICKS.decode_batch(line)
    assert (len(decoded.events), decoded.bad) == (1, [])
