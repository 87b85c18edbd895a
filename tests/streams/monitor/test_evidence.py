"""Sequential tests keep their promise about false alarms, and see what they are for."""

import math

import numpy as np
import pytest

from streams.monitor.evidence import ArmsTest, CalibrationTest, Counts, RivalTest, wilson

STEP = 2_000
STEPS = 4_000


def steps(rng: np.random.Generator, clicked: float, predicted: float = 0.05, num: int = STEPS) -> list[Counts]:
    """Steps of a model that predicts `predicted` where `clicked` is true."""
    return [Counts(STEP, float(clicks), STEP * predicted) for clicks in rng.binomial(STEP, clicked, size=num)]


# At the very bound, where false alarms are most frequent. e^-4 of 4,000 steps are 73; 55 would be by luck only.
@pytest.mark.parametrize(("side", "bound"), [("below", 0.75), ("above", 1.33)])
def test_false_alarms_are_no_more_than_promised(side: str, bound: float) -> None:
    test = CalibrationTest(side, threshold=4.0)  # type: ignore[arg-type]  # parametrized
    alarms = sum(test.observe(step, bound) for step in steps(np.random.default_rng(1), bound * 0.05))
    assert 0 < alarms <= STEPS * math.exp(-4.0)


@pytest.mark.parametrize(("side", "bound", "clicked"), [("below", 0.75, 0.03), ("above", 1.33, 0.08)])
def test_calibration_beyond_the_bound_is_seen_soon(side: str, bound: float, clicked: float) -> None:
    test = CalibrationTest(side)  # type: ignore[arg-type]  # parametrized
    found = [test.observe(step, bound) for step in steps(np.random.default_rng(2), clicked, num=20)]
    assert found.index(True) < 16


def test_few_clicks_say_nothing() -> None:
    test = CalibrationTest("below", threshold=1.0)
    assert not any(test.observe(Counts(300, 0.0, 15.0), 0.75) for _ in range(3))
    assert test.detector.evidence > 1.0
    assert test.observe(Counts(300, 0.0, 15.0), 0.75)
    assert test.detector.alarmed.expected == 60.0


def test_rival_alarms_seldom_while_the_model_is_right_and_soon_when_it_is_not() -> None:
    rng = np.random.default_rng(3)

    def alarms(truth: float, model: float, rival: float, num: int) -> int:
        test, found = RivalTest(0.0, threshold=4.0), 0
        for _ in range(num):
            clicks = float(rng.binomial(STEP, truth))
            ratio = clicks * math.log(rival / model) + (STEP - clicks) * math.log((1 - rival) / (1 - model))
            found += test.observe(ratio, 0.0, Counts(STEP, clicks, STEP * model))
        return found

    assert alarms(0.05, 0.05, 0.06, STEPS) <= STEPS * math.exp(-4.0)
    assert alarms(0.05, 0.07, 0.05, 40) > 2


def test_arms_alarm_only_if_the_policy_earns_less() -> None:
    rng = np.random.default_rng(4)

    def alarms(policy: float, holdout: float) -> int:
        test = ArmsTest(threshold=4.0)
        found = 0
        for _ in range(500):
            arms = Counts(9_500, float(rng.binomial(9_500, policy))), Counts(500, float(rng.binomial(500, holdout)))
            found += test.observe(*arms)
        return found

    assert alarms(0.05, 0.05) <= 500 * math.exp(-4.0)
    assert alarms(0.03, 0.05) > 5


def test_interval_holds_the_rate() -> None:
    low, high = wilson(50, 1_000)
    assert low < 0.05 < high
    assert wilson(0, 0) == (0.0, 1.0)
