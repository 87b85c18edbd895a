"""What deltas save: `python -m benchmarks.learn.deltas --products 200 --updates 40`.

The learner learns updates of 1,000 impressions of the traffic that `genco bench learn` makes, and the bytes of the last
five snapshots are compared with those of their deltas, both also compressed.
"""

from __future__ import annotations

import argparse
import itertools
import json

import numpy as np
import zstandard

from benchmarks.learn.ours import HORIZON_MS, decode
from benchmarks.learn.traffic import Traffic
from learner.online import LearnerSettings, OnlineLearner
from streams.contracts.delta import apply_delta, make_delta
from streams.example_records import EXAMPLES_PER_RECORD

UPDATE = 1_000
COMPARED = 5


def snapshots(num_products: int, num_updates: int) -> list[bytes]:
    """Return the blobs after each of the last updates."""
    traffic = Traffic(num_products=num_products)
    learner = OnlineLearner(LearnerSettings(horizon_ms=HORIZON_MS))
    learner.apply_catalog(traffic.elements, traffic.products)
    blobs = []
    records = UPDATE // EXAMPLES_PER_RECORD
    for number in range(num_updates):
        learner.update(decode([traffic.record(each) for each in range(number * records, (number + 1) * records)]))
        if number >= num_updates - COMPARED:
            made = learner.snapshot(
                model_id="benchmark",
                epoch=1,
                version=number + 1,
                parent_sha256=None,
                trained_through={},
                due_ms_quantiles=[],
                created_at_ms=0,
                signing_key=b"the key of a benchmark's snapshot",
            )
            blobs.append(made.blob)
    return blobs


def measure(num_products: int, num_updates: int) -> dict[str, float]:
    """Return mean bytes of full snapshots and deltas, and what the deltas save."""
    compress = zstandard.ZstdCompressor(3).compress
    blobs, rows = snapshots(num_products, num_updates), []
    for before, after in itertools.pairwise(blobs):
        delta = make_delta(before, after)
        if apply_delta(before, delta) != after:
            raise RuntimeError("base and delta are not the full snapshot")
        rows.append((len(after), len(delta), len(compress(after)), len(compress(delta))))
    full, delta_bytes, full_zstd, delta_zstd = np.mean(rows, axis=0).tolist()
    return {
        "full": full,
        "delta": delta_bytes,
        "saved": 1.0 - delta_bytes / full,
        "full_zstd": full_zstd,
        "delta_zstd": delta_zstd,
    }


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--products", type=int, default=200, metavar="N")
    parser.add_argument("--updates", type=int, default=40, metavar="N")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.products, arguments.updates)))  # noqa: T201


if __name__ == "__main__":
    main()
