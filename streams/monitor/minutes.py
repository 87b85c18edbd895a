"""The last day in minutes: numbers for generic drift detectors, each beside what chance would do.

A minute is closed when it holds enough expected clicks to mean something, so with little traffic it is longer. Its
numbers are in standard errors, so that one setting of the detectors fits all.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from streams.monitor.detectors import chance_of_alarm, drift_detectors
from streams.monitor.tallies import Step

if TYPE_CHECKING:
    from streams.monitor.calibration import CalibrationChecks
    from streams.monitor.evidence import Counts
    from streams.monitor.traffic import PolicyHealth

Key = tuple[str, str]
"""Signal and detector."""
MINUTE_MS: Final = 60_000
MIN_EXPECTED: Final = 10.0
KNOWN_CLICKS: Final = 500.0
"""From so many clicks on the usual click rate is known."""
SIGNALS: Final = ("calibration", "reference_calibration", "click_rate", "policy_entropy")
HOUR: Final = 60
"""Looks over which a detector is compared with random alarms."""


class Minutes:
    """Closes minutes and shows them to the detectors."""

    def __init__(self) -> None:
        self._step = Step()
        self._begun_ms: int | None = None
        self._clicks, self._num = 1.0, 25.0
        self.detectors = {(signal, name): scored for signal in SIGNALS for name, scored in drift_detectors().items()}
        self.values: dict[str, float] = {}
        """Numbers of the last minute."""

    @property
    def base_rate(self) -> float:
        """Click rate over about the last 100,000 decisions."""
        return self._clicks / self._num

    def observe(self, now_ms: int, step: Step, checks: CalibrationChecks, policy: PolicyHealth) -> list[Key]:
        """Take a step; return what sees a drift."""
        self._step.add(step)
        self._begun_ms = now_ms if self._begun_ms is None else self._begun_ms
        total = self._step.policy_arm.num + self._step.uniform_arm.num
        if now_ms - self._begun_ms < MINUTE_MS or total * self.base_rate < MIN_EXPECTED:
            return []
        self.values = self._values(self._step, checks, policy)
        self._learn_rate(self._step)
        self._step, self._begun_ms = Step(), now_ms
        known = {key: scored for key, scored in self.detectors.items() if key[0] in self.values}
        return [key for key, scored in known.items() if scored.update(self.values[key[0]])]

    def _values(self, step: Step, checks: CalibrationChecks, policy: PolicyHealth) -> dict[str, float]:
        clicks = step.policy_arm.clicks + step.uniform_arm.clicks
        usual = (step.policy_arm.num + step.uniform_arm.num) * self.base_rate
        values = {"click_rate": (clicks - usual) / math.sqrt(usual)} if self._clicks >= KNOWN_CLICKS else {}
        if step.all.expected > 0:
            values["calibration"] = _residual(step.all, checks.level.value)
        if step.reference.expected > 0:
            values["reference_calibration"] = _residual(step.reference, checks.reference_level.value)
        if math.isfinite(policy.entropy_ratio):
            values["policy_entropy"] = 20.0 * policy.entropy_ratio
        return values

    def _learn_rate(self, step: Step) -> None:
        num = step.policy_arm.num + step.uniform_arm.num
        kept = 100_000.0 / (100_000.0 + num)
        self._clicks = kept * self._clicks + step.policy_arm.clicks + step.uniform_arm.clicks
        self._num = kept * self._num + num
        self._clicks = max(self._clicks, 1e-3 * self._num)

    def by_chance(self) -> dict[Key, float]:
        """Return how likely random alarms as frequent as a detector's would fall into any given hour."""
        return {key: chance_of_alarm(scored.rate, HOUR) for key, scored in self.detectors.items()}


def _residual(counts: Counts, level: float) -> float:
    expected = level * counts.expected
    return (counts.clicks - expected) / math.sqrt(expected)
