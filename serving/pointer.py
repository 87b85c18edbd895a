"""The generator: a pointer over the slots of a card, compiled. `learner.generator` is the same in torch.

    k(e)   = content(e) W + embedding(e)                           key of an element; unseen ones have content alone
    h_s    = slot_s + context V_s + product + sum_{t before s} k(e_t) U_ts
    q_s    = h_s + tanh(h_s A + a) B                               query of slot s, given what was chosen before it
    log pi(e | context, product) = sum_s log softmax_{candidates of s}(q_s . k(e) / sqrt(d))[e_s]

Which slots come before a slot is the variant, see there. Slots are filled in an order that does not depend on the one
in which a request names them, because that is how the weights were trained. A test holds the twins to 1e-5.

Shapes: R proposals, T slots of the request, S slots of the vocabulary, X candidates over all slots, F content numbers,
C context columns, P products, E elements, d width, h width of the hidden layer. Index -1 is "not in the vocabulary".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from serving.ascent import U, add_products, filled_up

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

VARIANTS: Final = ("autoregressive", "confident", "parallel")
_CONFIDENT: Final = VARIANTS.index("confident")
_PARALLEL: Final = VARIANTS.index("parallel")
_0, _1 = U(0), U(1)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, as the pointer sees it."""

    slots: Sequence[int]
    """Vocabulary index of each of the T slots, -1 for one that it lacks: uniform there."""
    keys: FloatArray
    """(d, X) keys of the candidates, slot after slot."""
    first: NDArray[np.uint64]
    """(T + 1,) where the candidates of each slot begin, and at last X."""
    product: int
    """Vocabulary index of the product, -1 if it lacks it."""
    context: FloatArray
    """(C,)"""


class Pointer:
    """Proposes creatives and knows their exact log-probabilities."""

    def __init__(self, weights: Mapping[str, FloatArray], variant: str = "autoregressive") -> None:
        """Take the weights, named as in a snapshot without the prefix `generator.`.

        Raises:
            ValueError: If there is no such variant.
        """
        if variant not in VARIANTS:
            raise ValueError(f"variant of the generator is {variant!r}; expected one of {', '.join(VARIANTS)}")
        self.variant = variant
        self._scale = np.float32(weights["content"].shape[1] ** -0.5)
        self._content_Fd = filled_up(weights["content"], 1)
        self.width = d = self._content_Fd.shape[1]
        # A last row of zeros answers index -1.
        self._element_Ed = np.vstack([filled_up(weights["element"], 1), np.zeros((1, d), np.float32)])
        self._product_Pd = np.vstack([filled_up(weights["product"], 1), np.zeros((1, d), np.float32)])
        self._slot_Sd = filled_up(weights["slot"], 1)
        self._context_SdC = filled_up(weights["context"].transpose(0, 2, 1), 1)
        self._chosen = filled_up(filled_up(weights["chosen"].transpose(0, 2, 1, 3), 1), 3).ravel()
        self._hidden_in = filled_up(filled_up(weights["hidden_in"], 0), 1).ravel()
        self._hidden_bias = filled_up(weights["hidden_bias"], 0)
        self._hidden_out = filled_up(filled_up(weights["hidden_out"], 0), 1).ravel()

    def keys(self, content_XF: FloatArray, element_X: IntArray) -> FloatArray:
        """Return the (d, X) keys of elements."""
        return np.ascontiguousarray((content_XF @ self._content_Fd + self._element_Ed[element_X]).T)

    def propose(self, asked: Asked, uniform_RT: NDArray[np.float64], temperature: float = 1.0) -> IntArray:
        """Return R creatives, (R, T) places among the candidates.

        Args:
            asked: The request.
            uniform_RT: Numbers in [0, 1) that decide: the same numbers, the same proposals.
            temperature: Above 1 the proposals differ more than the generator's own samples, below 1 less; > 0.
        """
        place_RT = np.zeros(uniform_RT.shape, np.int64)
        self._visit(asked, place_RT, uniform_RT, np.float32(1.0 / temperature))
        return place_RT

    def log_probabilities(self, asked: Asked, place_RT: IntArray) -> FloatArray:
        """Return the (R, T) log-probability of each choice, given the choices in the slots before it."""
        return self._visit(asked, np.ascontiguousarray(place_RT), np.empty((0, 0)), np.float32(1.0))

    def _visit(
        self, asked: Asked, place_RT: IntArray, uniform_RT: NDArray[np.float64], inverse: np.float32
    ) -> FloatArray:
        base_Sd = self._slot_Sd + self._context_SdC @ asked.context + self._product_Pd[asked.product]
        weights = _Weights(
            np.array(asked.slots, np.int64),
            asked.first,
            asked.keys.ravel(),
            base_Sd.ravel(),
            self._chosen,
            self._hidden_in,
            self._hidden_bias,
            self._hidden_out,
            self._scale,
        )
        log_pi_RT: FloatArray = _visit(weights, VARIANTS.index(self.variant), uniform_RT, inverse, place_RT)
        return log_pi_RT


class _Weights(NamedTuple):
    """What the compiled pointer looks at, flat; d and h are multiples of `LANES`, filled up with zeros."""

    slot: NDArray[np.int64]
    """(T,)"""
    first: NDArray[np.uint64]
    """(T + 1,)"""
    keys: FloatArray
    """(d X)"""
    base: FloatArray
    """(S d): what the query of each slot starts from."""
    chosen: FloatArray
    """(S d S d): what a key chosen in one slot adds to the queries of all slots."""
    hidden_in: FloatArray
    """(d h)"""
    hidden_bias: FloatArray
    """(h,)"""
    hidden_out: FloatArray
    """(h d)"""
    scale: np.float32
    """1 / sqrt(d)"""


class _Room(NamedTuple):
    """Arrays to work in."""

    h: FloatArray
    """(S d): the queries, as far as choices are made."""
    hidden: FloatArray
    """(h,)"""
    query: FloatArray
    """(d,)"""
    logit: FloatArray
    """(X,)"""
    share: NDArray[np.float64]
    """(X,) sums of probabilities."""


@njit(cache=True, nogil=True)
def _bend(number: FloatArray) -> None:
    """Put tanh in place of numbers, to 3e-7: a quotient of polynomials, which takes a tenth of the library's time."""
    for i in range(U(len(number))):
        x = min(max(number[i], np.float32(-7.9)), np.float32(7.9))
        y = x * x
        above = np.float32(-2.76076847742355e-16) * y + np.float32(2.00018790482477e-13)
        above = above * y + np.float32(-8.60467152213735e-11)
        above = above * y + np.float32(5.12229709037114e-08)
        above = above * y + np.float32(1.48572235717979e-05)
        above = above * y + np.float32(6.37261928875436e-04)
        above = above * y + np.float32(4.89352455891786e-03)
        below = np.float32(1.19825839466702e-06) * y + np.float32(1.18534705686654e-04)
        below = below * y + np.float32(2.26843463243900e-03)
        below = below * y + np.float32(4.89352518554385e-03)
        number[i] = x * above / below


@njit(cache=True, nogil=True)
def _look(weights: _Weights, t: U, room: _Room) -> None:
    """Write the logits of a slot's candidates; of a slot that the vocabulary lacks all are 0."""
    low, num, total = weights.first[t], weights.first[t + _1] - weights.first[t], weights.first[-1]
    room.logit[low : low + num] = 0
    if weights.slot[t] < 0:
        return
    d, h, slot = U(len(room.query)), U(len(room.hidden)), U(weights.slot[t])
    room.hidden[:] = weights.hidden_bias
    add_products(room.hidden, _0, h, room.h, slot * d, d, weights.hidden_in, _0, h)
    _bend(room.hidden)
    for i in range(d):
        room.query[i] = room.h[slot * d + i]
    add_products(room.query, _0, d, room.hidden, _0, h, weights.hidden_out, _0, d)
    for i in range(d):
        room.query[i] *= weights.scale
    add_products(room.logit, low, num, room.query, _0, d, weights.keys, low, total)


@njit(cache=True, nogil=True)
def _order(weights: _Weights, room: _Room, variant: int) -> NDArray[np.int64]:
    """Return the order in which the slots are filled; `room.h` holds what the queries start from."""
    num_slots = len(weights.slot)
    # That of the vocabulary, unknown slots last; in the variant "confident" the surest of the known first.
    rank_T = np.empty(num_slots, np.float64)
    for t in range(num_slots):
        rank_T[t] = weights.slot[t] if weights.slot[t] >= 0 else np.inf
    order_T = np.argsort(rank_T, kind="mergesort")
    if variant != _CONFIDENT:
        return order_T
    for t in range(num_slots):
        if weights.slot[t] >= 0:
            _look(weights, U(t), room)
            low, high = weights.first[t], weights.first[t + 1]
            top, total, weighted = room.logit[low:high].max(), np.float32(0), np.float32(0)
            for x in range(low, high):
                share = math.exp(room.logit[x] - top)
                total += share
                weighted += share * (room.logit[x] - top)
            rank_T[t] = np.float32((math.log(total) - weighted / total) / math.log(max(2.0, float(high - low))))
    return order_T[np.argsort(rank_T[order_T], kind="mergesort")]


@njit(cache=True, nogil=True)
def _visit(
    weights: _Weights,
    variant: int,
    uniform_RT: NDArray[np.float64],
    inverse: np.float32,
    place_RT: NDArray[np.int64],
) -> FloatArray:
    """Fill the slots of R creatives, or with no uniform numbers look at those that are given.

    Returns:
        (R, T) log-probability of each choice at temperature 1; nothing of use where creatives are filled.
    """
    num_creatives, num_slots = place_RT.shape
    d = U(len(weights.hidden_out) // len(weights.hidden_bias))
    sums, total = U(len(weights.base)), weights.first[-1]
    room = _Room(
        weights.base.copy(),
        np.empty(len(weights.hidden_bias), np.float32),
        np.empty(d, np.float32),
        np.empty(total, np.float32),
        np.empty(total, np.float64),
    )
    order_T = _order(weights, room, variant)
    out_RT, key = np.empty(place_RT.shape, np.float32), np.empty(d, np.float32)
    for r in range(num_creatives):
        room.h[:] = weights.base
        for turn in range(num_slots):
            t = order_T[turn]
            low, high = weights.first[t], weights.first[t + 1]
            _look(weights, U(t), room)
            top = room.logit[low]
            for x in range(low + _1, high):
                top = max(top, room.logit[x])
            summed = 0.0
            for x in range(low, high):
                summed += math.exp((room.logit[x] - top) * inverse)
                room.share[x] = summed
            if len(uniform_RT):
                # The first place beyond the threshold: there is one, as the numbers are below 1.
                threshold, x = uniform_RT[r, t] * summed, low
                while room.share[x] <= threshold:
                    x += _1
                place_RT[r, t] = np.int64(x - low)
            else:
                out_RT[r, t] = room.logit[low + U(place_RT[r, t])] - top - math.log(summed)
            if weights.slot[t] >= 0 and variant != _PARALLEL and turn + 1 < num_slots:
                x = low + U(place_RT[r, t])
                for i in range(d):
                    key[i] = weights.keys[i * total + x]
                row = U(weights.slot[t]) * d * sums
                add_products(room.h, _0, sums, key, _0, d, weights.chosen, row, sums)
    return out_RT
