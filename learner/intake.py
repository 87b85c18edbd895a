"""Which examples are learned: bad ones are set aside with a reason, and none is learned twice.

Labels form a lattice: nothing < negative < positive. A decision is learned at most once as a negative and at most once
as a positive, and no negative after a positive, so duplicates, re-emission after a crash and labels that a replay
decides earlier all end in the same state. Decisions are remembered by a 64-bit hash of their id, in buckets of event
time that are forgotten when the newest impression is a horizon ahead. Impressions older than that are learned, counted
and not remembered: losing them would be certain, learning one twice is unlikely.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from streams.contracts.examples import ExampleBatch, LabelKind

BUCKET_MS = 10_000
NEGATIVE, POSITIVE = 1, 2


class Intake:
    """Sorts examples into those to learn and those to skip, and remembers what was learned."""

    def __init__(self, horizon_ms: int) -> None:
        self.horizon_ms = horizon_ms
        self.newest_ms = 0
        self._buckets: dict[int, dict[int, int]] = {}

    def __len__(self) -> int:
        """Return how many decisions are remembered."""
        return sum(len(bucket) for bucket in self._buckets.values())

    def admit(self, batch: ExampleBatch) -> tuple[list[int], Counter[str]]:
        """Return the rows to learn, and how many rows were skipped (or could not be remembered) for each reason.

        Admitted rows count as learned from here on.
        """
        admitted: list[int] = []
        reasons: Counter[str] = Counter()
        for row in range(len(batch)):
            reason = _fault(batch, row) or self._repeated(batch, row, reasons)
            if reason:
                reasons[reason] += 1
            else:
                admitted.append(row)
        self._forget()
        return admitted, reasons

    def _repeated(self, batch: ExampleBatch, row: int, reasons: Counter[str]) -> str:
        occurred_at_ms = int(batch.occurred_at_ms[row])
        self.newest_ms = max(self.newest_ms, occurred_at_ms)
        if occurred_at_ms < self.newest_ms - self.horizon_ms:
            reasons["beyond_horizon"] += 1
            return ""
        bucket = self._buckets.setdefault(occurred_at_ms // BUCKET_MS, {})
        digest = hashlib.blake2b(batch.decision_id[row].encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little", signed=True)
        known = bucket.get(key, 0)
        if batch.label[row]:
            if known & POSITIVE:
                return "duplicate"
            bucket[key] = known | POSITIVE
        elif known:
            return "weaker_label" if known & POSITIVE else "duplicate"
        else:
            bucket[key] = NEGATIVE
        return ""

    def _forget(self) -> None:
        first = (self.newest_ms - self.horizon_ms) // BUCKET_MS
        for number in [number for number in self._buckets if number < first]:
            del self._buckets[number]

    def tensors(self) -> dict[str, Tensor]:
        """Return what is remembered, for a checkpoint: bucket, key and strength of each decision."""
        entries = [(number, key, seen) for number, bucket in self._buckets.items() for key, seen in bucket.items()]
        return {"decisions": torch.tensor(entries, dtype=torch.int64).reshape(-1, 3)}

    def state(self) -> dict[str, Any]:
        """Return the rest of a checkpoint, JSON-able."""
        return {"newest_ms": self.newest_ms}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take the place of the intake that a checkpoint holds."""
        self.newest_ms = state["newest_ms"]
        self._buckets = {}
        for number, key, seen in tensors["decisions"].tolist():
            self._buckets.setdefault(number, {})[key] = seen


def _fault(batch: ExampleBatch, row: int) -> str:
    """Return why an example must not be learned, or an empty string."""
    label, propensity, survival = batch.label[row], batch.propensity[row], batch.survival_probability[row]
    if label not in (0, 1) or (batch.label_kind[row] == LabelKind.LATE_POSITIVE and not label):
        return "bad_label"
    if not math.isfinite(batch.reward[row]):
        return "bad_reward"
    # "Not inside" instead of "outside", so that nan is a fault, too.
    if not 0.0 < propensity <= 1.0 or not 0.0 < survival <= 1.0:
        return "bad_propensity"
    candidates, creative = batch.candidates[row], batch.creative[row]
    if not creative or creative.keys() != candidates.keys():
        return "bad_creative"
    if any(element not in candidates[slot] for slot, element in creative.items()):
        return "bad_creative"
    if any(isinstance(value, float) and not math.isfinite(value) for value in batch.context[row].values()):
        return "bad_context"
    return ""
