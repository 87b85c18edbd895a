"""Cards that nobody has sent: new products, new elements and new combinations, made from those of a batch.

A generator that only sees what is in the traffic learns its ids by heart and has nothing to say about what is new.

Shapes: B cards, S slots, A candidates, F content numbers, C context columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learner.generator import Cards

ANGLE = 2.0 * torch.pi


def unseen(cards: Cards, share: float, rng: torch.Generator) -> Cards:
    """Return the cards, about a share of them changed.

    A changed card has no product, the context of another card, and in each slot the candidates that another card has
    there (if both have the slot). A part of its candidates, of some cards few and of some all, become elements that do
    not exist: without an id, their content a mixture of those of two candidates that keeps mean and variance.

    Args:
        cards: The cards.
        share: Probability that a card is changed, in [0, 1].
        rng: Decides which, and how.
    """
    num_cards, num_slots, _ = cards.mask.shape
    device = cards.mask.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=rng).to(device)

    is_changed_B = uniform(num_cards) < share
    other_B = torch.randint(num_cards, (num_cards,), generator=rng).to(device)
    other_BS = torch.randint(num_cards, (num_cards, num_slots), generator=rng).to(device)
    slot_S = torch.arange(num_slots, device=device)
    has_BS = cards.mask.any(-1)
    is_swapped_BS = is_changed_B[:, None] & has_BS & has_BS[other_BS, slot_S]
    from_BS = torch.where(is_swapped_BS, other_BS, torch.arange(num_cards, device=device)[:, None])
    mask_BSA, content_BSAF = cards.mask[from_BS, slot_S], cards.content[from_BS, slot_S]
    is_new_BSA = mask_BSA & is_changed_B[:, None, None] & (uniform(*mask_BSA.shape) < uniform(num_cards, 1, 1))
    mixed_BSAF = _mixed(content_BSAF, mask_BSA, uniform(*mask_BSA.shape), uniform(*mask_BSA.shape))
    return Cards(
        product=cards.product.masked_fill(is_changed_B, -1),
        context=torch.where(is_changed_B[:, None], cards.context[other_B], cards.context),
        candidate=cards.candidate[from_BS, slot_S].masked_fill(is_new_BSA, -1),
        mask=mask_BSA,
        content=torch.where(is_new_BSA[..., None], mixed_BSAF, content_BSAF),
    )


def _mixed(content_BSAF: Tensor, mask_BSA: Tensor, which_BSA: Tensor, angle_BSA: Tensor) -> Tensor:
    """Return the content of each candidate mixed with that of another, about the mean of the slot."""
    count_BS1 = mask_BSA.sum(-1, keepdim=True).clamp(min=1)
    mean_BS1F = (content_BSAF * mask_BSA[..., None]).sum(2, keepdim=True) / count_BS1[..., None]
    deviation_BSAF = content_BSAF - mean_BS1F
    # Candidates are the first places of a slot.
    other_BSA = (which_BSA * count_BS1).long()
    other_BSAF = deviation_BSAF.gather(2, other_BSA[..., None].expand_as(deviation_BSAF))
    angle_BSA1 = ANGLE * angle_BSA[..., None]
    return mean_BS1F + angle_BSA1.cos() * deviation_BSAF + angle_BSA1.sin() * other_BSAF
