"""From starts to the creative that each draw believes in: a relay of all draws.

Coordinate ascent is cheap and finds what its start leads to; a second start costs as much as the first. The draws of
one posterior are close to each other, so what one of them finds is a good start for the others: each draw climbs from
a start of its own, the best of what all of them found is put into a pool, and each draw goes on from what it likes best
there. So every draw profits from M starts and pays for one, and some scores of whole creatives.

Shapes: N requests, M draws, T slots of the card, R starts, P creatives in the pool.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from serving.search import Ascent, FloatArray, IntArray, Problem

POOL: Final = 8
"""P: creatives that are handed on; 4 lost .002 to .005 of the reward, 32 gained .001 (8 slots x 50)."""
LAST_SWEEPS: Final = 2
"""Passes over the slots after the exchange."""


def relay(problem: Problem, start_NRT: IntArray, max_sweeps: int) -> IntArray:
    """Return the creative e^(m) that each draw ends at, (N, M, T).

    Args:
        problem: The requests.
        start_NRT: Creatives to start from; draw m has number m modulo R.
        max_sweeps: Passes over the slots before the exchange.
    """
    draws, start_M = problem.on_draws(), np.arange(problem.num_draws) % start_NRT.shape[1]
    return exchange(draws, problem.on_mean(), draws.climb(start_NRT[:, start_M, None], max_sweeps))


def exchange(draws: Ascent, mean: Ascent, found_NMT: IntArray) -> IntArray:
    """Let every draw go on from the best that any of them found, (N, M, T)."""
    pool_NPT = _distinct(found_NMT, mean.values(found_NMT[:, None])[:, 0])
    (num, num_draws, num_slots), num_known = found_NMT.shape, 1 + pool_NPT.shape[1]
    known = np.empty((num, num_draws, num_known, num_slots), np.int64)
    known[:, :, 0] = found_NMT
    known[:, :, 1:] = pool_NPT[:, None]
    return draws.climb(draws.best(known)[:, :, None], LAST_SWEEPS)


def _distinct(found_NMT: IntArray, value_NM: FloatArray) -> IntArray:
    """Return the P best creatives of each request, equal ones as far as possible only once, (N, P, T)."""
    row_N1 = np.arange(len(found_NMT))[:, None]
    order_NM = (-value_NM).argsort(axis=1, kind="stable")
    sorted_NM = value_NM[row_N1, order_NM]
    # Equal creatives have equal values, computed by the same steps.
    repeats_NM = np.zeros(value_NM.shape, np.bool_)
    np.equal(sorted_NM[:, 1:], sorted_NM[:, :-1], out=repeats_NM[:, 1:])
    kept_NP = repeats_NM.argsort(axis=1, kind="stable")[:, :POOL]
    pool_NPT: IntArray = found_NMT[row_N1, order_NM[row_N1, kept_NP]]
    return pool_NPT
