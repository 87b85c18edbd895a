"""What differs between two snapshots of a model: metrics, vocabulary, settings, and how far the numbers moved.

Rows are compared by what they stand for and not by their place: a row of a name that expired is used again for another.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from streams.contracts.features import FeatureSpec
from streams.contracts.snapshot import SNAPSHOT_TENSORS, SnapshotManifest, unpack_pairs, unpack_tensors

MOST_NAMED: Final = 5
"""Elements and products whose change is shown."""
Keys = Sequence[Hashable | None]
"""What each index of an axis stands for; None: nothing, its row is free."""


def difference(first: tuple[SnapshotManifest, bytes], second: tuple[SnapshotManifest, bytes]) -> dict[str, Any]:
    """Return what differs, as JSON can hold it.

    Raises:
        SnapshotError: If a blob is not of the format.
        ValueError: If its vocabulary is none.
    """
    (manifest, blob), (other_manifest, other_blob) = first, second
    tensors, others = unpack_tensors(blob), unpack_tensors(other_blob)
    specs = [FeatureSpec.from_json(t["vocabulary"].tobytes()) for t in (tensors, others)]
    axes, other_axes = (_axes(spec, t) for spec, t in zip(specs, (tensors, others), strict=True))
    return {
        "model_id": manifest.model_id,
        "first": _named(manifest),
        "second": _named(other_manifest),
        "metrics": _pairs(manifest.metrics, other_manifest.metrics),
        "gate": _pairs(manifest.gate.numbers, other_manifest.gate.numbers),
        "settings": _pairs(*(json.loads(t["settings"].tobytes()) for t in (tensors, others)), only_changed=True),
        "vocabulary": {
            name: _sizes(axes[dim], other_axes[dim])
            for name, dim in (("slots", "S"), ("context", "C"), ("products", "P"), ("elements", "E"), ("pairs", "R"))
        },
        "tensors": [
            _moved(name, (tensors[name], others[name]), (axes, other_axes))
            for name, spec in SNAPSHOT_TENSORS.items()
            if spec.dtype == "F32"
        ],
        "largest": {
            name: _largest((tensors[name], others[name]), (axes[dim], other_axes[dim]), (axes["D"], other_axes["D"]))
            for name, dim in (("element", "E"), ("product", "P"))
        },
    }


def _named(manifest: SnapshotManifest) -> dict[str, Any]:
    fields = manifest.model_dump(mode="json", include={"sha256", "created_at_ms", "max_event_time_ms", "num_bytes"})
    return {"version": f"{manifest.epoch}.{manifest.version}", **fields, "trained_through": manifest.trained_through}


def _pairs(first: Mapping[str, Any], second: Mapping[str, Any], *, only_changed: bool = False) -> dict[str, list[Any]]:
    """Return name -> the two values, None where there is none."""
    both = {name: [first.get(name), second.get(name)] for name in sorted(first.keys() | second.keys())}
    return {name: pair for name, pair in both.items() if not only_changed or pair[0] != pair[1]}


def _axes(spec: FeatureSpec, tensors: Mapping[str, NDArray[Any]]) -> dict[str, Keys]:
    """Return dimension -> what its indices stand for, for the dimensions that have names."""
    slots = spec.slots
    elements = [None if key is None else (slots[key[0]], key[1]) for key in spec.elements]
    context = [None if column is None else (column.field, column.value) for column in spec.context]
    return {
        "S": slots,
        "C": context,
        "D": ["alone", *context],
        "P": spec.products,
        "E": elements,
        "Q": [
            None if slots[s] is None or slots[t] is None else (slots[s], slots[t])
            for t in range(len(slots))
            for s in range(t)
        ],
        "R": [_both(elements[i], elements[j]) for i, j in unpack_pairs(tensors["pairs"]).tolist()],
    }


def _both(one: Hashable | None, other: Hashable | None) -> Hashable | None:
    return None if one is None or other is None else frozenset((one, other))


def _places(keys: Keys) -> dict[Hashable, int]:
    return {key: index for index, key in enumerate(keys) if key is not None}


def _sizes(first: Keys, second: Keys) -> dict[str, int]:
    one, two = _places(first).keys(), _places(second).keys()
    return {"first": len(one), "second": len(two), "added": len(two - one), "removed": len(one - two)}


def _moved(
    name: str, arrays: tuple[NDArray[Any], NDArray[Any]], axes: tuple[dict[str, Keys], dict[str, Keys]]
) -> dict[str, Any]:
    """Return how far a tensor moved, over what both snapshots have."""
    rows: tuple[list[list[int]], list[list[int]]] = ([], [])
    for dim, sizes in zip(SNAPSHOT_TENSORS[name].dims, zip(*(a.shape for a in arrays), strict=True), strict=True):
        known = [axis.get(str(dim), range(size)) for axis, size in zip(axes, sizes, strict=True)]
        one, two = (_places(keys) for keys in known)
        common = [key for key in one if key in two]
        rows[0].append([one[key] for key in common])
        rows[1].append([two[key] for key in common])
    before, after = (array[np.ix_(*places)].astype(np.float64) for array, places in zip(arrays, rows, strict=True))
    norm, change = float(np.linalg.norm(before)), float(np.linalg.norm(after - before))
    return {
        "tensor": name,
        "compared": before.size,
        "first": norm,
        "second": float(np.linalg.norm(after)),
        "change": change,
        "relative": change / norm if norm else None,
    }


def _largest(
    arrays: tuple[NDArray[Any], NDArray[Any]], rows: tuple[Keys, Keys], columns: tuple[Keys, Keys]
) -> list[dict[str, Any]]:
    """Return the rows that moved most, largest first, with their effects alone: logits of a click."""
    (one, two), (left, right) = map(_places, rows), map(_places, columns)
    common, shared = [key for key in one if key in two], [key for key in left if key in right]
    before = arrays[0][np.ix_([one[k] for k in common], [left[k] for k in shared])].astype(np.float64)
    after = arrays[1][np.ix_([two[k] for k in common], [right[k] for k in shared])].astype(np.float64)
    change = np.linalg.norm(after - before, axis=1)
    return [
        {
            "name": "/".join(map(str, key)) if isinstance(key := common[row], tuple) else str(key),
            "first": float(before[row, 0]),
            "second": float(after[row, 0]),
            "change": float(change[row]),
        }
        for row in np.argsort(-change, kind="stable")[:MOST_NAMED].tolist()
        if change[row] > 0
    ]
