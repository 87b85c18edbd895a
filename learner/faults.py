"""What is wrong with an example, so that it must not be learned.

The joiner lets none of these through; others may write examples, too, and a model must survive all of them.

Shapes: N examples.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from learner.parsing import ParsedExamples
from streams.contracts.examples import ExampleBatch, LabelKind

BoolArray = NDArray[np.bool_]

MAX_TIME_MS: Final = 4_102_444_800_000
"""The year 2100: a time in microseconds would make the learner forget every decision."""
MAX_REWARD: Final = 1e9
"""As of a click."""
MIN_SURVIVAL: Final = 1e-4
"""An example weighs 1 / survival probability; one that is worth more than ten thousand is a mistake."""


def faults(batch: ExampleBatch, parsed: ParsedExamples) -> dict[str, BoolArray]:
    """Return reason -> which examples have it, (N,); one of them may have several.

    Args:
        batch: The examples.
        parsed: The same, parsed.
    """
    label_N, is_late_N = batch.label, batch.has_kind(LabelKind.LATE_POSITIVE)
    is_unknown_N = batch.has_kind(LabelKind.UNKNOWN)
    has_kind_N = is_late_N | is_unknown_N | batch.has_kind(LabelKind.FINAL) | batch.has_kind(LabelKind.PROVISIONAL)
    # "Not inside" instead of "outside", so that nan is a fault, too.
    return {
        "bad_id": pc.binary_length(batch.columns.column("decision_id")).to_numpy() == 0,
        "bad_time": ~((batch.occurred_at_ms >= 0) & (batch.occurred_at_ms < MAX_TIME_MS)),
        "bad_label": ~((label_N == 0) | (label_N == 1)) | ~has_kind_N | (is_late_N & (label_N == 0)),
        "unknown_label": is_unknown_N,
        "bad_reward": ~((batch.reward >= 0.0) & (batch.reward <= MAX_REWARD)),
        "bad_propensity": ~(
            (batch.propensity > 0.0)
            & (batch.propensity <= 1.0)
            & (batch.survival_probability >= MIN_SURVIVAL)
            & (batch.survival_probability <= 1.0)
        ),
        "bad_candidates": np.array([found is None for found in parsed.sets], np.bool_)[parsed.set],
        "bad_creative": ~(parsed.place >= 0).any(1),
        "bad_context": np.array([context is None for context in parsed.contexts], np.bool_)[parsed.context],
    }
