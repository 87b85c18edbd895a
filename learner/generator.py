"""The generator: a pointer over the slots of a card, in torch. `serving.pointer` is its twin in numpy.

    k(e)   = content(e) W + embedding(e)                           key of an element; unseen ones have content alone
    h_s    = slot_s + context V_s + product + sum_{t before s} k(e_t) U_ts
    q_s    = h_s + tanh(h_s A + a) B                               query of slot s, given what was chosen before it
    log pi(e | context, product) = sum_s log softmax_{candidates of s}(q_s . k(e) / sqrt(d))[e_s]

Variants differ in nothing but which slots come before a slot:

    autoregressive   those before it in the vocabulary
    confident        those of which the generator is surer when it knows no choice yet: lower entropy, relative to the
                     log of the number of candidates (the free order of CECS, fixed before a card's first choice)
    parallel         none: all slots at once, as fast as can be, blind to pairs

All but W and A start at zero, so a new generator is uniform, and rows that are appended for new names change nothing
until they are trained.

Shapes: B cards, G creatives a card, S slots of the vocabulary, A candidates of the largest slot, F content numbers, C
context columns, P products, E elements, d width, h width of the hidden layer.

References:
    Vinyals et al. (2015), Pointer Networks. CECS: A Cross-Element Combinatorial Selection Model for Multi-Element
    Creative in Display Advertising (2023), arXiv 2307.01593.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learner.adam import Adam
from streams.contracts.growing import Freed

VARIANTS = ("autoregressive", "confident", "parallel")


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorSettings:
    """Settings of the generator and its training."""

    variant: str = "autoregressive"
    """One of `VARIANTS`."""
    width: int = 16
    """d: width of keys and queries."""
    hidden: int = 32
    """h: width of the hidden layer."""
    learning_rate: float = 0.01
    group_size: int = 8
    """G: creatives sampled for a card; each is judged against the others."""
    cards: int = 32
    """B: cards in a training step."""
    unseen_share: float = 0.25
    """Share of the cards of a step that are made into ones that nobody has sent: see `generator_cards.unseen`."""
    sweeps: int = 1
    """Passes of coordinate ascent that make a winner of the best sample."""
    examples_per_step: int = 500
    """One training step for so many learned examples."""
    advantage_floor: float = 0.05
    """Smallest scale of an advantage, in logits: groups that hardly differ teach hardly anything."""
    slot_credit: float = 0.5
    """What a slot's own contribution counts in its advantage; the whole creative's reward counts the rest."""
    policy_gradient: float = 1.0
    """Weight of the group-relative policy gradient."""
    entropy: float = 0.3
    """Weight of the entropy bonus; .02 froze the policy early."""
    leash: float = 0.1
    """Weight of the divergence from the last published generator."""
    distillation: float = 1.0
    """Weight of the imitation of refined winners."""

    def __post_init__(self) -> None:
        """Refuse a variant that does not exist."""
        if self.variant not in VARIANTS:
            raise ValueError(f"variant of the generator is {self.variant!r}; expected one of {', '.join(VARIANTS)}")


_ROWS = {
    "element": ("element",),
    "slot": ("slot",),
    "context": ("slot", "context"),
    "product": ("product",),
    "chosen": ("slot", "slot"),
}
"""Weights with rows for names, and the kind of names along each of their first dimensions."""


@dataclass(frozen=True)
class Cards:
    """B requests as numbers."""

    product: Tensor
    """(B,): index, -1 if unknown."""
    context: Tensor
    """(B, C)"""
    candidate: Tensor
    """(B, S, A): index of each candidate, -1 if unknown or none."""
    mask: Tensor
    """(B, S, A) bool: whether there is a candidate, the first ones; none at all where the card lacks the slot."""
    content: Tensor
    """(B, S, A, F)"""


class Generator:
    """The weights, their optimizer, and how they give log-probabilities and samples."""

    def __init__(
        self, content_size: int, settings: GeneratorSettings | None = None, *, seed: int = 0, device: str = "cpu"
    ) -> None:
        self.settings = settings or GeneratorSettings()
        self.device = torch.device(device)
        d, h = self.settings.width, self.settings.hidden
        rng = torch.Generator().manual_seed(seed)
        shapes = {
            "content": (content_size, d),
            "element": (0, d),
            "slot": (0, d),
            "context": (0, 0, d),
            "product": (0, d),
            "chosen": (0, 0, d, d),
            "hidden_in": (d, h),
            "hidden_bias": (h,),
            "hidden_out": (h, d),
        }
        self.weights = {name: torch.zeros(shape, device=self.device) for name, shape in shapes.items()}
        for name in ("content", "hidden_in"):
            fan_in, fan_out = shapes[name]
            self.weights[name] = (torch.randn(fan_in, fan_out, generator=rng) * fan_in**-0.5).to(self.device)
        self.optimizer = Adam(self.weights, self.settings.learning_rate)

    def grow(self, *, slots: int, context: int, products: int, elements: int) -> None:
        """Append rows of zeros for new names."""
        d = self.settings.width
        shapes = {
            "element": (elements, d),
            "slot": (slots, d),
            "context": (slots, context, d),
            "product": (products, d),
            "chosen": (slots, slots, d, d),
        }
        for table in (self.weights, self.optimizer.first, self.optimizer.second):
            for name, shape in shapes.items():
                table[name] = padded(table[name], shape)

    def reset(self, freed: Freed) -> None:
        """Forget what was learned under names that are gone: other names take their rows."""
        for table in (self.weights, self.optimizer.first, self.optimizer.second):
            for name, dims in _ROWS.items():
                rows = {"element": freed.elements, "slot": freed.slots, "context": freed.context}
                rows["product"] = freed.products
                for dim, kind in enumerate(dims):
                    if rows[kind]:
                        table[name] = table[name].index_fill(dim, torch.tensor(rows[kind], device=self.device), 0.0)

    def log_probabilities(
        self, cards: Cards, chosen_BGS: Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return log-probabilities of every candidate in every slot, given the earlier choices of each creative.

        Args:
            cards: The cards.
            chosen_BGS: Places of the chosen candidates; anything where the card lacks the slot.
            weights: Other weights than the current ones.

        Returns:
            (B, G, S, A); -inf for what is no candidate.
        """
        w = weights or self.weights
        key_BSAd, base_BSd = self._keys(cards, w), self._base(cards, w)
        h_BGSd = base_BSd[:, None].expand(-1, chosen_BGS.shape[1], -1, -1)
        if self.settings.variant != "parallel":
            chosen_BGSd = picked(key_BSAd, chosen_BGS) * cards.mask.any(-1)[:, None, :, None]
            # One matrix a card, or one for all of them, from what was chosen (T, d) to what it adds (S, d).
            pull_BTSdd = w["chosen"] * self._before(cards, base_BSd, key_BSAd, w)[..., None, None]
            pull_BXX = pull_BTSdd.transpose(2, 3).flatten(3).flatten(1, 2)
            h_BGSd = h_BGSd + (chosen_BGSd.flatten(2) @ pull_BXX).view(h_BGSd.shape)
        logits = self._logits(w, h_BGSd, key_BSAd)
        # Slots that a card lacks get finite numbers that nobody reads: -inf alone would make their gradient nan.
        mask_B1SA = (cards.mask | ~cards.mask.any(-1, keepdim=True))[:, None]
        return logits.masked_fill(~mask_B1SA, -torch.inf).log_softmax(-1)

    @torch.no_grad()
    def sample(self, cards: Cards, num_creatives: int, rng: torch.Generator) -> Tensor:
        """Return sampled creatives as (B, G, S) places among the candidates; 0 where the card lacks the slot."""
        w, key_BSAd = self.weights, self._keys(cards, self.weights)
        base_BSd = self._base(cards, w)
        order_BS = self._order(cards, base_BSd, key_BSAd, w)
        num_cards, num_slots = order_BS.shape
        h_BGSd = base_BSd[:, None].repeat(1, num_creatives, 1, 1)
        chosen_BGS = torch.zeros(num_cards, num_creatives, num_slots, dtype=torch.long, device=self.device)
        uniform = torch.rand(chosen_BGS.shape, generator=rng).to(self.device)
        card_B = torch.arange(num_cards, device=self.device)
        for slot_B in order_BS.T:
            key_BAd, mask_BA = key_BSAd[card_B, slot_B], cards.mask[card_B, slot_B]
            has_B1 = mask_BA.any(-1, keepdim=True)
            logits = self._logits(w, h_BGSd[card_B, :, slot_B][:, :, None], key_BAd[:, None])[:, :, 0]
            pi = logits.masked_fill(~mask_BA[:, None], -torch.inf).softmax(-1)
            total = torch.where(has_B1[..., None], pi, 0.0).cumsum(-1)
            place_BG = (total <= uniform[card_B, :, slot_B][..., None] * total[..., -1:]).sum(-1)
            place_BG = torch.minimum(place_BG, mask_BA.sum(-1, keepdim=True).clamp(min=1) - 1)
            chosen_BGS[card_B, :, slot_B] = place_BG * has_B1
            if self.settings.variant != "parallel":
                key_BGd = picked(key_BAd[:, None], place_BG[..., None])[:, :, 0] * has_B1[..., None]
                pull_BdX = w["chosen"][slot_B].transpose(1, 2).flatten(2)
                h_BGSd += (key_BGd @ pull_BdX).view(h_BGSd.shape)
        return chosen_BGS

    def _keys(self, cards: Cards, w: Mapping[str, Tensor]) -> Tensor:
        element_Ed = padded(w["element"], (len(w["element"]) + 1, self.settings.width))
        return cards.content @ w["content"] + torch.nn.functional.embedding(
            cards.candidate % len(element_Ed), element_Ed
        )

    def _base(self, cards: Cards, w: Mapping[str, Tensor]) -> Tensor:
        product_Pd = padded(w["product"], (len(w["product"]) + 1, self.settings.width))
        context_BSd = torch.einsum("bc,scd->bsd", cards.context, w["context"])
        return w["slot"] + context_BSd + product_Pd[cards.product][:, None]

    def _logits(self, w: Mapping[str, Tensor], h_BGSd: Tensor, key_BSAd: Tensor) -> Tensor:
        query_BGSd = h_BGSd + torch.tanh(h_BGSd @ w["hidden_in"] + w["hidden_bias"]) @ w["hidden_out"]
        # One matrix product for each card and slot.
        logits: Tensor = (query_BGSd.transpose(1, 2) @ key_BSAd.transpose(2, 3)) * self.settings.width**-0.5
        return logits.transpose(1, 2)

    @torch.no_grad()
    def _order(self, cards: Cards, base_BSd: Tensor, key_BSAd: Tensor, w: Mapping[str, Tensor]) -> Tensor:
        """Return the slots of each card in the order in which they are filled, (B, S)."""
        num_cards, num_slots = base_BSd.shape[:2]
        if self.settings.variant != "confident":
            return torch.arange(num_slots, device=self.device).expand(num_cards, -1)
        count_BS = cards.mask.sum(-1)
        log_pi = self._logits(w, base_BSd[:, None], key_BSAd)[:, 0].masked_fill(~cards.mask, -30.0).log_softmax(-1)
        entropy_BS = -(log_pi.exp() * log_pi).sum(-1) / count_BS.clamp(min=2).log()
        return entropy_BS.masked_fill(count_BS == 0, torch.inf).argsort(dim=1, stable=True)

    def _before(self, cards: Cards, base_BSd: Tensor, key_BSAd: Tensor, w: Mapping[str, Tensor]) -> Tensor:
        """Return 1 where slot t comes before slot s, (B or 1, T, S)."""
        rank_BS = self._order(cards, base_BSd, key_BSAd, w).argsort(1)
        if self.settings.variant == "autoregressive":
            rank_BS = rank_BS[:1]
        return (rank_BS[:, :, None] < rank_BS[:, None, :]).to(base_BSd.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return weights and optimizer for a checkpoint."""
        return {f"{table}.{name}": w for table, values in self._tables().items() for name, w in values.items()}

    def state(self) -> dict[str, Any]:
        """Return the rest of a checkpoint, JSON-able."""
        return {"num_steps": self.optimizer.num_steps}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take the place of the generator that a checkpoint holds."""
        for table, values in self._tables().items():
            for name in values:
                values[name] = tensors[f"{table}.{name}"].to(self.device)
        self.optimizer.num_steps = state["num_steps"]

    def _tables(self) -> dict[str, dict[str, Tensor]]:
        return {"weight": self.weights, "first": self.optimizer.first, "second": self.optimizer.second}


def padded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor extended by zeros at the end of each dimension."""
    pads = [size for was, now in zip(tensor.shape, shape, strict=True) for size in (now - was, 0)]
    return torch.nn.functional.pad(tensor, pads[::-1]) if any(pads) else tensor


def picked(value_BSAd: Tensor, chosen_BGS: Tensor) -> Tensor:
    """Return the values (B, G, S, d) of the chosen candidates."""
    index = chosen_BGS.transpose(1, 2)[..., None].expand(-1, -1, -1, value_BSAd.shape[-1])
    return value_BSAd.gather(2, index).transpose(1, 2)
