"""The processes that learn one model together, one for each GPU (or for each share of the CPUs).

All of them hold the same model and see the same examples in the same order. What is a sum over examples and costs most,
the core's Gram matrix, each computes for its share of the examples, and the shares are added; everything else each
computes for itself, in the same order, so it stays the same everywhere. That holds on machines of one kind: processors
that round differently would let the copies drift apart.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Protocol

import torch.distributed
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from streams.contracts.settings import ConfigurationError

STEP_TIMEOUT: Final = timedelta(seconds=60)
"""A process that keeps the others waiting this long within an update is given up, and with it the run."""
IDLE_TIMEOUT: Final = timedelta(days=365)
"""Between two messages there may be no traffic for as long as it likes; a process that died is noticed at once."""


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
    """The processes that `torchrun` started: sums over gloo between CPUs, over NCCL between GPUs.

    Messages, bytes from rank 0 to all others, go over a gloo group of their own: they wait on CPUs, and for long.
    """

    def __init__(self, device: str, step_timeout: timedelta = STEP_TIMEOUT) -> None:
        """Meet the other processes; returns when all are there.

        Args:
            device: That of this process, see `own_device`.
            step_timeout: How long a sum, and a message to be taken, waits for the slowest process.

        Raises:
            RuntimeError: If they do not come within the timeout.
        """
        self.device = device
        is_cpu = torch.device(device).type == "cpu"
        store, self.rank, self.size = next(rendezvous("env://", timeout=step_timeout))
        torch.distributed.init_process_group(
            "gloo" if is_cpu else "nccl",
            store=torch.distributed.PrefixStore(_attempt(), store),  # type: ignore[attr-defined]
            rank=self.rank,
            world_size=self.size,
            timeout=step_timeout,
        )
        self._step_timeout = step_timeout
        self._messages = torch.distributed.new_group(backend="gloo", timeout=IDLE_TIMEOUT)

    def add(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes.

        Raises:
            RuntimeError: If a process is gone, or does not come within the timeout.
        """
        torch.distributed.all_reduce(tensor)
        return tensor

    def send(self, kind: int, data: bytes = b"") -> None:
        """Send a message from rank 0 to all others.

        Raises:
            RuntimeError: If one of them is gone, or does not take it within the timeout.
        """
        self._broadcast(torch.tensor([kind, len(data)]), self._step_timeout)
        if data:
            self._broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8), self._step_timeout)

    def receive(self) -> tuple[int, bytes]:
        """Wait for the next message of rank 0 and return its kind and its bytes.

        Raises:
            RuntimeError: If rank 0 is gone.
        """
        kind, length = self._broadcast(torch.zeros(2, dtype=torch.int64), IDLE_TIMEOUT).tolist()
        if not length:
            return kind, b""
        return kind, self._broadcast(torch.empty(length, dtype=torch.uint8), IDLE_TIMEOUT).numpy().tobytes()

    def _broadcast(self, tensor: Tensor, timeout: timedelta) -> Tensor:
        torch.distributed.broadcast(tensor, src=0, group=self._messages, async_op=True).wait(timeout)
        return tensor

    def leave(self) -> None:
        """Close the connections."""
        torch.distributed.destroy_process_group()


def join_group(device: str) -> ProcessGroup | None:
    """Meet the other processes that `torchrun` started; None if this is the only one.

    Raises:
        RuntimeError: If they do not come.
    """
    return ProcessGroup(device) if _is_one_of_several() else None


def _attempt() -> str:
    """Return where in torchrun's store the addresses of the processes stand.

    The store outlives a restart, and with it the addresses of those that have died. Machines count restarts each for
    itself; several of them need a store that does not outlive its processes (`TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`).
    """
    is_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    return f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}" if is_one_machine else "attempt"


def _is_one_of_several() -> bool:
    """Tell whether `torchrun` started this process among others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def own_device(device: str) -> str:
    """Return the device of this process among those of this machine: each has a GPU of its own.

    Raises:
        ConfigurationError: If the setting names one GPU for all of them.
    """
    if not _is_one_of_several() or device == "cpu":
        return device
    if device != "cuda":
        raise ConfigurationError(
            f"GENCO_DEVICE is {device!r}, and several processes learn; expected cpu, or cuda: each takes its own GPU"
        )
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
