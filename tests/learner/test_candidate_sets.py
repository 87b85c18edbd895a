"""Sets of candidates are told apart exactly, and creatives are found in them wherever they stand."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.candidate_sets import NOWHERE, CandidateShelf, row_keys
from streams.contracts.examples import EXAMPLE_SCHEMA

Candidates = dict[str, list[str]]


def column(name: str, values: list[Any]) -> pa.Array:
    pairs = [list(value.items()) if isinstance(value, dict) else value for value in values]
    return pa.array(pairs, EXAMPLE_SCHEMA.field(name).type)


def places(candidates: list[Candidates], creatives: list[Any], shelf: CandidateShelf | None = None) -> list[list[int]]:
    shelf = shelf or CandidateShelf()
    sets, number_N = shelf.find(column("candidates", candidates))
    return shelf.places(sets, number_N, column("creative", creatives)).tolist()


NAMES = st.text("abé", max_size=3)
SETS = st.dictionaries(NAMES, st.lists(NAMES, max_size=3), max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.lists(SETS, max_size=8), st.integers(0, 8))
def test_rows_have_one_key_if_and_only_if_their_sets_are_one(sets: list[Candidates], skipped: int) -> None:
    rows = [[(slot, tuple(ids)) for slot, ids in each.items()] for each in sets]
    keys = row_keys(column("candidates", sets))
    for a, key_a in zip(rows, keys, strict=True):
        for b, key_b in zip(rows, keys, strict=True):
            assert (a == b) == (key_a == key_b)
    # A part of a column is like the whole.
    assert row_keys(column("candidates", sets).slice(skipped)) == keys[skipped:]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.dictionaries(
                st.sampled_from(["t", "i", "h"]), st.lists(st.sampled_from("abcd"), min_size=1, unique=True), min_size=1
            ),
            st.lists(st.tuples(st.sampled_from(["t", "i", "h", "new"]), st.sampled_from("abcdz")), max_size=4),
        ),
        max_size=8,
    )
)
def test_places_are_those_that_a_look_at_each_row_finds(cards: list[tuple[Candidates, list[tuple[str, str]]]]) -> None:
    shelf = CandidateShelf()
    for _ in range(2):  # parsed, and then known
        found = places([candidates for candidates, _ in cards], [pairs for _, pairs in cards], shelf)
        for (candidates, pairs), row in zip(cards, found, strict=True):
            creative = dict(pairs)
            fits = len(creative) == len(pairs) and creative.keys() == candidates.keys()
            fits = fits and all(element in candidates[slot] for slot, element in pairs)
            expected = [ids.index(creative[slot]) for slot, ids in candidates.items()] if fits else []
            assert row == expected + [NOWHERE] * (len(row) - len(expected))


def test_what_is_no_set_of_candidates_is_none_and_fits_no_creative() -> None:
    many = {f"s{n}": ["a"] for n in range(33)}
    bad: list[Any] = [{}, {"t": []}, {"t": ["a", "a"]}, {"t": [""]}, {"": ["a"]}, many, {"t": ["a"] * 1025}]
    bad += [[("t", ["a"]), ("t", ["b"])], [("t", None)], [("t", ["a", None])]]
    shelf = CandidateShelf()
    sets, number_N = shelf.find(column("candidates", [*bad, {"t": ["a"]}]))
    assert [sets[n] is None for n in number_N] == [True] * len(bad) + [False]
    found = shelf.places(sets, number_N, column("creative", [{"t": "a"}] * (len(bad) + 1)))
    assert (found[:-1] == NOWHERE).all()
    assert found[-1].tolist() == [0]


def test_creative_without_an_element_fits_nothing() -> None:
    assert places([{"t": ["a", "b"]}] * 2, [[("t", None)], {"t": "b"}]) == [[NOWHERE], [1]]


def test_known_set_is_the_same_object_until_there_are_too_many() -> None:
    shelf = CandidateShelf(max_kept=3)
    first = column("candidates", [{"t": ["a", "b"]}])
    ((one,), _), ((two,), _) = shelf.find(first), shelf.find(first)
    assert one is two is not None
    shelf.find(column("candidates", [{"t": ["c", "d"]}]))
    ((again,), _) = shelf.find(first)
    assert again is not None
    assert again is not one
    assert again.candidates == {"t": ("a", "b")}
    assert places([{"t": ["a", "b"]}], [{"t": "b"}], shelf) == [[1]]


@pytest.mark.parametrize("num_sets", [1, 200])
def test_empty_columns_and_columns_of_many_sets(num_sets: int) -> None:
    assert places([], []) == []
    cards = [{"t": [f"{n}", "x"], "i": ["y", f"{n}"]} for n in range(num_sets)]
    creatives = [{"i": f"{n}", "t": f"{n}"} for n in range(num_sets)]
    assert np.array_equal(places(cards, creatives), [[0, 1]] * num_sets)
