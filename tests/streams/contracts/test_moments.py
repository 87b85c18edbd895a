"""Moments of a stream do not depend on where it is cut into batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.contracts.moments import MAX_NUMBER, Moments

NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60)


@given(NUMBERS, st.lists(st.integers(0, 60), max_size=6))
@settings(max_examples=200, deadline=None)
def test_merged_batches_have_the_moments_of_the_whole(numbers: list[float], cuts: list[int]) -> None:
    merged = Moments()
    for part in np.split(np.array(numbers), sorted(min(cut, len(numbers)) for cut in cuts)):
        merged = merged.merge(Moments.of(part))
    assert merged.count == len(numbers)
    assert merged.mean == pytest.approx(np.mean(numbers), rel=1e-9, abs=1e-6)
    assert merged.squares == pytest.approx(np.var(numbers) * len(numbers), rel=1e-9, abs=1e-3)


def test_one_by_one_is_the_same_stream() -> None:
    numbers = np.random.default_rng(0).normal(1e6, 1e-2, 1000)
    merged = Moments()
    for number in numbers:
        merged = merged.merge(Moments.of([number]))
    # A sum of squares minus the square of the sum would have lost all digits here: 10^6 squared against 10^-2 squared.
    assert merged.sd == pytest.approx(numbers.std(), rel=1e-3)


def test_absurd_numbers_are_left_out() -> None:
    moments = Moments.of([1.0, float("nan"), float("inf"), -float("inf"), 1e300, -1.0, MAX_NUMBER])
    assert moments.count == 3
    assert Moments.of([float("nan")]) == Moments()
    assert Moments.of([]) == Moments()


def test_numbers_without_spread_are_not_divided_by_nothing() -> None:
    assert Moments().sd == 1.0
    assert Moments.of([5.0, 5.0]).sd == 1.0
    assert Moments.of([1e9, 1e9 + 1e-3]).sd == 1.0
