"""What differs between a snapshot and the one published before it: whole tensors, or the rows that changed.

A delta is a line that names the format, the length of a header (4 bytes), the header in JSON, and data. The header
names the parent by its sha256 and lists the tensors that differ, each with its new shape and, where only rows of it
travel, their number. The data of a tensor are the indices of these rows (4 bytes each) and then the rows. Rows are
taken along the first dimension, eight bytes at a time where a tensor holds packed pairs. A tensor that lost rows is cut
to its new length, one that gained some has them among the rows that travel; one that is not listed is the parent's.

Base and delta give the bytes of the full snapshot, bit for bit. So a delta needs no signature: whoever applies one
compares the sha256 of the result with the signed manifest, and fetches the full snapshot if they differ, or if the
parent is not the snapshot that he has.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from streams.contracts.snapshot import (
    MAX_BLOB_BYTES,
    MAX_HEADER_BYTES,
    SNAPSHOT_TENSORS,
    SnapshotError,
    TensorSpec,
    pack_tensors,
    unpack_tensors,
)

MAGIC: Final = b"genco-delta-1\n"
_START: Final = len(MAGIC) + 4
_PACKED: Final = {"pairs": 8}
"""Flat tensors whose rows are so many numbers."""
_NUMPY: Final[dict[str, np.dtype[Any]]] = {"F32": np.dtype("<f4"), "U8": np.dtype(np.uint8)}


class _Part(BaseModel):
    """A tensor that differs."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    shape: list[int] = Field(max_length=8)
    rows: int | None
    """How many travel; None: the whole tensor does."""


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    parent: str = Field(pattern=r"^[0-9a-f]{64}$")
    tensors: list[_Part] = Field(max_length=256)


def make_delta(base: bytes, blob: bytes, expected: Mapping[str, TensorSpec] = SNAPSHOT_TENSORS) -> bytes:
    """Return what turns the blob `base` into `blob`.

    Raises:
        SnapshotError: If one of them is not of the format.
    """
    old, new = unpack_tensors(base, expected), unpack_tensors(blob, expected)
    parts, data = [], []
    for name, tensor in new.items():
        before, after = _rows(name, old[name]), _rows(name, tensor)
        changed = _changed(before, after)
        if not len(changed) and before.shape == after.shape:
            continue
        whole, some = tensor.tobytes(), after[changed].tobytes()
        is_whole = before.shape[1:] != after.shape[1:] or 4 * len(changed) + len(some) >= len(whole)
        parts.append(_Part(name=name, shape=list(tensor.shape), rows=None if is_whole else len(changed)))
        data += [whole] if is_whole else [changed.astype("<i4").tobytes(), some]
    header = _Header(parent=hashlib.sha256(base).hexdigest(), tensors=parts).model_dump_json().encode()
    return b"".join([MAGIC, struct.pack("<I", len(header)), header, *data])


def apply_delta(
    base: bytes,
    delta: bytes,
    expected: Mapping[str, TensorSpec] = SNAPSHOT_TENSORS,
    max_bytes: int = MAX_BLOB_BYTES,
) -> bytes:
    """Return the blob that a delta makes of `base`; whether it is the right one its sha256 tells.

    Args:
        base: A blob that was verified.
        delta: Bytes that may come from anyone.
        expected: The tensors of the format.
        max_bytes: The result has no more.

    Raises:
        SnapshotError: With reason `gap` if the delta is of another parent, `delta` if it cannot be applied.
    """
    header, place = _read_header(delta)
    if header.parent != hashlib.sha256(base).hexdigest():
        raise SnapshotError("gap", f"delta follows {header.parent[:16]}, not the snapshot that is here")
    # Before anything is allocated: names and shapes are the stranger's.
    sizes = [math.prod(part.shape) if min(part.shape, default=0) >= 0 else max_bytes + 1 for part in header.tensors]
    if sum(sizes) > max_bytes or len({part.name for part in header.tensors}) != len(sizes):
        raise SnapshotError(
            "delta", f"delta makes {sum(sizes)} numbers of {len(sizes)} tensors; too many, or one twice"
        )
    tensors = dict(unpack_tensors(base, expected))
    for part in header.tensors:
        if part.name not in tensors:
            raise SnapshotError("delta", f"delta names the tensor {part.name[:80]!r}; the format has none such")
        tensors[part.name], place = _applied(part, tensors[part.name], delta, place, _NUMPY[expected[part.name].dtype])
    if place != len(delta):
        raise SnapshotError("delta", f"delta has {len(delta)} bytes; its header speaks of {place}")
    return pack_tensors(tensors)


def _rows(name: str, tensor: NDArray[Any]) -> NDArray[Any]:
    width = _PACKED.get(name, 1)
    if width > 1 and tensor.ndim == 1 and len(tensor) % width == 0:
        return tensor.reshape(-1, width)
    return tensor


def _changed(before: NDArray[Any], after: NDArray[Any]) -> NDArray[np.int64]:
    """Return the indices of the rows of `after` that `before` does not have, bit by bit: 0 and -0 differ."""
    if before.shape[1:] != after.shape[1:]:
        return np.arange(len(after))
    common = min(len(before), len(after))
    if not after[:common].size:  # no rows in common, or rows of nothing
        return np.arange(common, len(after))
    old, new = (np.ascontiguousarray(array[:common]).reshape(common, -1).view(np.uint8) for array in (before, after))
    return np.concatenate([np.flatnonzero((old != new).any(axis=1)), np.arange(common, len(after))])


def _read_header(delta: bytes) -> tuple[_Header, int]:
    if len(delta) > MAX_BLOB_BYTES or len(delta) < _START or not delta.startswith(MAGIC):
        raise SnapshotError("delta", f"{len(delta)} bytes are no delta")
    (length,) = struct.unpack_from("<I", delta, len(MAGIC))
    if length > MAX_HEADER_BYTES or _START + length > len(delta):
        raise SnapshotError(
            "delta", f"header of the delta says {length} bytes; at most {MAX_HEADER_BYTES} are possible"
        )
    try:
        return _Header.model_validate_json(delta[_START : _START + length]), _START + length
    except ValidationError as error:
        raise SnapshotError("delta", f"header of the delta is malformed: {error.errors()[0]['type']}") from None


def _applied(
    part: _Part, base: NDArray[Any], delta: bytes, place: int, dtype: np.dtype[Any]
) -> tuple[NDArray[Any], int]:
    """Return the new tensor, and where the data of the next one begin."""
    if part.rows is None:
        count = math.prod(part.shape)
        return _array(delta, place, count, dtype).reshape(part.shape), place + count * dtype.itemsize
    rows = _rows(part.name, base)
    tail = rows.shape[1:]
    length = part.shape[0] // (_PACKED[part.name] if rows.ndim > base.ndim else 1) if part.shape else 0
    shape = (length, *tail)
    if math.prod(shape) != math.prod(part.shape) or base.ndim != len(part.shape) or not 0 <= part.rows <= length:
        raise SnapshotError("delta", f"{part.rows} rows do not fit a tensor {part.name} of shape {part.shape}")
    index = _array(delta, place, part.rows, np.dtype("<i4"))
    place += 4 * part.rows
    count = part.rows * math.prod(tail)
    values = _array(delta, place, count, dtype)
    if len(index) and not (index.min() >= 0 and index.max() < length):
        raise SnapshotError("delta", f"a row of tensor {part.name} is beyond its {length}")
    out = np.zeros(shape, dtype)
    common = min(length, len(rows))
    out[:common] = rows[:common]
    out[index] = values.reshape(-1, *tail)
    return out.reshape(part.shape), place + count * dtype.itemsize


def _array(delta: bytes, place: int, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    if place + count * dtype.itemsize > len(delta):
        raise SnapshotError(
            "delta", f"delta ends at byte {len(delta)}; byte {place + count * dtype.itemsize} is needed"
        )
    return np.frombuffer(delta, dtype, count, place)
