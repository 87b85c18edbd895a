"""Did the joiner do its work? A benchmark of a join that loses an example measures nothing.

The generator knows what must come out: every decision once as a first label, and a positive for every decision with a
click within the attribution window, whether at first or as a correction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.broker import BenchmarkError
from streams.contracts.examples import LabelKind, decode_examples


class WrongExamplesError(BenchmarkError):
    """Examples are missing, doubled, or labeled wrongly."""


@dataclass(frozen=True, slots=True)
class ExampleCounts:
    """What was found."""

    first_labels: int
    positives: int
    corrections: int
    """Positives that came after a provisional negative."""
    records: int


class ExampleCheck:
    """Feed it every record of the topic `examples`, then ask for the verdict.

    Args:
        ids: Every decision that was sent.
        joined: For each of them, whether it has a click within the window.
    """

    def __init__(self, ids: Sequence[str], joined: NDArray[np.bool_]) -> None:
        self._ids = ids
        self._joined = joined
        self._number = {decision_id: number for number, decision_id in enumerate(ids)}
        self._firsts = np.zeros(len(ids), np.int64)
        self._positives = np.zeros(len(ids), np.int64)
        self._corrections = np.zeros(len(ids), np.int64)
        self._records = 0

    def add(self, value: bytes) -> None:
        """Take one record.

        Raises:
            WrongExamplesError: If it cannot be read, or holds a decision that was never sent.
        """
        if self._records == 0:
            # Only the first as a consumer would read it: to make objects of a million takes a minute.
            _decode_as_consumer(value)
        self._records += 1
        with pa.ipc.open_stream(value) as reader:
            columns = reader.read_all().select(["decision_id", "label", "label_kind"]).to_pydict()
        rows = np.array([self._number.get(decision_id, -1) for decision_id in columns["decision_id"]], np.int64)
        if (rows < 0).any():
            unknown = columns["decision_id"][int(np.argmin(rows))]
            raise WrongExamplesError(f"examples hold decision {unknown!r}, which was never sent")
        is_correction = np.array([kind == LabelKind.LATE_POSITIVE for kind in columns["label_kind"]], np.bool_)
        is_positive = np.array(columns["label"], np.int64) == 1
        for counts, wanted in (
            (self._firsts, ~is_correction),
            (self._positives, is_positive),
            (self._corrections, is_correction),
        ):
            np.add.at(counts, rows[wanted], 1)

    def verdict(self) -> ExampleCounts:
        """Return the counts.

        Raises:
            WrongExamplesError: If anything is wrong; the first decision of each kind is named.
        """
        faults = [
            self._fault(self._firsts == 0, "have no example"),
            self._fault(self._firsts > 1, "have more than one first label"),
            self._fault((self._positives == 0) & self._joined, "were clicked within the window and have no positive"),
            self._fault((self._positives > 0) & ~self._joined, "are positive without a click within the window"),
            self._fault(self._positives > 1, "have more than one positive"),
            self._fault(self._corrections > self._positives, "have a correction that is no positive"),
        ]
        if found := [fault for fault in faults if fault]:
            raise WrongExamplesError(f"of {len(self._ids)} decisions " + "; ".join(found))
        return ExampleCounts(
            int(self._firsts.sum()), int(self._positives.sum()), int(self._corrections.sum()), self._records
        )

    def _fault(self, is_wrong: NDArray[np.bool_], what: str) -> str:
        count = int(is_wrong.sum())
        return f"{count} {what} (first: {self._ids[int(np.argmax(is_wrong))]})" if count else ""


def _decode_as_consumer(value: bytes) -> None:
    try:
        decode_examples(value)
    except ValueError as error:
        raise WrongExamplesError(f"examples cannot be read: {error}") from error
