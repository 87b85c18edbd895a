"""The generator: a pointer over the slots of a card, in numpy. `learner.generator` is the same in torch.

    k(e)   = content(e) W + embedding(e)                           key of an element; unseen ones have content alone
    h_s    = slot_s + context V_s + product + sum_{t before s} k(e_t) U_ts
    q_s    = h_s + tanh(h_s A + a) B                               query of slot s, given what was chosen before it
    log pi(e | context, product) = sum_s log softmax_{candidates of s}(q_s . k(e) / sqrt(d))[e_s]

Which slots come before a slot is the variant, see there. Slots are filled in an order that does not depend on the one
in which a request names them, because that is how the weights were trained. A test holds the twins to 1e-5.

Shapes: N requests of one shape, R proposals, T slots of the requests, S slots of the vocabulary, A candidates of a
slot, F content numbers, C context columns, P products, E elements, d width. Index -1 is "not in the vocabulary".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

VARIANTS: Final = ("autoregressive", "confident", "parallel")


@dataclass(frozen=True, slots=True)
class Asked:
    """N requests of one shape, as the pointer sees them."""

    slots: Sequence[int]
    """Vocabulary index of each of the T slots, -1 for one that it lacks: uniform there."""
    keys: Sequence[FloatArray]
    """For each slot the (N, A, d) keys of its candidates."""
    product: IntArray
    """(N,): vocabulary index of each product."""
    context: FloatArray
    """(N, C)"""


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
        self.content_Fd = weights["content"]
        self.width = d = self.content_Fd.shape[1]
        # A last row of zeros answers index -1.
        self.element_Ed = np.vstack([weights["element"], np.zeros((1, d), np.float32)])
        self.product_Pd = np.vstack([weights["product"], np.zeros((1, d), np.float32)])
        self.slot_Sd = weights["slot"]
        self.context_SdC = np.ascontiguousarray(weights["context"].transpose(0, 2, 1))
        # (S, d, S d): what a key chosen in one slot adds to the queries of all slots, as one matrix.
        chosen_SdSd = np.ascontiguousarray(weights["chosen"].transpose(0, 2, 1, 3))
        self.chosen_SdX = chosen_SdSd.reshape(*self.slot_Sd.shape, self.slot_Sd.size)
        self.hidden = weights["hidden_in"], weights["hidden_bias"], weights["hidden_out"]

    def keys(self, content_AF: FloatArray, element_A: IntArray) -> FloatArray:
        """Return the (A, d) keys of elements."""
        return content_AF @ self.content_Fd + self.element_Ed[element_A]

    def propose(self, asked: Asked, uniform_NRT: NDArray[np.float64], temperature: float = 1.0) -> IntArray:
        """Return R creatives for each of N requests as (N, R, T) positions among the candidates.

        Args:
            asked: The requests.
            uniform_NRT: Numbers in [0, 1) that decide: the same numbers, the same proposals.
            temperature: Above 1 the proposals differ more than the generator's own samples, below 1 less; > 0.
        """
        chosen_NRT, inverse = np.zeros(uniform_NRT.shape, np.int64), np.float32(1.0 / temperature)
        for visit in self._visits(asked, chosen_NRT):
            logits = visit.logits
            logits -= logits.max(-1, keepdims=True)
            logits *= inverse
            cumulative = np.add.accumulate(np.exp(logits, out=logits), -1, dtype=np.float64)
            threshold = uniform_NRT[visit.rows, :, visit.place, None] * cumulative[..., -1:]
            # The first place beyond the threshold: there is one, as the numbers are below 1.
            chosen_NRT[visit.rows, :, visit.place] = (cumulative > threshold).argmax(-1)
        return chosen_NRT

    def log_probabilities(self, asked: Asked, chosen_NRT: IntArray) -> FloatArray:
        """Return the (N, R, T) log-probability of each choice, given the choices in the slots before it."""
        out = np.zeros(chosen_NRT.shape, np.float32)
        for visit in self._visits(asked, chosen_NRT):
            chosen = chosen_NRT[visit.rows, :, visit.place, None]
            log_pi = _log_softmax(visit.logits)
            out[visit.rows, :, visit.place] = np.take_along_axis(log_pi, chosen, -1)[..., 0]
        return out

    def _visits(self, asked: Asked, chosen_NRT: IntArray) -> Iterator[Visit]:
        """Go through the slots of each request in its order; a choice counts as made once the visit is over."""
        base_NSd = self._base(asked)
        h_NRSd = np.repeat(base_NSd[:, None], chosen_NRT.shape[1], 1)
        turns = list(self._turns(asked, base_NSd))
        for number, (place, rows) in enumerate(turns, 1):
            slot, key_NAd = asked.slots[place], asked.keys[place][rows]
            if slot < 0:
                shape = len(key_NAd), chosen_NRT.shape[1], key_NAd.shape[1]
                yield Visit(place, rows, np.zeros(shape, np.float32))
                continue
            h_NRd = h_NRSd[rows, :, slot]
            yield Visit(place, rows, self._logits(h_NRd, key_NAd))
            if self.variant != "parallel" and number < len(turns):
                first_N1 = np.arange(len(key_NAd))[:, None]
                pull = key_NAd[first_N1, chosen_NRT[rows, :, place]] @ self.chosen_SdX[slot]
                h_NRSd[rows] += pull.reshape(*h_NRd.shape[:2], *base_NSd.shape[1:])

    def _turns(self, asked: Asked, base_NSd: FloatArray) -> Iterator[tuple[int, IntArray | slice]]:
        """Yield a place and the requests that fill it next; in a fixed order that is all of them."""
        slots = asked.slots
        if self.variant != "confident":
            for place in sorted(range(len(slots)), key=lambda place: (slots[place] < 0, slots[place], place)):
                yield place, slice(None)
            return
        for place_N in self._surest_first(asked, base_NSd).T:
            for place in np.unique(place_N).tolist():
                yield place, np.flatnonzero(place_N == place)

    def _surest_first(self, asked: Asked, base_NSd: FloatArray) -> IntArray:
        """Return the places of each request's slots, those first in which the generator is surest, (N, T)."""
        num_requests, slots = len(base_NSd), asked.slots
        # In the order of the vocabulary first, so that equal ones come out as in torch; unknown slots last.
        rank_NT = np.full((num_requests, len(slots)), np.inf, np.float32)
        for place, slot in enumerate(slots):
            if slot >= 0:
                logits = self._logits(base_NSd[:, None, slot], asked.keys[place])[:, 0]
                log_pi = _log_softmax(logits)
                rank_NT[:, place] = -(np.exp(log_pi) * log_pi).sum(-1) / np.log(max(2, logits.shape[1]))
        by_slot = np.array(sorted(range(len(slots)), key=lambda place: slots[place]))
        order_NT: IntArray = by_slot[np.argsort(rank_NT[:, by_slot], axis=1, kind="stable")]
        return order_NT

    def _base(self, asked: Asked) -> FloatArray:
        """Return what a slot's query starts from, (N, S, d)."""
        # One small product for each request, not one for all: its rounding must not depend on who else is asking.
        context_NSd: FloatArray = np.matmul(self.context_SdC, asked.context[:, None, :, None])[..., 0]
        return self.slot_Sd + context_NSd + self.product_Pd[asked.product][:, None, :]

    def _logits(self, h_NRd: FloatArray, key_NAd: FloatArray) -> FloatArray:
        hidden_in, hidden_bias, hidden_out = self.hidden
        query_NRd = h_NRd + np.tanh(h_NRd @ hidden_in + hidden_bias) @ hidden_out
        logits: FloatArray = np.matmul(query_NRd, key_NAd.transpose(0, 2, 1)) * np.float32(self.width**-0.5)
        return logits


@dataclass(frozen=True, slots=True)
class Visit:
    """The choice of some requests in one slot."""

    place: int
    """Which of the T slots."""
    rows: IntArray | slice
    """Which of the N requests."""
    logits: FloatArray
    """(rows, R, A)"""


def _log_softmax(logits: FloatArray) -> FloatArray:
    top = logits.max(-1, keepdims=True)
    log_pi: FloatArray = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return log_pi
