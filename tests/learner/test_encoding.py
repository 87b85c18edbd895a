"""Arrays of distinct values give the numbers that a look at each example gives, in any vocabulary."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.encoding import ExampleEncoder
from learner.parsing import ExampleParser
from streams.contracts.examples import ExampleBatch
from streams.contracts.features import FeatureSpec
from streams.contracts.growing import FeatureLimits, GrowingFeatureSpec
from tests.builders import batch_of, shown

CONTEXTS: list[dict[str, Any]] = [
    {},
    {"device": "ios", "hour": 3},
    {"device": "web", "hour": 7.5, "new": True},
    {"hour": 7.5, "other": "x"},
]
CARDS: list[dict[str, list[str]]] = [
    {"title": ["a", "b"], "image": ["a"]},
    {"image": ["b", "a"], "title": ["b", "c", "a"]},
    {"title": ["d"]},
    {"tag": ["a", "e"]},
]
IMPRESSIONS = st.lists(
    st.builds(
        lambda number, product, context, card, place: shown(
            f"d{number}",
            product_id=product,
            context=CONTEXTS[context],
            candidates=CARDS[card],
            creative={slot: ids[place % len(ids)] for slot, ids in CARDS[card].items()},
            slot_propensities=dict.fromkeys(CARDS[card], 0.5),
        ),
        st.integers(0, 99),
        st.sampled_from(["p", "q", "r"]),
        st.integers(0, 3),
        st.integers(0, 3),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=10,
)
LIMITS = [
    FeatureLimits(content_size=2),
    FeatureLimits(content_size=2, max_products=1, max_elements=3, max_slots=2, max_context_columns=2),
]


def check(batch: ExampleBatch, rows: list[int], spec: FeatureSpec, encoded: Any) -> None:
    """Compare with what the frozen vocabulary says of each row."""
    content_EF = content_of(spec)
    expected_NC = spec.context_matrix([batch.context[row] for row in rows])
    assert np.array_equal(encoded.context.numpy(), expected_NC)
    for n, row in enumerate(rows):
        assert encoded.product[n] == spec.product_index.get(batch.product_id[row], -1)
        chosen = [-1] * len(spec.slots)
        for slot, element in batch.creative[row].items():
            if slot in spec.slot_index:
                chosen[spec.slot_index[slot]] = spec.element_index.get((spec.slot_index[slot], element), -1)
        assert encoded.chosen[n].tolist() == chosen
        for slot, element in enumerate(chosen):
            assert encoded.content[n, slot].tolist() == (content_EF[element].tolist() if element >= 0 else [0, 0])


def content_of(spec: FeatureSpec) -> torch.Tensor:
    return torch.arange(1.0, 1.0 + 2 * len(spec.elements)).reshape(-1, 2)


@pytest.mark.parametrize("limits", LIMITS, ids=["room for all", "room for few"])
def test_numbers_are_those_of_each_row_and_of_the_vocabulary(limits: FeatureLimits) -> None:
    @settings(max_examples=150, deadline=None)
    @given(st.lists(IMPRESSIONS, min_size=1, max_size=3), st.data())
    def check_batches(batches: list[Any], data: st.DataObject) -> None:
        parser, features = ExampleParser(), GrowingFeatureSpec(limits)
        encoder = ExampleEncoder(features)
        for impressions in batches:
            batch = batch_of(impressions)
            rows = sorted(data.draw(st.sets(st.integers(0, len(batch) - 1), min_size=1)))
            parsed = parser.parse(batch)
            indexed = encoder.observe(parsed, np.array(rows))
            spec = features.freeze()
            check(batch, rows, spec, indexed.encode(spec, content_of(spec)))
            for number in parsed.set[rows]:
                found, fresh = parsed.sets[number], ExampleEncoder(features)
                assert found is not None
                # What is kept is what the vocabulary says.
                kept, told = encoder.find(found, spec), fresh.find(found, spec)
                assert kept.slot.tolist() == told.slot.tolist()
                assert kept.element.tolist() == told.element.tolist()

    check_batches()


@settings(max_examples=50, deadline=None)
@given(IMPRESSIONS)
def test_vocabulary_learns_what_it_would_learn_row_after_row(impressions: list[Any]) -> None:
    batch, features, plain = batch_of(impressions), GrowingFeatureSpec(), GrowingFeatureSpec()
    ExampleEncoder(features).observe(ExampleParser().parse(batch), np.arange(len(batch)))
    for row in range(len(batch)):
        plain.product(batch.product_id[row])
        plain.context(batch.context[row])
        for slot, ids in batch.candidates[row].items():
            for element_id in ids:
                plain.element(slot, element_id)
    found, expected = features.freeze(), plain.freeze()
    assert (found.slots, found.products, found.elements) == (expected.slots, expected.products, expected.elements)
    told = {(c.field, c.value): (c.mean, c.sd) for c in found.context}
    assert told.keys() == {(c.field, c.value) for c in expected.context}
    for column in expected.context:
        assert told[column.field, column.value] == pytest.approx((column.mean, column.sd))


def test_rows_that_are_not_learned_do_not_enter_the_vocabulary() -> None:
    batch = batch_of([shown("a", product_id="good"), shown("b", product_id="bad", candidates={"x": ["y"]})])
    features = GrowingFeatureSpec()
    ExampleEncoder(features).observe(ExampleParser().parse(batch), np.array([0]))
    spec = features.freeze()
    assert (spec.products, spec.slots, spec.elements) == (("good",), ("title",), ((0, "t1"),))


def test_known_sets_cost_no_more_look_ups() -> None:
    features = GrowingFeatureSpec()
    asked: list[str] = []
    original = features.element

    def element(slot: str, element_id: str, *, seen: int = 1) -> int:
        asked.append(element_id)
        return original(slot, element_id, seen=seen)

    features.element = element  # type: ignore[method-assign]
    parser, encoder = ExampleParser(), ExampleEncoder(features)
    for _ in range(3):
        batch = batch_of([shown(f"d{n}", candidates={"title": ["t1", "t2"]}) for n in range(5)])
        encoder.observe(parser.parse(batch), np.arange(5))
    assert asked == ["t1", "t2"]
