"""Coordinate ascent on the creatives of one card, compiled: what a decision spends its time on.

Under one posterior draw the logit of a creative is a sum of main effects, of pairs of content, z_s' W_st z_t, and of
pairs of elements. Choosing a candidate therefore adds a vector to the content weights of every other slot (its *pull*)
and a number to every other candidate (what stands *beside* it), and an ascent keeps the sums of both. A step scores all
candidates of a slot, A F products; one that moves updates the sums, F T F products.

Sums are added up in the order of the loops, one request and one draw at a time, and numba may not reorder them (no
`fastmath`). So a result depends neither on the batch it was part of nor on the machine's vector width, and a decision
can be repeated bit for bit.

Shapes: L draws, T slots of the card, X candidates over all slots, F content numbers, Z = T F, C context columns, R
starts. `first_T1`: where the candidates of each slot begin, and at last X. Places count from the first candidate of
a slot.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


@njit(cache=True, nogil=True)
def main_effects(
    base_LX: FloatArray,
    content_LFX: FloatArray,
    by_context_CX: FloatArray,
    weights_CLTF: FloatArray,
    context_C: FloatArray,
    first_T1: IntArray,
) -> FloatArray:
    """Return the main effects (L, X) of a card's candidates in a context.

    Args:
        base_LX: What they are without context.
        content_LFX: Content of the candidates as each draw sees it.
        by_context_CX: Effects of the candidates themselves with each context column.
        weights_CLTF: What each context column adds to the content weights.
        context_C: The context; columns that are 0 cost nothing.
        first_T1: See the module.
    """
    num_draws, size, total = content_LFX.shape
    num_slots = len(first_T1) - 1
    weight_LTF = np.zeros((num_draws, num_slots, size), np.float32)
    own_X = np.zeros(total, np.float32)
    for c in range(len(context_C)):
        number = context_C[c]
        if number != 0:
            for m in range(num_draws):
                for t in range(num_slots):
                    for f in range(size):
                        weight_LTF[m, t, f] += number * weights_CLTF[c, m, t, f]
            for x in range(total):
                own_X[x] += number * by_context_CX[c, x]
    main_LX = np.empty((num_draws, total), np.float32)
    for m in range(num_draws):
        for x in range(total):
            main_LX[m, x] = base_LX[m, x] + own_X[x]
        for t in range(num_slots):
            for f in range(size):
                weight = weight_LTF[m, t, f]
                for x in range(first_T1[t], first_T1[t + 1]):
                    main_LX[m, x] += weight * content_LFX[m, f, x]
    return main_LX


@njit(cache=True, nogil=True)
def _add_pulls(
    total_Z: FloatArray, place_T: IntArray, content_FX: FloatArray, pull_TFZ: FloatArray, first_T1: IntArray
) -> None:
    """Set the sum of what a creative's choices add to the content weights of all slots."""
    total_Z[:] = 0
    for t in range(len(place_T)):
        x = first_T1[t] + place_T[t]
        for f in range(len(content_FX)):
            number = content_FX[f, x]
            for z in range(len(total_Z)):
                total_Z[z] += number * pull_TFZ[t, f, z]


@njit(cache=True, nogil=True)
def value_of(
    place_T: IntArray,
    main_X: FloatArray,
    content_FX: FloatArray,
    pull_TFZ: FloatArray,
    pair_XX: FloatArray,
    first_T1: IntArray,
    total_Z: FloatArray,
) -> np.float32:
    """Return the creative's logit under a draw; `total_Z` is room to work in."""
    _add_pulls(total_Z, place_T, content_FX, pull_TFZ, first_T1)
    size, value = len(content_FX), np.float32(0)
    for t in range(len(place_T)):
        x = first_T1[t] + place_T[t]
        pulled = np.float32(0)
        for f in range(size):
            pulled += total_Z[t * size + f] * content_FX[f, x]
        # Pulls count each pair twice.
        value += main_X[x] + np.float32(0.5) * pulled
        if len(pair_XX):
            for s in range(t):
                value += pair_XX[x, first_T1[s] + place_T[s]]
    return value


@njit(cache=True, nogil=True)
def climb_one(
    place_T: IntArray,
    main_X: FloatArray,
    content_FX: FloatArray,
    pull_TFZ: FloatArray,
    pair_XX: FloatArray,
    first_T1: IntArray,
    max_sweeps: int,
    total_Z: FloatArray,
    beside_X: FloatArray,
    value_X: FloatArray,
) -> int:
    """Improve a creative in place until nothing moves; return how many candidates were scored."""
    num_slots, size, num_scores, still = len(place_T), len(content_FX), 0, 0
    _add_pulls(total_Z, place_T, content_FX, pull_TFZ, first_T1)
    beside_X[:] = 0
    if len(pair_XX):
        for t in range(num_slots):
            row_X = pair_XX[first_T1[t] + place_T[t]]
            for x in range(len(beside_X)):
                beside_X[x] += row_X[x]
    for step in range(max_sweeps * num_slots):
        t = step % num_slots
        low, high = first_T1[t], first_T1[t + 1]
        for x in range(low, high):
            value_X[x] = main_X[x] + beside_X[x]
        for f in range(size):
            weight, row_X = total_Z[t * size + f], content_FX[f]
            for x in range(low, high):
                value_X[x] += weight * row_X[x]
        best = low
        for x in range(low + 1, high):
            if value_X[x] > value_X[best]:
                best = x
        num_scores += high - low
        old = low + place_T[t]
        if best == old:
            still += 1
            if still == num_slots:
                break
            continue
        still = 1
        place_T[t] = best - low
        for f in range(size):
            moved = content_FX[f, best] - content_FX[f, old]
            for z in range(len(total_Z)):
                total_Z[z] += moved * pull_TFZ[t, f, z]
        if len(pair_XX):
            come_X, gone_X = pair_XX[best], pair_XX[old]
            for x in range(len(beside_X)):
                beside_X[x] += come_X[x] - gone_X[x]
    return num_scores


@njit(cache=True, nogil=True)
def values(
    place_LRT: IntArray,
    main_LX: FloatArray,
    content_LFX: FloatArray,
    pull_LTFZ: FloatArray,
    pair_XX: FloatArray,
    first_T1: IntArray,
) -> FloatArray:
    """Return the logits (L, R) of R creatives for each draw."""
    num_draws, num_creatives, _ = place_LRT.shape
    out_LR = np.empty((num_draws, num_creatives), np.float32)
    total_Z = np.empty(pull_LTFZ.shape[3], np.float32)
    for m in range(num_draws):
        for r in range(num_creatives):
            out_LR[m, r] = value_of(
                place_LRT[m, r], main_LX[m], content_LFX[m], pull_LTFZ[m], pair_XX, first_T1, total_Z
            )
    return out_LR


@njit(cache=True, nogil=True)
def climb(
    place_LRT: IntArray,
    main_LX: FloatArray,
    content_LFX: FloatArray,
    pull_LTFZ: FloatArray,
    pair_XX: FloatArray,
    first_T1: IntArray,
    max_sweeps: int,
) -> int:
    """Improve R creatives for each draw in place; return how many candidates were scored."""
    num_scores = 0
    total_Z = np.empty(pull_LTFZ.shape[3], np.float32)
    beside_X, value_X = np.empty(main_LX.shape[1], np.float32), np.empty(main_LX.shape[1], np.float32)
    for m in range(place_LRT.shape[0]):
        for r in range(place_LRT.shape[1]):
            num_scores += climb_one(
                place_LRT[m, r],
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
    return num_scores
