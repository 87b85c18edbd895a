"""A decision is learned at most once as a negative and once as a positive, and bad rows are set aside."""

from typing import Any

import numpy as np
import pytest

from learner.intake import Intake
from streams.contracts.examples import ExampleBatch


def batch(*rows: dict[str, Any]) -> ExampleBatch:
    default: dict[str, Any] = {
        "decision_id": "d",
        "occurred_at_ms": 0,
        "product_id": "p",
        "context": {"hour": 1},
        "candidates": {"title": ["a", "b"]},
        "creative": {"title": "a"},
        "slot_propensities": {"title": 0.5},
        "propensity": 0.5,
        "model_id": "m",
        "epoch": 0,
        "policy_version": 1,
        "source": "policy",
        "holdout": False,
        "seed": 1,
        "survival_probability": 1.0,
        "label": 0,
        "reward": 0.0,
        "label_kind": "final",
        "delay_ms": -1,
    }
    arrays = {
        "occurred_at_ms": np.int64,
        "propensity": np.float64,
        "epoch": np.int64,
        "policy_version": np.int64,
        "holdout": np.bool_,
        "seed": np.int64,
        "survival_probability": np.float64,
        "label": np.int8,
        "reward": np.float64,
        "delay_ms": np.int64,
    }
    columns: dict[str, Any] = {name: [(default | row)[name] for row in rows] for name in default}
    return ExampleBatch(**columns | {name: np.array(columns[name], dtype) for name, dtype in arrays.items()})


NEGATIVE = {"label_kind": "provisional"}
LATE = {"label": 1, "label_kind": "late_positive"}
POSITIVE = {"label": 1}


@pytest.mark.parametrize(
    ("rows", "admitted", "reasons"),
    [
        ([NEGATIVE, NEGATIVE], [0], {"duplicate": 1}),
        ([NEGATIVE, LATE, LATE, NEGATIVE], [0, 1], {"duplicate": 1, "weaker_label": 1}),
        ([POSITIVE, NEGATIVE], [0], {"weaker_label": 1}),
        ([LATE, NEGATIVE], [0], {"weaker_label": 1}),
        ([POSITIVE, LATE], [0], {"duplicate": 1}),
        ([{"label": 2}, {"label": -1}, {"label_kind": "late_positive"}], [], {"bad_label": 3}),
        ([{"propensity": p} for p in (0.0, 1.5, -1.0, float("nan"))], [], {"bad_propensity": 4}),
        ([{"survival_probability": 0.0}], [], {"bad_propensity": 1}),
        ([{"reward": float("inf")}], [], {"bad_reward": 1}),
        ([{"creative": {"title": "c"}}, {"creative": {}}, {"creative": {"image": "a"}}], [], {"bad_creative": 3}),
        ([{"context": {"hour": float("nan")}}], [], {"bad_context": 1}),
    ],
)
def test_rows_are_admitted_or_counted(rows: list[dict[str, Any]], admitted: list[int], reasons: dict[str, int]) -> None:
    assert Intake(1_000).admit(batch(*rows)) == (admitted, reasons)


def test_memory_lasts_over_batches_and_checkpoints_until_the_horizon() -> None:
    intake = Intake(60_000)
    intake.admit(batch(NEGATIVE))
    again = Intake(60_000)
    again.restore(intake.tensors(), intake.state())
    for each in (intake, again):
        assert each.admit(batch(NEGATIVE)) == ([], {"duplicate": 1})
        assert each.admit(batch(NEGATIVE | {"decision_id": "e", "occurred_at_ms": 200_000})) == ([0], {})
        assert len(each) == 1
        assert each.admit(batch(NEGATIVE)) == ([0], {"beyond_horizon": 1})


def test_empty_intake_can_be_saved() -> None:
    again = Intake(1)
    again.restore(Intake(1).tensors(), Intake(1).state())
    assert len(again) == 0
