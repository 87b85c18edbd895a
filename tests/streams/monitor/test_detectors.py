"""Drift detectors on minutes as they are set here, and the index of stability."""

import math
from collections import Counter

import numpy as np
import pytest

from streams.monitor.detectors import chance_of_alarm, drift_detectors
from streams.monitor.distributions import MIN_REFERENCE, MIN_WINDOW, Stability, psi


def minutes(shift: float, num: int = 120) -> list[float]:
    values = np.random.default_rng(5).standard_normal(2 * num)
    values[num:] += shift
    return values.tolist()


@pytest.mark.parametrize("name", ["adwin", "page_hinkley"])
def test_detector_sees_a_step_soon_and_nothing_else_and_stands_beside_chance(name: str) -> None:
    quiet, scored = drift_detectors()[name], drift_detectors()[name]
    assert not any(map(quiet.update, minutes(0.0)))
    assert quiet.rate == 0.0
    found = [number for number, value in enumerate(minutes(3.0)) if scored.update(value)]
    assert found
    assert all(120 <= number < 150 for number in found)
    assert (scored.num_looks, scored.num_alarms, scored.rate) == (240, len(found), len(found) / 240)


def test_random_alarms_hit_a_span_by_chance() -> None:
    # Of one alarm in 240 looks: 40 looks are hit in one run of six.
    assert chance_of_alarm(1 / 240, 40) == pytest.approx(0.154, abs=0.001)


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
