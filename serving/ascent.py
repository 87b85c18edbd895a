"""Coordinate ascent on the creatives of one card, compiled: what a decision spends its time on.

Under one posterior draw the logit of a creative is a sum of main effects, of pairs of content, z_s' W_st z_t, and of
pairs of elements. Choosing a candidate therefore adds a vector to the content weights of every other slot (its *pull*)
and a number to every other candidate (what stands *beside* it), and an ascent keeps the sums of both. A step scores all
candidates of a slot, A F products; one that moves updates the sums, F T F products.

Sums are added up in the order of the loops, one request and one draw at a time, and numba may not reorder them (no
`fastmath`). So a result depends neither on the batch it was part of nor on the machine's vector width, and a decision
can be repeated bit for bit.

Inside, arrays are flat, passed one by one, and places in them unsigned: a slice of an array, or one taken from a tuple,
is counted, which costs as much as a step's products, and a signed place would be looked at whether it is negative.

Shapes: L draws, T slots of the card, X candidates over all slots, F content numbers (filled up with zeros to a multiple
of `LANES`), Z = T F, Y = F X, C context columns, R starts. The content of the candidates lies slot after slot, (F, A)
numbers of each, so that every loop runs over neighbors. `first_T1`: where the candidates of each slot begin, and at
last X. Places count from the first candidate of a slot.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
Places = NDArray[np.uint64]
U = np.uint64

LANES: Final = 4
_0, _1, _2, _3, _4 = U(0), U(1), U(2), U(3), U(4)


class Effects(NamedTuple):
    """What an ascent on a card works on, flat."""

    main: FloatArray
    """(L X) main effects in the context of the request."""
    content: FloatArray
    """(L Y) content of the candidates as each draw sees it."""
    pull: FloatArray
    """(L T F Z): what a content number in a slot adds to the content weights of every slot."""
    pair: FloatArray
    """(X X) effects of pairs of elements, symmetric and zeros within a slot; empty where there are none."""
    first: Places
    """(T + 1,) where the candidates of each slot begin, and at last X."""
    size: np.uint64
    """F"""


def filled_up(array: FloatArray, axis: int) -> FloatArray:
    """Return an array with zeros appended along an axis up to a multiple of `LANES`, its numbers in C order."""
    width = [(0, 0)] * array.ndim
    width[axis] = 0, -array.shape[axis] % LANES
    filled: FloatArray = np.pad(array, width)
    return np.ascontiguousarray(filled)


@njit(cache=True, nogil=True)
def add_products(
    out: FloatArray, o: U, num: U, number: FloatArray, n: U, size: U, row: FloatArray, r: U, wide: U
) -> None:
    """Add the products of `size` numbers and as many rows to `num` numbers of `out`.

    Four rows at a time, or half of the time would go into reading and writing `out`.

    Args:
        out: What is added to, from place o on.
        o: See there.
        num: Numbers of a row.
        number: The numbers, from place n on.
        n: See there.
        size: How many, a multiple of `LANES`.
        row: The rows; the first begins at place r.
        r: See there.
        wide: From the beginning of a row to that of the next.
    """
    for f in range(_0, size, _4):
        a, b, c, d = number[n + f], number[n + f + _1], number[n + f + _2], number[n + f + _3]
        at = r + f * wide
        bt, ct, dt = at + wide, at + _2 * wide, at + _3 * wide
        for x in range(num):
            out[o + x] = out[o + x] + a * row[at + x] + b * row[bt + x] + c * row[ct + x] + d * row[dt + x]


@njit(cache=True, nogil=True)
def main_effects(
    base_LX: FloatArray,
    content_LY: FloatArray,
    by_context_CX: FloatArray,
    weights_CLTF: FloatArray,
    context_C: FloatArray,
    first_T1: Places,
) -> FloatArray:
    """Return the main effects (L, X) of a card's candidates in a context.

    Args:
        base_LX: What they are without context.
        content_LY: Content of the candidates as each draw sees it.
        by_context_CX: Effects of the candidates themselves with each context column.
        weights_CLTF: What each context column adds to the content weights.
        context_C: The context; columns that are 0 cost nothing.
        first_T1: See the module.
    """
    num_draws, num_slots, size = U(base_LX.shape[0]), U(len(first_T1) - 1), U(weights_CLTF.shape[3])
    total, content, by_context = U(base_LX.shape[1]), content_LY.reshape(-1), by_context_CX.reshape(-1)
    main_LX, own, weight = base_LX.copy(), np.zeros(total, np.float32), np.zeros(weights_CLTF[0].size, np.float32)
    main, weights = main_LX.reshape(-1), weights_CLTF.reshape(-1)
    for c in range(U(len(context_C))):
        number = context_C[c]
        if number != 0:
            for i in range(U(len(weight))):
                weight[i] += number * weights[c * U(len(weight)) + i]
            for x in range(total):
                own[x] += number * by_context[c * total + x]
    for m in range(num_draws):
        for x in range(total):
            main[m * total + x] += own[x]
        for t in range(num_slots):
            low, num = first_T1[t], first_T1[t + _1] - first_T1[t]
            place = (m * num_slots + t) * size
            add_products(main, m * total + low, num, weight, place, size, content, size * (m * total + low), num)
    return main_LX


@njit(cache=True, nogil=True)
def _choose(
    content: FloatArray,
    pull: FloatArray,
    first: Places,
    size: U,
    m: U,
    place: Places,
    p: U,
    later_alone: bool,
    room: FloatArray,
) -> None:
    """Write what a creative's choices add to the content weights, and their content, to `room`.

    With `later_alone` a choice pulls on the slots after it only, so that each pair counts once.
    """
    num_slots, total = U(len(first) - 1), first[-1]
    sums = num_slots * size
    for z in range(sums):
        room[z] = np.float32(0)
    for t in range(num_slots):
        low, num = first[t], first[t + _1] - first[t]
        column = size * (m * total + low) + place[p + t]
        for f in range(size):
            room[sums + t * size + f] = content[column + f * num]
        begin = (t + _1) * size if later_alone else _0
        row = (m * num_slots + t) * size * sums + begin
        add_products(room, begin, sums - begin, room, sums + t * size, size, pull, row, sums)


@njit(cache=True, nogil=True)
def value_of(
    main: FloatArray,
    content: FloatArray,
    pull: FloatArray,
    pair: FloatArray,
    first: Places,
    size: U,
    m: U,
    place: Places,
    p: U,
    room: FloatArray,
) -> np.float32:
    """Return the logit under draw m of the creative that stands at place p; `room` as in `room_for`."""
    _choose(content, pull, first, size, m, place, p, True, room)
    num_slots, total = U(len(first) - 1), first[-1]
    sums = num_slots * size
    a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for z in range(size, sums, _4):
        a += room[z] * room[sums + z]
        b += room[z + _1] * room[sums + z + _1]
        c += room[z + _2] * room[sums + z + _2]
        d += room[z + _3] * room[sums + z + _3]
    value = (a + b) + (c + d)
    for t in range(num_slots):
        x = first[t] + place[p + t]
        value += main[m * total + x]
        if len(pair):
            for s in range(t):
                value += pair[x * total + first[s] + place[p + s]]
    return value


@njit(cache=True, nogil=True)
def climb(
    main: FloatArray,
    content: FloatArray,
    pull: FloatArray,
    pair: FloatArray,
    first: Places,
    size: U,
    m: U,
    place: Places,
    p: U,
    room: FloatArray,
    max_sweeps: int,
) -> int:
    """Improve the creative at place p under draw m, slot by slot, until nothing moves; `room` as in `room_for`.

    Returns:
        How many candidates were scored.
    """
    num_slots, total, num_scores, still, t = U(len(first) - 1), first[-1], 0, _0, _0
    sums = num_slots * size
    beside = _2 * sums
    value = beside + total
    moved = value + total
    _choose(content, pull, first, size, m, place, p, False, room)
    for x in range(total):
        room[beside + x] = np.float32(0)
    if len(pair):
        for s in range(num_slots):
            row = (first[s] + place[p + s]) * total
            for x in range(total):
                room[beside + x] += pair[row + x]
    for _ in range(U(max_sweeps) * num_slots):
        low, num = first[t], first[t + _1] - first[t]
        block = size * (m * total + low)
        for a in range(num):
            room[value + a] = main[m * total + low + a] + room[beside + low + a]
        add_products(room, value, num, room, t * size, size, content, block, num)
        best, most = _0, room[value]
        for a in range(_1, num):
            is_more = room[value + a] > most
            most = room[value + a] if is_more else most
            best = U(a) if is_more else best
        num_scores += int(num)
        old = place[p + t]
        if best == old:
            still += _1
        else:
            still = _1
            place[p + t] = best
            for f in range(size):
                room[moved + f] = content[block + f * num + best] - content[block + f * num + old]
            row = (m * num_slots + t) * size * sums
            add_products(room, _0, sums, room, moved, size, pull, row, sums)
            if len(pair):
                come, gone = (low + best) * total, (low + old) * total
                for x in range(total):
                    room[beside + x] += pair[come + x] - pair[gone + x]
        if still == num_slots:
            break
        t = t + _1 if t + _1 < num_slots else _0
    return num_scores


@njit(cache=True, nogil=True)
def room_for(first: Places, size: U) -> FloatArray:
    """Return room to work in.

    Sums of pulls (Z) and content of the choices (Z), what stands beside the candidates (X), scores (X), and how the
    content of a choice has changed (F).
    """
    return np.empty(_2 * (U(len(first) - 1) * size + first[-1]) + size, np.float32)


@njit(cache=True, nogil=True)
def values(
    main: FloatArray,
    content: FloatArray,
    pull: FloatArray,
    pair: FloatArray,
    first: Places,
    size: U,
    first_draw: int,
    place: Places,
    num_creatives: int,
) -> FloatArray:
    """Return the logits (L R) of R creatives for each draw from `first_draw` on; `place` is (L R T), flat."""
    room, num_slots = room_for(first, size), U(len(first) - 1)
    out = np.empty(U(len(place)) // num_slots, np.float32)
    for i in range(U(len(out))):
        m = U(first_draw) + i // U(num_creatives)
        out[i] = value_of(main, content, pull, pair, first, size, m, place, i * num_slots, room)
    return out


@njit(cache=True, nogil=True)
def climbs(
    main: FloatArray,
    content: FloatArray,
    pull: FloatArray,
    pair: FloatArray,
    first: Places,
    size: U,
    first_draw: int,
    place: Places,
    num_creatives: int,
    max_sweeps: int,
) -> int:
    """Improve R creatives for each draw from `first_draw` on; return how many candidates were scored."""
    num_scores, room, num_slots = 0, room_for(first, size), U(len(first) - 1)
    for i in range(U(len(place)) // num_slots):
        m = U(first_draw) + i // U(num_creatives)
        num_scores += climb(main, content, pull, pair, first, size, m, place, i * num_slots, room, max_sweeps)
    return num_scores
