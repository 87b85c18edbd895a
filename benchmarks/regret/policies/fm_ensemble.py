"""An ensemble of factorization machines with Thompson sampling, after AutoCO (Chen et al. 2021).

Fields are the product, the context and each slot's element; an element's vector is that of its id plus a linear map of
its content, and every pair of fields interacts by the product of their vectors. AutoCO searches an operator for each
pair and draws its embeddings from a variational posterior; here the operator is the product, and the draws are members
of an ensemble that differ by their beginnings and by the bootstrap (each example counts Poisson(1) times for each
member). Trained by Adam on replay of all labels so far, half of each minibatch from the newest.

References:
    Chen et al. (2021), Automated Creative Optimization for E-Commerce Advertising, arXiv 2103.00436.

Shapes: N requests or labels, M members, S slots, Q slot pairs, E elements, G content numbers, C context numbers,
P products, K embedding numbers.
"""

from __future__ import annotations

import itertools
import math
from typing import Final

import numpy as np
import torch
from torch import Tensor

from benchmarks.regret.policies.base import BenchPolicy, CatalogNow, Choice, Facts, Labels, RequestBatch
from benchmarks.regret.policies.content import ContentTable
from benchmarks.regret.policies.search import best_creatives

MEMBERS: Final = 16
EMBEDDING: Final = 8
STEPS: Final = 12
"""Minibatches for every 1,000 labels."""
MINIBATCH: Final = 512
LEARNING_RATE: Final = 0.002
PRIOR_SD: Final = {
    "bias": 1.0,
    "product": 0.7,
    "context": 0.2,
    "element": 0.08,
    "content": 0.04,
    "product_vector": 0.2,
    "context_vector": 0.2,
    "element_vector": 0.2,
    "content_vector": 0.2,
}


class FmEnsemble(BenchPolicy):
    """Members learn together, as one batch of matrix products."""

    def __init__(self, facts: Facts, seed: int) -> None:
        super().__init__(facts, seed)
        self._content = ContentTable(facts)
        S, E, G, C, P, K = (
            facts.num_slots, facts.num_elements, self._content.size, facts.context_size, facts.num_products, EMBEDDING,
        )  # fmt: skip
        shapes = {
            "bias": (1,), "product": (P,), "context": (C,), "element": (S, E), "content": (S, G),
            "product_vector": (P, K), "context_vector": (C, K),
            "element_vector": (S, E, K), "content_vector": (S, G, K),
        }  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        self._weights = {
            name: (PRIOR_SD[name] / 2 * torch.randn(MEMBERS, *shape, generator=generator)).requires_grad_()
            for name, shape in shapes.items()
        }
        with torch.no_grad():
            self._weights["bias"] -= 3.3
        self._optimizer = torch.optim.Adam(self._weights.values(), lr=LEARNING_RATE)
        self._pairs = list(itertools.combinations(range(S), 2))
        self._replay: list[tuple[Tensor, ...]] = []
        self._size = 0
        self._publish()

    def catalog(self, catalog: CatalogNow) -> None:
        """Take the content of new elements."""
        self._content.see(catalog)
        self._publish()

    def choose(self, requests: RequestBatch) -> Choice:
        """Show what is best for a member drawn for each request."""
        member_N = self.rng.integers(MEMBERS, size=len(requests))
        context_NC = requests.context(self.facts)
        query_NK = self._product_MPK[member_N, requests.product] + np.einsum(
            "nc,nck->nk", context_NC, self._context_MCK[member_N]
        )
        slots = np.arange(self.facts.num_slots)[:, None]
        at = member_N[:, None, None], slots, requests.candidates
        score_NSA = self._main_MSE[at] + np.einsum("nsak,nk->nsa", self._vector_MSEK[at], query_NK)
        return Choice(best_creatives(score_NSA, self._pair_MQEE, member_N, requests.candidates))

    def learn(self, labels: Labels) -> None:
        """Take some steps on the newest labels and on all before them."""
        if not len(labels):
            return
        weight_NM = self.rng.poisson(1.0, size=(len(labels), MEMBERS)) * labels.weight[:, None]
        newest = tuple(
            torch.from_numpy(np.ascontiguousarray(column))
            for column in (
                labels.requests.product,
                labels.requests.context(self.facts),
                labels.chosen,
                labels.label.astype(np.float32),
                weight_NM.astype(np.float32),
            )
        )
        self._replay.append(newest)
        self._size += len(labels)
        for _ in range(max(1, round(STEPS * len(labels) / 1000))):
            self._step(newest, len(labels))
        self._publish()

    def _step(self, newest: tuple[Tensor, ...], num_newest: int) -> None:
        old = [self._replay[i] for i in self.rng.integers(len(self._replay), size=4)]
        parts = [(newest, MINIBATCH // 2)] + [(part, MINIBATCH // 8) for part in old]
        taken = []
        for part, size in parts:
            rows = torch.from_numpy(self.rng.integers(len(part[0]), size=size))
            taken.append([column[rows] for column in part])
        product, context, chosen, label, weight = (torch.cat(columns) for columns in zip(*taken, strict=True))
        logit_MN = self._logit(product, context, chosen)
        loss_MN = torch.nn.functional.binary_cross_entropy_with_logits(
            logit_MN, label.expand_as(logit_MN), weight=weight.T, reduction="none"
        )
        prior = torch.stack(
            [
                ((w + 3.3 if name == "bias" else w) / PRIOR_SD[name]).square().sum() / 2
                for name, w in self._weights.items()
            ]
        ).sum()
        loss = loss_MN.mean(dim=1).sum() + prior / self._size
        for group in self._optimizer.param_groups:
            group["lr"] = LEARNING_RATE / math.sqrt(1 + self._size / 50_000)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def _logit(self, product: Tensor, context: Tensor, chosen: Tensor) -> Tensor:
        """Return (M, N) logits of shown cards."""
        w, slots = self._weights, torch.arange(self.facts.num_slots)
        content_NSG = torch.from_numpy(self._content.table_SEG)[slots, chosen]
        linear_MN = w["bias"] + w["product"][:, product] + w["context"] @ context.T
        linear_MN = linear_MN + w["element"][:, slots, chosen].sum(-1)
        linear_MN = linear_MN + torch.einsum("nsg,msg->mn", content_NSG, w["content"])
        element_MNSK = w["element_vector"][:, slots, chosen] + torch.einsum(
            "nsg,msgk->mnsk", content_NSG, w["content_vector"]
        )
        others_MN2K = torch.stack([w["product_vector"][:, product], context @ w["context_vector"]], dim=2)
        vector_MNFK = torch.cat([element_MNSK, others_MN2K], dim=2)
        # The sum over pairs: half of the square of the sum, less the squares.
        pairs_MNK = vector_MNFK.sum(2).square() - vector_MNFK.square().sum(2)
        return linear_MN + pairs_MNK.sum(-1) / 2

    def _publish(self) -> None:
        """Make the tables that choices look things up in."""
        w = {name: weight.detach().numpy() for name, weight in self._weights.items()}
        content_SEG = self._content.table_SEG
        self._product_MPK, self._context_MCK = w["product_vector"], w["context_vector"]
        self._main_MSE = w["element"] + np.einsum("seg,msg->mse", content_SEG, w["content"])
        self._vector_MSEK = w["element_vector"] + content_SEG @ w["content_vector"]
        pairs = [self._vector_MSEK[:, s] @ self._vector_MSEK[:, t].swapaxes(1, 2) for s, t in self._pairs]
        E = self.facts.num_elements
        self._pair_MQEE = np.stack(pairs, axis=1) if pairs else np.zeros((MEMBERS, 0, E, E), np.float32)
