"""Sentence embeddings of all-MiniLM-L6-v2 in numpy, so that servers need no torch for a title.

BERT with 6 layers, mean of the last layer's tokens, normalized. The product has one text at a time, seldom a new one;
in float32 it takes some milliseconds for a title.

Shapes: T tokens of a text, H = 384 numbers a token, A = 12 heads of 32 numbers.

References:
    Wang et al. (2020), MiniLM. Reimers and Gurevych (2019), Sentence-BERT. Devlin et al. (2019), BERT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

WIDTH = 384
NUM_LAYERS = 6
NUM_HEADS = 12
_EPSILON = 1e-12  # of the layer norms


class MiniLM:
    """The network; its weights are named as in the published file.

    Raises:
        ValueError: If a tensor is missing or has another shape.
    """

    def __init__(self, tensors: Mapping[str, FloatArray]) -> None:
        wanted = _shapes()
        for name, shape in wanted.items():
            got = tensors[name].shape if name in tensors else None
            if got is None or any(want not in (None, size) for want, size in zip(shape, got, strict=True)):
                raise ValueError(f"tensor {name} of the sentence model has shape {got}; expected {shape}")
        self._w = {name: np.asarray(tensors[name], np.float32) for name in wanted}

    def embed(self, token_ids: Sequence[int]) -> FloatArray:
        """Return the (384,) embedding, of length 1, of the T token ids of a text."""
        w = self._w
        x_TH = w["embeddings.word_embeddings.weight"][list(token_ids)]
        x_TH = x_TH + w["embeddings.position_embeddings.weight"][: len(token_ids)]
        x_TH = self._norm(x_TH + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for layer in range(NUM_LAYERS):
            prefix = f"encoder.layer.{layer}"
            mixed_TH = self._linear(self._attention(x_TH, prefix), f"{prefix}.attention.output.dense")
            x_TH = self._norm(x_TH + mixed_TH, f"{prefix}.attention.output.LayerNorm")
            hidden = _gelu(self._linear(x_TH, f"{prefix}.intermediate.dense"))
            x_TH = self._norm(x_TH + self._linear(hidden, f"{prefix}.output.dense"), f"{prefix}.output.LayerNorm")
        mean_H = x_TH.mean(0)
        embedding: FloatArray = (mean_H / np.linalg.norm(mean_H)).astype(np.float32)
        return embedding

    def _attention(self, x_TH: FloatArray, prefix: str) -> FloatArray:
        query, key, value = (
            self._linear(x_TH, f"{prefix}.attention.self.{name}").reshape(len(x_TH), NUM_HEADS, -1).swapaxes(0, 1)
            for name in ("query", "key", "value")
        )
        score_ATT = query @ key.swapaxes(1, 2) / np.float32(math.sqrt(WIDTH / NUM_HEADS))
        weight_ATT = np.exp(score_ATT - score_ATT.max(-1, keepdims=True))
        weight_ATT /= weight_ATT.sum(-1, keepdims=True)
        out: FloatArray = (weight_ATT @ value).swapaxes(0, 1).reshape(len(x_TH), WIDTH)
        return out

    def _linear(self, x: FloatArray, name: str) -> FloatArray:
        out: FloatArray = x @ self._w[f"{name}.weight"].T + self._w[f"{name}.bias"]
        return out

    def _norm(self, x_TH: FloatArray, name: str) -> FloatArray:
        centered = x_TH - x_TH.mean(-1, keepdims=True)
        scaled = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + np.float32(_EPSILON))
        out: FloatArray = scaled * self._w[f"{name}.weight"] + self._w[f"{name}.bias"]
        return out


def _gelu(x: FloatArray) -> FloatArray:
    """Return x times the normal distribution function at x.

    The error function is a rational approximation, off by at most 1.5e-7 (Abramowitz and Stegun 1964, 7.1.26): numpy
    has none, and scipy is no dependency of a server.
    """
    z = np.abs(x) * np.float32(math.sqrt(0.5))
    t = 1.0 / (1.0 + np.float32(0.3275911) * z)
    powers = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    erf = np.copysign(1.0 - powers * np.exp(-z * z), x)
    out: FloatArray = (0.5 * x * (1.0 + erf)).astype(np.float32)
    return out


def _shapes() -> dict[str, tuple[int | None, ...]]:
    """Return the name and shape of every tensor that is used; None: any size."""
    norm = {"LayerNorm.weight": (WIDTH,), "LayerNorm.bias": (WIDTH,)}
    shapes: dict[str, tuple[int | None, ...]] = {
        "embeddings.word_embeddings.weight": (None, WIDTH),
        "embeddings.position_embeddings.weight": (None, WIDTH),
        "embeddings.token_type_embeddings.weight": (None, WIDTH),
        **{f"embeddings.{name}": shape for name, shape in norm.items()},
    }
    for layer in range(NUM_LAYERS):
        prefix = f"encoder.layer.{layer}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes[f"{prefix}.attention.{name}.weight"] = (WIDTH, WIDTH)
            shapes[f"{prefix}.attention.{name}.bias"] = (WIDTH,)
        for name, rows, columns in (("intermediate", 4 * WIDTH, WIDTH), ("output", WIDTH, 4 * WIDTH)):
            shapes[f"{prefix}.{name}.dense.weight"] = (rows, columns)
            shapes[f"{prefix}.{name}.dense.bias"] = (rows,)
        shapes |= {f"{prefix}.{part}.{n}": s for part in ("attention.output", "output") for n, s in norm.items()}
    return shapes
