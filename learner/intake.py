"""Which examples are learned: bad ones are set aside with a reason, and none is learned twice.

Labels form a lattice: nothing < negative < positive. A decision is learned at most once as a negative and at most once
as a positive, and no negative after a positive, so duplicates, re-emission after a crash and labels that a replay
decides earlier all end in the same state. Decisions are remembered by a 64-bit hash of their id, in buckets of event
time that are forgotten when the newest impression is a horizon ahead. Impressions older than that are learned, counted
and not remembered: losing them would be certain, learning one twice is unlikely.

A bucket is a sorted array of hashes and one byte for each, so a decision takes nine bytes; a dictionary took a hundred.

Shapes: N examples, R of them without a fault, D decisions among them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from streams.contracts.examples import ExampleBatch

BUCKET_MS: Final = 10_000
NEGATIVE, POSITIVE = 1, 2

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]
ByteArray = NDArray[np.uint8]


class Intake:
    """Sorts examples into those to learn and those to skip, and remembers what was learned."""

    def __init__(self, horizon_ms: int) -> None:
        self.horizon_ms = horizon_ms
        self.newest_ms = 0
        self._buckets: dict[int, _Bucket] = {}

    def __len__(self) -> int:
        """Return how many decisions are remembered."""
        return sum(len(bucket.key_D) for bucket in self._buckets.values())

    @property
    def num_bytes(self) -> int:
        """What the remembered decisions take in memory."""
        return sum(bucket.key_D.nbytes + bucket.seen_D.nbytes for bucket in self._buckets.values())

    def admit(self, batch: ExampleBatch, faults: Mapping[str, BoolArray]) -> tuple[IntArray, Counter[str]]:
        """Return the rows to learn, and how many rows were skipped (or could not be remembered) for each reason.

        Admitted rows count as learned from here on.

        Args:
            batch: N examples.
            faults: Reason -> which examples must not be learned, (N,); of several reasons the first one counts.
        """
        reasons: Counter[str] = Counter()
        is_good_N = np.ones(len(batch), np.bool_)
        for reason, is_bad_N in faults.items():
            reasons[reason] += int((is_bad_N & is_good_N).sum())
            is_good_N &= ~is_bad_N
        rows = np.flatnonzero(is_good_N)
        time_R, is_positive_R = batch.occurred_at_ms[rows], batch.label[rows] > 0
        newest_R = np.maximum(np.maximum.accumulate(time_R), self.newest_ms)
        is_old_R = time_R < newest_R - self.horizon_ms
        reasons["beyond_horizon"] += int(is_old_R.sum())
        is_learned_R = is_old_R.copy()
        number_R = time_R // BUCKET_MS
        key_R = decision_keys(batch.columns.column("decision_id"))[rows]
        for number in np.unique(number_R[~is_old_R]).tolist():
            inside = np.flatnonzero((number_R == number) & ~is_old_R)
            bucket = self._buckets.setdefault(number, _Bucket())
            is_new, is_weaker = bucket.learn(key_R[inside], is_positive_R[inside])
            is_learned_R[inside] = is_new
            reasons["weaker_label"] += int(is_weaker.sum())
            reasons["duplicate"] += int((~is_new & ~is_weaker).sum())
        self.newest_ms = int(newest_R[-1]) if len(rows) else self.newest_ms
        self._forget()
        return rows[is_learned_R], +reasons

    def _forget(self) -> None:
        first = (self.newest_ms - self.horizon_ms) // BUCKET_MS
        for number in [number for number in self._buckets if number < first]:
            del self._buckets[number]

    def tensors(self) -> dict[str, Tensor]:
        """Return what is remembered, for a checkpoint: hash and strength of each decision, bucket after bucket."""
        sizes = [[number, len(bucket.key_D)] for number, bucket in self._buckets.items()]
        keys = [bucket.key_D for bucket in self._buckets.values()]
        seen = [bucket.seen_D for bucket in self._buckets.values()]
        return {
            "buckets": torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2),
            "keys": torch.from_numpy(np.concatenate([*keys, np.empty(0, np.int64)])),
            "seen": torch.from_numpy(np.concatenate([*seen, np.empty(0, np.uint8)])),
        }

    def state(self) -> dict[str, Any]:
        """Return the rest of a checkpoint, JSON-able."""
        return {"newest_ms": self.newest_ms}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take the place of the intake that a checkpoint holds."""
        self.newest_ms = state["newest_ms"]
        self._buckets = {}
        key_D, seen_D, first = tensors["keys"].numpy(), tensors["seen"].numpy(), 0
        for number, size in tensors["buckets"].tolist():
            self._buckets[number] = _Bucket(key_D[first : first + size].copy(), seen_D[first : first + size].copy())
            first += size


class _Bucket:
    """The decisions of ten seconds: their hashes in ascending order, and what each was learned as."""

    def __init__(self, key_D: IntArray | None = None, seen_D: ByteArray | None = None) -> None:
        self.key_D: IntArray = np.empty(0, np.int64) if key_D is None else key_D
        self.seen_D: ByteArray = np.empty(0, np.uint8) if seen_D is None else seen_D

    def learn(self, key_R: IntArray, is_positive_R: BoolArray) -> tuple[BoolArray, BoolArray]:
        """Remember R labels, one after the other.

        Of one decision's labels in a batch only the first and the first positive can be new: whatever else comes, comes
        after one that is as strong.

        Returns:
            For each label whether it is new, and whether it is a negative that came after a positive, both (R,).
        """
        num_rows = len(key_R)
        key_D, first_D, decision_R = np.unique(key_R, return_index=True, return_inverse=True)
        first_positive_D = np.full(len(key_D), num_rows)
        positive = np.flatnonzero(is_positive_R)[::-1]
        # Of several values for one place numpy keeps the last, here that of the earliest row.
        first_positive_D[decision_R[positive]] = positive

        place_D = np.searchsorted(self.key_D, key_D)
        is_known_D = np.zeros(len(key_D), np.bool_)
        inside_D = place_D < len(self.key_D)
        is_known_D[inside_D] = self.key_D[place_D[inside_D]] == key_D[inside_D]
        seen_D = np.zeros(len(key_D), np.uint8)
        seen_D[is_known_D] = self.seen_D[place_D[is_known_D]]

        row_R = np.arange(num_rows)
        was_positive_R = (seen_D & POSITIVE)[decision_R] > 0
        is_first_R = (row_R == first_D[decision_R]) & (seen_D[decision_R] == 0)
        is_first_positive_R = (row_R == first_positive_D[decision_R]) & ~was_positive_R
        is_new_R = np.where(is_positive_R, is_first_positive_R, is_first_R)
        is_weaker_R = ~is_positive_R & ~is_new_R & (was_positive_R | (first_positive_D[decision_R] < row_R))

        # No two labels of a decision are new and of the same kind, so nothing is added twice.
        np.add.at(seen_D, decision_R[is_new_R], np.where(is_positive_R, POSITIVE, NEGATIVE)[is_new_R].astype(np.uint8))
        self.seen_D[place_D[is_known_D]] = seen_D[is_known_D]
        if not is_known_D.all():
            self.key_D = np.insert(self.key_D, place_D[~is_known_D], key_D[~is_known_D])
            self.seen_D = np.insert(self.seen_D, place_D[~is_known_D], seen_D[~is_known_D])
        return is_new_R, is_weaker_R


def decision_keys(ids: pa.Array) -> IntArray:
    """Return a 64-bit hash of each decision id, the same in every process and release."""
    digests = b"".join([hashlib.blake2b(each.encode(), digest_size=8).digest() for each in ids.to_pylist()])
    return np.frombuffer(digests, "<i8").astype(np.int64)
