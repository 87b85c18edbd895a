"""Snapshots that tests publish."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from streams.contracts.features import ContextColumn, FeatureSpec
from streams.contracts.snapshot import (
    SNAPSHOT_TENSORS,
    GateVerdict,
    PolicySnapshot,
    SnapshotManifest,
    pack_tensors,
    sign,
)

KEY = b"k" * 32
NOW_MS = 1_764_000_000_000


def snapshot(
    model_id: str,
    epoch: int,
    version: int,
    blob: bytes | None = None,
    feature_spec_hash: str = "f",
    created_at_ms: int = NOW_MS,
) -> PolicySnapshot:
    """Return a snapshot signed with `KEY`; without a blob, of bytes that no server can load."""
    blob = f"weights {epoch}:{version}".encode() if blob is None else blob
    manifest = SnapshotManifest(
        model_id=model_id,
        epoch=epoch,
        version=version,
        sha256=hashlib.sha256(blob).hexdigest(),
        num_bytes=len(blob),
        feature_spec_hash=feature_spec_hash,
        gate=GateVerdict(accepted=True),
        metrics={"log_loss": 0.0625},
        created_at_ms=created_at_ms,
    )
    return PolicySnapshot(sign(manifest, KEY), blob)


def real_blob() -> tuple[bytes, FeatureSpec]:
    """Return weights of a small vocabulary, drawn at random, that a server can load."""
    spec = FeatureSpec(
        slots=("title", "image"),
        context=(ContextColumn(field="device", value="ios"),),
        products=("p1",),
        elements=((0, "t1"), (0, "t2"), (1, "i1")),
        content_size=2,
        encoder="hash-1:2",
    )
    sizes: dict[Any, int] = {1: 1, "encoder_mean": 0, "encoder_matrix": 0} | dict(
        zip("MSQFGCDPERdh", (4, 2, 1, 2, 2, 1, 2, 1, 3, 0, 2, 3), strict=True)
    )
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {
        name: rng.normal(size=[sizes[dim] for dim in tensor.dims]).astype(np.float32)
        for name, tensor in SNAPSHOT_TENSORS.items()
        if tensor.dtype == "F32"
    }
    tensors["pairs"] = np.empty(0, np.uint8)
    tensors["encoder.kinds"] = np.frombuffer(b"[]", np.uint8)
    tensors["element_content"][1] = 0.0
    tensors["vocabulary"] = np.frombuffer(spec.to_json(), np.uint8)
    tensors["settings"] = np.frombuffer(b'{"epsilon": 0.05}', np.uint8)
    return pack_tensors(tensors), spec
