"""What `genco policy list` and `GET /v1/registry` show: the registry as JSON can hold it."""

from __future__ import annotations

from typing import Any, Final

from streams.contracts.control import RegistryState
from streams.contracts.registry import Version
from streams.contracts.snapshot import SnapshotManifest
from streams.registry import Registry

SHOWN_METRICS: Final = ("log_loss", "normalized_entropy", "calibration")


def listing(registry: Registry, limit: int) -> dict[str, Any]:
    """Return the registry as JSON can hold it: its state, its newest versions, the newest actions."""
    state, candidate = registry.state(), registry.candidate()
    versions = registry.history()
    kept = [v for v in (state.pinned, state.current) if v is not None]
    chosen = versions[:limit] + sorted({v for v in kept if v not in versions[:limit]}, reverse=True)
    manifests = registry.manifests(chosen)
    rows = [_row(version, manifests[version], marks(version, state)) for version in chosen]
    if candidate is not None and not candidate.gate.accepted:
        rows.insert(0, _row(Version(candidate.epoch, candidate.version), candidate, ["refused"]))
    return {
        "model_id": registry.model_id,
        "state": state.model_dump(mode="json"),
        "stored": len(versions),
        "versions": rows,
        "audit": [record.model_dump(mode="json") for record in registry.audit(limit)],
    }


def marks(version: Version, state: RegistryState) -> list[str]:
    """Return what is special about a version."""
    is_current = state.current == version
    found = ["current"] if is_current else []
    if state.pinned == version:
        found.append("pinned")
    return [*found, "frozen"] if is_current and state.frozen else found


def _row(version: Version, manifest: SnapshotManifest | None, marked: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"version": str(version), "marks": marked, "stored": manifest is not None}
    if manifest is None:
        return row
    return row | {
        "created_at_ms": manifest.created_at_ms,
        "gate": manifest.gate.model_dump(mode="json", include={"accepted", "reasons"}),
        "sha256": manifest.sha256,
        "num_bytes": manifest.num_bytes,
        "metrics": {name: manifest.metrics.get(name) for name in SHOWN_METRICS},
    }
