"""Cards that nobody has sent: new products, new elements and new combinations, made from those of a batch.

A generator that only sees what is in the traffic learns its ids by heart and has nothing to say about what is new.

Shapes: B cards, S slots, A candidates, F content numbers, C context columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learner.generator import Cards


def unseen(cards: Cards, share: float, rng: torch.Generator) -> Cards:
    """Return the cards, about a share of them changed.

    A changed card has no product, the context of another card, in each slot the candidates that another card has there
    (if both have the slot), and half of its elements lose their ids, so that their content alone speaks for them.

    Args:
        cards: The cards.
        share: Probability that a card is changed, in [0, 1].
        rng: Decides which, and how.
    """
    num_cards, num_slots, num_candidates = cards.mask.shape
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
    candidate_BSA = cards.candidate[from_BS, slot_S]
    forgets_BSA = is_changed_B[:, None, None] & (uniform(num_cards, num_slots, num_candidates) < 0.5)
    return Cards(
        product=cards.product.masked_fill(is_changed_B, -1),
        context=torch.where(is_changed_B[:, None], cards.context[other_B], cards.context),
        candidate=candidate_BSA.masked_fill(forgets_BSA, -1),
        mask=cards.mask[from_BS, slot_S],
        content=cards.content[from_BS, slot_S],
    )
