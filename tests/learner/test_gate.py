"""The gate refuses what must not be served, and says why."""

from typing import Any

import numpy as np
import pytest

from learner.gate import GateSettings, Validation, judge, norms

GOOD = Validation(num_examples=5_000, num_clicks=200, expected_clicks=210, log_loss=5_000 * 0.16)
PROBED = {"entropy": 1.0, "min_propensity": 1e-5, "logged_ctr": 0.05, "snips": 0.05, "snips_se": 0.002}


def tensors(value: float = 0.1) -> dict[str, Any]:
    return {"mean.content": np.full((2, 3), value, np.float32), "generator.slot": np.ones((2, 2), np.float32)}


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
        ({"probed": PROBED | {"snips": 0.02, "snips_effective_size": 500.0}}, "estimated click rate"),
        ({"probed": PROBED | {"min_propensity": float("nan")}}, "smallest propensity"),
    ],
)
def test_unsound_version_is_refused_with_a_reason(changes: dict[str, Any], reason: str) -> None:
    arguments: dict[str, Any] = {"tensors": tensors(), "validation": GOOD, "probed": PROBED} | changes
    verdict = judge(arguments.pop("tensors"), before=norms(tensors()), **arguments)
    assert not verdict.accepted
    assert reason in verdict.reasons[0]


def test_few_examples_and_small_effective_sizes_are_not_judged() -> None:
    odd = Validation(num_examples=100, num_clicks=60, expected_clicks=1, log_loss=900.0)
    probed = PROBED | {"snips": 0.001, "snips_effective_size": 20.0}
    assert judge(tensors(), before=None, validation=odd, probed=probed, settings=GateSettings()).accepted
