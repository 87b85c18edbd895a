"""What creatives earn under draws of the reward model, and how to improve them, for many cards at once in torch.

The core's effects, one draw for each card, and the effects of single elements under the posterior mean, without what
no choice changes. Pairs of single elements are left out: the generator knows no pairs of ids.

Shapes: B cards, G creatives a card, S slots, A candidates, F content numbers, C context columns, M draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.design import slot_pairs
from learner.generator import Cards, picked


@dataclass(frozen=True)
class Rewards:
    """What creatives earn, in logits."""

    total: Tensor
    """(B, G): creative logit."""
    marginal: Tensor
    """(B, G, S): what the choice in a slot contributes, its pairs with all other slots included."""


class Judge:
    """M draws of the reward model, ready to judge cards."""

    def __init__(self, effects: Mapping[str, Tensor]) -> None:
        """Take the effects.

        Args:
            effects: The core's under M draws, named as in a snapshot without the prefix `draws.`, and `element`
                (E, 1 + C), those of single elements under the posterior mean.
        """
        self.num_draws, num_slots, size = effects["content"].shape
        self._content_MSF = effects["content"]
        self._context_MSFC = effects["content_context"]
        # A last row of zeros answers index -1.
        self._element_EC = torch.nn.functional.pad(effects["element"], (0, 0, 0, 1))
        width = effects["content_pair"].shape[-1]
        pair_MSFSF = effects["content_pair"].new_zeros(self.num_draws, num_slots, size, num_slots, size)
        for q, (s, t) in enumerate(zip(*slot_pairs(num_slots), strict=True)):
            pair_MSFSF[:, s, :width, t, :width] = effects["content_pair"][:, q]
            pair_MSFSF[:, t, :width, s, :width] = effects["content_pair"][:, q].transpose(1, 2)
        self._pair_MXX = pair_MSFSF.reshape(self.num_draws, num_slots * size, num_slots * size)

    def cards(self, cards: Cards, draw_B: Tensor) -> JudgedCards:
        """Return the effects of each card's candidates under its draw."""
        weight_BSF = self._content_MSF[draw_B] + torch.einsum("bsfc,bc->bsf", self._context_MSFC[draw_B], cards.context)
        element_BSAC = self._element_EC[cards.candidate]
        own_BSA = element_BSAC[..., 0] + torch.einsum("bsac,bc->bsa", element_BSAC[..., 1:], cards.context)
        main_BSA = (torch.einsum("bsaf,bsf->bsa", cards.content, weight_BSF) + own_BSA) * cards.mask
        return JudgedCards(main_BSA, cards.content * cards.mask[..., None], cards.mask, self._pair_MXX[draw_B])


@dataclass(frozen=True)
class JudgedCards:
    """The effects of each card's candidates under one draw a card."""

    main: Tensor
    """(B, S, A): zeros where there is no candidate."""
    content: Tensor
    """(B, S, A, F): zeros where there is no candidate."""
    mask: Tensor
    """(B, S, A)"""
    pair: Tensor
    """(B, S F, S F), symmetric."""

    def rewards(self, chosen_BGS: Tensor) -> Rewards:
        """Return what creatives earn, given as places of the chosen candidates."""
        main_BGS = self.main.gather(2, chosen_BGS.transpose(1, 2)).transpose(1, 2)
        content_BGSF = picked(self.content, chosen_BGS)
        pull_BGSF = (content_BGSF.flatten(2) @ self.pair).view_as(content_BGSF)
        pairs_BGS = (content_BGSF * pull_BGSF).sum(-1)
        return Rewards((main_BGS + 0.5 * pairs_BGS).sum(-1), main_BGS + pairs_BGS)

    def refined(self, chosen_BGS: Tensor, sweeps: int) -> Tensor:
        """Return the creatives after coordinate ascent: slot by slot the best candidate, given the others."""
        chosen_BGS, size = chosen_BGS.clone(), self.content.shape[-1]
        main_BSA = self.main.masked_fill(~self.mask, -torch.inf)
        # A slot that a card lacks keeps place 0.
        main_BSA[:, :, 0].masked_fill_(~self.mask.any(-1), 0.0)
        content_BGX = picked(self.content, chosen_BGS).flatten(2)
        for step in range(sweeps * chosen_BGS.shape[2]):
            s = step % chosen_BGS.shape[2]
            columns = slice(s * size, (s + 1) * size)
            pull_BGF = content_BGX @ self.pair[:, :, columns]
            value_BGA = torch.baddbmm(main_BSA[:, s, None], pull_BGF, self.content[:, s].transpose(1, 2))
            chosen_BGS[:, :, s] = value_BGA.argmax(-1)
            content_BGX[:, :, columns] = picked(self.content[:, s : s + 1], chosen_BGS[:, :, s : s + 1])[:, :, 0]
        return chosen_BGS
