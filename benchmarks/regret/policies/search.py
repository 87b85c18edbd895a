"""Scores and coordinate ascent, for peers whose score of a card is a sum of single and pairwise terms.

Shapes: N requests, M draws, S slots, Q = S (S - 1) / 2 pairs of slots (s < t, s first), A candidates, E elements of a
slot by number, C context numbers.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from benchmarks.regret.policies.base import Facts, Floats32, Ints


def num_draws(facts: Facts) -> int:
    """Return M: 512, or fewer where the tables of so many draws would take more than 64 MB, but at least 64.

    Requests share the draws made after an update. With too few of them a policy can miss the best creative of a small
    world for long: with 64, regret in a world of 216 creatives was .45 to .91 on seeds where 512 gave .13 to .30.
    """
    pairs = facts.num_slots * (facts.num_slots - 1) // 2
    numbers = facts.num_slots * facts.num_elements * (1 + facts.context_size) + pairs * facts.num_elements**2
    return min(512, max(64, 2**24 // numbers))


def linear_scores(
    main_MSE: Floats32, context_MSEC: Floats32, draw_N: Ints, context_NC: Floats32, candidates_NSA: Ints
) -> Floats32:
    """Return (N, S, A): what each candidate adds by itself and with the context, on each request's draw."""
    tables = np.ascontiguousarray(main_MSE), np.ascontiguousarray(context_MSEC)
    scores: Floats32 = _scores(*tables, draw_N, context_NC, candidates_NSA)
    return scores


def best_creatives(score_NSA: Floats32, pair_MQEE: Floats32, draw_N: Ints, candidates_NSA: Ints) -> Ints:
    """Return the (N, S) element numbers that each request's draw likes best.

    From the best elements by themselves, slot after slot takes its best candidate given the others until none moves,
    and again from an arbitrary start that differs between requests; the better end wins.

    Args:
        score_NSA: What each candidate adds by itself, in the same unit as the pairs.
        pair_MQEE: What the earlier slot's element and the later one's add together, by element number.
        draw_N: Index into the draws.
        candidates_NSA: Element numbers.
    """
    chosen: Ints = _search(score_NSA, np.ascontiguousarray(pair_MQEE), draw_N, candidates_NSA)
    return chosen


@njit(cache=True, fastmath=True)
def _scores(main, by_context, draw_N, context_NC, candidates_NSA):  # type: ignore[no-untyped-def]
    num_requests, num_slots, width = candidates_NSA.shape
    out = np.empty((num_requests, num_slots, width), np.float32)
    for i in range(num_requests):
        m = draw_N[i]
        for s in range(num_slots):
            for a in range(width):
                e = candidates_NSA[i, s, a]
                value = main[m, s, e]
                for c in range(context_NC.shape[1]):
                    if context_NC[i, c] != 0:
                        value += by_context[m, s, e, c] * context_NC[i, c]
                out[i, s, a] = value
    return out


@njit(cache=True, fastmath=True)
def _search(score_NSA, pair, draw_N, candidates_NSA):  # type: ignore[no-untyped-def]
    num_requests, num_slots, width = candidates_NSA.shape
    out = np.empty((num_requests, num_slots), np.int64)
    at, best_at = np.empty(num_slots, np.int64), np.empty(num_slots, np.int64)
    index = np.zeros((num_slots, num_slots), np.int64)
    q = 0
    for s in range(num_slots):
        for t in range(s + 1, num_slots):
            index[s, t] = index[t, s] = q
            q += 1
    for i in range(num_requests):
        m, score = draw_N[i], score_NSA[i]
        best = np.float32(-np.inf)
        for start in range(2):
            for s in range(num_slots):
                at[s] = score[s].argmax() if start == 0 else (i + 3 * s) % width
            for _ in range(8):
                moved = False
                for s in range(num_slots):
                    top, place = np.float32(-np.inf), at[s]
                    for a in range(width):
                        e = candidates_NSA[i, s, a]
                        value = score[s, a]
                        for t in range(num_slots):
                            if t < s:
                                value += pair[m, index[s, t], candidates_NSA[i, t, at[t]], e]
                            elif t > s:
                                value += pair[m, index[s, t], e, candidates_NSA[i, t, at[t]]]
                        if value > top:
                            top, place = value, a
                    if place != at[s]:
                        at[s] = place
                        moved = True
                if not moved:
                    break
            value = np.float32(0)
            for s in range(num_slots):
                value += score[s, at[s]]
                for t in range(s + 1, num_slots):
                    value += pair[m, index[s, t], candidates_NSA[i, s, at[s]], candidates_NSA[i, t, at[t]]]
            if value > best:
                best = value
                best_at[:] = at
        for s in range(num_slots):
            out[i, s] = candidates_NSA[i, s, best_at[s]]
    return out
