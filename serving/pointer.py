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
from typing import Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

VARIANTS: Final = ("autoregressive", "confident", "parallel")
_CONFIDENT: Final = VARIANTS.index("confident")
_PARALLEL: Final = VARIANTS.index("parallel")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, as the pointer sees it."""

    slots: Sequence[int]
    """Vocabulary index of each of the T slots, -1 for one that it lacks: uniform there."""
    keys: FloatArray
    """(d, X) keys of the candidates, slot after slot."""
    first: IntArray
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
        self._content_Fd = weights["content"]
        self.width = d = self._content_Fd.shape[1]
        # A last row of zeros answers index -1.
        self._element_Ed = np.vstack([weights["element"], np.zeros((1, d), np.float32)])
        self._product_Pd = np.vstack([weights["product"], np.zeros((1, d), np.float32)])
        self._slot_Sd = weights["slot"]
        self._context_CSd = np.ascontiguousarray(weights["context"].transpose(1, 0, 2))
        # (S, d, S, d): what a key chosen in one slot adds to the queries of all slots.
        self._chosen_SdSd = np.ascontiguousarray(weights["chosen"].transpose(0, 2, 1, 3))
        self._hidden = tuple(np.ascontiguousarray(weights[name]) for name in ("hidden_in", "hidden_bias", "hidden_out"))

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
        log_pi_RT: FloatArray = _visit(
            np.array(asked.slots, np.int64),
            asked.first,
            asked.keys,
            _base(self._slot_Sd, self._context_CSd, self._product_Pd[asked.product], asked.context),
            self._chosen_SdSd,
            *self._hidden,
            VARIANTS.index(self.variant),
            uniform_RT,
            inverse,
            place_RT,
        )
        return log_pi_RT


@njit(cache=True, nogil=True)
def _base(slot_Sd: FloatArray, context_CSd: FloatArray, product_d: FloatArray, context_C: FloatArray) -> FloatArray:
    """Return what the query of each slot starts from, (S, d)."""
    base_Sd = slot_Sd + product_d
    for c in range(len(context_C)):
        if context_C[c] != 0:
            for s in range(base_Sd.shape[0]):
                for i in range(base_Sd.shape[1]):
                    base_Sd[s, i] += context_C[c] * context_CSd[c, s, i]
    return base_Sd


@njit(cache=True, nogil=True)
def _logits(
    h_d: FloatArray,
    keys_dX: FloatArray,
    low: int,
    high: int,
    in_dh: FloatArray,
    bias_h: FloatArray,
    out_hd: FloatArray,
    hidden_h: FloatArray,
    query_d: FloatArray,
    logit_X: FloatArray,
) -> None:
    """Write the logits of a slot's candidates, those from `low` to `high`."""
    hidden_h[:] = bias_h
    for i in range(len(h_d)):
        for j in range(len(hidden_h)):
            hidden_h[j] += h_d[i] * in_dh[i, j]
    query_d[:] = h_d
    for j in range(len(hidden_h)):
        bent = math.tanh(hidden_h[j])
        for i in range(len(query_d)):
            query_d[i] += bent * out_hd[j, i]
    scale = np.float32(1.0 / math.sqrt(len(h_d)))
    logit_X[low:high] = 0
    for i in range(len(query_d)):
        number, row_X = scale * query_d[i], keys_dX[i]
        for x in range(low, high):
            logit_X[x] += number * row_X[x]


@njit(cache=True, nogil=True)
def _entropy(logit_X: FloatArray, low: int, high: int) -> np.float32:
    """Return the entropy of a slot's candidates, relative to the log of their number."""
    top = logit_X[low:high].max()
    total, weighted = np.float32(0), np.float32(0)
    for x in range(low, high):
        share = math.exp(logit_X[x] - top)
        total += share
        weighted += share * (logit_X[x] - top)
    return np.float32((math.log(total) - weighted / total) / math.log(max(2, high - low)))


@njit(cache=True, nogil=True)
def _visit(
    slot_T: IntArray,
    first_T1: IntArray,
    keys_dX: FloatArray,
    base_Sd: FloatArray,
    chosen_SdSd: FloatArray,
    in_dh: FloatArray,
    bias_h: FloatArray,
    out_hd: FloatArray,
    variant: int,
    uniform_RT: NDArray[np.float64],
    inverse: np.float32,
    place_RT: IntArray,
) -> FloatArray:
    """Fill the slots of R creatives, or with no uniform numbers look at those that are given.

    Returns:
        (R, T) log-probability of each choice at temperature 1.
    """
    num_creatives, num_slots = place_RT.shape
    num_known, width = base_Sd.shape
    hidden_h, query_d = np.empty(len(bias_h), np.float32), np.empty(width, np.float32)
    logit_X, share_X = np.zeros(keys_dX.shape[1], np.float32), np.empty(keys_dX.shape[1], np.float64)
    # In the order of the vocabulary, unknown slots last; surest first in the variant "confident".
    rank_T = np.empty(num_slots, np.float64)
    for t in range(num_slots):
        slot = slot_T[t]
        rank_T[t] = slot if slot >= 0 else num_known + t
    order_T = np.argsort(rank_T, kind="mergesort")
    if variant == _CONFIDENT:
        for t in range(num_slots):
            slot, low, high = slot_T[t], first_T1[t], first_T1[t + 1]
            if slot >= 0:
                _logits(base_Sd[slot], keys_dX, low, high, in_dh, bias_h, out_hd, hidden_h, query_d, logit_X)
                rank_T[t] = _entropy(logit_X, low, high)
            else:
                rank_T[t] = np.inf
        order_T = order_T[np.argsort(rank_T[order_T], kind="mergesort")]
    log_pi_RT = np.empty(place_RT.shape, np.float32)
    h_Sd = np.empty_like(base_Sd)
    for r in range(num_creatives):
        h_Sd[:] = base_Sd
        for turn in range(num_slots):
            t = order_T[turn]
            slot, low, high = slot_T[t], first_T1[t], first_T1[t + 1]
            if slot >= 0:
                _logits(h_Sd[slot], keys_dX, low, high, in_dh, bias_h, out_hd, hidden_h, query_d, logit_X)
            top = logit_X[low:high].max()
            if len(uniform_RT):
                total = 0.0
                for x in range(low, high):
                    total += math.exp((logit_X[x] - top) * inverse)
                    share_X[x] = total
                # The first place beyond the threshold: there is one, as the numbers are below 1.
                threshold, x = uniform_RT[r, t] * total, low
                while share_X[x] <= threshold:
                    x += 1
                place_RT[r, t] = x - low
            else:
                total = 0.0
                for x in range(low, high):
                    total += math.exp(logit_X[x] - top)
                log_pi_RT[r, t] = logit_X[low + place_RT[r, t]] - top - math.log(total)
            if slot >= 0 and variant != _PARALLEL and turn + 1 < num_slots:
                x = low + place_RT[r, t]
                for i in range(width):
                    number = keys_dX[i, x]
                    for s in range(num_known):
                        for j in range(width):
                            h_Sd[s, j] += number * chosen_SdSd[slot, i, s, j]
    return log_pi_RT
