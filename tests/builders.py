"""Events and examples that tests are made of."""

from collections.abc import Sequence
from typing import Any

from streams.contracts.codec import encode_context
from streams.contracts.events import Click, Impression
from streams.contracts.examples import EXAMPLE_SCHEMA, ExampleBatch, LabelKind, encode_examples

Labeled = tuple[Impression, LabelKind, Click | None]
"""What is in an example: the impression, the kind of its label, and the click if it is a positive."""


def shown(decision_id: str, time_ms: int = 1000, **changes: Any) -> Impression:
    """Return an impression of the smallest card there is."""
    fields: dict[str, Any] = {
        "schema_version": 1,
        "decision_id": decision_id,
        "occurred_at_ms": time_ms,
        "product_id": "p",
        "context": {},
        "candidates": {"title": ["t1"]},
        "creative": {"title": "t1"},
        "slot_propensities": {"title": 1.0},
        "propensity": 1.0,
        "model_id": "default",
        "epoch": 0,
        "policy_version": 0,
        "source": "policy",
        "holdout": False,
        "seed": 0,
        "survival_probability": 1.0,
    }
    return Impression(**fields | changes)


def clicked(decision_id: str, time_ms: int = 1500, reward: float = 1.0) -> Click:
    """Return a click."""
    return Click(schema_version=1, decision_id=decision_id, occurred_at_ms=time_ms, reward=reward)


def examples_value(examples: Sequence[Labeled]) -> bytes:
    """Return the value of a record of the topic `examples`, made without the joiner's code."""
    return encode_examples(_columns(examples))


def batch_of(impressions: Sequence[Impression]) -> ExampleBatch:
    """Return impressions that nobody has clicked so far."""
    return ExampleBatch.from_columns(_columns([(each, LabelKind.PROVISIONAL, None) for each in impressions]))


def _columns(examples: Sequence[Labeled]) -> dict[str, list[Any]]:
    impressions = [impression for impression, _, _ in examples]
    columns: dict[str, list[Any]] = {
        name: [getattr(impression, name) for impression in impressions]
        for name in Impression.__struct_fields__
        if name not in ("schema_version", "context")
    }
    columns["context"] = [encode_context(impression.context) for impression in impressions]
    columns["label"] = [int(click is not None) for _, _, click in examples]
    columns["reward"] = [0.0 if click is None else click.reward for _, _, click in examples]
    columns["label_kind"] = [kind.value for _, kind, _ in examples]
    columns["delay_ms"] = [
        None if click is None else click.occurred_at_ms - impression.occurred_at_ms for impression, _, click in examples
    ]
    return columns


def changed(batch: ExampleBatch, **columns: Any) -> ExampleBatch:
    """Return a batch with other values: a list for all rows of a column, or row -> value."""
    maps = ("candidates", "creative", "slot_propensities")
    values = {name: batch.columns.column(name).to_pylist() for name in EXAMPLE_SCHEMA.names}
    values |= {name: [dict(pairs) for pairs in values[name]] for name in maps}
    for name, new in columns.items():
        changes = new if isinstance(new, dict) else dict(enumerate(new))
        for row, value in changes.items():
            values[name][row] = value
    return ExampleBatch.from_columns(values)
