"""The gate refuses what must not be served, and says why."""

from typing import Any

import numpy as np
import pytest

from learner.gate import GateSettings, Validation, judge, norms
from learner.value_watch import ValueWatch

GOOD = Validation(num_examples=5_000, num_clicks=200, expected_clicks=210, log_loss=5_000 * 0.16)
PROBED = {"entropy": 1.0, "min_propensity": 1e-5, "logged_ctr": 0.05, "snips": 0.05, "snips_se": 0.002}


def tensors(value: float = 0.1) -> dict[str, Any]:
    return {"mean.content": np.full((2, 3), value, np.float32), "generator.slot": np.ones((2, 2), np.float32)}


def lossy_watch() -> ValueWatch:
    """Policies that never show what is clicked."""
    watch = ValueWatch(0.7, 200.0)
    is_shown = np.arange(3_000) % 2 == 1
    for _ in range(2):
        watch.add(np.where(is_shown, 1.9, 0.1), (np.arange(3_000) % 10 == 0).astype(float))
    return watch


def test_sound_version_is_accepted_with_its_numbers() -> None:
    verdict = judge(tensors(), before=norms(tensors()), validation=GOOD, probed=PROBED)
    assert verdict.accepted
    assert verdict.reasons == ()
    assert verdict.numbers["calibration"] == pytest.approx(210 / 200)
    assert verdict.numbers["norm_generator"] == pytest.approx(2.0)


def test_first_version_without_data_is_accepted() -> None:
    assert judge(tensors(), before=None, validation=Validation(), probed={}).accepted


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tensors": tensors(float("nan"))}, "not finite"),
        ({"tensors": tensors(1e4)}, "norm_mean is"),
        ({"tensors": tensors(100.0)}, "times as much"),
        ({"validation": GOOD + Validation(num_clicks=300)}, "expected / observed"),
        ({"validation": GOOD + Validation(log_loss=500.0)}, "normalized entropy"),
        ({"golden_shift": 1.6}, "golden batch moved by a factor of 4.95"),
        ({"watch": lossy_watch()}, "estimated click rate is at most"),
        ({"probed": PROBED | {"min_propensity": float("nan")}}, "smallest propensity"),
    ],
)
def test_unsound_version_is_refused_with_a_reason(changes: dict[str, Any], reason: str) -> None:
    arguments: dict[str, Any] = {"tensors": tensors(), "validation": GOOD, "probed": PROBED} | changes
    verdict = judge(arguments.pop("tensors"), before=norms(tensors()), **arguments)
    assert not verdict.accepted
    assert reason in verdict.reasons[0]


def test_few_examples_are_not_judged() -> None:
    odd = Validation(num_examples=100, num_clicks=60, expected_clicks=1, log_loss=900.0)
    settings = GateSettings()
    assert judge(
        tensors(), before=None, validation=odd, probed=PROBED, golden_shift=5.0, watch=None, settings=settings
    ).accepted
