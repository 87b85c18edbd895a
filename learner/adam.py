"""Adam for tensors that grow and are checkpointed by name.

References:
    Kingma and Ba (2015), Adam: A Method for Stochastic Optimization.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

FIRST_RATE, SECOND_RATE = 0.1, 0.01
MAX_NORM = 1.0


class Adam:
    """Steps of Adam on gradients that are clipped to norm 1; whoever owns the weights may append zeros to all three."""

    def __init__(self, weights: dict[str, Tensor], learning_rate: float) -> None:
        self.weights, self.learning_rate = weights, learning_rate
        self.first = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.second = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.num_steps = 0

    def step(self, gradients: Mapping[str, Tensor]) -> float:
        """Move the weights, unless a gradient is not finite, and return the norm of all gradients together."""
        norm = float(torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt())
        if not math.isfinite(norm):
            return norm
        self.num_steps += 1
        clip = min(1.0, MAX_NORM / (norm + 1e-12))
        rate = self.learning_rate / (1.0 - (1.0 - FIRST_RATE) ** self.num_steps)
        second_scale = 1.0 / (1.0 - (1.0 - SECOND_RATE) ** self.num_steps)
        for name, strided in gradients.items():
            # In the order of memory that a checkpoint restores; rounding depends on it.
            gradient = strided.contiguous() * clip
            first = self.first[name].lerp_(gradient, FIRST_RATE)
            second = self.second[name].mul_(1.0 - SECOND_RATE).addcmul_(gradient, gradient, value=SECOND_RATE)
            # A new tensor: the last published weights must stay as they are.
            scale = (second * second_scale).sqrt_().add_(1e-8)
            self.weights[name] = self.weights[name].addcdiv(first, scale, value=-rate)
        return norm
