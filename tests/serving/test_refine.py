"""The relay: no draw ends worse than where it was, and what one finds helps the others."""

import itertools
from typing import Any

import numpy as np
import pytest

from serving.refine import POOL, _distinct, exchange, relay
from serving.search import PART_FROM, Ascent, Deck, Problem

SIZES, DRAWS, F, N = (4, 5, 3), 6, 3, 2


def problem_of(seed: int = 0, *, pairs: float = 1.0, num_requests: int = N) -> Problem:
    """Requests over as many cards with random effects, those of pairs symmetric as a model's are."""
    rng, total, slots = np.random.default_rng(seed), sum(SIZES), len(SIZES)
    deck = Deck((tuple(range(slots)), SIZES), DRAWS + 1, F, 2, 0)
    weights = 0.5 * rng.standard_normal((slots, slots, DRAWS + 1, F, F)).astype(np.float32)
    for row in range(num_requests):
        between = pairs * rng.standard_normal((total, total)).astype(np.float32)
        between += between.T
        for t, size in enumerate(SIZES):
            content = rng.standard_normal((size, F)).astype(np.float32)
            deck.content[t][row] = content
            deck.keys[t][row] = 0.0
            deck.base[t][row] = 0.1 * rng.standard_normal((DRAWS + 1, size))
            deck.by_context[t][row] = 0.0
            deck.pulls[t][row] = 0.0
            for s in range(slots):
                if s != t:
                    matrix = weights[t, s] if t < s else weights[s, t].transpose(0, 2, 1)
                    deck.pulls[t][row, :, :, s] = np.einsum("af,lfg->alg", content, matrix)
            span = deck.spans[t]
            deck.pairs[t][row] = between[span]
            deck.pairs[t][row][:, span] = 0.0
    rows = np.arange(num_requests)
    main = [deck.base[t][rows] for t in range(slots)]
    context = np.zeros((num_requests, 0), np.float32)
    return Problem(deck, rows, deck.content_of(rows), main, np.full(num_requests, -1), context)


def every() -> np.ndarray[Any, Any]:
    return np.array(list(itertools.product(*map(range, SIZES))))


def values(ascent: Ascent, found_NMT: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return ascent.values(found_NMT[:, :, None])[:, :, 0]


@pytest.mark.parametrize("pairs", [0.0, 1.0])
def test_values_of_an_ascent_equal_the_sum_of_effects(pairs: float) -> None:
    problem = problem_of(pairs=pairs)
    deck = problem.deck
    found = problem.on_draws().values(np.broadcast_to(every(), (N, DRAWS, *every().shape)))
    for n, m, i in itertools.product(range(N), (0, DRAWS - 1), (0, 17, 59)):
        places, total = every()[i], 0.0
        for t, a in enumerate(places):
            total += float(problem.main[t][n, m, a])
            for s in range(t):
                other = places[s]
                total += float(deck.pulls[s][n, other, m, t] @ deck.content[t][n, m, a])
                total += float(deck.pairs[t][n, a, deck.spans[s].start + other])
        assert found[n, m, i] == pytest.approx(total, abs=1e-4)


def test_relay_ends_where_no_single_slot_helps_and_finds_more_than_one_ascent() -> None:
    problem, rng = problem_of(), np.random.default_rng(1)
    start = np.stack([rng.integers(size, size=(N, DRAWS)) for size in SIZES], -1)
    alone = values(problem.on_draws(), problem.on_draws().climb(start[:, :, None], 16))
    winners = relay(problem, start, max_sweeps=16)
    together = values(problem.on_draws(), winners)
    assert (together >= alone - 1e-5).all()
    assert together.sum() > alone.sum() + 0.1
    best = problem.on_draws().values(np.broadcast_to(every(), (N, DRAWS, *every().shape))).max(-1)
    assert (together <= best + 1e-5).all()
    for t, size in enumerate(SIZES):
        for place in range(size):
            other = winners.copy()
            other[..., t] = place
            assert (values(problem.on_draws(), other) <= together + 1e-4).all()


def test_exchange_hands_the_best_of_one_draw_to_all() -> None:
    """All draws agree and all but one stand still at a bad creative: each must take the good one."""
    problem = problem_of()
    for t in range(len(SIZES)):
        problem.deck.pulls[t][:] = 0.0
        problem.deck.pairs[t][:] = 0.0
        problem.main[t][:] = 0.0
        problem.main[t][..., 1] = 1.0
    found = np.zeros((N, DRAWS, len(SIZES)), np.int64)
    found[:, 3] = 1
    assert (exchange(problem.on_draws(), problem.on_mean(), found) == 1).all()


def plain_ascent(problem: Problem, n: int, m: int, chosen: list[int], max_sweeps: int) -> tuple[list[int], int]:
    """One request under one draw, slot by slot, and how many scores that took."""
    deck, row, num_slots, still, num_scores = problem.deck, problem.rows[n], len(SIZES), 0, 0
    for step in range(max_sweeps * num_slots):
        t = step % num_slots
        others = [s for s in range(num_slots) if s != t]
        score = problem.main[t][n, m].astype(np.float64)
        for s in others:
            score = score + deck.content[t][row, m] @ deck.pulls[s][row, chosen[s], m, t].astype(np.float64)
            score += deck.pairs[s][row, chosen[s], deck.spans[t]]
        num_scores += SIZES[t]
        still = still + 1 if score.argmax() == chosen[t] else 1
        chosen[t] = int(score.argmax())
        if still == num_slots:
            break
    return chosen, num_scores


@pytest.mark.parametrize("num_requests", [1, 2 * PART_FROM // DRAWS])
@pytest.mark.parametrize("pairs", [0.0, 1.0])
def test_all_climb_together_as_each_does_alone(num_requests: int, pairs: float) -> None:
    problem, rng = problem_of(pairs=pairs, num_requests=num_requests), np.random.default_rng(2)
    start = np.stack([rng.integers(size, size=(num_requests, DRAWS)) for size in SIZES], -1)
    ascent = problem.on_draws()
    together, sweeps = ascent.climb(start[:, :, None], 4), []
    for n, m in itertools.product(range(num_requests), range(DRAWS)):
        end, num_scores = plain_ascent(problem, n, m, start[n, m].tolist(), 4)
        assert together[n, m].tolist() == end
        sweeps.append(num_scores)
    assert ascent.num_scores == sum(sweeps)
    # Some are at rest long before the others, so that the others go on alone.
    assert num_requests == 1 or np.quantile(sweeps, 0.3) < max(sweeps) - sum(SIZES)


def test_fewer_starts_than_draws_are_used_in_turn() -> None:
    problem = problem_of()
    start = np.array([[[0, 0, 0], [3, 4, 2]]] * N)
    twice = np.concatenate([start] * (DRAWS // 2), 1)
    np.testing.assert_array_equal(relay(problem, start, 4), relay(problem, twice, 4))


def test_pool_holds_each_creative_once_and_the_best_first() -> None:
    found = every()[np.array([5, 7, 5, 9, 7, 5, 5, 5, 5, 5, 5, 5])][None]
    value = np.array([[3.0, 1.0, 3.0, 2.0, 1.0] + [3.0] * 7], np.float32)
    pool = _distinct(found, value)
    assert pool.shape == (1, POOL, len(SIZES))
    np.testing.assert_array_equal(pool[0, :3], every()[[5, 9, 7]])


def test_scores_count_what_is_not_at_rest() -> None:
    problem = problem_of()
    ascent = problem.on_mean()
    rested = ascent.climb(np.zeros((N, 1, 1, len(SIZES)), np.int64), 16)
    again = problem.on_mean()
    again.climb(rested[:, :, None], 16)
    # One pass over all candidates sees that nothing moves.
    assert again.num_scores == N * sum(SIZES) < ascent.num_scores
