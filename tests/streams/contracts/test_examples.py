"""Examples survive Arrow, and what is no record of examples is refused with a reason."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.contracts.codec import EventDecoder
from streams.contracts.events import Click, Impression
from streams.contracts.examples import (
    EXAMPLE_SCHEMA,
    NO_DELAY,
    ExampleBatch,
    decode_examples,
    encode_examples,
)

GOLDEN = Path(__file__).resolve().parents[2] / "data" / "v1"


def columns(num: int = 3) -> dict[str, list[Any]]:
    return {
        "decision_id": [f"d{n}" for n in range(num)],
        "occurred_at_ms": [1000 + n for n in range(num)],
        "product_id": [f"p{n}" for n in range(num)],
        "context": [f'{{"hour":{n},"device":"ios","x":1.0,"new":true}}' for n in range(num)],
        "candidates": [{"title": ["t1", "t2"], "image": ["i1"]} for _ in range(num)],
        "creative": [{"title": f"t{n}", "image": "i1"} for n in range(num)],
        "slot_propensities": [{"title": 0.5, "image": 1.0} for _ in range(num)],
        "propensity": [0.5] * num,
        "model_id": ["default"] * num,
        "epoch": list(range(num)),
        "policy_version": [2**53 - 1] * num,
        "source": ["policy"] * num,
        "holdout": [n % 2 == 0 for n in range(num)],
        "seed": [2**63 - 1 - n for n in range(num)],
        "survival_probability": [1.0] * num,
        "label": [n % 2 for n in range(num)],
        "reward": [float(n) for n in range(num)],
        "label_kind": ["final"] * num,
        "delay_ms": [n if n % 2 else None for n in range(num)],
    }


def same(a: ExampleBatch, b: ExampleBatch) -> bool:
    """Equal in values, dtypes, and the order of keys."""
    for name in EXAMPLE_SCHEMA.names:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, list):
            if x != y or [list(v) for v in x] != [list(v) for v in y]:
                return False
        elif x.dtype != y.dtype or not np.array_equal(x, y):
            return False
    return True


def arrow(schema: pa.Schema, arrays: list[pa.Array]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return sink.getvalue().to_pybytes()


def table() -> pa.Table:
    return pa.ipc.open_stream(encode_examples(columns())).read_all().combine_chunks()


def rewritten(**changed: pa.Array | None) -> bytes:
    """Return a record whose named columns are replaced, or left out where None."""
    source = table()
    names = [name for name in source.column_names if changed.get(name, 1) is not None]
    names += [name for name in changed if name not in source.column_names]
    arrays = [changed[n] if n in changed else source.column(n).chunk(0) for n in names]
    schema = pa.schema([pa.field(n, a.type) for n, a in zip(names, arrays, strict=True)], EXAMPLE_SCHEMA.metadata)
    return arrow(schema, arrays)


def test_every_column_survives_a_round_trip() -> None:
    raw = columns(5)
    batch = decode_examples(encode_examples(raw))
    assert len(batch) == 5
    assert EXAMPLE_SCHEMA.names == list(raw)
    for name, values in raw.items():
        got = list(getattr(batch, name))
        if name == "context":
            assert got == [{"hour": n, "device": "ios", "x": 1.0, "new": True} for n in range(5)]
            assert [type(v) for v in got[0].values()] == [int, str, float, bool]
        elif name == "delay_ms":
            assert got == [NO_DELAY, 1, NO_DELAY, 3, NO_DELAY]
        else:
            assert got == values, name


@settings(max_examples=50)
@given(st.lists(st.permutations(["title", "image", "tag", "a", "z"]), min_size=1, max_size=4))
def test_order_of_slots_is_kept(orders: list[list[str]]) -> None:
    raw = columns(len(orders))
    raw["creative"] = [{slot: f"e-{slot}" for slot in order} for order in orders]
    raw["candidates"] = [{slot: [f"e-{slot}", "x"] for slot in order} for order in orders]
    raw["slot_propensities"] = [dict.fromkeys(order, 0.5) for order in orders]
    batch = decode_examples(encode_examples(raw))
    for name in ("creative", "candidates", "slot_propensities"):
        assert [list(mapping) for mapping in getattr(batch, name)] == orders
        assert getattr(batch, name) == raw[name]


def test_schema_is_the_documented_one() -> None:
    value = encode_examples(columns())
    assert pa.ipc.open_stream(value).schema.equals(EXAMPLE_SCHEMA, check_metadata=True)
    assert EXAMPLE_SCHEMA.metadata == {b"genco.schema": b"examples", b"genco.schema_version": b"1"}
    assert [f.name for f in EXAMPLE_SCHEMA if f.nullable] == ["delay_ms"]


def test_same_columns_give_the_same_bytes() -> None:
    assert encode_examples(columns()) == encode_examples(columns())


def test_empty_batch_survives_and_joins() -> None:
    empty = ExampleBatch.empty()
    assert len(empty) == 0
    full = decode_examples(encode_examples(columns()))
    assert same(ExampleBatch.concat([empty, full, empty]), full)
    assert same(full.take([]), empty)
    assert same(decode_examples(encode_examples({n: [] for n in EXAMPLE_SCHEMA.names})), empty)


@given(st.lists(st.integers(0, 4), max_size=8))
def test_take_returns_the_rows_in_that_order(rows: list[int]) -> None:
    batch = decode_examples(encode_examples(columns(5)))
    taken = batch.take(np.array(rows, np.intp))
    assert len(taken) == len(rows)
    for name in EXAMPLE_SCHEMA.names:
        column = getattr(batch, name)
        assert list(getattr(taken, name)) == [column[row] for row in rows]


@given(st.integers(0, 5), st.integers(0, 5))
def test_concat_puts_together_what_take_took_apart(first: int, second: int) -> None:
    batch = decode_examples(encode_examples(columns(5)))
    a, b = sorted((first, second))
    parts = [batch.take(range(a)), batch.take(range(a, b)), batch.take(range(b, 5))]
    assert same(ExampleBatch.concat(parts), batch)


def test_unknown_column_is_ignored() -> None:
    extra = pa.array([{"x": [1]}] * 3)
    assert same(decode_examples(rewritten(future=extra)), decode_examples(encode_examples(columns())))


def test_columns_in_another_order_are_read_by_name() -> None:
    source = table()
    names = list(reversed(source.column_names))
    schema = pa.schema([source.schema.field(name) for name in names], EXAMPLE_SCHEMA.metadata)
    value = arrow(schema, [source.column(name).chunk(0) for name in names])
    assert same(decode_examples(value), decode_examples(encode_examples(columns())))


def test_several_record_batches_are_read_as_one() -> None:
    source = table()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, source.schema) as writer:
        writer.write_table(source, max_chunksize=1)
    assert same(decode_examples(sink.getvalue().to_pybytes()), decode_examples(encode_examples(columns())))


@pytest.mark.parametrize("name", EXAMPLE_SCHEMA.names)
def test_missing_column_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"lack the column.*{name}"):
        decode_examples(rewritten(**{name: None}))
    raw = columns()
    del raw[name]
    with pytest.raises(ValueError, match=f"lack the column '{name}'"):
        encode_examples(raw)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("occurred_at_ms", pa.array(["a", "b", "c"])),
        ("propensity", pa.array(["a", "b", "c"])),
        ("creative", pa.array([1, 2, 3])),
        ("candidates", pa.array(["x", "y", "z"])),
        ("label", pa.array([1000, 0, 0])),
        ("context", pa.array([[1], [2], [3]])),
    ],
)
def test_column_of_another_type_is_refused(name: str, array: pa.Array) -> None:
    with pytest.raises(ValueError, match="not a record of examples"):
        decode_examples(rewritten(**{name: array}))


@pytest.mark.parametrize("context", ["{", "[]", '{"a":{"b":1}}', '{"a":NaN}', '{"a":null}', ""])
def test_context_that_is_none_is_found_when_it_is_looked_at(context: str) -> None:
    batch = decode_examples(encode_examples(columns() | {"context": ["{}", context, "{}"]}))
    assert len(batch.candidates) == 3
    with pytest.raises(ValueError, match="is no JSON object of single values"):
        _ = batch.context


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("epoch", ["x", 1, 2]),
        ("label", [300, 0, 1]),
        ("creative", [1, 2, 3]),
        ("creative", [None, {}, {}]),
        ("decision_id", [1, 2, 3]),
        ("decision_id", ["only one"]),
    ],
)
def test_values_that_do_not_fit_are_not_written(name: str, values: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"schema|length"):
        encode_examples(columns() | {name: values})


@pytest.mark.parametrize("version", [b"0", b"2", b"x", None])
def test_another_schema_version_is_refused(version: bytes | None) -> None:
    metadata = {} if version is None else {"genco.schema_version": version}
    source = table()
    value = arrow(source.schema.with_metadata(metadata), [column.chunk(0) for column in source.columns])
    with pytest.raises(ValueError, match=r"schema version|invalid literal"):
        decode_examples(value)


@pytest.mark.parametrize("value", [b"", b"garbage", b"\xff" * 100, b"ARROW1\x00\x00", b"\x00" * 64, b'{"a":1}\n'])
def test_garbage_is_refused(value: bytes) -> None:
    with pytest.raises(ValueError, match="not a record of examples"):
        decode_examples(value)


def test_cut_record_never_gives_other_examples() -> None:
    value = encode_examples(columns())
    whole = decode_examples(value)
    for length in range(0, len(value), 7):
        try:
            batch = decode_examples(value[:length])
        except ValueError:
            continue
        assert same(batch, whole), f"cut to {length} of {len(value)} bytes"


def test_record_cut_after_its_schema_is_refused() -> None:
    schema_alone = len(EXAMPLE_SCHEMA.serialize())
    with pytest.raises(ValueError, match="examples"):
        decode_examples(encode_examples(columns())[:schema_alone])


@pytest.mark.parametrize("name", [f.name for f in EXAMPLE_SCHEMA if not f.nullable])
def test_null_in_a_required_column_is_refused(name: str) -> None:
    value = rewritten(**{name: pa.nulls(3, EXAMPLE_SCHEMA.field(name).type)})
    with pytest.raises(ValueError, match=f"(?s)examples.*{name}"):
        decode_examples(value)


FUZZ = """
import random, sys
from streams.contracts.examples import decode_examples
value = sys.stdin.buffer.read()
rng = random.Random(1)
for _ in range(1500):
    data = bytearray(value)
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    try:
        decode_examples(bytes(data))
    except ValueError:
        pass
"""


def test_flipped_bytes_do_not_end_the_process() -> None:
    done = subprocess.run(  # in a process of its own: it dies of a segmentation fault
        [sys.executable, "-W", "ignore", "-c", FUZZ],
        input=encode_examples(columns()),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]


# -- what the last release wrote ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make() -> ModuleType:
    """The script that made the golden files; its functions return what they must load to."""
    spec = importlib.util.spec_from_file_location("golden_v1_make", GOLDEN / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_events_of_version_1_still_load(make: ModuleType) -> None:
    impressions = EventDecoder(Impression).decode_batch((GOLDEN / "impressions.ndjson").read_bytes())
    assert (impressions.events, impressions.bad) == (make.golden_impressions(), [])
    for got, expected in zip(impressions.events, make.golden_impressions(), strict=True):
        assert list(got.creative) == list(expected.creative)
        assert [type(v) for v in got.context.values()] == [type(v) for v in expected.context.values()]
    clicks = EventDecoder(Click).decode_batch((GOLDEN / "clicks.ndjson").read_bytes())
    assert (clicks.events, clicks.bad) == (make.golden_clicks(), [])


def test_examples_of_version_1_still_load(make: ModuleType) -> None:
    batch = decode_examples((GOLDEN / "examples.arrow").read_bytes())
    impressions = make.golden_impressions()
    for name in Impression.__struct_fields__:
        if name != "schema_version":
            assert list(getattr(batch, name)) == [getattr(impression, name) for impression in impressions], name
    assert [list(creative) for creative in batch.creative] == [list(i.creative) for i in impressions]
    assert [type(v) for v in batch.context[0].values()] == [str, int, float, bool, float]
    assert batch.label.tolist() == [1, 1, 0]
    assert batch.reward.tolist() == [1.0, 19.95, 0.0]
    assert batch.label_kind == ["final", "late_positive", "provisional"]
    assert batch.delay_ms.tolist() == [4_000, 30_000, NO_DELAY]
