"""Clicks told as the joiner tells them.

An impression is told once, `label_wait_s` after it: as a final positive if its click has come by then, else as a
provisional negative. A click after that and within the attribution window is told as a late positive when it comes; a
click after the window is never told. Without a wait there are no delays, and the next update tells everything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.regret.policies.base import FINAL, LATE_POSITIVE, PROVISIONAL, Choice, Labels, RequestBatch
from benchmarks.regret.traffic import Batch, IntArray
from benchmarks.regret.worlds import BenchWorld

NEVER = np.iinfo(np.int64).max // 2
"""When an impression without a click is clicked."""


@dataclass(frozen=True, slots=True)
class _Shown:
    """A batch that was shown; times in ms since the world began."""

    batch: Batch
    requests: RequestBatch
    choice: Choice
    told_ms: IntArray
    click_ms: IntArray


class LabelQueue:
    """Holds impressions until their labels are due.

    Batches are kept until the last of their labels can have come: one attribution window of traffic.
    """

    def __init__(self, bench: BenchWorld) -> None:
        self._wait_ms = round((bench.label_wait_s or 0.0) * 1000)
        self._window_ms = round(bench.attribution_window_s * 1000)
        self._open: list[_Shown] = []
        self._until_ms = 0

    def add(self, batch: Batch, requests: RequestBatch, choice: Choice, clicked_N: NDArray[np.bool_]) -> None:
        """Take a batch that was shown."""
        counts_N = clicked_N & (batch.delay_ms <= self._window_ms)
        click_ms_N = np.where(counts_N, batch.occurred_ms + batch.delay_ms, NEVER)
        self._open.append(_Shown(batch, requests, choice, batch.occurred_ms + self._wait_ms, click_ms_N))

    def due(self, now_ms: int) -> Labels:
        """Return the labels due since the last call and before now: first labels, then late positives, by time."""
        parts, times = [], []
        for shown in self._open:
            positive_N = shown.click_ms <= shown.told_ms
            first_N = self._is_due(shown.told_ms, now_ms)
            late_N = self._is_due(shown.click_ms, now_ms) & ~positive_N
            for rows_N, time_ms_N, is_late in ((first_N, shown.told_ms, False), (late_N, shown.click_ms, True)):
                kind_N = np.where(positive_N, FINAL, LATE_POSITIVE if is_late else PROVISIONAL)
                rows = np.flatnonzero(rows_N)
                parts.append(_labels(shown, rows, kind_N[rows]))
                times.append((np.full(len(rows), is_late), time_ms_N[rows]))
        self._until_ms = now_ms
        self._open = [shown for shown in self._open if shown.batch.end_ms + self._window_ms >= now_ms]
        labels = Labels.concat(parts)
        late, time_ms = (np.concatenate(column) for column in zip(*times, strict=True))
        return labels.take(np.lexsort((time_ms, late)))

    def _is_due(self, time_ms_N: IntArray, now_ms: int) -> NDArray[np.bool_]:
        due_N: NDArray[np.bool_] = (time_ms_N >= self._until_ms) & (time_ms_N < now_ms)
        return due_N


def _labels(shown: _Shown, rows: IntArray, kind: IntArray) -> Labels:
    chosen_NS, propensity_NS = shown.choice.chosen[rows], shown.choice.propensity
    label = (kind != PROVISIONAL).astype(np.int64)
    occurred_ms = shown.batch.occurred_ms[rows]
    return Labels(
        number=shown.batch.first + rows,
        requests=shown.requests.take(rows),
        chosen=chosen_NS,
        propensity=np.ones(chosen_NS.shape) if propensity_NS is None else propensity_NS[rows],
        label=label,
        kind=kind,
        occurred_ms=occurred_ms,
        delay_ms=np.where(label > 0, shown.click_ms[rows] - occurred_ms, 0),
        weight=np.ones(len(rows)),
    )
