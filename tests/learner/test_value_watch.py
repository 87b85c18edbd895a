"""The off-policy estimate that is looked at after every update says nothing wrong more often than it says it may."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from learner.value_watch import BLOCK, ValueWatch, half_width

LEAST = 0.7
LOGGED = 0.05


def watch_of(value: float, num: int, seed: int = 0) -> ValueWatch:
    """Return a watch that has seen policies with this click rate: they show half as often what half of the log does."""
    watch = ValueWatch(LEAST, 200.0)
    rng = np.random.default_rng(seed)
    for _ in range(num // 100):
        watch.add(*impressions(value, 100, rng))
    return watch


def impressions(value: float, num: int, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two creatives, each logged half of the time; the policy shows the first with probability 1/4."""
    better = (2.0 * value - 3.0 * LOGGED) / -1.0  # click rates a, b with (a + b) / 2 = LOGGED, a / 4 + 3 b / 4 = value
    is_first = rng.random(num) < 0.5
    rate = np.where(is_first, better, 2.0 * LOGGED - better)
    return np.where(is_first, 0.5, 1.5), (rng.random(num) < rate).astype(np.float64)


def test_policies_that_lose_too_much_are_refused_with_the_bound() -> None:
    watch = watch_of(0.026, 15_000)
    assert "estimated click rate is at most" in (watch.reason() or "")
    found = watch.numbers()
    assert found["value"] == pytest.approx(0.026, abs=0.004)
    assert found["value_logged"] == pytest.approx(LOGGED, abs=0.005)
    assert found["value"] < found["value_at_most"] < LEAST * found["value_logged"]


def test_policies_as_good_as_what_was_shown_are_not_refused() -> None:
    assert watch_of(LOGGED, 15_000).reason() is None


def test_little_data_says_nothing() -> None:
    watch = ValueWatch(LEAST, 200.0)
    assert (watch.numbers(), watch.reason()) == ({}, None)
    watch.add(np.full(190, 1e-6), np.ones(190))
    assert watch.reason() is None, "too few clicks"
    watch.add(np.concatenate([np.full(100, 1e-6), [1e3]]), np.ones(101))
    assert watch.reason() is None, "one weight is all there is"


def test_creatives_that_the_log_does_not_hold_count_as_average() -> None:
    """Uniform play over thousands of creatives: a policy that shows one of them has hardly any weight on the log."""
    watch, rng = ValueWatch(LEAST, 200.0), np.random.default_rng(0)
    for _ in range(150):
        watch.add(np.full(100, 0.01), (rng.random(100) < LOGGED).astype(np.float64))
    assert watch.numbers()["value"] == pytest.approx(LOGGED, rel=0.1)
    assert watch.reason() is None


def test_a_new_block_forgets_the_one_before() -> None:
    watch = watch_of(LOGGED, BLOCK)
    assert watch.numbers()["value_num"] == BLOCK
    watch.add(*impressions(0.026, 100, np.random.default_rng(1)))
    assert watch.numbers()["value_num"] == 100


def test_looking_after_every_hundred_impressions_spoils_a_fixed_interval_and_not_the_sequence() -> None:
    """At the bound itself: ALPHA of 400 blocks is less than one, and four have a chance of 1 in 1,000."""
    rng = np.random.default_rng(3)
    value = LEAST * LOGGED
    alarms = fixed = 0
    for _ in range(400):
        weight, label = impressions(value, BLOCK, rng)
        d = label * (weight - LEAST) - LOGGED * (weight - 1.0)
        num = np.arange(5_000, BLOCK + 1, 100)
        mean = d.cumsum()[num - 1] / num
        deviation = np.sqrt((d**2).cumsum()[num - 1] / num - mean**2)
        alarms += bool((mean + [half_width(int(n), s) for n, s in zip(num, deviation, strict=True)] < 0).any())
        fixed += bool((mean + 2.0 * deviation / np.sqrt(num) < 0).any())
    assert alarms < 4
    assert fixed / 400 > 0.05
