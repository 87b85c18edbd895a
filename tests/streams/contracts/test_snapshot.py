"""Snapshots survive the way, and nothing hostile gets through."""

import hashlib
import json
import struct
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from streams.contracts.snapshot import (
    MAX_HEADER_BYTES,
    GateVerdict,
    SnapshotError,
    SnapshotManifest,
    TensorSpec,
    pack_tensors,
    sign,
    unpack_tensors,
    verify,
)

KEY = b"k" * 32
EXPECTED = {"a": TensorSpec("F32", ("M", "F")), "b": TensorSpec("F32", ("F",)), "text": TensorSpec("U8", ("n",))}


def tensors() -> dict[str, Any]:
    return {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones(3, np.float32),
        "text": np.frombuffer(b"{}", np.uint8),
    }


def manifest(blob: bytes, **changes: Any) -> SnapshotManifest:
    values: dict[str, Any] = {
        "model_id": "m",
        "epoch": 1,
        "version": 2,
        "sha256": hashlib.sha256(blob).hexdigest(),
        "num_bytes": len(blob),
        "feature_spec_hash": "f",
        "trained_through": {"0": 7},
        "gate": GateVerdict(accepted=True),
        "created_at_ms": 5,
    }
    return sign(SnapshotManifest(**values | changes), KEY)


def with_header(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: tuple[Any, ...] = (1,), span: tuple[Any, ...] = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


def test_tensors_round_trip_and_the_bytes_do_not_depend_on_the_order() -> None:
    blob = pack_tensors(tensors())
    assert pack_tensors(dict(reversed(tensors().items()))) == blob
    again = unpack_tensors(blob, EXPECTED)
    assert all((again[name] == array).all() for name, array in tensors().items())


def test_scalar_stays_a_scalar() -> None:
    blob = pack_tensors({"x": np.array(3.0, np.float32)})
    assert unpack_tensors(blob, {"x": TensorSpec("F32", ())})["x"].shape == ()


def test_manifest_survives_json_and_verifies() -> None:
    blob = pack_tensors(tensors())
    again = SnapshotManifest.model_validate_json(manifest(blob).model_dump_json())
    verify(again, blob, KEY)


def test_manifest_of_a_newer_writer_verifies() -> None:
    blob = pack_tensors(tensors())
    newer = manifest(blob, invented_later=[1, {"x": None}])
    verify(SnapshotManifest.model_validate_json(newer.model_dump_json()), blob, KEY)


@pytest.mark.parametrize("key", [b"other" * 8])
def test_wrong_key_is_refused(key: bytes) -> None:
    blob = pack_tensors(tensors())
    with pytest.raises(SnapshotError, match="signature") as caught:
        verify(manifest(blob), blob, key)
    assert caught.value.reason == "hmac"


def test_empty_key_is_a_mistake() -> None:
    blob = pack_tensors(tensors())
    with pytest.raises(ValueError, match="empty"):
        verify(manifest(blob), blob, b"")


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("version", 3, "hmac"),
        ("trained_through", {"0": 8}, "hmac"),
        ("gate", GateVerdict(accepted=False), "hmac"),
        ("hmac", "ü", "hmac"),
        ("hmac", "", "hmac"),
        ("format", "genco-snapshot-2", "format"),
        ("num_bytes", 1, "length"),
    ],
)
def test_changed_manifest_is_refused(field: str, value: Any, reason: str) -> None:
    blob = pack_tensors(tensors())
    with pytest.raises(SnapshotError) as caught:
        verify(manifest(blob).model_copy(update={field: value}), blob, KEY)
    assert caught.value.reason == reason


def test_each_flipped_byte_is_refused() -> None:
    blob = pack_tensors(tensors())
    signed = manifest(blob)
    for place in range(0, len(blob), 7):
        bad = blob[:place] + bytes([blob[place] ^ 1]) + blob[place + 1 :]
        with pytest.raises(SnapshotError):
            verify(signed, bad, KEY)


def test_truncated_blob_is_refused() -> None:
    blob = pack_tensors(tensors())
    with pytest.raises(SnapshotError) as caught:
        verify(manifest(blob), blob[:-1], KEY)
    assert caught.value.reason == "length"


@pytest.mark.parametrize(
    ("blob", "reason"),
    [
        (b"", "header"),
        (b"1234567", "header"),
        (struct.pack("<Q", 2**63) + b"{}", "header"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b" " * (MAX_HEADER_BYTES + 1), "header"),
        (with_header(b"[" * 60_000), "header"),
        (with_header(b"\xff\xfe"), "header"),
        (with_header([]), "header"),
        (with_header(b'{"x":1,"x":2}'), "header"),
        (with_header({}), "names"),
        (with_header({"x": entry(), "y": entry()}, b"0000"), "names"),
        (with_header({"x": 3}), "shape"),
        (with_header({"x": entry(dtype="I64")}, b"0000"), "shape"),
        (with_header({"x": entry(dtype="F64")}, b"0000"), "shape"),
        (with_header({"x": entry(shape=(1, 1))}, b"0000"), "shape"),
        (with_header({"x": entry(shape=(-1,))}, b"0000"), "shape"),
        (with_header({"x": entry(shape=(True,))}, b"0000"), "shape"),
        (with_header({"x": entry(shape=(2**40,))}, b"0000"), "shape"),
        (with_header({"x": entry(shape=(2,))}, b"0000"), "layout"),
        (with_header({"x": entry(span=(0, 8))}, b"0000"), "layout"),
        (with_header({"x": entry(span=(4, 8))}, b"00000000"), "layout"),
        (with_header({"x": entry(span=(0, 4.0))}, b"0000"), "layout"),
        (with_header({"x": entry()}, b"00000"), "layout"),
        (with_header({"x": entry()}, struct.pack("<f", float("nan"))), "finite"),
        (with_header({"x": entry()}, struct.pack("<f", float("-inf"))), "finite"),
    ],
)
def test_hostile_blob_is_refused(blob: bytes, reason: str) -> None:
    with pytest.raises(SnapshotError) as caught:
        unpack_tensors(blob, {"x": TensorSpec("F32", ("n",))})
    assert caught.value.reason == reason


def test_overlapping_tensors_are_refused() -> None:
    blob = with_header({"x": entry(), "y": entry()}, b"0000")
    with pytest.raises(SnapshotError) as caught:
        unpack_tensors(blob, {"x": TensorSpec("F32", ("n",)), "y": TensorSpec("F32", ("n",))})
    assert caught.value.reason == "layout"


def test_dimensions_of_one_name_must_agree() -> None:
    blob = save(tensors() | {"b": np.ones(4, np.float32)})
    with pytest.raises(SnapshotError, match=r"F = 4; expected 3|F = 3; expected 4"):
        unpack_tensors(blob, EXPECTED)


def test_what_would_be_refused_is_not_packed() -> None:
    with pytest.raises(SnapshotError, match="not finite"):
        pack_tensors({"x": np.array([np.nan], np.float32)})
    with pytest.raises(SnapshotError, match="dtype"):
        pack_tensors({"x": np.zeros(1, np.int64)})


@given(st.binary(max_size=300), st.integers(0, 400))
@settings(max_examples=150, deadline=None)
def test_random_bytes_give_snapshot_errors_only(noise: bytes, place: int) -> None:
    blob = pack_tensors(tensors())
    for hostile in (noise, blob[:place] + noise + blob[place + len(noise) :], with_header(noise)):
        with suppress(SnapshotError):
            unpack_tensors(hostile, EXPECTED)
