"""Drift detectors on minutes, and the index of stability."""

import math
from collections import Counter

import numpy as np
import pytest

from streams.monitor.detectors import Adwin, PageHinkley, Scored, chance_of_alarm
from streams.monitor.distributions import MIN_REFERENCE, MIN_WINDOW, Stability, psi


def minutes(shift: float, num: int = 120) -> list[float]:
    values = np.random.default_rng(5).standard_normal(2 * num)
    values[num:] += shift
    return values.tolist()


@pytest.mark.parametrize("make", [Adwin, lambda: PageHinkley(delta=0.5, threshold=12.0)])
def test_detector_sees_a_step_and_nothing_else(make: type[Adwin]) -> None:
    assert not any(map(make().update, minutes(0.0)))
    detector = make()
    found = [number for number, value in enumerate(minutes(3.0)) if detector.update(value)]
    assert found
    assert all(120 <= number < 160 for number in found)


def test_detector_stands_beside_chance() -> None:
    scored = Scored(PageHinkley(delta=0.5, threshold=12.0))
    for value in minutes(3.0):
        scored.update(value)
    assert scored.num_alarms == 1
    assert scored.rate == 1 / 240
    # Random alarms of this rate would fall into the 40 minutes after the step in one run of six.
    assert chance_of_alarm(scored.rate, 40) == pytest.approx(0.154, abs=0.001)


def test_index_is_zero_for_the_same_and_grows_with_the_difference() -> None:
    before = np.array([500.0, 300.0, 200.0])
    assert psi(before, 3 * before) == pytest.approx(0.0, abs=1e-4)
    assert 0.0 < psi(before, np.array([450.0, 330.0, 220.0])) < 0.1 < psi(before, np.array([200.0, 300.0, 500.0]))


def feed(stability: Stability, shares: dict[str, float], windows: int) -> None:
    for _ in range(windows):
        stability.observe(Counter({name: int(share * MIN_WINDOW) for name, share in shares.items()}))


def test_feature_has_moved_after_two_windows_and_stays_compared_with_before() -> None:
    stability, usual = Stability(), {"ios": 0.5, "web": 0.3, "android": 0.2}
    feed(stability, usual, MIN_REFERENCE // MIN_WINDOW + 3)
    assert stability.index == pytest.approx(0.0, abs=1e-3)
    feed(stability, {"ios": 0.1, "new": 0.9}, 1)
    assert (stability.num_moved, stability.index > 1.0) == (1, True)
    feed(stability, {"ios": 0.1, "new": 0.9}, 3)
    assert stability.num_moved == 4
    feed(stability, usual, 1)
    assert stability.num_moved == 0


def test_half_a_window_is_suspected() -> None:
    stability = Stability()
    feed(stability, {"a": 0.5, "b": 0.5}, 5)
    stability.observe({"a": MIN_WINDOW // 2 + 1})
    assert stability.is_moving
    assert not math.isnan(stability.index)
