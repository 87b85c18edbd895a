"""The vocabulary of a learner grows in order of arrival, keeps what is in use, gives back what is not, and restores."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.contracts.features import ContextColumn, FeatureSpec
from streams.contracts.growing import FeatureLimits, Freed, GrowingFeatureSpec

SOON = FeatureLimits(max_products=4, max_elements=6, max_slots=2, max_context_columns=4, expire_after_ms=160)
"""A clock that may move by 10 ms an update, and names that live for 160."""


def pass_time(features: GrowingFeatureSpec, duration_ms: int) -> Freed:
    freed = Freed()
    for now_ms in range(features.now_ms + 10, features.now_ms + duration_ms + 1, 10):
        features.advance(now_ms)
        freed = features.expire()
    return freed


def test_names_that_are_no_longer_seen_give_their_rows_to_new_ones() -> None:
    features = GrowingFeatureSpec(SOON)
    features.advance(1_000)
    features.context({"device": "ios", "hour": 3})
    features.context({"device": "ios", "hour": 7})
    features.product("old"), features.product("used")
    features.element("title", "old"), features.element("title", "used"), features.element("image", "old")
    for now_ms in range(1_000, 1_171, 10):
        features.advance(now_ms)
        features.product("used"), features.element("title", "used")
        freed = features.expire()
    assert freed == Freed(slots=(1,), context=(0, 1), products=(0,), elements=(0, 2))
    spec = features.freeze()
    assert spec.slots == ("title", None)
    assert spec.context == (None, None)
    assert spec.products == (None, "used")
    assert spec.elements == (None, (0, "used"), None)
    assert FeatureSpec.from_json(spec.to_json()) == spec
    assert spec.context_row({"device": "ios", "hour": 3}).tolist() == [0.0, 0.0]

    assert features.element("tag", "new") == 0
    features.context({"hour": 100})
    spec = features.freeze()
    assert spec.slots == ("title", "tag")
    assert spec.elements == ((1, "new"), (0, "used"), None)
    # Nothing is left of the numbers before.
    assert spec.context == (ContextColumn(field="hour", mean=100.0, sd=1.0), None)
    assert not pass_time(features, 0)


def test_catalog_keeps_names_that_nobody_sees_and_lets_go_of_those_it_dropped() -> None:
    features = GrowingFeatureSpec(SOON)
    features.advance(1_000)
    features.catalog(["p", "q"], [("title", "a"), ("image", "b")])
    assert not pass_time(features, 500)
    features.catalog(["q"], [("image", "b")])
    assert not pass_time(features, 160)
    assert pass_time(features, 10) == Freed(slots=(0,), products=(0,), elements=(0,))
    assert features.freeze().elements == (None, (1, "b"))


def test_neither_a_gap_nor_a_wrong_time_expires_what_is_in_use() -> None:
    features = GrowingFeatureSpec(SOON)
    features.advance(1_000)
    features.product("p")
    features.advance(10**15)
    assert not features.expire()
    assert features.now_ms == 1_010
    features.advance(500)
    assert features.now_ms == 1_010


def test_rows_that_a_caller_remembers_stay_when_touched() -> None:
    features = GrowingFeatureSpec(SOON)
    features.advance(1_000)
    rows = np.array([features.element("title", e) for e in "ab"])
    for now_ms in range(1_010, 1_400, 10):
        features.advance(now_ms)
        features.touch(slots=np.array([-1]), elements=rows[:1])
        features.expire()
    assert features.freeze().elements == ((0, "a"), None)
    assert features.freeze().slots == ("title",)  # a slot stays as long as one of its elements does


def test_rare_names_wait_and_are_counted() -> None:
    features = GrowingFeatureSpec(FeatureLimits(min_seen=3))
    assert [features.product("p") for _ in range(3)] == [-1, -1, 0]
    assert features.product("q", seen=3) == 1
    assert [features.element("title", "e", seen=2) for _ in range(4)] == [-1, -1, 0, 0]
    features.context({"device": "ios", "hour": 1})
    features.numbers("hour", [1.0, 3.0])
    features.category("device", "ios", seen=2)
    spec = features.freeze()
    assert spec.context == (ContextColumn(field="hour", mean=2.0, sd=1.0), ContextColumn(field="device", value="ios"))
    assert features.unknown == {"product_rare": 2, "element_rare": 2, "slot_rare": 2, "context_rare": 2}


def test_field_of_countless_values_leaves_room_for_the_others() -> None:
    features = GrowingFeatureSpec(FeatureLimits(max_context_columns=6, max_values_per_field=4, expire_after_ms=160))
    features.advance(1_000)
    for user in range(100):
        features.context({"user": f"u{user}"})
    features.context({"device": "ios", "hour": 3})
    assert len(features.freeze().context) == 6
    assert features.unknown == {"context_crowded": 96}
    pass_time(features, 200)
    features.context({"user": "u500"})
    assert features.freeze().context_row({"user": "u500"}).any()


def test_absurd_numbers_are_counted_and_move_nothing() -> None:
    features = GrowingFeatureSpec()
    for hour in (1, 3, float("nan"), float("inf"), 1e300, 10**400):
        features.context({"hour": hour})
    features.numbers("hour", np.array([2.0, np.nan]))
    assert features.freeze().context == (ContextColumn(field="hour", mean=2.0, sd=np.sqrt(2 / 3)),)
    assert features.unknown == {"context_absurd": 5}
    assert features.freeze().context_row({"hour": 10**400}).tolist() == [0.0]


def test_batch_of_numbers_is_the_numbers_one_by_one() -> None:
    numbers = np.random.default_rng(0).normal(12, 5, 500)
    one, batch = GrowingFeatureSpec(), GrowingFeatureSpec()
    for number in numbers:
        one.context({"hour": float(number)})
    for part in np.array_split(numbers, 7):
        batch.numbers("hour", part)
    (a,), (b,) = one.freeze().context, batch.freeze().context
    assert (a.mean, a.sd) == pytest.approx((b.mean, b.sd), rel=1e-12)


CALLS = st.one_of(
    st.tuples(st.just("product"), st.sampled_from("abcdefg")),
    st.tuples(st.just("element"), st.sampled_from(["s", "t", "u"]), st.sampled_from("abcde")),
    st.tuples(st.just("context"), st.dictionaries(st.sampled_from("xyz"), st.sampled_from([True, "v", "w", 1, 2.5]))),
    st.tuples(
        st.just("catalog"), st.lists(st.sampled_from("abc")), st.lists(st.tuples(st.just("s"), st.sampled_from("ab")))
    ),
    st.tuples(st.just("advance"), st.integers(0, 400)),
    st.tuples(st.just("expire")),
)


@given(st.lists(CALLS, max_size=60), st.integers(0, 60), st.integers(1, 2))
@settings(max_examples=150, deadline=None)
def test_restored_vocabulary_goes_on_alike_whatever_is_called(
    calls: list[tuple[object, ...]], cut: int, min_seen: int
) -> None:
    limits = FeatureLimits(
        max_products=4, max_elements=5, max_slots=2, max_context_columns=4, min_seen=min_seen, expire_after_ms=64
    )
    features, again = GrowingFeatureSpec(limits), GrowingFeatureSpec(limits)
    for number, (name, *arguments) in enumerate(calls):
        if number == cut:
            again.restore(json.loads(json.dumps(features.state())))
        outcomes = [getattr(each, str(name))(*arguments) for each in ([features, again][: 1 + (number >= cut)])]
        assert outcomes[0] == outcomes[-1]
        spec = features.freeze()  # which checks itself: no name twice, no element without its slot
        assert (len(spec.products), len(spec.elements), len(spec.slots), len(spec.context)) <= (4, 5, 2, 4)
        assert FeatureSpec.from_json(spec.to_json()) == spec
    if cut < len(calls):
        assert again.state() == features.state()
        assert again.freeze().hash == features.freeze().hash


def test_limits_that_make_no_sense_are_refused() -> None:
    for wrong in ({"max_elements": 0}, {"min_seen": 0}, {"expire_after_ms": 0}, {"content_size": 17}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FeatureLimits(**wrong)
