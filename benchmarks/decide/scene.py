"""What is decided: snapshots of a learner that has learned from a world, and requests that are all different.

The snapshots lie in a folder, since the processes that measure are not the one that trains.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.search.scene import BATCH, KNOWN_PRODUCTS, Scene, context_of
from genco.world import DEVICES, SEGMENTS
from learner.generator import GeneratorSettings
from serving.policy import DecisionRequest
from streams.contracts.snapshot import PolicySnapshot, SnapshotManifest

MODEL: Final = "default"
SIGNING_KEY: Final = "the key of a benchmark's snapshots"
HOURS: Final = 24
NUM_REQUESTS: Final = KNOWN_PRODUCTS * len(DEVICES) * len(SEGMENTS) * HOURS
"""Different ones: each known product in each context."""


def train(folder: Path, scene: Scene, impressions: int, num_snapshots: int) -> None:
    """Teach a learner, and write snapshots with an update of 1,000 impressions between two of them."""
    learner = scene.learn(impressions, GeneratorSettings(), lambda _: None)
    for number in range(num_snapshots):
        if number:
            learner.update(scene.traffic(BATCH, impressions // BATCH + number))
        snapshot = learner.snapshot(
            model_id=MODEL,
            epoch=1,
            version=number + 1,
            parent_sha256=None,
            trained_through={"0": impressions + number * BATCH},
            due_ms_quantiles=[],
            created_at_ms=0,
            signing_key=SIGNING_KEY.encode(),
        )
        blob, manifest = _paths(folder, scene, number)
        blob.write_bytes(snapshot.blob)
        manifest.write_text(snapshot.manifest.model_dump_json(), "utf-8")


def read_snapshot(folder: Path, scene: Scene, number: int = 0) -> PolicySnapshot:
    """Return a snapshot that `train` wrote."""
    blob, manifest = _paths(folder, scene, number)
    return PolicySnapshot(SnapshotManifest.model_validate_json(manifest.read_text("utf-8")), blob.read_bytes())


def _paths(folder: Path, scene: Scene, number: int) -> tuple[Path, Path]:
    stem = f"{scene.num_slots}x{scene.num_candidates}-{number}"
    return folder / f"{stem}.safetensors", folder / f"{stem}.json"


def distinct_requests(scene: Scene, count: int, seed: int) -> list[DecisionRequest]:
    """Return requests of which no two have both product and context in common; at most `NUM_REQUESTS`.

    Their candidates are described by the snapshot, so, as in the server, they bring no content.
    """
    rng = np.random.default_rng([scene.seed, 4, seed])
    shape = KNOWN_PRODUCTS, len(DEVICES), len(SEGMENTS), HOURS
    drawn = np.unravel_index(rng.permutation(NUM_REQUESTS)[:count], shape)
    rows = zip(*(column.tolist() for column in drawn), strict=True)
    return [
        DecisionRequest(f"p{product}", context_of(*context), scene.candidate_ids[product], seed=number)
        for number, (product, *context) in enumerate(rows)
    ]
