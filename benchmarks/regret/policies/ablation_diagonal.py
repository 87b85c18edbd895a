"""Ours with a diagonal core: a variance for each coefficient instead of the full covariance.

The same features and priors, learned one example after the other by an extended Kalman step given the rest's logit, as
the rest itself is.

Shapes: N examples, K memories, D coefficients, M draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

from benchmarks.regret.policies.genco import Genco
from learner.core import Core, Posterior, Sum
from learner.design import Layout
from learner.online import LearnerSettings, OnlineLearner


class DiagonalCore(Core):
    """Means and variances; what the full core keeps as sums is not used."""

    def grow(self, layout: Layout) -> None:
        """Make room for new coefficients, at their prior."""
        old_layout = self.layout
        variance_KD = getattr(self, "variance_KD", None)
        super().grow(layout)
        grown_KD = torch.stack([1.0 / self._precision(j) for j in self._rate_K])
        if variance_KD is not None and variance_KD.shape[1]:
            columns = layout.old_columns(old_layout) if layout != old_layout else slice(None)
            grown_KD[:, columns] = variance_KD
        self.variance_KD = grown_KD

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
        """Return the posterior after a batch; see `Core.learned`."""
        means, variances = [], []
        for k, kept in enumerate(keep):
            prior_D, prior_mean_D = 1.0 / self._precision(self._rate_K[k]), self._prior_mean(self.layout)
            mean_D = prior_mean_D + (self.theta_KD[k] - prior_mean_D) * (1.0 - (1.0 - kept) / 2)
            variance_D = prior_D + (self.variance_KD[k] - prior_D) * kept
            _filter(
                x_ND.double().numpy(),
                np.ascontiguousarray(rest_NK[:, k].numpy()),
                label_N.numpy(),
                weight_N.numpy(),
                mean_D.numpy(),
                variance_D.numpy(),
            )
            means.append(mean_D)
            variances.append(variance_D)
        return Posterior(variances, self._g_KD, torch.stack(means), [])

    def take(self, posterior: Posterior) -> None:
        """Take over a posterior."""
        self.variance_KD, self.theta_KD = torch.stack(posterior.statistics), posterior.theta

    def learn_variances(self) -> None:
        """Leave the prior variances where they are."""

    def widen(self, share: float) -> None:
        """Forget a share of what the examples told."""
        prior_KD = torch.stack([1.0 / self._precision(j) for j in self._rate_K])
        prior_mean_D = self._prior_mean(self.layout)
        self.theta_KD = prior_mean_D + (self.theta_KD - prior_mean_D) * (1.0 - share / 2)
        self.variance_KD = prior_KD + (self.variance_KD - prior_KD) * (1.0 - share)

    def noise(self, memory_M: Tensor, normal_DM: Tensor) -> Tensor:
        """Return deviations of posterior draws from their means, (M, D) float32."""
        return (self.variance_KD[memory_M].sqrt() * normal_DM.T).float()


class Diagonal(Genco):
    """Ours with this core."""

    def make_learner(self, seed: int) -> OnlineLearner:
        """Return a learner with a diagonal core."""
        learner = OnlineLearner(LearnerSettings(seed=seed))
        model = learner.reward_model
        model.core = DiagonalCore(
            [memory.forget for memory in model.settings.memories], model.settings.core, model.device
        )
        return learner


@njit(cache=True)
def _filter(x_ND, offset_N, label_N, weight_N, mean_D, variance_D):  # type: ignore[no-untyped-def]
    for n in range(len(x_ND)):
        logit, variance = offset_N[n], 0.0
        for d in range(len(mean_D)):
            x = x_ND[n, d]
            logit += mean_D[d] * x
            variance += variance_D[d] * x * x
        p = 1.0 / (1.0 + np.exp(-logit))
        w = weight_N[n] * p * (1.0 - p)
        step = weight_N[n] * (label_N[n] - p) / (1.0 + w * variance)
        shrink = w / (1.0 + w * variance)
        for d in range(len(mean_D)):
            gain = variance_D[d] * x_ND[n, d]
            mean_D[d] += gain * step
            variance_D[d] -= gain * gain * shrink
