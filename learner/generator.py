"""The generator: an autoregressive pointer over the slots of a card, in torch. `serving.pointer` is its twin in numpy.

    k(e)   = content(e) W + embedding(e)                           key of an element; unseen ones have content alone
    h_s    = slot_s + context V_s + product + sum_{t < s} k(e_t) U_ts
    q_s    = h_s + tanh(h_s A + a) B                               query of slot s, given what the earlier slots chose
    log pi(e | context, product) = sum_s log softmax_{candidates of s}(q_s . k(e) / sqrt(d))[e_s]

All but W and A start at zero, so a new generator is uniform, and rows that are appended for new names change nothing
until they are trained.

Shapes: B cards, G creatives a card, S slots of the vocabulary, A candidates of the largest slot, F content numbers, C
context columns, P products, E elements, d width, h width of the hidden layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streams.contracts.growing import Freed


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorSettings:
    """Settings of the generator and its training."""

    width: int = 16
    """d: width of keys and queries."""
    hidden: int = 32
    """h: width of the hidden layer."""
    learning_rate: float = 0.01
    group_size: int = 16
    """G: creatives sampled for a card; each is judged against the others."""
    cards: int = 32
    """B: cards in a training step."""
    winners: int = 8
    """Refined winners of a card that are imitated in a step."""
    examples_per_step: int = 300
    """One training step for so many learned examples."""
    advantage_floor: float = 0.05
    """Smallest scale of an advantage, in logits: groups that hardly differ teach hardly anything."""
    entropy: float = 0.3
    """Weight of the entropy bonus; .02 froze the policy early."""
    leash: float = 0.1
    """Weight of the divergence from the last published generator."""
    distillation: float = 1.0
    """Weight of the imitation of refined winners."""


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
    """(B, S, A) bool: whether there is a candidate; none at all where the card lacks the slot."""
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
        self._first = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self._second = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.num_steps = 0

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
        for table in (self.weights, self._first, self._second):
            for name, shape in shapes.items():
                table[name] = padded(table[name], shape)

    def reset(self, freed: Freed) -> None:
        """Forget what was learned under names that are gone: other names take their rows."""
        for table in (self.weights, self._first, self._second):
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
        key_BSAd = self._keys(cards, w)
        chosen_BGSd = _pick(key_BSAd, chosen_BGS) * cards.mask.any(-1)[:, None, :, None]
        num_slots = len(w["slot"])
        earlier = torch.ones(num_slots, num_slots, device=self.device).triu(1)
        carried_BGSd = torch.einsum("bgtd,tsde->bgse", chosen_BGSd, w["chosen"] * earlier[:, :, None, None])
        logits = self._logits(w, self._base(cards, w)[:, None] + carried_BGSd, key_BSAd)
        # Slots that a card lacks get finite numbers that nobody reads: -inf alone would make their gradient nan.
        mask_B1SA = (cards.mask | ~cards.mask.any(-1, keepdim=True))[:, None]
        return logits.masked_fill(~mask_B1SA, -torch.inf).log_softmax(-1)

    @torch.no_grad()
    def sample(self, cards: Cards, num_creatives: int, rng: torch.Generator) -> Tensor:
        """Return sampled creatives as (B, G, S) places among the candidates; 0 where the card lacks the slot."""
        w, key_BSAd = self.weights, self._keys(cards, self.weights)
        base_BSd = self._base(cards, w)
        chosen_BGS = torch.zeros(
            len(cards.product), num_creatives, len(w["slot"]), dtype=torch.long, device=self.device
        )
        uniform = torch.rand(chosen_BGS.shape, generator=rng).to(self.device)
        carried: list[Tensor] = []
        for s in range(len(w["slot"])):
            h_BGd = base_BSd[:, s, None] + sum(k @ w["chosen"][t, s] for t, k in enumerate(carried))
            logits = self._logits(w, h_BGd.expand(-1, num_creatives, -1)[:, :, None], key_BSAd[:, s : s + 1])[:, :, 0]
            has_B11 = cards.mask[:, s].any(-1)[:, None, None]
            pi = logits.masked_fill(~cards.mask[:, None, s], -torch.inf).softmax(-1)
            total = torch.where(has_B11, pi, 0.0).cumsum(-1)
            place_BG = (total <= uniform[:, :, s, None] * total[..., -1:]).sum(-1)
            last_B1 = cards.mask[:, s].sum(-1).clamp(min=1)[:, None] - 1
            chosen_BGS[:, :, s] = torch.where(has_B11[..., 0], torch.minimum(place_BG, last_B1), 0)
            carried.append(_pick(key_BSAd[:, s : s + 1], chosen_BGS[:, :, s : s + 1])[:, :, 0] * has_B11)
        return chosen_BGS

    def _keys(self, cards: Cards, w: Mapping[str, Tensor]) -> Tensor:
        element_Ed = padded(w["element"], (len(w["element"]) + 1, self.settings.width))
        return cards.content @ w["content"] + element_Ed[cards.candidate]

    def _base(self, cards: Cards, w: Mapping[str, Tensor]) -> Tensor:
        product_Pd = padded(w["product"], (len(w["product"]) + 1, self.settings.width))
        context_BSd = torch.einsum("bc,scd->bsd", cards.context, w["context"])
        return w["slot"] + context_BSd + product_Pd[cards.product][:, None]

    def _logits(self, w: Mapping[str, Tensor], h_BGSd: Tensor, key_BSAd: Tensor) -> Tensor:
        query_BGSd = h_BGSd + torch.tanh(h_BGSd @ w["hidden_in"] + w["hidden_bias"]) @ w["hidden_out"]
        logits: Tensor = torch.einsum("bgsd,bsad->bgsa", query_BGSd, key_BSAd) / self.settings.width**0.5
        return logits

    def step(self, gradients: Mapping[str, Tensor]) -> float:
        """Make one Adam step (Kingma and Ba 2015), if the gradient is finite, and return the gradient's norm."""
        norm = float(torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt())
        if not norm < float("inf"):
            return norm
        self.num_steps += 1
        clip = min(1.0, 1.0 / (norm + 1e-12))
        first_rate, second_rate = 1.0 - 0.9**self.num_steps, 1.0 - 0.99**self.num_steps
        for name, strided in gradients.items():
            # In the order of memory that a checkpoint restores; rounding depends on it.
            gradient = strided.contiguous()
            self._first[name].lerp_(gradient * clip, 0.1)
            self._second[name].lerp_((gradient * clip).square(), 0.01)
            scale = (self._second[name] / second_rate).sqrt() + 1e-8
            self.weights[name] = (
                self.weights[name] - self.settings.learning_rate / first_rate * self._first[name] / scale
            )
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Return weights and optimizer for a checkpoint."""
        tables = {"weight": self.weights, "first": self._first, "second": self._second}
        return {f"{table}.{name}": w for table, values in tables.items() for name, w in values.items()}

    def state(self) -> dict[str, Any]:
        """Return the rest of a checkpoint, JSON-able."""
        return {"num_steps": self.num_steps}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take the place of the generator that a checkpoint holds."""
        for table, values in (("weight", self.weights), ("first", self._first), ("second", self._second)):
            for name in values:
                values[name] = tensors[f"{table}.{name}"].to(self.device)
        self.num_steps = state["num_steps"]


def padded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor extended by zeros at the end of each dimension."""
    pads = [size for was, now in zip(tensor.shape, shape, strict=True) for size in (now - was, 0)]
    return torch.nn.functional.pad(tensor, pads[::-1]) if any(pads) else tensor


def _pick(value_BSAd: Tensor, chosen_BGS: Tensor) -> Tensor:
    """Return the values (B, G, S, d) of the chosen candidates."""
    index = chosen_BGS.transpose(1, 2)[..., None].expand(-1, -1, -1, value_BSAd.shape[-1])
    return value_BSAd.gather(2, index).transpose(1, 2)
