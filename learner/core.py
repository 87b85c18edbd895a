"""The core block: a Bayesian logistic regression with full covariance over what generalizes.

The policy shows what it believes in, so the features that it learns from are strongly correlated; a diagonal posterior
would misjudge what is known. Each memory k keeps sums over examples in information form, the prior apart:

    H_k <- (1 - f_k) H_k + sum s w x x'
    g_k <- (1 - f_k) g_k + sum s [w (eta_k - o_k) + y - p_k] x
    theta_k = (T_k + H_k)^-1 (g_k + T_k m0)

with eta_k, p_k the memory's logit and click probability before the batch, o_k the part of the logit that the rest
explains, y the label, s the example's weight, w = p (1 - p) at the mean logit of the memories, so that one Gram matrix
serves them all, T_k the prior precisions, m0 zero but for the bias, and f_k = 1 - (1 - f)^(n / 1000) the forgetting of
a batch of n examples.

Prior variances are learned for each group of n coefficients (one EM step of the marginal likelihood, v0 the starting
variance): v = (sum theta^2 + sum Sigma_ii + a v0) / (n + a), a = max(4, n / 10).

Memories that forget at the same rate have the same H; with the same prior variances (theta^2 is their mean) they share
one covariance, and differ in g alone.

H and g are sums over examples, so several workers add theirs (`Sum`). Everything is matrix products and one Cholesky
factorization a rate of forgetting, on whatever device the tensors are.

Shapes: N examples, K memories, J rates of forgetting, D coefficients, M draws.

References:
    Bishop (2006), Pattern Recognition and Machine Learning, 3.5 and 4.5 (evidence, Laplace).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from learner.design import Layout, slot_pairs

LEARNED = ("content", "content_context", "content_pair")
"""Groups whose prior variance is learned; bias and context are too few to learn one from."""

Sum = Callable[[Tensor], Tensor]
"""Adds a tensor over all workers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PriorScales:
    """Standard deviations of the coefficients before any click, in logits."""

    bias: float = 1.0
    context: float = 0.2
    content: float = 0.04
    content_context: float = 0.016
    content_pair: float = 0.012


@dataclass(frozen=True, kw_only=True, slots=True)
class CoreSettings:
    """Settings of the core."""

    bias_mean: float = -3.3
    """Log odds of a click before any example."""
    max_coefficients: int = 4096
    """Cap on D; pairs give way first, see `learner.design`."""
    learn_variances: bool = True
    scales: PriorScales = field(default_factory=PriorScales)


@dataclass(frozen=True)
class Posterior:
    """A posterior that a batch led to, not taken over yet."""

    statistics: list[Tensor]
    """H of each rate of forgetting."""
    push: Tensor
    """g, (K, D)."""
    theta: Tensor
    """(K, D)"""
    factor: list[Tensor]
    """Cholesky factor of each rate's precision."""


class Core:
    """Sums, means and covariances of all memories."""

    def __init__(self, forget: Sequence[float], settings: CoreSettings, device: torch.device) -> None:
        """Begin at the prior.

        Args:
            forget: What each memory forgets for each 1,000 examples.
            settings: Prior and size.
            device: Where everything is kept.
        """
        rates = list(dict.fromkeys(forget))
        self._rate_K = [rates.index(f) for f in forget]
        num_memories, num_rates = len(forget), len(rates)
        self.settings = settings
        self.device = device
        self.layout = Layout()
        self.num_jittered = 0
        """Factorizations so far that needed jitter or double precision."""
        self.theta_KD = torch.zeros(num_memories, 0, dtype=torch.float64, device=device)
        self._H_JDD = torch.zeros(num_rates, 0, 0, device=device)
        self._g_KD = torch.zeros(num_memories, 0, dtype=torch.float64, device=device)
        # Prior variance of each learned group.
        self._variance_JG = self._starting_variance().repeat(num_rates, 1)
        self._factor: list[Tensor | None] = [None] * num_rates
        self.grow(Layout())

    def _starting_variance(self) -> Tensor:
        scales = [getattr(self.settings.scales, name) ** 2 for name in LEARNED]
        return torch.tensor(scales, dtype=torch.float64, device=self.device)

    def grow(self, layout: Layout) -> None:
        """Make room for new coefficients; the old ones keep what they have learned.

        Raises:
            ValueError: If a size has shrunk.
        """
        if layout == self.layout and self._g_KD.shape[1]:
            return
        num_memories, size = len(self.theta_KD), layout.size
        H_JDD = torch.zeros(len(self._H_JDD), size, size, device=self.device)
        g_KD = torch.zeros(num_memories, size, dtype=torch.float64, device=self.device)
        theta_KD = self._prior_mean(layout).repeat(num_memories, 1)
        if self._g_KD.shape[1]:
            old = layout.old_columns(self.layout).to(self.device)
            H_JDD[:, old[:, None], old[None, :]] = self._H_JDD
            g_KD[:, old] = self._g_KD
            # A coefficient without data stays at its prior mean, and moves no other.
            theta_KD[:, old] = self.theta_KD
        self.layout, self._H_JDD, self._g_KD, self.theta_KD = layout, H_JDD, g_KD, theta_KD
        self._factor = [None] * len(H_JDD)

    def _prior_mean(self, layout: Layout) -> Tensor:
        mean_D = torch.zeros(layout.size, dtype=torch.float64, device=self.device)
        mean_D[0] = self.settings.bias_mean
        return mean_D

    def _precision(self, j: int) -> Tensor:
        parts = []
        for name, shape in self.layout.shapes.items():
            if name in LEARNED:
                variance = float(self._variance_JG[j, LEARNED.index(name)])
            else:
                variance = getattr(self.settings.scales, name) ** 2
            parts.append(torch.full((torch.Size(shape).numel(),), 1.0 / variance, dtype=torch.float64))
        return torch.cat(parts).to(self.device)

    def logits(self, x_ND: Tensor, theta_KD: Tensor | None = None) -> Tensor:
        """Return x . theta of each memory, (N, K) float64."""
        theta_KD = self.theta_KD if theta_KD is None else theta_KD
        return (x_ND @ theta_KD.float().T).double()

    def learned(
        self,
        x_ND: Tensor,
        *,
        logit_NK: Tensor,
        rest_NK: Tensor,
        mean_logit_N: Tensor,
        label_N: Tensor,
        weight_N: Tensor,
        keep: Sequence[float],
        add: Sum,
    ) -> Posterior:
        """Return the posterior after a batch; nothing changes before `take`.

        Args:
            x_ND: Rows of the examples that this worker adds up.
            logit_NK: Whole logit of each memory at which the likelihood is expanded.
            rest_NK: The part of it that the rest explains.
            mean_logit_N: Mean logit of the memories; gives the curvature.
            label_N: 0 or 1.
            weight_N: Weight of each example, >= 0.
            keep: What each memory keeps of its sums, in (0, 1].
            add: Adds over the workers.

        Raises:
            FloatingPointError: If the result is not finite.
        """
        mean_N = torch.sigmoid(mean_logit_N)
        slope_N = (mean_N * (1.0 - mean_N)).clamp(min=1e-4)
        scaled_ND = x_ND * (slope_N * weight_N).sqrt().float()[:, None]
        gram = add(scaled_ND.T @ scaled_ND)
        response_NK = slope_N[:, None] * (logit_NK - rest_NK) + label_N[:, None] - torch.sigmoid(logit_NK)
        push_KD = add((x_ND.T @ (weight_N[:, None] * response_NK).float()).double().T.contiguous())
        H = [H_DD * keep[self._rate_K.index(j)] + gram for j, H_DD in enumerate(self._H_JDD)]
        g_KD = self._g_KD * torch.tensor(keep, dtype=torch.float64, device=self.device)[:, None] + push_KD
        theta_KD, factors = self._solve(H, g_KD)
        if not torch.isfinite(theta_KD).all():
            raise FloatingPointError(f"{len(x_ND)} examples gave coefficients that are not finite; nothing learned")
        return Posterior(H, g_KD, theta_KD, factors)

    def take(self, posterior: Posterior) -> None:
        """Take over a posterior."""
        self._H_JDD, self._g_KD, self.theta_KD = torch.stack(posterior.statistics), posterior.push, posterior.theta
        self._factor = list(posterior.factor)

    def _solve(self, H: Sequence[Tensor], g_KD: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the posterior means (K, D) and the Cholesky factors of the posterior precisions, one a rate."""
        precisions = [self._precision(j) for j in range(len(H))]
        factors = [self._cholesky(H_DD, precision_D) for H_DD, precision_D in zip(H, precisions, strict=True)]
        prior_mean_D, means = self._prior_mean(self.layout), []
        for g_D, j in zip(g_KD, self._rate_K, strict=True):
            b_D = (g_D + precisions[j] * prior_mean_D).to(factors[j].dtype)
            means.append(torch.cholesky_solve(b_D[:, None], factors[j])[:, 0].double())
        # The factor is kept row by row, as a checkpoint holds it: with LAPACK's columns a draw rounds differently.
        return torch.stack(means), [factor.float().contiguous() for factor in factors]

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

    def learn_variances(self) -> None:
        """Move the prior variances of all groups by one EM step."""
        if not self.settings.learn_variances:
            return
        start_G = self._starting_variance()
        for j in range(len(self._variance_JG)):
            variance_D = torch.cholesky_inverse(self.factor(j)).diagonal().double()
            square_D = (self.theta_KD[[k for k, rate in enumerate(self._rate_K) if rate == j]] ** 2).mean(0)
            for i, name in enumerate(LEARNED):
                columns = self.layout.columns[name].flatten().to(self.device)
                if len(columns):
                    a = max(4.0, 0.1 * len(columns))
                    squares = (square_D[columns] + variance_D[columns]).sum()
                    self._variance_JG[j, i] = (squares + a * start_G[i]) / (len(columns) + a)

    def widen(self, share: float) -> None:
        """Forget a share of all that the examples told, in every memory."""
        self._H_JDD, self._g_KD = self._H_JDD * (1.0 - share), self._g_KD * (1.0 - share)
        self.theta_KD, factors = self._solve(list(self._H_JDD), self._g_KD)
        self._factor = list(factors)

    def reset(self, *, slots: Sequence[int], context: Sequence[int]) -> None:
        """Bring all coefficients of slots and context columns back to the prior: their names are gone."""
        columns = self.layout.columns
        gone = [columns["context"][list(context)], columns["content_context"][:, :, list(context)]]
        gone += [columns[name][list(slots)] for name in ("content", "content_context")]
        first, second = slot_pairs(self.layout.slots)
        pairs = [q for q, pair in enumerate(zip(first, second, strict=True)) if set(pair) & set(slots)]
        gone.append(columns["content_pair"][pairs])
        gone_X = torch.tensor(sorted({j for index in gone for j in index.flatten().tolist()}), device=self.device)
        # The others keep their means: what is gone is held at its own.
        H_KDX = self._H_JDD[self._rate_K][:, :, gone_X].double()
        self._g_KD -= torch.einsum("kdx,kx->kd", H_KDX, self.theta_KD[:, gone_X])
        self._H_JDD[:, gone_X, :] = 0.0
        self._H_JDD[:, :, gone_X] = 0.0
        self._g_KD[:, gone_X] = 0.0
        self.theta_KD[:, gone_X] = 0.0
        self._factor = [None] * len(self._factor)

    def factor(self, j: int) -> Tensor:
        """Return the lower Cholesky factor of the posterior precision at rate j, (D, D)."""
        factor = self._factor[j]
        if factor is None:
            factor = self._factor[j] = self._cholesky(self._H_JDD[j], self._precision(j)).float().contiguous()
        return factor

    def noise(self, memory_M: Tensor, normal_DM: Tensor) -> Tensor:
        """Return deviations of posterior draws from their means, (M, D) float32.

        Args:
            memory_M: Which memory's posterior each draw is from.
            normal_DM: Standard normal numbers.
        """
        out_MD = torch.empty(len(memory_M), self.layout.size, device=self.device)
        rate_M = torch.tensor(self._rate_K, device=self.device)[memory_M]
        for j in range(len(self._H_JDD)):
            of_M = rate_M == j
            if of_M.any():
                out_MD[of_M] = torch.linalg.solve_triangular(self.factor(j).T, normal_DM[:, of_M], upper=True).T
        return out_MD

    def tensors(self) -> dict[str, Tensor]:
        """Return everything learned, for a checkpoint."""
        return {
            "statistics": self._H_JDD,
            "pushes": self._g_KD,
            "theta": self.theta_KD,
            "variances": self._variance_JG,
            # The factor cannot be computed again from the rest: the prior variances may have moved since.
            **{f"factor.{j}": factor for j, factor in enumerate(self._factor) if factor is not None},
        }

    def state(self) -> dict[str, Any]:
        """Return the rest of a checkpoint, JSON-able."""
        layout = self.layout
        return {
            "layout": [layout.slots, layout.content, layout.context, layout.pair_content],
            "num_jittered": self.num_jittered,
        }

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take the place of the core that a checkpoint holds."""
        self.layout = Layout(*state["layout"])
        self.num_jittered = state["num_jittered"]
        on = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        self._H_JDD, self._g_KD, self.theta_KD = on["statistics"], on["pushes"], on["theta"]
        self._variance_JG = on["variances"]
        self._factor = [on.get(f"factor.{j}") for j in range(len(self._H_JDD))]
