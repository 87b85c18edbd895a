"""Sums over matured decisions: of a step, of a window of steps, and by slice."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from streams.monitor.evidence import Counts, wilson
from streams.monitor.reading import Rows

DELAY_BINS_MS: Final = np.array([-1_000, 0, 500, 1_000, 2_000, 5_000, 10_000, 30_000, 60_000, 300_000, 1_800_000])
"""Edges of the delays: what lies below the first comes from clocks that disagree."""
FADING: Final = 0.99
"""What a slice keeps from step to step; at one each ten seconds a quarter of an hour counts."""
MAX_SLICES: Final = 1_000
_LEAST: Final = 1e-6


@dataclass(slots=True)
class Step:
    """Sums over the decisions that matured in one step; they add up."""

    all: Counts = field(default_factory=Counts)
    """Decisions with a prediction by the model that served."""
    holdout: Counts = field(default_factory=Counts)
    reference: Counts = field(default_factory=Counts)
    reference_holdout: Counts = field(default_factory=Counts)
    policy_arm: Counts = field(default_factory=Counts)
    """All decisions of the policy, predicted or not."""
    uniform_arm: Counts = field(default_factory=Counts)
    """Those of the uniform share."""
    loss: float = 0.0
    """Log loss of the model over `all`, in nats."""
    paired_loss: float = 0.0
    """The same where the reference predicts, too."""
    reference_loss: float = 0.0
    base_loss: float = 0.0
    """Log loss of the click rate that was known before, over `all`."""
    paired_entropy: float = 0.0
    """The same where the reference predicts, too."""
    delays: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(DELAY_BINS_MS) + 1))
    """Clicks by delay."""

    def add(self, other: Step, sign: float = 1.0) -> None:
        """Add another step, or take it away again with the sign -1."""
        for name in _COUNTS:
            getattr(self, name).add(getattr(other, name), sign)
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + sign * getattr(other, name))

    @property
    def normalized_entropy(self) -> float:
        """Log loss in units of the entropy of the mean click rate; nan without clicks."""
        rate = self.all.clicks / self.all.num if self.all.num else 0.0
        if not 0 < rate < 1:
            return math.nan
        return self.loss / self.all.num / -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))

    @property
    def loss_against_reference(self) -> float:
        """Log loss of the model / that of the reference on the same decisions; nan without any."""
        return self.paired_loss / self.reference_loss if self.reference_loss > 0 else math.nan


_COUNTS: Final = [each.name for each in fields(Step) if each.default_factory is Counts]
_SUMS: Final = [each.name for each in fields(Step) if each.default_factory is not Counts]


def step_of(rows: Rows, base_rate: float) -> Step:
    """Return the sums over matured decisions.

    Args:
        rows: Each decision once.
        base_rate: Click rate known before, in (0, 1).
    """
    step = Step()
    known, paired = np.isfinite(rows.current), np.isfinite(rows.reference) & np.isfinite(rows.current)
    step.all = _counts(rows, known, rows.current)
    step.holdout = _counts(rows, known & rows.is_holdout, rows.current)
    step.reference = _counts(rows, paired, rows.reference)
    step.reference_holdout = _counts(rows, paired & rows.is_holdout, rows.reference)
    step.policy_arm = _counts(rows, ~rows.is_holdout)
    step.uniform_arm = _counts(rows, rows.is_holdout)
    loss_N = _loss(rows.current, rows.is_click)
    base_N = np.where(rows.is_click, -math.log(base_rate), -math.log1p(-base_rate))
    step.loss = float(loss_N[known].sum())
    step.base_loss = float(base_N[known].sum())
    step.paired_loss = float(loss_N[paired].sum())
    step.paired_entropy = float(base_N[paired].sum())
    step.reference_loss = float(_loss(rows.reference, rows.is_click)[paired].sum())
    clicks = rows.delay_ms[rows.is_click]
    step.delays = np.bincount(np.digitize(clicks, DELAY_BINS_MS), minlength=len(DELAY_BINS_MS) + 1).astype(np.float64)
    return step


def _counts(rows: Rows, inside: NDArray[np.bool_], expected: NDArray[np.float64] | None = None) -> Counts:
    return Counts(
        float(inside.sum()),
        float(rows.is_click[inside].sum()),
        0.0 if expected is None else float(expected[inside].sum()),
    )


def _loss(probability: NDArray[np.float64], is_click: NDArray[np.bool_]) -> NDArray[np.float64]:
    bounded = np.clip(probability, _LEAST, 1.0 - _LEAST)
    return -np.log(np.where(is_click, bounded, 1.0 - bounded))


class Window:
    """The steps of the last so many milliseconds."""

    def __init__(self, length_ms: int) -> None:
        self._length_ms = length_ms
        self._steps: deque[tuple[int, Step]] = deque()
        self.total = Step()
        """Sums over the window."""

    def add(self, now_ms: int, step: Step) -> None:
        """Take a step."""
        self._steps.append((now_ms, step))
        self.total.add(step)
        while self._steps[0][0] <= now_ms - self._length_ms:
            self.total.add(self._steps.popleft()[1], -1.0)


@dataclass(frozen=True, slots=True)
class SliceRatio:
    """Calibration of a slice."""

    value: float
    """Clicks / predicted clicks."""
    low: float
    high: float
    """Interval, 95 %, from the click rate's."""


class Slices:
    """Calibration by product, element or policy version, recent decisions counting more."""

    def __init__(self) -> None:
        self._counts: dict[int, Counts] = {}

    def fade(self) -> None:
        """Begin a step."""
        for counts in self._counts.values():
            counts.num *= FADING
            counts.clicks *= FADING
            counts.expected *= FADING

    def add(self, code: NDArray[Any], rows: Rows) -> None:
        """Take decisions; those with a code below 0 or without a prediction are left out."""
        inside = (code >= 0) & np.isfinite(rows.current)
        names, which = np.unique(code[inside], return_inverse=True)
        num = np.bincount(which, minlength=len(names))
        clicks = np.bincount(which, rows.is_click[inside], len(names))
        expected = np.bincount(which, rows.current[inside], len(names))
        for name, *sums in zip(names.tolist(), num.tolist(), clicks.tolist(), expected.tolist(), strict=True):
            self._counts.setdefault(name, Counts()).add(Counts(*sums))
        if len(self._counts) > MAX_SLICES:
            kept = sorted(self._counts.items(), key=lambda item: -item[1].num)[:MAX_SLICES]
            self._counts = dict(kept)

    def largest(self, most: int) -> list[tuple[int, SliceRatio]]:
        """Return the slices with the most decisions."""
        found = sorted(self._counts.items(), key=lambda item: -item[1].num)[:most]
        return [(code, _ratio(counts)) for code, counts in found if counts.expected > 0]


def _ratio(counts: Counts) -> SliceRatio:
    low, high = wilson(counts.clicks, counts.num)
    rate = counts.expected / counts.num
    return SliceRatio(counts.ratio, low / rate, high / rate)
