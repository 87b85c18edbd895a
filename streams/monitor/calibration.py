"""What matured labels say of the models: who predicts wrongly, since when, and in which direction.

Bounds are those of the ratio clicks / predicted clicks:

    broken     below .75 or above 1.33: nobody should trust these predictions
    moved      below .95 or above 1.05, and of what is usual for this model, its error added: something changed
    vanished   below .3, by the reference: clicks are missing rather than fewer
"""

from __future__ import annotations

import copy
import math
from typing import Final

from streams.monitor.diagnosis import Latch
from streams.monitor.evidence import MIN_CLICKS, MIN_EXAMPLES, ArmsTest, CalibrationTest, Counts, EDetector, RivalTest
from streams.monitor.tallies import Step, Window

BROKEN: Final = (0.75, 1.33)
MOVED: Final = (0.95, 1.05)
VANISHED: Final = 0.3
REFERENCE_MARGIN: Final = 0.01
"""The reference must predict better by this share of the entropy of the click rate."""
BASE_MARGIN: Final = 0.005
LEVEL_LIMITS: Final = (0.8, 1.25)
LEVEL_CLICKS: Final = 5_000.0
"""What is usual is an average over about so many expected clicks."""
WINDOW_MS: Final = 300_000


class Level:
    """The usual ratio of clicks to predictions, and how uncertain it is."""

    def __init__(self) -> None:
        self._counts = Counts(0.0, 50.0, 50.0)

    @property
    def value(self) -> float:
        """The ratio, shrunk to 1 by fifty clicks."""
        low, high = LEVEL_LIMITS
        return min(max(self._counts.ratio, low), high)

    @property
    def band(self) -> tuple[float, float]:
        """Ratios that are nothing new: around 1 and the usual one, with twice the error of that.

        A model that was wrong and gets right does not alarm.
        """
        error = 2.0 / math.sqrt(self._counts.expected)
        return MOVED[0] * min(self.value, 1.0) * (1.0 - error), MOVED[1] * max(self.value, 1.0) * (1.0 + error)

    def observe(self, counts: Counts) -> None:
        """Take a step."""
        kept = LEVEL_CLICKS / (LEVEL_CLICKS + counts.expected)
        self._counts = Counts(0.0, kept * self._counts.clicks, kept * self._counts.expected)
        self._counts.add(counts)


class _Side:
    """Two tests of a ratio."""

    def __init__(self) -> None:
        self.below, self.above = CalibrationTest("below"), CalibrationTest("above")

    def observe(self, counts: Counts, band: tuple[float, float]) -> bool:
        is_below, is_above = self.below.observe(counts, band[0]), self.above.observe(counts, band[1])
        return is_below or is_above

    @property
    def detectors(self) -> list[EDetector]:
        return [self.below.detector, self.above.detector]


class CalibrationChecks:
    """All tests on labels, and whether what they found still holds.

    Args:
        warm_examples: Predicted decisions that pass before any test begins: a young model is wrong, and gets better.
    """

    def __init__(self, warm_examples: int) -> None:
        self._warm_left = float(warm_examples)
        self.window = Window(WINDOW_MS)
        self.level, self.reference_level = Level(), Level()
        self._broken = _Side()
        self._moved = _Side()
        self._reference_moved = _Side()
        self._reference_holdout = _Side()
        self._vanished = CalibrationTest("below")
        self._rival = RivalTest(REFERENCE_MARGIN)
        self._base = RivalTest(BASE_MARGIN)
        self._arms = ArmsTest()
        self.has_vanished = Latch()
        self.reset()

    def reset(self) -> None:
        """Begin all tests anew but that for vanished clicks, with what is usual as it is."""
        for detector in self.detectors.values():
            if detector is not self._vanished.detector:
                detector.reset()
        self.is_broken, self.has_moved, self.has_reference_moved = Latch(), Latch(), Latch()
        self.is_worse_than_reference, self.is_worse_than_base = Latch(), Latch()
        self.is_worse_than_uniform = Latch()

    @property
    def detectors(self) -> dict[str, EDetector]:
        """Every sequential test by name."""
        return {
            "broken_below": self._broken.below.detector,
            "broken_above": self._broken.above.detector,
            "moved_below": self._moved.below.detector,
            "moved_above": self._moved.above.detector,
            "reference_below": self._reference_moved.below.detector,
            "reference_above": self._reference_moved.above.detector,
            "reference_holdout_below": self._reference_holdout.below.detector,
            "reference_holdout_above": self._reference_holdout.above.detector,
            "vanished": self._vanished.detector,
            "reference_predicts_better": self._rival.detector,
            "base_rate_predicts_better": self._base.detector,
            "holdout_earns_more": self._arms.detector,
        }

    @property
    def recent(self) -> Step:
        """Sums over the last five minutes."""
        return self.window.total

    @property
    def is_warm(self) -> bool:
        """Whether the tests have begun."""
        return self._warm_left <= 0

    @property
    def is_quiet(self) -> bool:
        """Whether no test is suspicious or on."""
        return not any(detector.is_suspicious for detector in self.detectors.values()) and not any(
            latch.is_on
            for latch in (self.is_broken, self.has_moved, self.has_reference_moved, self.is_worse_than_reference)
        )

    @property
    def is_calibrated(self) -> bool:
        """Whether the model that serves predicts what comes, as far as the window can say."""
        return _is_enough(self.recent.all) and _is_inside(self.recent.all, MOVED)

    def forget_levels(self) -> None:
        """Learn anew what is usual."""
        self.level, self.reference_level = Level(), Level()

    def renew_reference(self) -> None:
        """Begin anew what compares with the reference: it is another model now, and as good as the one that serves."""
        self.reference_level = copy.copy(self.level)
        for detector in (
            *self._reference_moved.detectors,
            *self._reference_holdout.detectors,
            self._vanished.detector,
            self._rival.detector,
        ):
            detector.reset()

    def observe(self, step: Step, now_ms: int, *, is_trusted: bool, is_explained: bool = False) -> None:
        """Take the decisions that matured in a step.

        Args:
            step: Their sums.
            now_ms: The time.
            is_trusted: False while labels are wrong for another reason: then only the test for vanished clicks goes on.
            is_explained: True while somebody else has said why: then none does.
        """
        self.window.add(now_ms, step)
        recent = self.recent
        self._warm_left -= step.all.num
        if not self.is_warm:
            self.level.observe(step.all)
            self.reference_level.observe(step.reference)
            return
        if is_explained:
            self._vanished.detector.reset()
            self.has_vanished = Latch()
            self.reset()
            return
        is_alarm = self._vanished.observe(step.reference, VANISHED)
        self.has_vanished.update(now_ms, alarm=is_alarm, is_well=not _is_below(recent.reference, 2 * VANISHED))
        if not is_trusted:
            return
        self._observe_models(step, recent, now_ms)
        if self.is_quiet:
            self.level.observe(step.all)
            self.reference_level.observe(step.reference)

    def _observe_models(self, step: Step, recent: Step, now_ms: int) -> None:
        band, reference_band = self.level.band, self.reference_level.band
        alarm = self._broken.observe(step.all, BROKEN)
        self.is_broken.update(now_ms, alarm=alarm, is_well=_is_inside(recent.all, BROKEN))
        alarm = self._moved.observe(step.all, band)
        self.has_moved.update(now_ms, alarm=alarm, is_well=_is_inside(recent.all, band))
        alarm = self._reference_moved.below.observe(step.reference, reference_band[0])
        # More clicks than the reference expects come from a better policy, too, unless the newer model errs like it.
        is_above = self._reference_moved.above.observe(step.reference, reference_band[1])
        alarm |= is_above and recent.all.ratio > band[1]
        alarm |= self._reference_holdout.observe(step.reference_holdout, BROKEN)
        is_better = recent.reference.ratio > 1.0 and _is_inside(recent.all, band)
        is_well = is_better or _is_inside(recent.reference, reference_band)
        self.has_reference_moved.update(now_ms, alarm=alarm, is_well=is_well)
        alarm = self._rival.observe(step.paired_loss - step.reference_loss, step.paired_entropy, step.all)
        is_well = not recent.loss_against_reference > 1.0 + REFERENCE_MARGIN
        self.is_worse_than_reference.update(now_ms, alarm=alarm, is_well=is_well)
        alarm = self._base.observe(step.loss - step.base_loss, step.base_loss, step.all)
        self.is_worse_than_base.update(now_ms, alarm=alarm, is_well=not recent.loss > recent.base_loss)
        alarm = self._arms.observe(step.policy_arm, step.uniform_arm)
        rate = recent.policy_arm.clicks * recent.uniform_arm.num
        is_well = rate >= recent.uniform_arm.clicks * recent.policy_arm.num
        self.is_worse_than_uniform.update(now_ms, alarm=alarm, is_well=is_well)


def _is_enough(counts: Counts) -> bool:
    return counts.num >= MIN_EXAMPLES and counts.expected >= MIN_CLICKS


def _is_below(counts: Counts, bound: float) -> bool:
    return _is_enough(counts) and counts.ratio < bound


def _is_inside(counts: Counts, band: tuple[float, float]) -> bool:
    return not _is_enough(counts) or band[0] <= counts.ratio <= band[1]
