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

from serving.ascent import FloatArray, IntArray, climb_one, value_of
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
    card = problem.card
    place_MT = start_RT[np.arange(problem.num_draws) % len(start_RT)]
    num_scores: int = _relay(place_MT, problem.main, card.content, card.weights.pull, card.pair, card.first, max_sweeps)
    return place_MT, num_scores


@njit(cache=True, nogil=True)
def _relay(
    place_MT: IntArray,
    main_LX: FloatArray,
    content_LFX: FloatArray,
    pull_LTFZ: FloatArray,
    pair_XX: FloatArray,
    first_T1: IntArray,
    max_sweeps: int,
) -> int:
    """Improve the creatives in place."""
    num_draws, num_slots, num_scores = place_MT.shape[0], place_MT.shape[1], 0
    total_Z, value_M = np.empty(pull_LTFZ.shape[3], np.float32), np.empty(num_draws, np.float32)
    beside_X, value_X = np.empty(main_LX.shape[1], np.float32), np.empty(main_LX.shape[1], np.float32)
    for m in range(num_draws):
        num_scores += climb_one(
            place_MT[m],
            main_LX[m],
            content_LFX[m],
            pull_LTFZ[m],
            pair_XX,
            first_T1,
            max_sweeps,
            total_Z,
            beside_X,
            value_X,
        )
        value_M[m] = value_of(place_MT[m], main_LX[-1], content_LFX[-1], pull_LTFZ[-1], pair_XX, first_T1, total_Z)
    pool_PT = _pool(place_MT, value_M)
    num_scores += num_draws * num_slots * (1 + len(pool_PT))
    for m in range(num_draws):
        main_X, content_FX, pull_TFZ = main_LX[m], content_LFX[m], pull_LTFZ[m]
        best, most = -1, value_of(place_MT[m], main_X, content_FX, pull_TFZ, pair_XX, first_T1, total_Z)
        for p in range(len(pool_PT)):
            value = value_of(pool_PT[p], main_X, content_FX, pull_TFZ, pair_XX, first_T1, total_Z)
            if value > most:
                best, most = p, value
        if best >= 0:
            place_MT[m] = pool_PT[best]
        num_scores += climb_one(
            place_MT[m], main_X, content_FX, pull_TFZ, pair_XX, first_T1, LAST_SWEEPS, total_Z, beside_X, value_X
        )
    return num_scores


@njit(cache=True, nogil=True)
def _pool(place_MT: IntArray, value_M: FloatArray) -> IntArray:
    """Return the best creatives, each once and at most `POOL`, the best first, (P, T)."""
    pool_PT, count = np.empty((POOL, place_MT.shape[1]), np.int64), 0
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
