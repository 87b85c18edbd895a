"""A frozen vocabulary turns contexts into numbers, survives JSON, and refuses what contradicts itself."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.contracts.features import FeatureSpec
from streams.contracts.growing import FeatureLimits, GrowingFeatureSpec


def grown() -> GrowingFeatureSpec:
    features = GrowingFeatureSpec()
    for device, hour in (("ios", 10), ("web", 14), ("ios", 18)):
        features.context({"device": device, "hour": hour, "new": True})
    features.product("p1")
    features.element("title", "t1")
    features.element("image", "t1")
    return features


def test_spec_round_trip_keeps_everything_and_its_hash() -> None:
    spec = grown().freeze()
    again = FeatureSpec.from_json(spec.to_json())
    assert again == spec
    assert again.hash == spec.hash
    assert spec.slots == ("title", "image")
    assert spec.element_index == {(0, "t1"): 0, (1, "t1"): 1}


def test_context_numbers_are_standardized_and_unknown_values_count_nothing() -> None:
    spec = grown().freeze()
    matrix = spec.context_matrix(
        [
            {"device": "ios", "hour": 14, "new": True},
            {"device": "tv", "hour": 1e9, "new": False, "other": 3},
            {"hour": float("nan")},
        ]
    )
    columns = [(column.field, column.value) for column in spec.context]
    assert columns == [("device", "ios"), ("hour", None), ("new", True), ("device", "web")]
    assert matrix.tolist() == [[1.0, 0.0, 1.0, 0.0], [0.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert spec.context_row({"hour": 18})[1] == pytest.approx(4 / np.std([10, 14, 18]))


def test_number_and_flag_of_one_field_do_not_meet() -> None:
    features = GrowingFeatureSpec()
    features.context({"a": True})
    features.context({"a": 1})
    assert features.freeze().context_row({"a": True}).tolist() == [1.0, 0.0]


def test_full_vocabulary_leaves_names_unknown_and_counts_them() -> None:
    features = GrowingFeatureSpec(FeatureLimits(max_products=1, max_elements=1, max_context_columns=1, max_slots=1))
    assert [features.product("a"), features.product("b"), features.product("a")] == [0, -1, 0]
    assert [features.element("s", "a"), features.element("s", "b"), features.element("t", "a")] == [0, -1, -1]
    features.context({"x": "1", "y": "2"})
    assert features.unknown == {"product_full": 1, "element_full": 1, "slot_full": 1, "context_full": 1}
    assert len(features.freeze().context) == 1


def test_restored_vocabulary_goes_on_alike() -> None:
    features, again = grown(), GrowingFeatureSpec()
    again.restore(features.state())
    for each in (features, again):
        each.context({"device": "tv", "hour": 3})
        each.element("tag", "x")
    assert again.freeze() == features.freeze()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b'{"slots":["a","a"],"context":[],"products":[],"elements":[],"content_size":8,"encoder":"x"}',
        b'{"slots":["a"],"context":[],"products":[],"elements":[[1,"e"]],"content_size":8,"encoder":"x"}',
        b'{"slots":["a"],"context":[],"products":[],"elements":[],"content_size":17,"encoder":"x"}',
        b'{"slots":[],"context":[{"field":"h","sd":0}],"products":[],"elements":[],"content_size":8,"encoder":"x"}',
    ],
)
def test_bad_spec_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"spec"):
        FeatureSpec.from_json(text)


@given(st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_hostile_bytes_are_value_errors(data: bytes) -> None:
    with pytest.raises(ValueError, match="spec"):
        FeatureSpec.from_json(data)
