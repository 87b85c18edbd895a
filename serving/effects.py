"""What a snapshot says about elements, under each posterior draw: their content as the draw sees it, and their effects.

A draw is the core's coefficients, which travel drawn, and deviations of what is known of each element, which travel as
widths: scale times posterior standard deviation times normal numbers that follow from the snapshot's seed.

    z(e) = content(e) + trait(e) + scale root(e) normal       what stands in the core's features
    own(e) = element(e) + scale sd(e) normal                  effect of the element itself

Effects with the context, and those of pairs of elements, are the posterior means under every draw. Drawing the former
changed no regret that could be measured; drawing the latter may win a little, and would take a table of a card's pairs
for every draw (`benchmarks/README.md`, Regret).

Shapes: M draws, L = M + 1 with the posterior mean last, S slots of the vocabulary, E elements, F content numbers, of
which the first G stand in pairs, C context columns, A candidates, R pairs of elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.ascent import filled_up
from streams.contracts.snapshot import unpack_pairs

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SlotWeights:
    """The core's weights for cards with the same T slots; F is filled up with zeros to a multiple of `LANES`."""

    content: FloatArray
    """(L, T, F)"""
    context: FloatArray
    """(C, L, T, F): what each context column adds to them."""
    pull: FloatArray
    """(L, T, F, T F): what a content number in a slot adds to those of every slot."""


class Effects:
    """A snapshot's effects, ready to be looked up.

    Args:
        tensors: Named and shaped as in `streams.contracts.snapshot`.
        scale: Spread of the draws in posterior standard deviations.
        seed: Decides the normal numbers.
    """

    def __init__(self, tensors: Mapping[str, NDArray[Any]], scale: float, seed: int) -> None:
        self.num_draws, num_slots, size = tensors["draws.content"].shape
        both = {
            name: np.concatenate([tensors[f"draws.{name}"], tensors[f"mean.{name}"][None]])
            for name in ("content", "content_context", "content_pair")
        }
        # A last row of zeros answers index -1.
        self._content_LSF = np.pad(both["content"], ((0, 0), (0, 1), (0, 0)))
        self._context_CLSF = np.pad(both["content_context"].transpose(3, 0, 1, 2), ((0, 0), (0, 0), (0, 1), (0, 0)))
        self._pull_LSFSF = _pulls(both["content_pair"], num_slots + 1, size)
        self._content_EF = np.pad(tensors["element_content"] + tensors["trait"], ((0, 1), (0, 0)))
        self._element_EC = np.pad(tensors["element"], ((0, 1), (0, 0)))
        self._context_sd_EC = np.pad(tensors["element_sd"][:, 1:], ((0, 1), (0, 0)))
        self._noise_LEF, self._own_LE = _noise(tensors, self.num_draws, scale, seed)
        self._own_LE += self._element_EC[:, 0]
        self._bias = float(tensors["mean.bias"][0])
        self._context_C = tensors["mean.context"]
        self._product_PC = np.pad(tensors["product"], ((0, 1), (0, 0)))
        self._pairs = _Pairs(unpack_pairs(tensors["pairs"]), tensors["pair"], tensors["pair_sd"])

    def content_of(self, index_A: IntArray) -> FloatArray:
        """Return the content of elements under the posterior mean, (A, F); zeros at index -1."""
        rows: FloatArray = self._content_EF[index_A]
        return rows

    def drawn(self, content_AF: FloatArray, index_A: IntArray) -> FloatArray:
        """Return what each draw sees in elements with this content, (L, A, F)."""
        drawn_LAF: FloatArray = content_AF + self._noise_LEF[:, index_A]
        return drawn_LAF

    def own(self, index_A: IntArray) -> FloatArray:
        """Return the effects of elements themselves, (L, A); zeros at index -1."""
        rows: FloatArray = self._own_LE[:, index_A]
        return rows

    def by_context(self, index_A: IntArray) -> FloatArray:
        """Return the effects of elements with each context column, (A, C)."""
        rows: FloatArray = self._element_EC[index_A, 1:]
        return rows

    def context_deviation(self, cards: Sequence[IntArray], context_C: FloatArray, seed: int) -> list[FloatArray]:
        """Return full-width deviations of the elements' own effects with a context, (L, A) for each slot; mean: zeros.

        They stand in no draw that is played, see above, but are a part of what is not known. Normal numbers belong to
        elements and columns, so that what two contexts have in common deviates in common.

        Args:
            cards: (A,) indices of the candidates of each slot.
            context_C: The context.
            seed: Decides the normal numbers.
        """
        out = []
        for t, index_A in enumerate(cards):
            shape = self.num_draws, len(index_A), len(context_C)
            normal_MAC = np.random.default_rng([seed, 1, t]).standard_normal(shape, dtype=np.float32)
            deviation_MA = (normal_MAC * self._context_sd_EC[index_A]) @ context_C
            out.append(np.pad(deviation_MA, ((0, 1), (0, 0))))
        return out

    def pairs(self, index_A: IntArray, others_B: IntArray) -> FloatArray:
        """Return the effects of pairs of elements, (A, B); zeros where a pair has none."""
        return self._pairs.between(index_A, others_B)

    def pair_deviation(self, cards: Sequence[IntArray], seed: int) -> list[list[FloatArray]]:
        """Return full-width deviations of the effects of pairs, [t][s] with s < t, (L, A of t, B of s); mean: zeros.

        Like `context_deviation` they stand in no draw that is played. Pairs that were never shown deviate by nothing.

        Args:
            cards: (A,) indices of the candidates of each slot.
            seed: Decides the normal numbers.
        """
        out: list[list[FloatArray]] = []
        for t, index_A in enumerate(cards):
            rng = np.random.default_rng([seed, 2, t])
            deviations = []
            for index_B in cards[:t]:
                sd_AB = self._pairs.deviations(index_A, index_B)
                normal_MAB = rng.standard_normal((self.num_draws, *sd_AB.shape), dtype=np.float32)
                deviations.append(np.pad(normal_MAB * sd_AB, ((0, 1), (0, 0), (0, 0))))
            out.append(deviations)
        return out

    def weights(self, slots: Sequence[int]) -> SlotWeights:
        """Return the core's weights for a card with these slots; -1, a slot that the snapshot lacks, has zeros."""
        content_LTF, context_CLTF = self._content_LSF[:, slots], self._context_CLSF[:, :, slots]
        pull_LTFTF = filled_up(filled_up(self._pull_LSFSF[:, slots][:, :, :, slots], 2), 4)
        return SlotWeights(
            filled_up(content_LTF, 2), filled_up(context_CLTF, 3), pull_LTFTF.reshape(*pull_LTFTF.shape[:3], -1)
        )

    def appeal(self, product: int, context_C: FloatArray) -> float:
        """Return the logit of a product in a context, without any creative; index -1 is an unknown product."""
        of_product = float(self._product_PC[product, 0] + self._product_PC[product, 1:] @ context_C)
        return self._bias + float(self._context_C @ context_C) + of_product


def _pulls(content_pair_LQGG: FloatArray, num_slots: int, size: int) -> FloatArray:
    """Return (L, S, F, S, F): what a content number in one slot adds to the weights of the numbers of every slot.

    The last of the `num_slots` is one that the snapshot lacks: zeros.
    """
    pull = np.zeros((len(content_pair_LQGG), num_slots, size, num_slots, size), np.float32)
    width = content_pair_LQGG.shape[2]
    for t in range(num_slots - 1):
        for s in range(t):
            pair_LGG = content_pair_LQGG[:, t * (t - 1) // 2 + s]
            pull[:, s, :width, t, :width] = pair_LGG
            pull[:, t, :width, s, :width] = pair_LGG.transpose(0, 2, 1)
    return pull


def _noise(
    tensors: Mapping[str, NDArray[Any]], num_draws: int, scale: float, seed: int
) -> tuple[FloatArray, FloatArray]:
    """Return deviations of the elements' content (L, E + 1, F) and own effects (L, E + 1); zeros for mean and -1."""
    root_EFF, sd_E = tensors["trait_root"], tensors["element_sd"][:, 0]
    num_elements, size, _ = root_EFF.shape
    normal_EFM = np.random.default_rng(seed).standard_normal((num_elements, size + 1, num_draws), dtype=np.float32)
    content_LEF = np.zeros((num_draws + 1, num_elements + 1, size), np.float32)
    own_LE = np.zeros((num_draws + 1, num_elements + 1), np.float32)
    content_LEF[:-1, :-1] = scale * np.matmul(root_EFF, normal_EFM[:, :size]).transpose(2, 0, 1)
    own_LE[:-1, :-1] = (scale * sd_E[:, None] * normal_EFM[:, size]).T
    return content_LEF, own_LE


class _Pairs:
    """Effects of pairs of elements, found by binary search."""

    def __init__(self, pairs_R2: IntArray, effect_R: FloatArray, sd_R: FloatArray) -> None:
        code_R = pairs_R2.min(1) << 32 | pairs_R2.max(1) if len(pairs_R2) else np.empty(0, np.int64)
        order = np.argsort(code_R)
        self._code_R, self._effect_R, self._sd_R = code_R[order], effect_R[order], sd_R[order]

    def between(self, index_A: IntArray, others_B: IntArray) -> FloatArray:
        return self._look_up(self._effect_R, index_A, others_B)

    def deviations(self, index_A: IntArray, others_B: IntArray) -> FloatArray:
        return self._look_up(self._sd_R, index_A, others_B)

    def _look_up(self, number_R: FloatArray, index_A: IntArray, others_B: IntArray) -> FloatArray:
        shape = len(index_A), len(others_B)
        if not len(self._code_R):
            return np.zeros(shape, np.float32)
        low_AB = np.minimum(index_A[:, None], others_B)
        code_AB = np.where(low_AB >= 0, low_AB << 32 | np.maximum(index_A[:, None], others_B), -1)
        place_AB = np.searchsorted(self._code_R, code_AB).clip(max=len(self._code_R) - 1)
        found: FloatArray = np.where(self._code_R[place_AB] == code_AB, number_R[place_AB], np.float32(0))
        return found
