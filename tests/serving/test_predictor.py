"""What the predictor says of many is what the policy says of each."""

import json

import numpy as np
import pytest

from serving.policy import DecisionRequest
from serving.predictor import Predictor
from streams.contracts.examples import ExampleBatch
from tests.builders import batch_of, shown
from tests.serving.test_policy import SLOTS, creatives, policy_of, spec_of, tensors_of


def shown_creatives() -> ExampleBatch:
    contexts = ({"device": "web"}, {"device": "ios"}, {"device": "other"}, {})
    candidates = {slot: list(ids) for slot, ids in SLOTS.items()}
    return batch_of(
        [
            shown(
                f"d{number}",
                product_id=("p0", "p1", "unknown")[number % 3],
                context=contexts[number % 4],
                creative=creative,
                candidates=candidates,
            )
            for number, creative in enumerate(creatives())
        ]
    )


def test_predictions_are_those_of_the_policy() -> None:
    batch, policy = shown_creatives(), policy_of()
    predicted = Predictor(spec_of(), tensors_of()).predict(batch)
    expected = [
        policy.expected_ctr(DecisionRequest(product_id, context, SLOTS), creative)
        for product_id, context, creative in zip(batch.product_id, batch.context, batch.creative, strict=True)
    ]
    assert predicted == pytest.approx(np.array(expected), abs=1e-5)
    assert predicted.std() > 0.1


def test_order_of_slots_and_what_is_unknown_changes_nothing() -> None:
    predictor = Predictor(spec_of(), tensors_of())
    whole = {"title": "t1", "image": "i0", "tag": "g2"}
    variants = [whole, dict(reversed(whole.items())), whole | {"banner": "b1"}, whole | {"tag": "new"}]
    predicted = predictor.predict(
        batch_of([shown(f"d{n}", product_id="p0", creative=c) for n, c in enumerate(variants)])
    )
    assert predicted[0] == pytest.approx(predicted[1], abs=1e-6)
    assert predicted[0] == predicted[2]
    assert abs(predicted[0] - predicted[3]) > 1e-3


def test_part_of_a_record_is_predicted_as_in_the_record() -> None:
    batch, predictor = shown_creatives(), Predictor(spec_of(), tensors_of())
    part = ExampleBatch(batch.columns.slice(5, 7))
    assert predictor.predict(part) == pytest.approx(predictor.predict(batch)[5:12], abs=1e-6)
    assert json.loads(part.columns.column("context")[0].as_py()) == batch.context[5]
