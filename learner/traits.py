"""Traits: what an element is beyond its content.

Two images with the same content numbers are not the same image. Each element has a correction d of its content f, a
Gaussian with a full F x F covariance, and z = f + d stands in the core's features: so what clicks tell of an element
through one of its effects (its own, with the context, with the elements beside it) serves all the others.

After the core's update an extended Kalman step is made for the corrections of the elements shown, one example after the
other, along the gradient of the logit

    g_s = w_s + W_s context + sum_{t != s} W_st z_t

Traits forget nothing: what people like changes, what an image shows does not.

Shapes: N examples, S slots, Q pairs of slots, E elements, F content numbers, of which the first G stand in pairs, C
context columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from learner.design import Rows, slot_pairs

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class Traits:
    """Corrections of all elements and their covariances.

    Args:
        scale: Standard deviation of a correction before any click, in units of a content number.
    """

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._mean_EF: FloatArray = np.zeros((0, 0))
        self._covariance_EFF: FloatArray = np.zeros((0, 0, 0))

    def grow(self, elements: int, content: int) -> None:
        """Make room for new elements and content numbers; they start at the prior."""
        num_elements, size = self._mean_EF.shape
        if elements <= num_elements and content == size:
            return
        if elements > num_elements:
            elements = max(elements, num_elements * 3 // 2)
        mean_EF = np.zeros((max(elements, num_elements), content))
        covariance_EFF = np.tile(np.eye(content) * self._scale**2, (len(mean_EF), 1, 1))
        mean_EF[:num_elements, :size] = self._mean_EF
        covariance_EFF[:num_elements, :size, :size] = self._covariance_EFF
        self._mean_EF, self._covariance_EFF = mean_EF, covariance_EFF

    def reset(self, rows: IntArray) -> None:
        """Bring elements back to the prior: others take their places, or their content has changed."""
        self._mean_EF[rows] = 0.0
        self._covariance_EFF[rows] = np.eye(self._mean_EF.shape[1]) * self._scale**2

    def corrected(self, rows: Rows) -> Tensor:
        """Return content plus correction of the chosen elements, (N, S, F) float32; 0 where there is none."""
        size = self._mean_EF.shape[1]
        chosen_NS = rows.chosen.cpu()
        correction_NSF = torch.from_numpy(self._mean_EF)[chosen_NS.clamp(min=0)].float() * (chosen_NS >= 0)[..., None]
        out_NSF = rows.content.clone()
        out_NSF[..., :size] += correction_NSF.to(out_NSF.device)
        return out_NSF

    def learn(
        self,
        logit_N: FloatArray,
        rows: Rows,
        label_N: FloatArray,
        weight_N: FloatArray,
        effects: Mapping[str, Tensor],
    ) -> None:
        """Learn the examples one after the other.

        Args:
            logit_N: Logits under the served mean.
            rows: The examples.
            label_N: 0 or 1.
            weight_N: Weight of each example.
            effects: Served mean of the core: content (S, F), content_context (S, F, C), content_pair (Q, G, G).
        """
        num_slots, size = effects["content"].shape
        both_SSFF = np.zeros((num_slots, num_slots, size, size))
        for q, (s, t) in enumerate(zip(*slot_pairs(num_slots), strict=True)):
            pair_GG = effects["content_pair"][q].double().cpu().numpy()
            both_SSFF[s, t, : len(pair_GG), : len(pair_GG)] = pair_GG
            both_SSFF[t, s, : len(pair_GG), : len(pair_GG)] = pair_GG.T
        _filter(
            logit_N,
            rows.context.cpu().double().numpy(),
            rows.chosen.cpu().numpy(),
            rows.content[..., :size].cpu().double().contiguous().numpy(),
            label_N,
            weight_N,
            effects["content"].cpu().double().numpy(),
            effects["content_context"].cpu().double().contiguous().numpy(),
            both_SSFF,
            self._mean_EF,
            self._covariance_EFF,
        )

    def means(self, elements: int) -> FloatArray:
        """Return the corrections of the first elements, (E, F)."""
        return self._mean_EF[:elements]

    def roots(self, elements: int) -> FloatArray:
        """Return lower Cholesky factors of their covariances, (E, F, F)."""
        size = self._mean_EF.shape[1]
        return np.linalg.cholesky(self._covariance_EFF[:elements] + 1e-9 * np.eye(size)).astype(np.float64, copy=False)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything learned, for a checkpoint."""
        return {"mean": torch.from_numpy(self._mean_EF), "covariance": torch.from_numpy(self._covariance_EFF)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the place of the traits that a checkpoint holds."""
        self._mean_EF = tensors["mean"].numpy().copy()
        self._covariance_EFF = tensors["covariance"].numpy().copy()


@njit(cache=True)
def _filter(
    logit_N: FloatArray,
    context_NC: FloatArray,
    chosen_NS: IntArray,
    content_NSF: FloatArray,
    label_N: FloatArray,
    weight_N: FloatArray,
    main_SF: FloatArray,
    by_context_SFC: FloatArray,
    pair_SSFF: FloatArray,
    mean_EF: FloatArray,
    covariance_EFF: FloatArray,
) -> None:
    """Learn the examples one after the other, in place."""
    num_examples, num_slots = chosen_NS.shape
    size, num_columns = main_SF.shape[1], context_NC.shape[1]
    z_SF = np.empty((num_slots, size))
    gradient_SF = np.empty((num_slots, size))
    gain_SF = np.empty((num_slots, size))
    for n in range(num_examples):
        for s in range(num_slots):
            e = chosen_NS[n, s]
            for f in range(size):
                z_SF[s, f] = content_NSF[n, s, f] + mean_EF[e, f] if e >= 0 else 0.0
        variance = 0.0
        for s in range(num_slots):
            e = chosen_NS[n, s]
            if e < 0:
                continue
            for f in range(size):
                slope = main_SF[s, f]
                for c in range(num_columns):
                    slope += by_context_SFC[s, f, c] * context_NC[n, c]
                for t in range(num_slots):
                    if t != s:
                        for h in range(size):
                            slope += pair_SSFF[s, t, f, h] * z_SF[t, h]
                gradient_SF[s, f] = slope
            for f in range(size):
                gain = 0.0
                for h in range(size):
                    gain += covariance_EFF[e, f, h] * gradient_SF[s, h]
                gain_SF[s, f] = gain
                variance += gain * gradient_SF[s, f]
        p = 1.0 / (1.0 + np.exp(-logit_N[n]))
        w = weight_N[n] * p * (1.0 - p)
        step = weight_N[n] * (label_N[n] - p) / (1.0 + w * variance)
        shrink = w / (1.0 + w * variance)
        for s in range(num_slots):
            e = chosen_NS[n, s]
            if e < 0:
                continue
            for f in range(size):
                mean_EF[e, f] += gain_SF[s, f] * step
                for h in range(size):
                    covariance_EFF[e, f, h] -= gain_SF[s, f] * gain_SF[s, h] * shrink
