"""The reward model: which part of a click each element of a creative, and the product itself, has earned.

Multi-instance: the creative is the bag, its elements are the instances, and one click labels all of them at once.

    logit P(click) = theta . x(context, z)                                        the core, `learner.core`
                     + product(p) . (1, context)                                  the rest, `learner.rest`
                     + sum_s element(e_s) . (1, context) + sum_{s<t} pair(e_s, e_t)
    z_s = content(e_s) + trait(e_s)                                               the traits, `learner.traits`

The core holds what generalizes and has a full covariance, the rest holds what is particular and has variances only, the
traits correct the content that the core sees. The product's appeal stands apart, so that the creative's part is uplift
and not popularity. Several memories, which differ in what they forget and in what they expect of pairs, see every
example; their weights follow their prequential log loss. The served mean is their weighted mean.

When creatives no longer earn what they are said to, the world has changed, and what is known of tastes is widened
(`learner.change_test`).

An update validates first, then learns the core (among the first examples in several passes: each, at the new logits,
replaces what the one before added), then, given the core, the rest, then the traits.

Shapes: N examples, K memories, D coefficients of the core, M draws, S slots, Q pairs of slots, F content numbers, of
which the first G stand in pairs, C context columns, P products, E elements, R pairs of elements.

References:
    Ilse et al. (2018), Attention-based Deep Multiple Instance Learning (the setting). Herbster and Warmuth (1998),
    Tracking the Best Expert (fixed share). Hill et al. (2017), An Efficient Bandit Algorithm for Realtime Multivariate
    Optimization (pairs). Russo et al. (2018), A Tutorial on Thompson Sampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.change_test import ChangeSettings, ChangeTest
from learner.core import Core, CoreSettings, Posterior
from learner.design import Layout, Rows, design
from learner.rest import DiagonalRest, Memory, RestSettings, Touched
from learner.traits import Traits
from learner.workers import ALONE, Workers
from streams.contracts.growing import Freed

MAX_PASSES = 12
"""Passes over a batch among the first examples: from a prior of 3.6 % to a click rate of 20 % Newton's steps overshoot,
and what a pass adds is right only where the logits stay."""
SETTLED = 0.02
"""Mean change of the logits, in logits, at which a pass is the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardModelSettings:
    """Settings of the reward model; every rate is per 1,000 examples."""

    memories: tuple[Memory, ...] = (Memory(), Memory(forget=0.01), Memory(pair_width=3.0))
    thompson_scale: float = 0.2
    """Spread of the posterior draws in posterior standard deviations."""
    weight_rate: float = 0.5
    """How fast the memories' weights follow their log loss."""
    weight_share: float = 0.05
    """How much weight all memories keep in any case."""
    warm_examples: int = 10_000
    """So many examples get several passes, and teach no traits."""
    variance_every: int = 10_000
    """Examples between two updates of the prior variances."""
    trait_scale: float = 0.3
    """Standard deviation of a trait before any click, in units of a content number."""
    change: ChangeSettings = field(default_factory=ChangeSettings)
    core: CoreSettings = field(default_factory=CoreSettings)
    rest: RestSettings = field(default_factory=RestSettings)

    def __post_init__(self) -> None:
        """Refuse what cannot be learned with."""
        if not self.memories:
            raise ValueError("there are no memories; expected at least one")
        if not 0.0 <= self.weight_share < 1.0:
            raise ValueError(f"weight_share is {self.weight_share}; must be in [0, 1)")


@dataclass(frozen=True)
class LearnedBatch:
    """What an update saw before it learned."""

    probability: Tensor
    """(N,) float64: click probability of each example before the batch was learned."""
    num_jittered: int
    """Factorizations that needed jitter or double precision."""


@dataclass(frozen=True)
class Effects:
    """What serving needs to know of the model: means, the core's draws, widths of the rest; in logits."""

    mean: dict[str, Tensor]
    """Core under the served mean: bias (1,), context (C,), content (S, F), content_context (S, F, C), content_pair
    (Q, G, G)."""
    draws: dict[str, Tensor]
    """The same under M draws, with a leading M."""
    product: NDArray[np.float32]
    """(P, 1 + C): effect of a product, alone and with each context column."""
    element: NDArray[np.float32]
    """(E, 1 + C): the same of an element."""
    element_sd: NDArray[np.float32]
    """(E, 1 + C): posterior standard deviations."""
    trait: NDArray[np.float32]
    """(E, F): what to add to an element's content."""
    trait_root: NDArray[np.float32]
    """(E, F, F): lower Cholesky factor of its covariance."""
    pairs: NDArray[np.int64]
    """(R, 2): pairs of elements with an effect of their own."""
    pair: NDArray[np.float32]
    """(R,): these effects."""
    pair_sd: NDArray[np.float32]
    """(R,): posterior standard deviations, what the memories differ by included."""


class RewardModel:
    """Core, rest, traits and the weights of the memories. Learning is the only thing that changes it."""

    def __init__(
        self,
        settings: RewardModelSettings | None = None,
        device: str | torch.device = "cpu",
        workers: Workers = ALONE,
    ) -> None:
        self.settings = settings = settings or RewardModelSettings()
        self.device = torch.device(device)
        self.num_examples = 0
        self.core = Core([memory.forget for memory in settings.memories], settings.core, self.device)
        self.rest = DiagonalRest(settings.memories, settings.rest)
        self.traits = Traits(settings.trait_scale)
        self.change = ChangeTest(settings.change)
        self._workers = workers
        self._variance_due = settings.variance_every
        num_memories = len(settings.memories)
        self._weight_K = torch.full((num_memories,), 1.0 / num_memories, dtype=torch.float64)
        self._num_elements = 0

    @property
    def layout(self) -> Layout:
        """Sizes of the core."""
        return self.core.layout

    @property
    def num_jittered(self) -> int:
        """Factorizations so far that needed jitter or double precision."""
        return self.core.num_jittered

    @property
    def memory_weights(self) -> list[float]:
        """Weight of each memory; they add up to 1."""
        weights: list[float] = self._weight_K.tolist()
        return weights

    def grow(self, *, slots: int, content: int, context: int, products: int, elements: int) -> None:
        """Make room for new names and numbers; what was learned stays.

        Raises:
            ValueError: If a size has shrunk.
        """
        layout = Layout.capped(
            slots=slots,
            content=content,
            context=context,
            max_coefficients=self.settings.core.max_coefficients,
            least=self.core.layout,
        )
        self.core.grow(layout)
        self.rest.grow(products=products, elements=elements, context=context)
        self.traits.grow(elements, content)
        self._num_elements = elements

    def reset(self, freed: Freed) -> None:
        """Forget what was learned under names that are gone: other names take their rows and columns."""
        elements, products = (np.array(rows, np.int64) for rows in (freed.elements, freed.products))
        self.rest.reset("element", elements)
        self.rest.reset("product", products)
        self.rest.reset_context(np.array(freed.context, np.int64))
        self.traits.reset(elements)
        if freed.slots or freed.context:
            self.core.reset(slots=freed.slots, context=freed.context)

    def reset_content(self) -> None:
        """Forget what was learned of content: other numbers stand for it now. Products and single elements stay."""
        self.core.widen(1.0)
        self.traits.reset(np.arange(self._num_elements))

    def _design(self, rows: Rows) -> Tensor:
        content_NSF = self.traits.corrected(rows)
        return design(rows.context.to(self.device), content_NSF.to(self.device), self.layout)

    def predict(self, rows: Rows) -> Tensor:
        """Return the click probability of each example under the served mean, (N,) float64."""
        rest_NK = torch.from_numpy(self.rest.touch(rows, self.num_examples).logits())
        logit_NK = self.core.logits(self._design(rows)).cpu() + rest_NK
        return torch.sigmoid(logit_NK @ self._weight_K)

    def learn(
        self, rows: Rows, label_N: Tensor, weight_N: Tensor, provisional_N: Tensor | None = None, late_share: float = 0
    ) -> LearnedBatch:
        """Learn from N examples.

        Args:
            rows: The examples; with several workers, those of all of them in the same order everywhere.
            label_N: 1 if clicked, else 0.
            weight_N: Weight of each example, >= 0.
            provisional_N: Whether a negative may still be clicked: its weight is corrected (`provisional_weight`).
            late_share: Share of the clicks that come after the wait.

        Raises:
            FloatingPointError: If the result is not finite; nothing has been learned then.
        """
        x_ND = self._design(rows)
        touched = self.rest.touch(rows, self.num_examples)
        rest_NK = torch.from_numpy(touched.logits())
        label_N, weight_N = label_N.double().cpu(), weight_N.double().cpu()
        logit_NK = self.core.logits(x_ND).cpu() + rest_NK
        probability_NK = torch.sigmoid(logit_NK)
        served_N = torch.sigmoid(logit_NK @ self._weight_K)
        if provisional_N is not None:
            corrected_N = weight_N * provisional_weight(served_N, late_share)
            weight_N = torch.where(provisional_N.cpu() & (label_N == 0), corrected_N, weight_N)
        jittered = self.core.num_jittered
        creative_N = (logit_NK - self._appeals(x_ND, touched)) @ self._weight_K
        learned, logit_NK = self._learn_core(x_ND, logit_NK, rest_NK, label_N, weight_N)
        touched.learn((logit_NK - rest_NK).numpy(), label_N.numpy(), weight_N.numpy())
        if not all(np.isfinite(mean).all() for mean in touched.mean.values()):
            raise FloatingPointError(f"{len(rows)} examples gave effects that are not finite; nothing learned")
        self.core.take(learned)
        self.rest.put(touched, self.num_examples)
        self.num_examples += len(rows)
        if self.num_examples >= self._variance_due:
            self.core.learn_variances()
            self._variance_due = self.num_examples + self.settings.variance_every
        self._weigh_memories(probability_NK, label_N, weight_N)
        if self.num_examples >= self.settings.warm_examples and self.settings.trait_scale > 0:
            mean_N = (self.core.logits(x_ND).cpu() + torch.from_numpy(touched.logits())) @ self._weight_K
            core = self._core_effects(self._core_mean())
            self.traits.learn(mean_N.numpy(), rows, label_N.numpy(), weight_N.numpy(), core)
        if self.num_examples > self.settings.change.warm_examples and self.change.observe(
            creative_N, served_N, label_N, weight_N
        ):
            self.core.widen(self.settings.change.widening)
            self.rest.widen(self.settings.change.widening)
        return LearnedBatch(served_N, self.core.num_jittered - jittered)

    def _appeals(self, x_ND: Tensor, touched: Touched) -> Tensor:
        """Return the part of the logits (N, K) that product and context explain without any creative."""
        columns = 1 + self.layout.context  # bias and context come first
        core_NK = (x_ND[:, :columns] @ self.core.theta_KD[:, :columns].float().T).double().cpu()
        return core_NK + torch.from_numpy(touched.appeal())

    def _learn_core(
        self, x_ND: Tensor, logit_NK: Tensor, rest_NK: Tensor, label_N: Tensor, weight_N: Tensor
    ) -> tuple[Posterior, Tensor]:
        """Return the core's posterior after the batch and the whole logits (N, K) that it gives."""
        keep = [(1.0 - f) ** (len(x_ND) / 1000.0) for f in (memory.forget for memory in self.settings.memories)]
        if self.num_examples == 0:
            # Far from the prior a first step would overshoot: begin at the click rate of the batch.
            prior = torch.sigmoid(torch.tensor(self.settings.core.bias_mean, dtype=torch.float64))
            rate = (weight_N @ label_N + prior) / (weight_N.sum() + 1.0)
            logit_NK = torch.logit(rate).expand_as(logit_NK)
        own = slice(self._workers.rank, None, self._workers.size)
        for _ in range(MAX_PASSES if self.num_examples < self.settings.warm_examples else 1):
            before_NK = logit_NK
            learned = self.core.learned(
                x_ND[own],
                logit_NK=logit_NK[own].to(self.device),
                rest_NK=rest_NK[own].to(self.device),
                mean_logit_N=(logit_NK @ self._weight_K)[own].to(self.device),
                label_N=label_N[own].to(self.device),
                weight_N=weight_N[own].to(self.device),
                keep=keep,
                add=self._workers.add,
            )
            logit_NK = self.core.logits(x_ND, learned.theta).cpu() + rest_NK
            # The same number everywhere: a process that made another pass would wait for the others in vain.
            moved = self._workers.add((logit_NK - before_NK).abs().mean().to(self.device))
            if float(moved) / self._workers.size < SETTLED:
                break
        return learned, logit_NK

    def _weigh_memories(self, probability_NK: Tensor, label_N: Tensor, weight_N: Tensor) -> None:
        likelihood_NK = torch.where(label_N[:, None] > 0, probability_NK, 1.0 - probability_NK)
        loss_K = -(weight_N[:, None] * likelihood_NK.clamp(min=1e-12).log()).sum(0)
        weight_K = torch.softmax(self._weight_K.log() - self.settings.weight_rate * loss_K, 0)
        share = 1.0 - (1.0 - self.settings.weight_share) ** (len(label_N) / 1000.0)
        self._weight_K = (1.0 - share) * weight_K + share / len(weight_K)

    def _core_mean(self) -> Tensor:
        """Return the served coefficients of the core, (D,) float32."""
        return (self._weight_K.to(self.device) @ self.core.theta_KD).float()

    def _core_draws(self, num_draws: int, rng: torch.Generator) -> Tensor:
        """Return M posterior draws of the core's coefficients, (M, D) float32, spread by `thompson_scale`."""
        # Stratified: a memory of weight w gets M w draws, up to one.
        place_M = (torch.rand((), generator=rng, dtype=torch.float64) + torch.arange(num_draws)) / num_draws
        memory_M = torch.searchsorted(self._weight_K.cumsum(0), place_M.clamp(max=1.0 - 1e-9))
        memory_M = memory_M.clamp(max=len(self._weight_K) - 1).to(self.device)
        normal_DM = torch.randn(self.layout.size, num_draws, generator=rng).to(self.device)
        return self._core_mean() + self.settings.thompson_scale * self.core.noise(memory_M, normal_DM)

    def _core_effects(self, theta_D: Tensor) -> dict[str, Tensor]:
        """Return coefficients (..., D) by group, in the groups' shapes."""
        columns = {name: index.flatten().to(self.device) for name, index in self.layout.columns.items()}
        lead = theta_D.shape[:-1]
        return {name: theta_D[..., columns[name]].reshape(*lead, *shape) for name, shape in self.layout.shapes.items()}

    def effects(self, num_draws: int, rng: torch.Generator, *, content_size: int, num_products: int) -> Effects:
        """Return what a snapshot holds of the model.

        Args:
            num_draws: M.
            rng: Decides the draws.
            content_size: F of the snapshot; zeros where the model uses fewer numbers.
            num_products: P.
        """
        free = content_size - self.layout.content

        def wide(theta_D: Tensor) -> dict[str, Tensor]:
            core = self._core_effects(theta_D)
            pad = torch.nn.functional.pad
            return core | {
                "content": pad(core["content"], (0, free)),
                "content_context": pad(core["content_context"], (0, 0, 0, free)),
            }

        weight_K = self._weight_K.numpy()
        now = self.num_examples
        product, _ = self.rest.now("product", num_products, now)
        element, element_variance = self.rest.now("element", self._num_elements, now)
        pair, pair_variance = (table[..., 0] for table in self.rest.now("pair", len(self.rest.pairs), now))
        mean_pair_R = weight_K @ pair
        pair_variance_R = weight_K @ (pair_variance + (pair - mean_pair_R) ** 2)
        root_EFF = np.zeros((self._num_elements, content_size, content_size))
        mean_EF = np.zeros((self._num_elements, content_size))
        size = self.layout.content
        root_EFF[:, :size, :size] = self.traits.roots(self._num_elements)
        mean_EF[:, :size] = self.traits.means(self._num_elements)
        return Effects(
            mean=wide(self._core_mean()),
            draws=wide(self._core_draws(num_draws, rng)),
            product=np.tensordot(weight_K, product, 1).astype(np.float32),
            element=np.tensordot(weight_K, element, 1).astype(np.float32),
            element_sd=np.sqrt(np.tensordot(weight_K, element_variance, 1)).astype(np.float32),
            trait=mean_EF.astype(np.float32),
            trait_root=root_EFF.astype(np.float32),
            pairs=self.rest.pairs,
            pair=mean_pair_R.astype(np.float32),
            pair_sd=np.sqrt(pair_variance_R).astype(np.float32),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return everything learned, for a checkpoint."""
        parts = {"core": self.core.tensors(), "rest": self.rest.tensors(), "traits": self.traits.tensors()}
        return {"weights": self._weight_K} | {f"{p}.{n}": w for p, part in parts.items() for n, w in part.items()}

    def state(self) -> dict[str, Any]:
        """Return the rest of a checkpoint, JSON-able."""
        return {
            "change": self.change.state(),
            "core": self.core.state(),
            "num_examples": self.num_examples,
            "variance_due": self._variance_due,
            "num_elements": self._num_elements,
        }

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take the place of the model that a checkpoint holds."""
        parts: dict[str, dict[str, Tensor]] = {"core": {}, "rest": {}, "traits": {}}
        for name, tensor in tensors.items():
            part, _, own = name.partition(".")
            if part in parts:
                parts[part][own] = tensor
        self.change.restore(state["change"])
        self.core.restore(parts["core"], state["core"])
        self.rest.restore(parts["rest"])
        self.traits.restore(parts["traits"])
        self._weight_K = tensors["weights"]
        self.num_examples, self._variance_due = state["num_examples"], state["variance_due"]
        self._num_elements = state["num_elements"]


def provisional_weight(probability_N: Tensor, late_share: float) -> Tensor:
    """Return the weight of provisional negatives: the probability that no click comes after the wait.

    Of impressions with click probability p, p (1 - q) have clicked before the wait ended and are no provisional
    negatives, p q will still click. So a provisional negative is truly one with probability (1 - p) / (1 - p (1 - q)).
    At q = 1 (no wait) this is the fake-negative weighting of Ktena et al. (2019) up to a common factor.

    Args:
        probability_N: Model's click probability of each example, before it is learned.
        late_share: q, the share of clicks that come after the wait, in [0, 1].
    """
    return (1.0 - probability_N) / (1.0 - probability_N * (1.0 - late_share))
