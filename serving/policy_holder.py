"""The one reference through which requests reach the policy, and the record of its swaps.

A request takes `holder.current` once and uses that policy to its end, so a swap under way changes nothing for it. The
ladder of rungs: `policy` (the newest that Redis announced), `last_good` (from disk, Redis not heard yet), `uniform`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from serving.policy import Choice, DecisionRequest, UniformPolicy
from streams.contracts.events import Source
from streams.contracts.snapshot import SnapshotManifest

MAX_SWAPS: Final = 500


class Chooser(Protocol):
    """What every rung of the ladder can do."""

    def choose(self, requests: Sequence[DecisionRequest]) -> list[Choice]:
        """Choose a creative for each request; changes no state."""
        ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """A policy that serves, and where it comes from."""

    policy: Chooser
    rung: Source
    manifest: SnapshotManifest | None = None
    """None: uniform."""
    revision: int = 0
    """Of the pointer that named it; 0: none did."""
    exploration: float = 1.0
    """Share of the traffic beside the uniform one that explores."""
    described: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Slot -> ids of the elements whose content the snapshot holds, so that requests need not bring it."""


@dataclass(frozen=True, slots=True)
class Swap:
    """One change of the policy."""

    version: int
    epoch: int
    revision: int
    trained_through: dict[str, int] = field(hash=False)
    swapped_at_ms: int
    rung: Source


class PolicyHolder:
    """Holds the current policy. Reading is free of locks; swaps come from one thread."""

    def __init__(self) -> None:
        self.uniform: Final[Chooser] = UniformPolicy()
        self.current = Loaded(self.uniform, "uniform")
        self._swaps: deque[Swap] = deque(maxlen=MAX_SWAPS)
        self._lock = threading.Lock()

    def swap(self, loaded: Loaded, now_ms: int) -> None:
        """Let the requests from now on use another policy."""
        self.current = loaded
        if loaded.manifest is not None:
            manifest = loaded.manifest
            swap = Swap(
                manifest.version, manifest.epoch, loaded.revision, dict(manifest.trained_through), now_ms, loaded.rung
            )
            with self._lock:
                self._swaps.append(swap)

    def confirm(self) -> None:
        """Note that Redis names the very snapshot that was loaded from disk: it is the newest, not a stopgap."""
        self.current = replace(self.current, rung="policy")

    def explore(self, policy: Chooser, share: float) -> None:
        """Let the same snapshot explore another share of the traffic."""
        self.current = replace(self.current, policy=policy, exploration=share)

    def swaps(self, last: int = MAX_SWAPS) -> list[Swap]:
        """Return the last swaps, oldest first."""
        with self._lock:
            return list(self._swaps)[-last:] if last > 0 else []
