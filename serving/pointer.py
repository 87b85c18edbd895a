"""The generator as serving runs it: an autoregressive pointer over the slots of a card, in numpy.

    k(e)   = content(e) W + embedding(e)                           key of an element; unseen ones have content alone
    h_s    = slot_s + context V_s + product + sum_{t < s} k(e_t) U_ts
    q_s    = h_s + tanh(h_s A + a) B                               query of slot s, given what the earlier slots chose
    log pi(e | context, product) = sum_s log softmax_{candidates of s}(q_s . k(e) / sqrt(d))[e_s]

Slots are filled in the order of the vocabulary, whatever order a request names them in, because that is the order the
weights were trained in. `learner.generator` is the same in torch; a test holds the two to 1e-5.

Shapes: N requests of one shape, R proposals, S slots of the vocabulary, A candidates of a slot, F content numbers, C
context columns, P products, E elements, d width, h width of the hidden layer. Index -1 is "not in the vocabulary".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


class Pointer:
    """Proposes creatives and knows their exact log-probabilities."""

    def __init__(self, weights: Mapping[str, FloatArray]) -> None:
        """Take the weights, named as in a snapshot without the prefix `generator.`."""
        self.content_Fd = weights["content"]
        self.width = d = self.content_Fd.shape[1]
        # A last row of zeros answers index -1.
        self.element_Ed = np.vstack([weights["element"], np.zeros((1, d), np.float32)])
        self.product_Pd = np.vstack([weights["product"], np.zeros((1, d), np.float32)])
        self.slot_Sd = weights["slot"]
        self.context_SdC = np.ascontiguousarray(weights["context"].transpose(0, 2, 1))
        self.chosen_SSdd = weights["chosen"]
        self.hidden = weights["hidden_in"], weights["hidden_bias"], weights["hidden_out"]

    def keys(self, content_AF: FloatArray, element_A: IntArray) -> FloatArray:
        """Return the (A, d) keys of elements."""
        return content_AF @ self.content_Fd + self.element_Ed[element_A]

    def propose(
        self,
        slots: Sequence[int],
        keys: Sequence[FloatArray],
        product_N: IntArray,
        context_NC: FloatArray,
        uniform_NRS: NDArray[np.float64],
    ) -> IntArray:
        """Return R creatives for each of N requests as (N, R, S) positions among the candidates.

        Args:
            slots: Vocabulary index of each of the requests' S slots, -1 for a slot that it lacks: uniform there.
            keys: For each slot the (N, A, d) keys of its candidates.
            product_N: Vocabulary index of each product.
            context_NC: Numbers of each context.
            uniform_NRS: Numbers in [0, 1) that decide: the same numbers, the same proposals.
        """
        chosen_NRS = np.zeros(uniform_NRS.shape, np.int64)
        base = self._base(product_N, context_NC)
        carried: list[tuple[int, FloatArray]] = []
        for place in _order(slots):
            logits = self._logits(slots[place], keys[place], base, carried, uniform_NRS.shape[1])
            cumulative = np.cumsum(np.exp(logits - logits.max(-1, keepdims=True)), -1)
            threshold = uniform_NRS[:, :, place, None] * cumulative[..., -1:]
            chosen_NR = np.minimum((cumulative <= threshold).sum(-1), logits.shape[-1] - 1)
            chosen_NRS[:, :, place] = chosen_NR
            if slots[place] >= 0:
                first_N1 = np.arange(len(chosen_NR))[:, None] * keys[place].shape[1]
                flat = keys[place].reshape(-1, self.width)
                carried.append((slots[place], np.take(flat, first_N1 + chosen_NR, axis=0)))
        return chosen_NRS

    def log_probabilities(
        self,
        slots: Sequence[int],
        keys: Sequence[FloatArray],
        product_N: IntArray,
        context_NC: FloatArray,
        chosen_NRS: IntArray,
    ) -> FloatArray:
        """Return the (N, R, S) log-probability of each choice, given the choices in earlier slots of the vocabulary."""
        out = np.zeros(chosen_NRS.shape, np.float32)
        base = self._base(product_N, context_NC)
        carried: list[tuple[int, FloatArray]] = []
        for place in _order(slots):
            logits = self._logits(slots[place], keys[place], base, carried, chosen_NRS.shape[1])
            top = logits.max(-1, keepdims=True)
            log_pi = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
            chosen_NR1 = chosen_NRS[:, :, place, None]
            out[:, :, place] = np.take_along_axis(log_pi, chosen_NR1, -1)[..., 0]
            if slots[place] >= 0:
                carried.append((slots[place], np.take_along_axis(keys[place], chosen_NR1, 1)))
        return out

    def _base(self, product_N: IntArray, context_NC: FloatArray) -> FloatArray:
        """Return what a slot's query starts from, (N, S, d)."""
        # One small product for each request, not one for all: its rounding must not depend on who else is asking.
        context_NSd: FloatArray = np.matmul(self.context_SdC, context_NC[:, None, :, None])[..., 0]
        return self.slot_Sd + context_NSd + self.product_Pd[product_N][:, None, :]

    def _logits(
        self,
        slot: int,
        keys_NAd: FloatArray,
        base_NSd: FloatArray,
        carried: Sequence[tuple[int, FloatArray]],
        num_proposals: int,
    ) -> FloatArray:
        if slot < 0:
            return np.zeros((len(keys_NAd), num_proposals, keys_NAd.shape[1]), np.float32)
        h_NRd = np.repeat(base_NSd[:, slot, None, :], num_proposals, 1)
        for earlier, key_NRd in carried:
            h_NRd = h_NRd + key_NRd @ self.chosen_SSdd[earlier, slot]
        hidden_in, hidden_bias, hidden_out = self.hidden
        query_NRd = h_NRd + np.tanh(h_NRd @ hidden_in + hidden_bias) @ hidden_out
        logits: FloatArray = np.matmul(query_NRd, keys_NAd.transpose(0, 2, 1)) / np.float32(np.sqrt(self.width))
        return logits


def _order(slots: Sequence[int]) -> list[int]:
    """Return the places of a request's slots in the order of the vocabulary, unknown slots last."""
    return sorted(range(len(slots)), key=lambda place: (slots[place] < 0, slots[place], place))
