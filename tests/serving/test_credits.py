"""The sums of credits: additive, consistent with the logit of creatives, and with honest widths."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.credits import CardEffects, deviation, half_width, widened


def effects_of(seed: int, sizes: list[int], num_draws: int = 3) -> CardEffects:
    rng = np.random.default_rng(seed)
    main = [rng.standard_normal((num_draws + 1, a)).astype(np.float32) for a in sizes]
    pair = [
        [rng.standard_normal((num_draws + 1, sizes[t], sizes[s])).astype(np.float32) for s in range(t)]
        for t in range(len(sizes))
    ]
    return CardEffects(main, pair)


def logit(effects: CardEffects, places: tuple[int, ...]) -> float:
    """The creative's logit under the mean, written down from the definition."""
    total = sum(float(main_LA[-1, a]) for main_LA, a in zip(effects.main, places, strict=True))
    return total + sum(
        float(effects.pair[t][s][-1, places[t], places[s]]) for t in range(len(places)) for s in range(t)
    )


cards = st.tuples(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 5), min_size=1, max_size=4))


@given(cards, st.data())
def test_credits_of_a_creative_add_up_to_its_logit(card: tuple[int, list[int]], data: st.DataObject) -> None:
    effects, sizes = effects_of(*card), card[1]
    places = tuple(data.draw(st.integers(0, size - 1)) for size in sizes)
    credits = effects.credits([[str(a) for a in range(size)] for size in sizes], places)
    assert [int(credit.element_id) for credit in credits] == list(places)
    assert sum(credit.credit for credit in credits) == pytest.approx(logit(effects, places), abs=1e-4)


@given(cards, st.data())
def test_uplift_is_what_the_logit_gains_over_the_mean_of_the_candidates(
    card: tuple[int, list[int]], data: st.DataObject
) -> None:
    effects, sizes = effects_of(*card), card[1]
    places = tuple(data.draw(st.integers(0, size - 1)) for size in sizes)
    credits = effects.credits([[str(a) for a in range(size)] for size in sizes], places)
    for t, size in enumerate(sizes):
        others = np.mean([logit(effects, (*places[:t], a, *places[t + 1 :])) for a in range(size)])
        assert credits[t].uplift == pytest.approx(logit(effects, places) - others, abs=1e-4)


@given(cards)
def test_credits_as_played_add_up_to_the_mean_logit(card: tuple[int, list[int]]) -> None:
    """Weighted by how often slots, each by itself, show their candidates."""
    effects, sizes = effects_of(*card), card[1]
    rng = np.random.default_rng(card[0])
    played = [rng.dirichlet(np.ones(size)).astype(np.float32) for size in sizes]
    mean = sum(
        logit(effects, places) * float(np.prod([p[a] for p, a in zip(played, places, strict=True)]))
        for places in itertools.product(*map(range, sizes))
    )
    credit = effects.credit(played)
    assert sum(float(p @ c[-1]) for p, c in zip(played, credit, strict=True)) == pytest.approx(mean, abs=1e-4)


@given(cards)
def test_interactions_are_what_main_effects_cannot_say(card: tuple[int, list[int]]) -> None:
    effects, sizes = effects_of(*card), card[1]
    for t in range(len(sizes)):
        for s in range(t):
            centered = effects.interaction(t, s)
            np.testing.assert_allclose(centered.sum(1), 0, atol=1e-4)
            np.testing.assert_allclose(centered.sum(2), 0, atol=1e-4)
            # What was taken away is a sum of one effect for each of the two.
            rest = effects.pair[t][s] - centered
            np.testing.assert_allclose(rest - rest[:, :1] - rest[:, :, :1] + rest[:, :1, :1], 0, atol=1e-4)


def test_draws_are_widened_around_the_mean_along_their_axis() -> None:
    narrow = np.array([[1.2, 0.0], [0.8, 0.1], [1.0, 0.0]], np.float32)
    wide = widened(narrow, 0.2)
    np.testing.assert_allclose(wide, [[2.0, 0.0], [0.0, 0.5], [1.0, 0.0]], atol=1e-6)
    np.testing.assert_allclose(widened(narrow.T, 0.2, axis=1), wide.T, atol=1e-6)
    np.testing.assert_allclose(deviation(wide), [1.0, 0.5 / np.sqrt(2)], atol=1e-6)


@pytest.mark.parametrize(("draws", "table"), [(8, 1.860), (16, 1.746), (32, 1.694), (128, 1.657)])
def test_intervals_reach_as_far_as_students_t_says(draws: int, table: float) -> None:
    assert half_width(draws) == pytest.approx(table, abs=2e-3)


def test_intervals_of_few_draws_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((17, 20_000)).astype(np.float32)
    draws[-1] = 0.0
    truth = rng.standard_normal(20_000)
    # 20,000 trials: .02 is nine standard deviations.
    assert np.mean(np.abs(truth) <= half_width(16) * deviation(draws)) == pytest.approx(0.9, abs=0.02)
