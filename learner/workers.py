"""The processes that learn one model together, one for each GPU (or for each share of the CPUs).

All of them hold the same model and see the same examples in the same order. What is a sum over examples and costs most,
the core's Gram matrix, each computes for its share of the examples, and the shares are added; everything else each
computes for itself, in the same order, so it stays the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.distributed
from torch import Tensor


class Workers(Protocol):
    """This process among the others."""

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    def add(self, tensor: Tensor) -> Tensor:
        """Return the sum of this tensor over all processes; every process must call it alike."""


@dataclass(frozen=True)
class Alone:
    """One process."""

    rank: int = 0
    size: int = 1

    def add(self, tensor: Tensor) -> Tensor:
        """Return the tensor."""
        return tensor


ALONE = Alone()


class ProcessGroup:
    """The processes that `torchrun` started: gloo between CPUs, NCCL between GPUs."""

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()

    def add(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes.

        Raises:
            RuntimeError: If a process is gone.
        """
        torch.distributed.all_reduce(tensor)
        return tensor
