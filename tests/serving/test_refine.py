"""Ascents and their relay: no draw ends worse than where it was, and what one finds helps the others."""

import itertools
from typing import Any

import numpy as np
import pytest

from serving.card import Card
from serving.effects import SlotWeights, filled_up
from serving.refine import POOL, _pool, relay
from serving.search import Ascent, Problem

SIZES, DRAWS, F = (4, 5, 3), 6, 3
T, X, SLOTS = len(SIZES), sum(SIZES), [slice(0, 4), slice(4, 9), slice(9, 12)]


def problem_of(*, pairs: float = 1.0, content: float = 1.0, main: Any = None) -> tuple[Problem, tuple[Any, ...]]:
    """Return a request with random effects, those of pairs symmetric, and the plain numbers they are made of."""
    rng = np.random.default_rng(0)
    numbers_LXF = content * rng.standard_normal((DRAWS + 1, X, F)).astype(np.float32)
    weight_LTFTF = np.zeros((DRAWS + 1, T, F, T, F), np.float32)
    for t, s in itertools.combinations(range(T), 2):
        matrix = 0.5 * rng.standard_normal((DRAWS + 1, F, F))
        weight_LTFTF[:, t, :, s], weight_LTFTF[:, s, :, t] = matrix, matrix.transpose(0, 2, 1)
    pair_XX = pairs * rng.standard_normal((X, X)).astype(np.float32)
    pair_XX += pair_XX.T
    for span in SLOTS:
        pair_XX[span, span] = 0.0
    main_LX = 0.1 * rng.standard_normal((DRAWS + 1, X)).astype(np.float32) if main is None else main
    filled = filled_up(numbers_LXF, 2)
    pull = filled_up(filled_up(weight_LTFTF, 2), 4)
    nothing = np.zeros((DRAWS + 1, T, filled.shape[2]), np.float32)
    card = Card(
        names=("a", "b", "c"),
        elements=tuple(tuple(f"{t}{a}" for a in range(size)) for t, size in enumerate(SIZES)),
        slots=(0, 1, 2),
        index=[np.arange(size) for size in SIZES],
        first=np.cumsum([0, *SIZES]).astype(np.uint64),
        weights=SlotWeights(nothing, np.zeros((0, *nothing.shape), np.float32), pull.reshape(*pull.shape[:3], -1)),
        keys=np.zeros((4, X), np.float32),
        content=np.concatenate([filled[:, s].transpose(0, 2, 1).reshape(DRAWS + 1, -1) for s in SLOTS], 1),
        base=main_LX,
        by_context=np.zeros((0, X), np.float32),
        pair=pair_XX if pairs else np.zeros((0, 0), np.float32),
    )
    return Problem.of(card, -1, np.zeros(0, np.float32)), (main_LX, numbers_LXF, weight_LTFTF, pair_XX)


def every() -> np.ndarray[Any, Any]:
    return np.array(list(itertools.product(*map(range, SIZES))))


def values(ascent: Ascent, found_LT: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return ascent.values(found_LT[:, None])[:, 0]


def plain_value(plain: tuple[Any, ...], m: int, places: Any) -> float:
    main_LX, numbers_LXF, weight_LTFTF, pair_XX = plain
    rows = [span.start + place for span, place in zip(SLOTS, places, strict=True)]
    total = float(sum(main_LX[m, x] for x in rows))
    for t, s in itertools.combinations(range(T), 2):
        total += float(numbers_LXF[m, rows[t]] @ weight_LTFTF[m, t, :, s] @ numbers_LXF[m, rows[s]])
        total += float(pair_XX[rows[t], rows[s]])
    return total


@pytest.mark.parametrize("pairs", [0.0, 1.0])
def test_values_of_an_ascent_equal_the_sum_of_effects(pairs: float) -> None:
    problem, plain = problem_of(pairs=pairs)
    found = problem.on_draws().values(np.broadcast_to(every(), (DRAWS, *every().shape)))
    mean = problem.on_mean().values(every()[None])
    for i, places in enumerate(every()):
        for m in range(DRAWS):
            assert found[m, i] == pytest.approx(plain_value(plain, m, places), abs=1e-4)
        assert mean[0, i] == pytest.approx(plain_value(plain, DRAWS, places), abs=1e-4)


def test_relay_ends_where_no_single_slot_helps_and_finds_more_than_one_ascent() -> None:
    problem, _ = problem_of()
    rng = np.random.default_rng(1)
    start = np.stack([rng.integers(size, size=DRAWS) for size in SIZES], -1)
    alone = values(problem.on_draws(), problem.on_draws().climb(start[:, None], 16))
    winners, _ = relay(problem, start, max_sweeps=16)
    together = values(problem.on_draws(), winners)
    assert (together >= alone - 1e-5).all()
    assert together.sum() > alone.sum() + 0.1
    best = problem.on_draws().values(np.broadcast_to(every(), (DRAWS, *every().shape))).max(-1)
    assert (together <= best + 1e-5).all()
    for t, size in enumerate(SIZES):
        for place in range(size):
            other = winners.copy()
            other[:, t] = place
            assert (values(problem.on_draws(), other) <= together + 1e-4).all()


def test_relay_hands_the_best_of_one_draw_to_all() -> None:
    """Slots are worth something only together: no draw but the one that starts there finds it by itself."""
    together = np.zeros((DRAWS + 1, X), np.float32)
    problem, _ = problem_of(pairs=0.0, content=0.0, main=together)
    pair_XX = np.zeros((X, X), np.float32)
    for t, s in itertools.permutations(range(T), 2):
        pair_XX[SLOTS[t], SLOTS[s]] = -1.0
        pair_XX[SLOTS[t].start, SLOTS[s].start] = 0.0
        pair_XX[SLOTS[t].start + 1, SLOTS[s].start + 1] = 1.0
    object.__setattr__(problem, "effects", problem.effects._replace(pair=pair_XX.ravel()))
    start = np.zeros((DRAWS, T), np.int64)
    start[3] = 1
    assert not problem.on_draws().climb(start[:1, None].repeat(DRAWS, 0), 16).any()
    assert (relay(problem, start, 4)[0] == 1).all()


@pytest.mark.parametrize("pairs", [0.0, 1.0])
def test_an_ascent_goes_slot_by_slot_to_the_best_candidate_and_stops_at_rest(pairs: float) -> None:
    problem, plain = problem_of(pairs=pairs)
    rng = np.random.default_rng(2)
    start = np.stack([rng.integers(size, size=DRAWS) for size in SIZES], -1)
    ascent, num_scores = problem.on_draws(), 0
    ends = ascent.climb(start[:, None], 4)
    for m in range(DRAWS):
        chosen, still = start[m].tolist(), 0
        for step in range(4 * T):
            t = step % T
            score = [plain_value(plain, m, [*chosen[:t], a, *chosen[t + 1 :]]) for a in range(SIZES[t])]
            num_scores += SIZES[t]
            still = still + 1 if np.argmax(score) == chosen[t] else 1
            chosen[t] = int(np.argmax(score))
            if still == T:
                break
        assert ends[m].tolist() == chosen
    assert ascent.num_scores == num_scores


def test_of_several_starts_the_best_end_is_told() -> None:
    problem, _ = problem_of()
    rng = np.random.default_rng(3)
    start = np.stack([rng.integers(size, size=(DRAWS, 5)) for size in SIZES], -1)
    best = values(problem.on_draws(), problem.on_draws().climb(start, 16))
    alone = [values(problem.on_draws(), problem.on_draws().climb(start[:, r : r + 1], 16)) for r in range(5)]
    np.testing.assert_array_equal(best, np.max(alone, 0))


def test_fewer_starts_than_draws_are_used_in_turn() -> None:
    problem, _ = problem_of()
    start = np.array([[0, 0, 0], [3, 4, 2]])
    np.testing.assert_array_equal(relay(problem, start, 4)[0], relay(problem, np.tile(start, (DRAWS // 2, 1)), 4)[0])


def test_pool_holds_each_creative_once_and_the_best_first() -> None:
    found = every()[np.array([5, 7, 5, 9, 7, 5, 5, 5, 5, 5, 5, 5])].astype(np.uint64)
    value = np.array([3.0, 1.0, 3.0, 2.0, 1.0] + [3.0] * 7, np.float32)
    np.testing.assert_array_equal(_pool(found, value), every()[[5, 9, 7]])
    many = every()[:20].astype(np.uint64)
    np.testing.assert_array_equal(_pool(many, np.arange(20, dtype=np.float32)), many[: -POOL - 1 : -1])
