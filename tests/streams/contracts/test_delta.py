"""Base and deltas give the full snapshot, bit for bit, and nothing that a stranger sends does harm."""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.contracts.delta import MAGIC, apply_delta, make_delta
from streams.contracts.snapshot import MAX_BLOB_BYTES, SnapshotError, TensorSpec, pack_tensors

FORMAT = {
    "element": TensorSpec("F32", ("E", "D")),
    "root": TensorSpec("F32", ("E", "D", "D")),
    "pair": TensorSpec("F32", ("R",)),
    "pairs": TensorSpec("U8", ("bytes",)),
    "vocabulary": TensorSpec("U8", ("B",)),
}
NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -2.5, 1e-45, 3e38])


@st.composite
def chains(draw: st.DrawFn) -> list[bytes]:
    """Snapshots one after the other: rows change, come and go, and sometimes everything does."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    blobs, tensors = [], {}
    for step in range(draw(st.integers(2, 4))):
        if step == 0 or draw(st.integers(0, 4)) == 0:
            columns = draw(st.integers(0, 3))
            sizes = [(draw(st.integers(0, 5)), columns)]
        num_rows, num_pairs = draw(st.integers(0, 6)), draw(st.integers(0, 4))
        columns = sizes[0][1]
        shapes = {
            "element": (num_rows, columns),
            "root": (num_rows, columns, columns),
            "pair": (num_pairs,),
            "pairs": (8 * num_pairs + draw(st.sampled_from([0, 0, 0, 3])),),
            "vocabulary": (draw(st.integers(0, 9)),),
        }
        for name, shape in shapes.items():
            old, kind = tensors.get(name), np.float32 if FORMAT[name].dtype == "F32" else np.uint8
            new = rng.integers(0, 2, shape).astype(kind)
            if old is not None and old.shape[1:] == shape[1:]:
                common = min(len(old), len(new))
                new[:common] = old[:common]
                for row in draw(st.lists(st.integers(0, max(0, len(new) - 1)), max_size=3)):
                    if new.size:
                        new[row] = draw(NUMBERS) if kind is np.float32 else draw(st.integers(0, 255))
            tensors[name] = new
        blobs.append(pack_tensors(tensors))
    return blobs


@settings(max_examples=200, deadline=None)
@given(chains())
def test_base_and_deltas_are_the_full_snapshot_bit_for_bit(blobs: list[bytes]) -> None:
    built = blobs[0]
    for before, after in itertools.pairwise(blobs):
        built = apply_delta(built, make_delta(before, after, FORMAT), FORMAT)
        assert built == after


def tensors_of(num_rows: int = 1_000) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "element": rng.normal(size=(num_rows, 4)).astype(np.float32),
        "root": rng.normal(size=(num_rows, 4, 4)).astype(np.float32),
        "pair": np.zeros(2, np.float32),
        "pairs": np.arange(16, dtype=np.uint8),
        "vocabulary": np.frombuffer(b"[]", np.uint8),
    }


BASE = pack_tensors(tensors_of())


def changed(*rows: int) -> bytes:
    tensors = tensors_of()
    tensors["root"][list(rows)] += 1.0
    return pack_tensors(tensors)


def test_delta_of_few_rows_is_small_and_of_none_smaller() -> None:
    assert len(make_delta(BASE, changed(3, 500), FORMAT)) < 2 * (64 + 4) + 250
    assert len(make_delta(BASE, BASE, FORMAT)) < 150
    assert apply_delta(BASE, make_delta(BASE, BASE, FORMAT), FORMAT) == BASE


def test_delta_of_another_parent_is_a_gap() -> None:
    first, second = changed(1), changed(1, 2)
    with pytest.raises(SnapshotError) as caught:
        apply_delta(BASE, make_delta(first, second, FORMAT), FORMAT)
    assert caught.value.reason == "gap"


def delta_of(*parts: dict[str, Any], data: bytes = b"", parent: str = hashlib.sha256(BASE).hexdigest()) -> bytes:
    header = json.dumps({"parent": parent, "tensors": parts}).encode()
    return MAGIC + struct.pack("<I", len(header)) + header + data


def part(*shape: int, rows: Any = None, name: str = "element") -> dict[str, Any]:
    return {"name": name, "shape": shape, "rows": rows}


@pytest.mark.parametrize(
    "delta",
    [
        b"",
        MAGIC,
        MAGIC + struct.pack("<I", 2**32 - 1),
        MAGIC + struct.pack("<I", 2) + b"{]",
        MAGIC + struct.pack("<I", 60_000) + b"[" * 60_000,
        delta_of(part(-1, -4)),
        delta_of(part(MAX_BLOB_BYTES, 4)),
        delta_of(part(MAX_BLOB_BYTES, 4, rows=0)),
        delta_of(*[part(MAX_BLOB_BYTES // 8, 4, rows=0, name=name) for name in ("element", "root")]),
        delta_of(part(9, rows=0)),
        delta_of(part(rows=0)),
        delta_of(part(9, 5, rows=0)),
        delta_of(part(9, 4, rows=10), data=b"\0" * 400),
        delta_of(part(9, 4, rows=-1)),
        delta_of(part(9, 4, rows=True), data=b"\0" * 20),
        delta_of(part(9, 4, rows=1), data=struct.pack("<i16x", 9)),
        delta_of(part(9, 4, rows=1), data=struct.pack("<i16x", -1)),
        delta_of(part(9, 4, rows=1), data=b"\0" * 10),
        delta_of(part(9, 4, rows=0), part(9, 4, rows=0)),
        delta_of(part(9, rows=0, name="pairs")),
        delta_of(part(9, name="other"), data=b"\0" * 9),
        delta_of(part(1, 1), data=struct.pack("<f", float("nan"))),
        delta_of(data=b"x"),
        delta_of(part(9, 4, rows=0) | {"more": 1}),
        delta_of(parent="0" * 64),
    ],
)
def test_hostile_delta_is_refused_as_one(delta: bytes) -> None:
    with pytest.raises(SnapshotError):
        apply_delta(BASE, delta, FORMAT)


def test_no_flipped_byte_does_more_than_change_the_result() -> None:
    good = make_delta(BASE, changed(3, 500), FORMAT)
    for place in range(len(good)):
        try:
            built = apply_delta(BASE, good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1 :], FORMAT)
        except SnapshotError:
            continue
        assert hashlib.sha256(built).digest() != hashlib.sha256(changed(3, 500)).digest()
