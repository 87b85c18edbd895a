"""From starts to the creative that each draw believes in: a relay of all draws.

Coordinate ascent is cheap and finds what its start leads to; a second start costs as much as the first. The draws of
one posterior are close to each other, so what one of them finds is a good start for the others: each draw climbs from
a start of its own, the best of what all of them found is put into a pool, and each draw goes on from what it likes best
there. So every draw profits from M starts and pays for one, and some scores of whole creatives.

Shapes: L = M + 1 draws with the posterior mean last, T slots of the card, R starts, P creatives in the pool; the others
as in `serving.ascent`.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

from serving.ascent import FloatArray, IntArray, Places, U, climb, room_for, value_of
from serving.search import Problem

POOL: Final = 8
"""P: creatives that are handed on; 4 lost .002 to .005 of the reward, 32 gained .001 (8 slots x 50)."""
LAST_SWEEPS: Final = 2
"""Passes over the slots after the exchange."""


def relay(problem: Problem, start_RT: IntArray, max_sweeps: int) -> tuple[IntArray, int]:
    """Return the creative e^(m) that each draw ends at, (M, T), and how many candidates were scored.

    Args:
        problem: The request.
        start_RT: Creatives to start from; draw m has number m modulo R.
        max_sweeps: Passes over the slots before the exchange.
    """
    place_MT = start_RT[np.arange(problem.num_draws) % len(start_RT)].astype(np.uint64)
    num_scores: int = _relay(*problem.effects, place_MT, max_sweeps)
    return place_MT.astype(np.int64), num_scores


@njit(cache=True, nogil=True)
def _relay(
    main: FloatArray,
    content: FloatArray,
    pull: FloatArray,
    pair: FloatArray,
    first: Places,
    size: U,
    place_MT: Places,
    max_sweeps: int,
) -> int:
    """Improve the creatives in place."""
    num_draws, num_slots = U(place_MT.shape[0]), U(place_MT.shape[1])
    place, score_M, room, num_scores = place_MT.reshape(-1), np.empty(num_draws, np.float32), room_for(first, size), 0
    for draw in range(num_draws):
        m, p = U(draw), U(draw) * num_slots
        num_scores += climb(main, content, pull, pair, first, size, m, place, p, room, max_sweeps)
        score_M[m] = value_of(main, content, pull, pair, first, size, num_draws, place, p, room)
    pool_PT = _pool(place_MT, score_M)
    pool = pool_PT.reshape(-1)
    num_scores += len(place) * (2 + len(pool_PT))
    for draw in range(num_draws):
        m, p = U(draw), U(draw) * num_slots
        most = value_of(main, content, pull, pair, first, size, m, place, p, room)
        for start in range(U(0), U(len(pool)), num_slots):
            q = U(start)
            score = value_of(main, content, pull, pair, first, size, m, pool, q, room)
            if score > most:
                most = score
                for t in range(num_slots):
                    place[p + t] = pool[q + t]
        num_scores += climb(main, content, pull, pair, first, size, m, place, p, room, LAST_SWEEPS)
    return num_scores


@njit(cache=True, nogil=True)
def _pool(place_MT: Places, value_M: FloatArray) -> Places:
    """Return the best creatives, each once and at most `POOL`, the best first, (P, T)."""
    pool_PT, count = np.empty((POOL, place_MT.shape[1]), np.uint64), 0
    for m in np.argsort(-value_M, kind="mergesort"):
        is_new = True
        for p in range(count):
            is_new &= (pool_PT[p] != place_MT[m]).any()
        if is_new:
            pool_PT[count] = place_MT[m]
            count += 1
            if count == POOL:
                break
    return pool_PT[:count]
