"""Published weights: a safetensors blob and a signed JSON manifest.

Whoever loads a snapshot trusts nothing: `verify` checks length, sha256 and HMAC of the blob against its manifest,
`unpack_tensors` checks the header of the blob (size, names, dtypes, shapes, layout) before the library reads it, and
every number afterwards. Nothing here can execute what it reads.

Shapes: M posterior draws, S slots, Q = S (S - 1) / 2 slot pairs, F content numbers an element, of which the first G
stand in pairs, C context columns, D = 1 + C, P products, E elements, R pairs of elements, d width of the generator, h
width of its hidden layer, B bytes of JSON. Pair (s, t), s < t, has index q = t (t - 1) / 2 + s, so a new slot appends
pairs and moves none.

    draws.content (M, S, F)  draws.content_context (M, S, F, C)  draws.content_pair (M, Q, G, G)
    mean.*                   the same of the posterior mean, without M; and mean.bias (1,), mean.context (C,)
    product (P, D)           effect of a product, alone and with each context column
    element (E, D)           the same of an element; element_sd (E, D): posterior standard deviations
    element_content (E, F)   content of every known element
    trait (E, F)             what clicks add to it; trait_root (E, F, F): lower Cholesky factor of the covariance
    pair (R,)                effects of pairs of elements; pair_sd (R,): posterior standard deviations; pairs (8 R,):
                             uint8, their indices, see `pack_pairs`
    encoder.*                what reduces rich content, see `streams.contracts.encoders`
    generator.*              weights of the pointer, see `serving.pointer`
    vocabulary (B,)          uint8: JSON of the `FeatureSpec`; here, so that the header stays small
    settings (B,)            uint8: JSON of how the policy is played (epsilon, Thompson scale, starts, sweeps)
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

FORMAT = "genco-snapshot-3"
MAX_HEADER_BYTES = 64 * 1024
MAX_BLOB_BYTES = 256 * 1024 * 1024
_BYTES = {"F32": 4, "U8": 1}
_DTYPES = {"F32": np.dtype(np.float32), "U8": np.dtype(np.uint8)}

Dimension = str | int


class SnapshotError(ValueError):
    """A snapshot that must not be used; `reason` is a short code for counters."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class GateVerdict(BaseModel):
    """Whether a version may be served, why not, and the numbers that were looked at."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    accepted: bool
    reasons: tuple[str, ...] = ()
    numbers: dict[str, float] = Field(default_factory=dict)


class GoldenAnswer(BaseModel):
    """A request, a creative, and what the policy says of it: whoever loads the snapshot must find the same."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    product_id: str
    context: dict[str, bool | int | float | str]
    candidates: dict[str, tuple[str, ...]]
    creative: dict[str, str]
    expected_ctr: float = Field(gt=0.0, lt=1.0)
    """Under the posterior mean."""
    log_probability: float
    """Of the generator, for the whole creative."""


class SnapshotManifest(BaseModel):
    """What a snapshot is, where it comes from, and what proves it."""

    # Unknown fields are kept, not used: the signature covers them, and an older reader must be able to check it.
    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True, allow_inf_nan=False)

    schema_version: int = 1
    format: str = FORMAT
    model_id: str = Field(min_length=1, max_length=128)
    epoch: int = Field(ge=0)
    """Fencing token of the learner's lease."""
    version: int = Field(ge=0)
    """Increases by one with each snapshot of an epoch."""
    parent_sha256: str = ""
    """sha256 of the blob published before; empty for the first."""
    sha256: str
    num_bytes: int = Field(ge=0)
    feature_spec_hash: str
    trained_through: dict[str, int] = Field(default_factory=dict)
    """Partition of `examples` -> offset of the next record to learn."""
    max_event_time_ms: int = 0
    """Newest impression that was learned."""
    due_ms_quantiles: tuple[float, ...] = ()
    """Eleven quantiles (0, 10, ... 100 %) of impression time + label wait over the examples that this snapshot learned
    and the one stored before had not; empty without any."""
    metrics: dict[str, float] = Field(default_factory=dict)
    gate: GateVerdict
    golden: tuple[GoldenAnswer, ...] = ()
    """Golden batch, see `serving.golden`; empty: the learner had seen no impression yet."""
    created_at_ms: int
    hmac: str = ""
    """HMAC-SHA256 (hex) over the canonical JSON of all other fields."""

    def canonical_bytes(self) -> bytes:
        """Return the bytes that are signed: every field but the signature, sorted, without spaces."""
        fields = self.model_dump(mode="json", exclude={"hmac"})
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


@dataclass(frozen=True, slots=True)
class PolicySnapshot:
    """A manifest and the safetensors bytes that it describes."""

    manifest: SnapshotManifest
    blob: bytes


def sign(manifest: SnapshotManifest, key: bytes) -> SnapshotManifest:
    """Return the manifest with its HMAC under `key`.

    Raises:
        ValueError: If the key is empty.
    """
    return manifest.model_copy(update={"hmac": _mac(manifest, key)})


def verify(manifest: SnapshotManifest, blob: bytes, key: bytes) -> None:
    """Check that the blob is the one that the owner of `key` described.

    Raises:
        SnapshotError: With reason `format`, `length`, `hmac` or `sha256`.
        ValueError: If the key is empty.
    """
    if manifest.schema_version != 1 or manifest.format != FORMAT:
        raise SnapshotError(
            "format", f"snapshot has format {manifest.format!r} version {manifest.schema_version}; expected {FORMAT!r}"
        )
    if len(blob) != manifest.num_bytes:
        raise SnapshotError("length", f"snapshot has {len(blob)} bytes; its manifest says {manifest.num_bytes}")
    # On bytes: compare_digest refuses text outside ASCII, which a hostile manifest may hold.
    if not hmac.compare_digest(_mac(manifest, key).encode(), manifest.hmac.encode("utf-8", "replace")):
        raise SnapshotError("hmac", "signature of the manifest is wrong; is GENCO_SIGNING_KEY the learner's?")
    digest = hashlib.sha256(blob).hexdigest()
    if digest != manifest.sha256:
        raise SnapshotError("sha256", f"snapshot has sha256 {digest}; its manifest says {manifest.sha256[:64]}")


def _mac(manifest: SnapshotManifest, key: bytes) -> str:
    if not key:
        raise ValueError("snapshot key is empty; expected at least one byte")
    return hmac.new(key, manifest.canonical_bytes(), hashlib.sha256).hexdigest()


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor must be: its dtype in safetensors' words and its dimensions, a name being the same everywhere."""

    dtype: str
    dims: tuple[Dimension, ...]


def _core(prefix: str, lead: tuple[Dimension, ...]) -> dict[str, TensorSpec]:
    dims: dict[str, tuple[Dimension, ...]] = {
        "content": ("S", "F"),
        "content_context": ("S", "F", "C"),
        "content_pair": ("Q", "G", "G"),
    }
    return {f"{prefix}.{name}": TensorSpec("F32", lead + tail) for name, tail in dims.items()}


SNAPSHOT_TENSORS: dict[str, TensorSpec] = {
    **_core("draws", ("M",)),
    **_core("mean", ()),
    "mean.bias": TensorSpec("F32", (1,)),
    "mean.context": TensorSpec("F32", ("C",)),
    "product": TensorSpec("F32", ("P", "D")),
    "element": TensorSpec("F32", ("E", "D")),
    "element_sd": TensorSpec("F32", ("E", "D")),
    "element_content": TensorSpec("F32", ("E", "F")),
    "trait": TensorSpec("F32", ("E", "F")),
    "trait_root": TensorSpec("F32", ("E", "F", "F")),
    "pair": TensorSpec("F32", ("R",)),
    "pair_sd": TensorSpec("F32", ("R",)),
    "pairs": TensorSpec("U8", ("pairs_bytes",)),
    "encoder.kinds": TensorSpec("U8", ("kinds_bytes",)),
    "encoder.mean": TensorSpec("F32", ("encoder_mean",)),
    "encoder.matrix": TensorSpec("F32", ("encoder_matrix",)),
    "generator.content": TensorSpec("F32", ("F", "d")),
    "generator.element": TensorSpec("F32", ("E", "d")),
    "generator.slot": TensorSpec("F32", ("S", "d")),
    "generator.context": TensorSpec("F32", ("S", "C", "d")),
    "generator.product": TensorSpec("F32", ("P", "d")),
    "generator.chosen": TensorSpec("F32", ("S", "S", "d", "d")),
    "generator.hidden_in": TensorSpec("F32", ("d", "h")),
    "generator.hidden_bias": TensorSpec("F32", ("h",)),
    "generator.hidden_out": TensorSpec("F32", ("h", "d")),
    "vocabulary": TensorSpec("U8", ("vocabulary_bytes",)),
    "settings": TensorSpec("U8", ("settings_bytes",)),
}
"""The tensors of format 2, all of them required and no others allowed."""


def pack_pairs(pairs_R2: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return pairs of element indices as the bytes of little-endian 32-bit integers, (8 R,)."""
    return np.frombuffer(pairs_R2.astype("<i4").tobytes(), np.uint8)


def unpack_pairs(data: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return what `pack_pairs` packed, (R, 2)."""
    return np.frombuffer(data.tobytes(), "<i4").reshape(-1, 2).astype(np.int64)


def pack_tensors(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """Return the safetensors bytes of named arrays; the same arrays give the same bytes.

    Raises:
        ValueError: If the result would be refused when it is read: too large, or a number is not finite.
    """
    for name, array in tensors.items():
        _check_finite(name, array)
    blob: bytes = safetensors_numpy.save({name: np.asarray(tensors[name], order="C") for name in sorted(tensors)})
    if len(blob) > MAX_BLOB_BYTES:
        raise SnapshotError("size", f"snapshot has {len(blob)} bytes; the limit is {MAX_BLOB_BYTES}")
    _header(blob)
    return blob


def unpack_tensors(blob: bytes, expected: Mapping[str, TensorSpec] = SNAPSHOT_TENSORS) -> dict[str, NDArray[Any]]:
    """Read safetensors bytes that may come from anyone.

    Args:
        blob: The bytes.
        expected: Every tensor that must be there; others are refused.

    Raises:
        SnapshotError: With reason `size`, `header`, `names`, `shape`, `layout` or `finite`.
    """
    if len(blob) > MAX_BLOB_BYTES:
        raise SnapshotError("size", f"snapshot has {len(blob)} bytes; the limit is {MAX_BLOB_BYTES}")
    header, data_start = _header(blob)
    header.pop("__metadata__", None)
    if header.keys() != expected.keys():
        odd = sorted(header.keys() ^ expected.keys())
        raise SnapshotError("names", f"snapshot lacks or adds {len(odd)} tensors, the first {odd[0][:100]!r}")
    sizes: dict[str, int] = {}
    for name, entry in header.items():
        _check_entry(name, entry, expected[name], sizes)
    _check_layout(header, len(blob) - data_start)
    try:
        tensors: dict[str, NDArray[Any]] = safetensors_numpy.load(blob)
    except SafetensorError as error:
        raise SnapshotError("header", f"not safetensors: {error}") from None
    for name, array in tensors.items():
        _check_finite(name, array)
    return tensors


def _header(blob: bytes) -> tuple[dict[str, Any], int]:
    """Return the parsed header and where the data start; the length is checked before a byte of it is parsed."""
    if len(blob) < 8:
        raise SnapshotError("header", f"snapshot has {len(blob)} bytes; a header alone takes 8")
    (length,) = struct.unpack("<Q", blob[:8])
    if length > MAX_HEADER_BYTES or length > len(blob) - 8:
        raise SnapshotError(
            "header", f"header says {length} bytes; at most {MAX_HEADER_BYTES} and {len(blob) - 8} are possible"
        )
    try:
        header = json.loads(blob[8 : 8 + length], object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise SnapshotError("header", f"header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise SnapshotError("header", f"header is a JSON {type(header).__name__}; expected an object")
    return header, 8 + length


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _check_entry(name: str, entry: Any, spec: TensorSpec, sizes: dict[str, int]) -> None:  # noqa: ANN401, RUF100
    shape, dtype = (entry.get("shape"), entry.get("dtype")) if isinstance(entry, dict) else (None, None)
    if dtype != spec.dtype:
        raise SnapshotError("shape", f"tensor {name} has dtype {str(dtype)[:20]!r}; expected {spec.dtype}")
    if not isinstance(shape, list) or len(shape) != len(spec.dims):
        raise SnapshotError("shape", f"tensor {name} has shape {str(shape)[:60]}; expected {spec.dims}")
    for size, dim in zip(shape, spec.dims, strict=True):
        want = sizes.setdefault(dim, size) if isinstance(dim, str) else dim
        if type(size) is not int or not 0 <= size <= MAX_BLOB_BYTES or size != want:
            raise SnapshotError("shape", f"tensor {name} has {dim} = {str(size)[:20]}; expected {str(want)[:20]}")


def _check_layout(header: Mapping[str, Any], num_bytes: int) -> None:
    """Tensors must lie one after the other, without gap or overlap, from the first byte of the data to the last."""
    spans = []
    for name, entry in header.items():
        span = entry.get("data_offsets")
        if not (isinstance(span, list) and len(span) == 2 and all(type(offset) is int for offset in span)):
            raise SnapshotError("layout", f"tensor {name} has offsets {str(span)[:60]}; expected two integers")
        size = _BYTES[entry["dtype"]]
        for dim in entry["shape"]:
            size *= dim
        if span[1] - span[0] != size:
            raise SnapshotError("layout", f"tensor {name} takes {span[1] - span[0]} bytes; its shape says {size}")
        spans.append((span[0], span[1], name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise SnapshotError("layout", f"tensor {name} starts at byte {start}; expected {end}")
        end = stop
    if end != num_bytes:
        raise SnapshotError("layout", f"tensors end at byte {end}; the data have {num_bytes}")


def _check_finite(name: str, array: NDArray[Any]) -> None:
    if array.dtype not in _DTYPES.values():
        raise SnapshotError("shape", f"tensor {name} has dtype {array.dtype}; expected one of {sorted(_DTYPES)}")
    if array.dtype == np.float32 and not np.isfinite(array).all():
        raise SnapshotError("finite", f"tensor {name} holds a value that is not finite")
