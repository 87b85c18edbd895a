"""The click probabilities of creatives that were shown, many at a time, under a snapshot's posterior mean.

`serving.policy` answers for one request, and searches; here nothing is searched. Both evaluate the logit that
`serving.policy` states, and a test compares them. Unknown products, elements, slots and contexts contribute nothing.

Shapes: N examples, S slots of the vocabulary, E elements, F content numbers, of which G stand in pairs, C context
columns, U distinct contexts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from streams.contracts.examples import ExampleBatch, parse_context
from streams.contracts.features import FeatureSpec
from streams.contracts.snapshot import unpack_pairs

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

MAX_CONTEXTS: Final = 16_384
"""Contexts whose numbers are kept."""


class Predictor:
    """A snapshot's posterior mean.

    Args:
        spec: The vocabulary that the tensors' rows and columns follow.
        tensors: Named and shaped as in `streams.contracts.snapshot`.
    """

    def __init__(self, spec: FeatureSpec, tensors: Mapping[str, NDArray[Any]]) -> None:
        self._spec = spec
        # A last row of zeros answers index -1.
        self._content_EF: FloatArray = np.pad(tensors["element_content"] + tensors["trait"], ((0, 1), (0, 0)))
        self._element_ED: FloatArray = np.pad(tensors["element"], ((0, 1), (0, 0)))
        self._product_PD: FloatArray = np.pad(tensors["product"], ((0, 1), (0, 0)))
        self._rows: dict[str, FloatArray] = {}
        self._bias = float(tensors["mean.bias"][0])
        self._context_C: FloatArray = tensors["mean.context"]
        self._content_SF: FloatArray = tensors["mean.content"]
        self._content_context_SFC: FloatArray = tensors["mean.content_context"]
        self._content_pair_QGG: FloatArray = tensors["mean.content_pair"]
        pairs_R2 = unpack_pairs(tensors["pairs"])
        code_R = _codes(pairs_R2[:, 0], pairs_R2[:, 1])
        order = np.argsort(code_R)
        # A last code that no pair has, so that every search ends at one.
        self._code_R = np.append(code_R[order], np.iinfo(np.int64).max)
        self._pair_R: FloatArray = np.append(tensors["pair"][order], np.float32(0))

    def predict(self, batch: ExampleBatch) -> NDArray[np.float64]:
        """Return the click probabilities of N examples, (N,)."""
        element_NS = self._elements(batch.columns.column("creative"))
        context_UC, context_N = self._contexts(batch.columns.column("context"))
        product_N = self._products(batch.columns.column("product_id"))
        context_NC = context_UC[context_N]
        logit_N = self._bias + context_NC @ self._context_C
        logit_N += self._product_PD[product_N, 0] + (self._product_PD[product_N, 1:] * context_NC).sum(1)
        content_NSF = self._content_EF[element_NS]
        weights_USF = self._content_SF + np.tensordot(context_UC, self._content_context_SFC, axes=(1, 2))
        logit_N += np.einsum("nsf,nsf->n", content_NSF, weights_USF[context_N])
        own_NSD = self._element_ED[element_NS]
        logit_N += own_NSD[:, :, 0].sum(1) + np.einsum("nsc,nc->n", own_NSD[:, :, 1:], context_NC)
        logit_N += self._pairs(element_NS, content_NSF)
        return 1.0 / (1.0 + np.exp(-np.clip(logit_N.astype(np.float64), -30.0, 30.0)))

    def _pairs(self, element_NS: IntArray, content_NSF: FloatArray) -> FloatArray:
        """Return what pairs add, of contents and of single elements, (N,)."""
        width = self._content_pair_QGG.shape[1]
        logit_N = np.zeros(len(element_NS), np.float32)
        for t in range(element_NS.shape[1]):
            for s in range(t):
                pulled_NG = content_NSF[:, s, :width] @ self._content_pair_QGG[t * (t - 1) // 2 + s]
                logit_N += (pulled_NG * content_NSF[:, t, :width]).sum(1)
                code_N = _codes(element_NS[:, s], element_NS[:, t])
                place_N = np.searchsorted(self._code_R, code_N)
                logit_N += np.where(self._code_R[place_N] == code_N, self._pair_R[place_N], np.float32(0))
        return logit_N

    def _elements(self, creative: pa.MapArray) -> IntArray:
        """Return the row of the element in each slot of the vocabulary, (N, S); -1: none, or unknown."""
        offsets = creative.offsets.to_numpy().astype(np.int64)
        row = np.repeat(np.arange(len(creative)), np.diff(offsets))
        inside = slice(int(offsets[0]), int(offsets[-1]))
        slots, slot = _distinct(creative.keys[inside])
        elements, element = _distinct(creative.items[inside])
        pair, which = np.unique(slot * len(elements) + element, return_inverse=True)
        names = [(slots[code // len(elements)], elements[code % len(elements)]) for code in pair.tolist()]
        known = np.array([self._spec.row_of(*name) for name in names], np.int64)
        column = np.array([self._spec.slot_index.get(name, -1) for name in slots], np.int64)[slot]
        out = np.full((len(creative), len(self._spec.slots)), -1, np.int64)
        is_slot = column >= 0
        out[row[is_slot], column[is_slot]] = known[which[is_slot]]
        return out

    def _contexts(self, column: pa.Array) -> tuple[FloatArray, IntArray]:
        """Return the distinct contexts as numbers, (U, C), and which one each example has, (N,)."""
        texts, context_N = _distinct(column)
        if len(self._rows) + len(texts) > MAX_CONTEXTS:
            self._rows.clear()
        missing = [text for text in texts if text not in self._rows]
        self._rows.update(zip(missing, self._spec.context_matrix([_parsed(text) for text in missing]), strict=True))
        rows = [self._rows[text] for text in texts]
        return np.array(rows, np.float32).reshape(len(texts), len(self._spec.context)), context_N

    def _products(self, column: pa.Array) -> IntArray:
        names, product_N = _distinct(column)
        return np.array([self._spec.product_index.get(name, -1) for name in names], np.int64)[product_N]


def _codes(first: IntArray, second: IntArray) -> IntArray:
    """Return a number for each unordered pair of elements, -1 where one is unknown."""
    low = np.minimum(first, second)
    return np.where(low >= 0, low << 32 | np.maximum(first, second), -1)


def _parsed(text: str) -> dict[str, Any]:
    try:
        return dict(parse_context(text))
    except ValueError:
        return {}


def _distinct(texts: pa.Array) -> tuple[list[str], IntArray]:
    """Return the distinct texts in order of appearance, and which one each row has."""
    encoded = texts.dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)
