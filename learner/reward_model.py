"""The reward model: which part of a click each element of a creative, and the product itself, has earned.

Multi-instance: the creative is the bag, its elements are the instances, and one click labels all of them at once.

    logit P(click) = theta . x,   x = (1, context, product, and for every slot content, content x context, element;
                                       for every pair of slots content x content), see `learner.design`

A Bayesian logistic regression with full covariance, because the policy shows what it believes in and so the features
that it learns from are strongly correlated. Each memory k keeps sums over examples in information form, prior apart:

    H_k <- (1 - f_k) H_k + sum s w x x'
    g_k <- (1 - f_k) g_k + sum s [w eta_k + y - p_k] x
    theta_k = (T_k + H_k)^-1 (g_k + T_k m0)

with eta_k, p_k the memory's logit and click probability before the batch, y the label, s the example's weight, w =
p (1 - p) at the mean logit of the memories, T_k the prior precisions, m0 zero but for the bias, and f_k = 1 -
(1 - f)^(n / 1000) the forgetting of a batch of n examples. In the first examples a second pass at the new logits
replaces what the first pass added.

Prior variances are learned for each group of n coefficients (one EM step of the marginal likelihood, v0 the starting
variance): v = (sum theta^2 + sum Sigma_ii + a v0) / (n + a), a = max(4, n / 10).

The memories' weights follow their prequential log loss. The served mean is their weighted mean; a draw is that mean
plus `thompson_scale` times a posterior draw of one memory, memories drawn by weight, stratified over the draws.

Shapes: N examples, K memories, D coefficients, M draws, S slots, F content numbers, C context columns.

References:
    Ilse et al. (2018), Attention-based Deep Multiple Instance Learning (the setting). Bishop (2006), Pattern
    Recognition and Machine Learning, 3.5 and 4.5 (evidence, Laplace). Herbster and Warmuth (1998), Tracking the Best
    Expert (fixed share).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from learner.design import Layout, Rows, design

LEARNED = ("product", "content", "content_context", "content_pair", "element")
"""Groups whose prior variance is learned; bias and context are too few to learn one from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PriorScales:
    """Standard deviations of the coefficients before any click, in logits."""

    bias: float = 1.0
    context: float = 0.2
    content: float = 0.04
    content_context: float = 0.016
    content_pair: float = 0.012
    product: float = 0.7
    element: float = 0.08


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardModelSettings:
    """Settings of the reward model; every rate is per 1,000 examples."""

    memories: tuple[float, ...] = (0.0, 0.01)
    """What each memory forgets, in [0, 1)."""
    thompson_scale: float = 0.2
    """Spread of the posterior draws in posterior standard deviations; .3 is level: -.012 +- .012 regret in twelve
    paired runs of 50,000 impressions in two worlds like the demo's."""
    weight_rate: float = 0.5
    """How fast the memories' weights follow their log loss."""
    weight_share: float = 0.05
    """How much weight all memories keep in any case."""
    warm_examples: int = 10_000
    """So many examples get two passes."""
    variance_every: int = 10_000
    """Examples between two updates of the prior variances."""
    bias_mean: float = -3.3
    """Log odds of a click before any example."""
    max_elements: int = 1024
    """Elements with an effect of their own; later ones have only what their content says."""
    scales: PriorScales = field(default_factory=PriorScales)

    def __post_init__(self) -> None:
        """Refuse what cannot be learned with."""
        if not self.memories or not all(0.0 <= f < 1.0 for f in self.memories):
            raise ValueError(f"memories are {self.memories}; expected at least one, each in [0, 1)")
        if not 0.0 <= self.weight_share < 1.0:
            raise ValueError(f"weight_share is {self.weight_share}; must be in [0, 1)")


@dataclass(frozen=True)
class LearnedBatch:
    """What an update saw before it learned."""

    probability: Tensor
    """(N,) float64: click probability of each example before the batch was learned."""
    num_jittered: int
    """Factorizations that needed jitter or double precision."""


class RewardModel:
    """The core block. Learning is the only thing that changes it; `draw` and `predict` do not."""

    def __init__(self, settings: RewardModelSettings | None = None, device: str | torch.device = "cpu") -> None:
        self.settings = settings or RewardModelSettings()
        self.device = torch.device(device)
        self.layout = Layout()
        self.num_examples = 0
        self.num_jittered = 0
        self._variance_due = self.settings.variance_every
        num_memories = len(self.settings.memories)
        self._weight_K = torch.full((num_memories,), 1.0 / num_memories, dtype=torch.float64, device=self.device)
        self._H_KDD = torch.zeros(num_memories, 0, 0, device=self.device)
        self._g_KD = torch.zeros(num_memories, 0, dtype=torch.float64, device=self.device)
        self._theta_KD = torch.zeros(num_memories, 0, dtype=torch.float64, device=self.device)
        # Prior variance of each learned group, one row a memory.
        self._variance_KG = self._starting_variance().repeat(num_memories, 1)
        self._factor: list[Tensor | None] = [None] * num_memories
        self.grow(Layout())

    def _starting_variance(self) -> Tensor:
        scales = [getattr(self.settings.scales, name) ** 2 for name in LEARNED]
        return torch.tensor(scales, dtype=torch.float64, device=self.device)

    @property
    def memory_weights(self) -> list[float]:
        """Weight of each memory; they add up to 1."""
        weights: list[float] = self._weight_K.tolist()
        return weights

    def grow(self, layout: Layout) -> None:
        """Make room for new coefficients; the old ones keep what they have learned.

        Raises:
            ValueError: If a size has shrunk.
        """
        if layout.elements > self.settings.max_elements:
            layout = Layout(layout.slots, layout.content, layout.context, layout.products, self.settings.max_elements)
        if layout == self.layout and self._g_KD.shape[1]:
            return
        num_memories, size = len(self._weight_K), layout.size
        H_KDD = torch.zeros(num_memories, size, size, device=self.device)
        g_KD = torch.zeros(num_memories, size, dtype=torch.float64, device=self.device)
        theta_KD = self._prior_mean(layout).repeat(num_memories, 1)
        if self._g_KD.shape[1]:
            old = layout.old_columns(self.layout).to(self.device)
            H_KDD[:, old[:, None], old[None, :]] = self._H_KDD
            g_KD[:, old] = self._g_KD
            # A coefficient without data stays at its prior mean, and moves no other.
            theta_KD[:, old] = self._theta_KD
        self.layout, self._H_KDD, self._g_KD, self._theta_KD = layout, H_KDD, g_KD, theta_KD
        self._factor = [None] * num_memories

    def _prior_mean(self, layout: Layout) -> Tensor:
        mean_D = torch.zeros(layout.size, dtype=torch.float64, device=self.device)
        mean_D[0] = self.settings.bias_mean
        return mean_D

    def _precision(self, k: int) -> Tensor:
        parts = []
        for name, shape in self.layout.shapes.items():
            if name in LEARNED:
                variance = float(self._variance_KG[k, LEARNED.index(name)])
            else:
                variance = getattr(self.settings.scales, name) ** 2
            parts.append(torch.full((torch.Size(shape).numel(),), 1.0 / variance, dtype=torch.float64))
        return torch.cat(parts).to(self.device)

    def predict(self, rows: Rows) -> Tensor:
        """Return the click probability of each example under the posterior mean, (N,) float64."""
        logit_NK = design(rows, self.layout).times(self._theta_KD.float()).double()
        return torch.sigmoid(logit_NK @ self._weight_K)

    def learn(
        self, rows: Rows, label_N: Tensor, weight_N: Tensor, provisional_N: Tensor | None = None, late_share: float = 0
    ) -> LearnedBatch:
        """Learn from N examples.

        Args:
            rows: The examples.
            label_N: 1 if clicked, else 0.
            weight_N: Weight of each example, >= 0.
            provisional_N: Whether a negative may still be clicked: its weight is corrected (`provisional_weight`).
            late_share: Share of the clicks that come after the wait.

        Raises:
            FloatingPointError: If the result is not finite; nothing has been learned then.
        """
        settings, x = self.settings, design(rows, self.layout)
        label_N, weight_N = label_N.double(), weight_N.double()
        logit_NK = x.times(self._theta_KD.float()).double()
        probability_NK = torch.sigmoid(logit_NK)
        served_N = torch.sigmoid(logit_NK @ self._weight_K)
        if provisional_N is not None:
            corrected_N = weight_N * provisional_weight(served_N, late_share)
            weight_N = torch.where(provisional_N & (label_N == 0), corrected_N, weight_N)
        keep = [(1.0 - f) ** (len(rows) / 1000.0) for f in settings.memories]
        jittered = self.num_jittered
        for _ in range(2 if self.num_examples < settings.warm_examples else 1):
            mean_N = torch.sigmoid(logit_NK @ self._weight_K)
            slope_N = (mean_N * (1.0 - mean_N)).clamp(min=1e-4)
            gram = x.gram((slope_N * weight_N).float())
            response_NK = slope_N[:, None] * logit_NK + label_N[:, None] - torch.sigmoid(logit_NK)
            push_KD = x.transposed_times((weight_N[:, None] * response_NK).float()).double()
            H = [self._H_KDD[k] * keep[k] + gram for k in range(len(keep))]
            g_KD = self._g_KD * torch.tensor(keep, dtype=torch.float64, device=self.device)[:, None] + push_KD
            solved = [self._solve(k, H[k], g_KD[k]) for k in range(len(keep))]
            theta_KD = torch.stack([theta for theta, _ in solved])
            if not torch.isfinite(theta_KD).all():
                raise FloatingPointError(f"{len(rows)} examples gave coefficients that are not finite; nothing learned")
            logit_NK = x.times(theta_KD.float()).double()
        self._H_KDD, self._g_KD, self._theta_KD = torch.stack(H), g_KD, theta_KD
        self._factor = [factor for _, factor in solved]
        self._weigh_memories(probability_NK, label_N, weight_N)
        self.num_examples += len(rows)
        if self.num_examples >= self._variance_due:
            self._learn_variances()
            self._variance_due = self.num_examples + settings.variance_every
        return LearnedBatch(served_N, self.num_jittered - jittered)

    def _solve(self, k: int, H_DD: Tensor, g_D: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior mean and the Cholesky factor of the posterior precision."""
        # The factor is kept row by row, as a checkpoint holds it: with LAPACK's columns a draw rounds differently.
        precision_D = self._precision(k)
        factor = self._cholesky(H_DD, precision_D)
        b_D = (g_D + precision_D * self._prior_mean(self.layout)).to(factor.dtype)
        return torch.cholesky_solve(b_D[:, None], factor)[:, 0].double(), factor.float().contiguous()

    def _cholesky(self, H_DD: Tensor, precision_D: Tensor) -> Tensor:
        """Factor prior plus statistics: single precision, then jitter, then double precision with more of it."""
        A_DD = H_DD.clone()
        A_DD.diagonal().add_(precision_D.float())
        scale = float(A_DD.diagonal().mean())
        for dtype, jitter in (
            (torch.float32, 0.0),
            (torch.float32, 1e-5),
            (torch.float64, 1e-5),
            (torch.float64, 1e-2),
        ):
            B_DD = A_DD.to(dtype)
            if jitter:
                B_DD = B_DD.clone()
                B_DD.diagonal().add_(jitter * scale)
                self.num_jittered += 1
            factor, info = torch.linalg.cholesky_ex(B_DD)
            if int(info) == 0:
                result: Tensor = factor
                return result
        raise FloatingPointError("the posterior precision has no Cholesky factor, even with jitter; nothing learned")

    def _weigh_memories(self, probability_NK: Tensor, label_N: Tensor, weight_N: Tensor) -> None:
        likelihood_NK = torch.where(label_N[:, None] > 0, probability_NK, 1.0 - probability_NK)
        loss_K = -(weight_N[:, None] * likelihood_NK.clamp(min=1e-12).log()).sum(0)
        weight_K = torch.softmax(self._weight_K.log() - self.settings.weight_rate * loss_K, 0)
        share = 1.0 - (1.0 - self.settings.weight_share) ** (len(label_N) / 1000.0)
        self._weight_K = (1.0 - share) * weight_K + share / len(weight_K)

    def _learn_variances(self) -> None:
        start_G = self._starting_variance()
        for k in range(len(self._weight_K)):
            variance_D = torch.cholesky_inverse(self._factor_of(k)).diagonal().double()
            for i, name in enumerate(LEARNED):
                columns = self.layout.columns[name].flatten().to(self.device)
                if len(columns):
                    a = max(4.0, 0.1 * len(columns))
                    squares = (self._theta_KD[k, columns] ** 2 + variance_D[columns]).sum()
                    self._variance_KG[k, i] = (squares + a * start_G[i]) / (len(columns) + a)

    def _factor_of(self, k: int) -> Tensor:
        factor = self._factor[k]
        if factor is None:
            factor = self._factor[k] = self._cholesky(self._H_KDD[k], self._precision(k)).float().contiguous()
        return factor

    def mean(self) -> Tensor:
        """Return the served coefficients, (D,) float32."""
        return (self._weight_K @ self._theta_KD).float()

    def draw(self, num_draws: int, rng: torch.Generator) -> Tensor:
        """Return M posterior draws of the coefficients, (M, D) float32, spread by `thompson_scale`."""
        # Stratified: a memory of weight w gets M w draws, up to one.
        place_M = (torch.rand((), generator=rng, dtype=torch.float64) + torch.arange(num_draws)) / num_draws
        memory_M = torch.searchsorted(self._weight_K.cumsum(0).cpu(), place_M.clamp(max=1.0 - 1e-9))
        memory_M = memory_M.clamp(max=len(self._weight_K) - 1).to(self.device)
        normal_DM = torch.randn(self.layout.size, num_draws, generator=rng).to(self.device)
        out_MD = self.mean().repeat(num_draws, 1)
        for k in range(len(self._weight_K)):
            of_M = memory_M == k
            if of_M.any():
                noise_DM = torch.linalg.solve_triangular(self._factor_of(k).T, normal_DM[:, of_M], upper=True)
                out_MD[of_M] += self.settings.thompson_scale * noise_DM.T
        return out_MD

    def effects(self, theta_D: Tensor, *, content_size: int, num_elements: int) -> dict[str, Tensor]:
        """Return coefficients (..., D) as the tensors of a snapshot, zeros where no coefficient exists.

        Returns:
            bias (...), product (..., P), context (..., C), content (..., S, F), content_context (..., S, F, C),
            content_pair (..., Q, F, F), element (..., E), with F = `content_size` and E = `num_elements`.
        """
        lead = theta_D.shape[:-1]
        out = {
            name: theta_D[..., self.layout.columns[name].flatten().to(self.device)].reshape(*lead, *shape)
            for name, shape in self.layout.shapes.items()
        }
        free = content_size - self.layout.content
        out["bias"] = out["bias"][..., 0]
        out["content"] = torch.nn.functional.pad(out["content"], (0, free))
        out["content_context"] = torch.nn.functional.pad(out["content_context"], (0, 0, 0, free))
        out["content_pair"] = torch.nn.functional.pad(out["content_pair"], (0, free, 0, free))
        out["element"] = torch.nn.functional.pad(out["element"], (0, num_elements - self.layout.elements))
        return out

    def credits(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return the credit of each slot's element and its posterior standard deviation, both (N, S), in logits.

        The credits of a row add up to the creative part of its logit; pair terms are shared half and half. The variance
        is that of the mixture of memories: the weighted mean of their variances.
        """
        x, layout = design(rows, self.layout), self.layout
        dense, size = layout.dense_size, layout.size
        X_ND = torch.cat([x.dense, x.dense.new_zeros(len(rows), size + 1 - dense)], 1)
        X_ND.scatter_(1, x.hot + dense, 1.0)
        credits, deviations = [], []
        for slot in range(layout.slots):
            share_D = torch.zeros(size + 1, device=self.device)
            for name in ("content", "content_context"):
                share_D[layout.columns[name][slot].flatten().to(self.device)] = 1.0
            for q in range(layout.shapes["content_pair"][0]):
                if slot in _pair(q):
                    share_D[layout.columns["content_pair"][q].flatten().to(self.device)] = 0.5
            part_ND = X_ND * share_D
            own_N = x.hot[:, 1 + slot] + dense
            part_ND.scatter_(1, own_N[:, None], 1.0)
            part_ND = part_ND[:, :size]
            credits.append(part_ND @ self.mean())
            spread = [
                torch.linalg.solve_triangular(self._factor_of(k), part_ND.T, upper=False).square().sum(0)
                for k in range(len(self._factor))
            ]
            deviations.append((self._weight_K.float() @ torch.stack(spread)).sqrt())
        return torch.stack(credits, 1), torch.stack(deviations, 1)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything learned, for a checkpoint."""
        return {
            "statistics": self._H_KDD,
            "pushes": self._g_KD,
            "theta": self._theta_KD,
            "weights": self._weight_K,
            "variances": self._variance_KG,
            # The factor cannot be computed again from the rest: the prior variances may have moved since.
            **{f"factor.{k}": factor for k, factor in enumerate(self._factor) if factor is not None},
        }

    def state(self) -> dict[str, Any]:
        """Return the rest of a checkpoint, JSON-able."""
        layout = self.layout
        return {
            "layout": [layout.slots, layout.content, layout.context, layout.products, layout.elements],
            "num_examples": self.num_examples,
            "num_jittered": self.num_jittered,
            "variance_due": self._variance_due,
        }

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take the place of the model that a checkpoint holds."""
        self.layout = Layout(*state["layout"])
        self.num_examples, self.num_jittered = state["num_examples"], state["num_jittered"]
        self._variance_due = state["variance_due"]
        on = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        self._H_KDD, self._g_KD, self._theta_KD = on["statistics"], on["pushes"], on["theta"]
        self._weight_K, self._variance_KG = on["weights"], on["variances"]
        self._factor = [on.get(f"factor.{k}") for k in range(len(self._weight_K))]


def _pair(q: int) -> tuple[int, int]:
    """Return the slots (s, t), s < t, of pair q = t (t - 1) / 2 + s."""
    t = (1 + math.isqrt(1 + 8 * q)) // 2
    return q - t * (t - 1) // 2, t


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
