"""A decision is learned at most once as a negative and once as a positive, and bad rows are set aside."""

import hashlib
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.faults import faults
from learner.intake import Intake, decision_keys
from learner.parsing import ExampleParser
from streams.contracts.examples import ExampleBatch, LabelKind

DEFAULT: dict[str, Any] = {
    "decision_id": "d",
    "occurred_at_ms": 0,
    "product_id": "p",
    "context": '{"hour":1}',
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
    "delay_ms": None,
}


def batch(*rows: dict[str, Any]) -> ExampleBatch:
    return ExampleBatch.from_columns({name: [(DEFAULT | row)[name] for row in rows] for name in DEFAULT})


def admit(intake: Intake, *rows: dict[str, Any]) -> tuple[list[int], dict[str, int]]:
    examples = batch(*rows)
    admitted, reasons = intake.admit(examples, faults(examples, ExampleParser().parse(examples)))
    return admitted.tolist(), dict(reasons)


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
        ([{"label_kind": "perhaps"}], [], {"bad_label": 1}),
        ([{"label_kind": "unknown"}, POSITIVE | {"label_kind": "unknown"}], [], {"unknown_label": 2}),
        ([{"label_kind": "unknown"}, NEGATIVE], [1], {"unknown_label": 1}),
        ([{"propensity": p} for p in (0.0, 1.5, -1.0, math.nan)], [], {"bad_propensity": 4}),
        ([{"survival_probability": p} for p in (0.0, 1e-9, 1.1, math.nan)], [], {"bad_propensity": 4}),
        ([POSITIVE | {"reward": r} for r in (math.inf, math.nan, -1.0, 1e10)], [], {"bad_reward": 4}),
        ([{"creative": {"title": "c"}}, {"creative": {}}, {"creative": {"image": "a"}}], [], {"bad_creative": 3}),
        ([{"creative": {"title": "a", "image": "a"}}], [], {"bad_creative": 1}),
        ([{"candidates": c} for c in ({}, {"title": []}, {"": ["a"]})], [], {"bad_candidates": 3}),
        ([{"candidates": {"title": ids}} for ids in (["a", ""], ["a", "a"])], [], {"bad_candidates": 2}),
        ([{"context": c} for c in ("", "[1]", '{"hour":NaN}', '{"hour":1e999}', '{"a":null}')], [], {"bad_context": 5}),
        ([{"context": '{"n":1' + "0" * 40 + "}"}], [], {"bad_context": 1}),
        ([{"decision_id": ""}], [], {"bad_id": 1}),
        ([{"occurred_at_ms": t} for t in (-1, 1_764_000_000_000_000)], [], {"bad_time": 2}),
        # Of several reasons the first one counts, and what is bad is not remembered.
        ([{"label": 9, "propensity": 0.0}, NEGATIVE], [1], {"bad_label": 1}),
        ([], [], {}),
    ],
)  # fmt: skip
def test_rows_are_admitted_or_counted(rows: list[dict[str, Any]], admitted: list[int], reasons: dict[str, int]) -> None:
    assert admit(Intake(1_000), *rows) == (admitted, reasons)


def test_memory_lasts_over_batches_and_checkpoints_until_the_horizon() -> None:
    intake = Intake(60_000)
    admit(intake, NEGATIVE)
    again = Intake(60_000)
    again.restore(intake.tensors(), intake.state())
    for each in (intake, again):
        assert admit(each, NEGATIVE) == ([], {"duplicate": 1})
        assert admit(each, NEGATIVE | {"decision_id": "e", "occurred_at_ms": 200_000}) == ([0], {})
        assert len(each) == 1
        assert admit(each, NEGATIVE) == ([0], {"beyond_horizon": 1})


def test_empty_intake_can_be_saved() -> None:
    again = Intake(1)
    again.restore(Intake(1).tensors(), Intake(1).state())
    assert len(again) == 0
    assert admit(again, NEGATIVE) == ([0], {})


def test_a_decision_takes_nine_bytes() -> None:
    intake = Intake(60_000)
    admit(intake, *({"decision_id": f"d{n}", "occurred_at_ms": 40 * n} for n in range(1_000)))
    assert (len(intake), intake.num_bytes) == (1_000, 9_000)


def test_keys_are_those_of_other_processes_and_releases() -> None:
    ids = ["d", "7.0192f3c4a5b67c8d9e0f.5d41", "é"]
    expected = [int.from_bytes(hashlib.blake2b(i.encode(), digest_size=8).digest(), "little", signed=True) for i in ids]
    column = batch(*({"decision_id": i} for i in ids)).columns.column("decision_id")
    assert decision_keys(column).tolist() == expected
    assert decision_keys(column)[0] == 8902676090269836725


class PlainIntake:
    """The rules, row after row."""

    def __init__(self, horizon_ms: int) -> None:
        self.horizon_ms, self.newest_ms = horizon_ms, 0
        self.seen: dict[tuple[int, str], set[int]] = {}

    def admit(self, rows: list[dict[str, Any]]) -> tuple[list[int], dict[str, int]]:
        admitted, reasons = [], Counter[str]()
        for number, row in enumerate(rows):
            reason = "bad_propensity" if row["propensity"] > 1 else self.skipped(row, reasons)
            if reason:
                reasons[reason] += 1
            else:
                admitted.append(number)
        first = (self.newest_ms - self.horizon_ms) // 10_000
        self.seen = {(bucket, id_): labels for (bucket, id_), labels in self.seen.items() if bucket >= first}
        return admitted, dict(reasons)

    def skipped(self, row: dict[str, Any], reasons: Counter[str]) -> str:
        self.newest_ms = max(self.newest_ms, row["occurred_at_ms"])
        if row["occurred_at_ms"] < self.newest_ms - self.horizon_ms:
            reasons["beyond_horizon"] += 1
            return ""
        labels = self.seen.setdefault((row["occurred_at_ms"] // 10_000, row["decision_id"]), set())
        if row["label"] in labels:
            return "weaker_label" if row["label"] == 0 and 1 in labels else "duplicate"
        if row["label"] == 0 and labels:
            return "weaker_label"
        labels.add(row["label"])
        return ""


ROWS = st.lists(
    st.builds(
        lambda decision_id, time_ms, label, propensity: {
            "decision_id": decision_id,
            "occurred_at_ms": time_ms,
            "label": label,
            "label_kind": (LabelKind.LATE_POSITIVE if label else LabelKind.PROVISIONAL).value,
            "propensity": propensity,
        },
        st.sampled_from("abcd"),
        st.sampled_from([0, 5_000, 9_999, 10_000, 25_000, 31_000, 90_000]),
        st.integers(0, 1),
        st.sampled_from([0.5, 0.5, 0.5, 2.0]),
    ),
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(ROWS, max_size=4), st.booleans())
def test_arrays_decide_as_the_rules_do_row_after_row(batches: list[list[dict[str, Any]]], restart: bool) -> None:
    plain, intake = PlainIntake(30_000), Intake(30_000)
    for rows in batches:
        assert admit(intake, *rows) == plain.admit(rows)
        assert len(intake) == sum(1 for labels in plain.seen.values() if labels)
        if restart:
            tensors, state = intake.tensors(), intake.state()
            intake = Intake(30_000)
            intake.restore(tensors, state)


def test_one_product_with_all_the_traffic_breaks_nothing() -> None:
    rows = [{"decision_id": f"d{n}", "occurred_at_ms": 0} for n in range(5_000)]
    intake = Intake(1_000)
    assert admit(intake, *rows, *rows) == (list(range(5_000)), {"duplicate": 5_000})
    assert np.array_equal(np.sort(intake.tensors()["keys"].numpy()), intake.tensors()["keys"].numpy())
