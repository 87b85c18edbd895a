"""An ensemble of small networks that see a card as a bag of elements, with three ways to pool them.

An element is the vector of its id plus a linear map of its content; one hidden layer takes it together with the context
to the element's logit. Appeal of product and context stands apart. Pooled are the elements' logits:

- additive: their sum, and a bilinear term of every pair of elements;
- attention: their mean, weighted by gated attention over the elements of the card (Ilse et al. 2018), times S, so that
  even attention would be the sum;
- noisy-or: each element gets the click by itself, or not; a card is clicked if one of them does.

Members differ by their beginnings and by the bootstrap: each example counts Poisson(1) times for each member. They are
trained by Adam on the newest labels and on replay of all before; each request is decided by a member drawn for it.

References:
    Ilse, Tomczak and Welling (2018), Attention-based Deep Multiple Instance Learning, arXiv 1802.04712.
    Osband et al. (2016), Deep Exploration via Bootstrapped DQN, arXiv 1602.04621.

Shapes: N requests or labels, M members, S slots, Q = S (S - 1) / 2 pairs of slots, E elements, A candidates, G content
numbers, C context numbers, P products, H hidden numbers, L numbers of the attention.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from typing import ClassVar, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.regret.policies.base import BenchPolicy, CatalogNow, Choice, Facts, Ints, Labels, RequestBatch
from benchmarks.regret.policies.content import ContentTable
from benchmarks.regret.policies.search import best_creatives

MEMBERS: Final = 8
HIDDEN: Final = 16
ATTENTION: Final = 8
STEPS: Final = 24
"""Minibatches for every 1,000 labels."""
MINIBATCH: Final = 512
NEWEST: Final = 0.4
"""Share of a minibatch from the newest labels."""
LEARNING_RATE: Final = 0.004
"""At the beginning; a third of it after 80,000 labels."""
BIAS: Final = -3.3
"""Prior mean of the bias: a click rate of 3.6 %."""
PRIOR_SD: Final = {
    "bias": 1.0,
    "product": 0.7,
    "context": 0.2,
    "product_context": 0.2,
    "id": 0.3,
    "content": 0.3,
    "hidden_context": 0.3,
    "value": 0.2,
    "pair": 0.1,
    "tanh": 0.5,
    "gate": 0.5,
    "attend": 0.5,
}
"""Standard deviation of the weights' prior; they begin at half of it times a normal number."""
_ALL: Final = slice(None)


def additive(logit_MNS: Tensor, appeal_MN: Tensor) -> Tensor:
    """Return the (M, N) log-odds of a click if elements add up."""
    return appeal_MN + logit_MNS.sum(-1)


def attention(logit_MNS: Tensor, score_MNS: Tensor, appeal_MN: Tensor) -> Tensor:
    """Return the (M, N) log-odds of a click if elements count by the softmax of their attention scores."""
    return appeal_MN + logit_MNS.shape[-1] * (score_MNS.softmax(-1) * logit_MNS).sum(-1)


def noisy_or(logit_MNS: Tensor, appeal_MN: Tensor) -> Tensor:
    """Return the (M, N) log-odds of 1 - prod_s (1 - p_s), p_s the sigmoid of appeal + logit - log S."""
    each_MNS = appeal_MN[..., None] + logit_MNS - math.log(logit_MNS.shape[-1])
    none_MN = functional.softplus(each_MNS).sum(-1)  # minus the logarithm of the probability of no click
    return none_MN + torch.log(-torch.expm1(-none_MN))


class _NeuralMil(BenchPolicy):
    """Members learn together, as one batch of matrix products; a pooling says what its elements come to."""

    shapes: ClassVar[dict[str, str]] = {}
    """Name of a weight of the pooling -> the sizes of it, as letters."""

    def __init__(self, facts: Facts, seed: int) -> None:
        super().__init__(facts, seed)
        self._content = ContentTable(facts)
        self._pairs = list(itertools.combinations(range(facts.num_slots), 2))
        sizes = {
            "S": facts.num_slots, "E": facts.num_elements, "G": self._content.size, "C": facts.context_size,
            "P": facts.num_products, "Q": len(self._pairs), "H": HIDDEN, "L": ATTENTION, "1": 1,
        }  # fmt: skip
        shapes = {
            "bias": "1", "product": "P", "context": "C", "product_context": "PC",
            "id": "SEH", "content": "SGH", "hidden_context": "CH", "value": "SH", **self.shapes,
        }  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        self._weights = {
            name: PRIOR_SD[name] / 2 * torch.randn(MEMBERS, *(sizes[x] for x in shape), generator=generator)
            for name, shape in shapes.items()
        }
        self._weights["bias"] += BIAS
        self._optimizer = torch.optim.Adam([w.requires_grad_() for w in self._weights.values()], lr=LEARNING_RATE)
        self._replay: list[Tensor] = []

    def catalog(self, catalog: CatalogNow) -> None:
        """Take the content of new elements."""
        self._content.see(catalog)

    @torch.no_grad()
    def choose(self, requests: RequestBatch) -> Choice:
        """Show what is best for a member drawn for each request."""
        member_N = self.rng.integers(MEMBERS, size=len(requests))
        context_NC = torch.from_numpy(requests.context(self.facts))
        chosen_NS = np.empty(requests.candidates.shape[:2], np.int64)
        for m in range(MEMBERS):
            rows = np.flatnonzero(member_N == m)
            if len(rows):
                chosen_NS[rows] = self._best(context_NC[rows], requests.candidates[rows], slice(m, m + 1))
        return Choice(chosen_NS)

    def learn(self, labels: Labels) -> None:
        """Take some steps on the newest labels and on all before them."""
        if not len(labels):
            return
        weight_NM = self.rng.poisson(1.0, size=(len(labels), MEMBERS)) * labels.weight[:, None]
        newest = [
            torch.from_numpy(labels.requests.product),
            torch.from_numpy(labels.requests.context(self.facts)),
            torch.from_numpy(labels.chosen),
            torch.from_numpy(labels.label.astype(np.float32)),
            torch.from_numpy(weight_NM.astype(np.float32)),
        ]
        self._replay = [torch.cat(c) for c in zip(self._replay, newest, strict=True)] if self._replay else newest
        for _ in range(max(1, round(STEPS * len(labels) / 1000))):
            self._step(len(labels))

    def _step(self, num_newest: int) -> None:
        size = len(self._replay[0])
        num_new = round(NEWEST * MINIBATCH)
        rows = [self.rng.integers(size - num_newest, size, num_new), self.rng.integers(size, size=MINIBATCH - num_new)]
        at = torch.from_numpy(np.concatenate(rows))
        product, context, chosen, label, weight = (column[at] for column in self._replay)
        logit_MN = self._logit(product, context, chosen)
        loss_MN = functional.binary_cross_entropy_with_logits(
            logit_MN, label.expand_as(logit_MN), weight=weight.T, reduction="none"
        )
        prior = torch.stack(
            [((w - BIAS if n == "bias" else w) / PRIOR_SD[n]).square().sum() / 2 for n, w in self._weights.items()]
        ).sum()
        for group in self._optimizer.param_groups:
            group["lr"] = LEARNING_RATE / math.sqrt(1 + size / 10_000)
        self._optimizer.zero_grad(set_to_none=True)
        (loss_MN.mean(dim=1).sum() + prior / size).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def _appeal(self, product_N: Tensor, context_NC: Tensor) -> Tensor:
        """Return the (M, N) part of the logit that no element changes."""
        w = self._weights
        by_product_MN = w["product"][:, product_N] + (w["product_context"][:, product_N] * context_NC).sum(-1)
        return w["bias"] + w["context"] @ context_NC.T + by_product_MN

    def _vectors(self, members: slice = _ALL) -> Tensor:
        """Return the (M, S, E, H) vectors of the elements."""
        content_SEG = torch.from_numpy(self._content.table_SEG)
        return self._weights["id"][members] + content_SEG @ self._weights["content"][members]

    def _hidden(self, context_NC: Tensor, element_NS: Tensor, members: slice = _ALL) -> Tensor:
        """Return the (M, N, S, H) hidden layer of elements in their contexts."""
        element_MNSH = self._vectors(members)[:, torch.arange(element_NS.shape[1]), element_NS]
        context_MNH = context_NC @ self._weights["hidden_context"][members]
        return functional.gelu(element_MNSH + context_MNH[:, :, None])

    def _values(self, hidden_MNSH: Tensor, members: slice = _ALL) -> Tensor:
        """Return the (M, N, S) logits of the elements."""
        return (hidden_MNSH * self._weights["value"][members, None]).sum(-1)

    def _candidates(self, context_NC: Tensor, candidates_NSA: Ints, member: slice) -> Tensor:
        """Return the (1, N A, S, H) hidden layer of all candidates: the a-th of all slots are taken for a card."""
        card_NS = torch.from_numpy(candidates_NSA).transpose(1, 2).flatten(0, 1)
        context_NC = context_NC.repeat_interleave(candidates_NSA.shape[2], dim=0)
        return self._hidden(context_NC, card_NS, member)

    @abstractmethod
    def _logit(self, product_N: Tensor, context_NC: Tensor, chosen_NS: Tensor) -> Tensor:
        """Return the (M, N) log-odds of a click on cards that were shown."""

    @abstractmethod
    def _best(self, context_NC: Tensor, candidates_NSA: Ints, member: slice) -> Ints:
        """Return the (N, S) elements of the cards that one member likes best."""


class NeuralAdditive(_NeuralMil):
    """Elements and pairs of elements add up."""

    shapes: ClassVar = {"pair": "QHH"}

    def _logit(self, product_N: Tensor, context_NC: Tensor, chosen_NS: Tensor) -> Tensor:
        value_MNS = self._values(self._hidden(context_NC, chosen_NS))
        first_NQ, second_NQ = chosen_NS[:, [s for s, _ in self._pairs]], chosen_NS[:, [t for _, t in self._pairs]]
        pair_MNQ = self._pair_table()[:, torch.arange(len(self._pairs)), first_NQ, second_NQ]
        return additive(value_MNS, self._appeal(product_N, context_NC)) + pair_MNQ.sum(-1)

    def _best(self, context_NC: Tensor, candidates_NSA: Ints, member: slice) -> Ints:
        value_1NS = self._values(self._candidates(context_NC, candidates_NSA, member), member)
        score_NSA = _by_candidate(value_1NS, candidates_NSA).contiguous().numpy()
        only_N = np.zeros(len(candidates_NSA), np.int64)
        return best_creatives(score_NSA, self._pair_table(member).numpy(), only_N, candidates_NSA)

    def _pair_table(self, members: slice = _ALL) -> Tensor:
        """Return (M, Q, E, E): what the elements of two slots add together."""
        vector_MSEH = self._vectors(members)
        first_MQEH, second_MQEH = (
            vector_MSEH[:, [s for s, _ in self._pairs]],
            vector_MSEH[:, [t for _, t in self._pairs]],
        )
        return first_MQEH @ self._weights["pair"][members] @ second_MQEH.transpose(2, 3)


class NeuralAttention(_NeuralMil):
    """Elements count by gated attention."""

    shapes: ClassVar = {"tanh": "HL", "gate": "HL", "attend": "L1"}

    def _logit(self, product_N: Tensor, context_NC: Tensor, chosen_NS: Tensor) -> Tensor:
        hidden_MNSH = self._hidden(context_NC, chosen_NS)
        return attention(self._values(hidden_MNSH), self._scores(hidden_MNSH), self._appeal(product_N, context_NC))

    def _best(self, context_NC: Tensor, candidates_NSA: Ints, member: slice) -> Ints:
        hidden_1NSH = self._candidates(context_NC, candidates_NSA, member)
        value_NSA = _by_candidate(self._values(hidden_1NSH, member), candidates_NSA)
        score_NSA = _by_candidate(self._scores(hidden_1NSH, member), candidates_NSA)
        return _taken(candidates_NSA, best_weighted_mean(value_NSA, score_NSA))

    def _scores(self, hidden_MNSH: Tensor, members: slice = _ALL) -> Tensor:
        """Return the (M, N, S) attention scores of the elements."""
        w, flat_MNH = {name: self._weights[name][members] for name in self.shapes}, hidden_MNSH.flatten(1, 2)
        score_MN1 = (torch.tanh(flat_MNH @ w["tanh"]) * torch.sigmoid(flat_MNH @ w["gate"])) @ w["attend"]
        return score_MN1.view(hidden_MNSH.shape[:3])


class NeuralNoisyOr(_NeuralMil):
    """Each element may get the click by itself, so the best card is that of the best elements."""

    def _logit(self, product_N: Tensor, context_NC: Tensor, chosen_NS: Tensor) -> Tensor:
        return noisy_or(self._values(self._hidden(context_NC, chosen_NS)), self._appeal(product_N, context_NC))

    def _best(self, context_NC: Tensor, candidates_NSA: Ints, member: slice) -> Ints:
        value_1NS = self._values(self._candidates(context_NC, candidates_NSA, member), member)
        return _taken(candidates_NSA, _by_candidate(value_1NS, candidates_NSA).argmax(2))


def best_weighted_mean(value_NSA: Tensor, score_NSA: Tensor) -> Tensor:
    """Return the (N, S) places whose mean value, weighted by exp(score), is the largest.

    A mean above r exists if and only if weight x (value - r), summed over the slots' best, is above 0. So the places
    that are best for any r give the next r, until it is the largest (Dinkelbach 1967), after three or four rounds.
    """
    weight_NSA = torch.exp(score_NSA - score_NSA.amax((1, 2), keepdim=True))
    mean_N11 = value_NSA.mean((1, 2), keepdim=True)
    for _ in range(8):
        place_NS1 = (weight_NSA * (value_NSA - mean_N11)).argmax(2, keepdim=True)
        weight_NS1 = weight_NSA.gather(2, place_NS1)
        mean_N11 = (weight_NS1 * value_NSA.gather(2, place_NS1)).sum(1, keepdim=True) / weight_NS1.sum(1, keepdim=True)
    return place_NS1[..., 0]


def _by_candidate(value_1NS: Tensor, candidates_NSA: Ints) -> Tensor:
    """Return (N, S, A) values of candidates that were computed as cards."""
    num_requests, num_slots, width = candidates_NSA.shape
    return value_1NS.view(num_requests, width, num_slots).transpose(1, 2)


def _taken(candidates_NSA: Ints, place_NS: Tensor) -> Ints:
    """Return the (N, S) element numbers at places among the candidates."""
    taken: Ints = np.take_along_axis(candidates_NSA, place_NS[..., None].numpy(), axis=2)[..., 0]
    return taken
