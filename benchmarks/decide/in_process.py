"""How long the policy takes for a decision, without a server, and Vowpal Wabbit beside it.

Every round starts with a policy that has decided nothing. *Cold*: the first request of each card, which the policy has
to prepare. *Warm*, what a server mostly sees: the card is known, the request (product and context) is new. *Repeated*:
the very request was decided before, with another seed. The sizes and the peers take turns within a round.
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.decide.peers import REDUCTIONS, VowpalWabbit
from benchmarks.decide.scene import distinct_requests, read_snapshot
from benchmarks.search.scene import KNOWN_PRODUCTS, Scene
from serving.policy import DecisionRequest, Policy

BATCH: Final = 64
VW_IMPRESSIONS: Final = 1_000
Figures = dict[str, float]


def measure(folder: Path, sizes: Sequence[tuple[int, int]], *, rounds: int, singles: int, batches: int) -> Any:
    """Return medians over the rounds.

    Args:
        folder: Where the snapshots lie.
        sizes: Slots and candidates of the cards; the peers take part in the first.
        rounds: How many.
        singles: Decisions one by one of a round.
        batches: Batches of 64 of a round.
    """
    scenes = [Scene(*size) for size in sizes]
    vw = {name: VowpalWabbit(name, scenes[0], VW_IMPRESSIONS) for name in REDUCTIONS}
    figures: list[defaultdict[str, list[float]]] = [defaultdict(list) for _ in sizes]
    peers: defaultdict[str, list[float]] = defaultdict(list)
    for number in range(rounds):
        for scene, found in zip(scenes, figures, strict=True):
            for name, value in one_round(folder, scene, number, singles, batches).items():
                found[name].append(value)
        for name, peer in vw.items():
            _, seconds = peer.decide(distinct_requests(scenes[0], singles, number)[: singles // 2])
            peers[f"{name}_us"].append(1e6 * float(np.median(seconds)))
    return {
        "sizes": [{name: float(np.median(values)) for name, values in found.items()} for found in figures],
        "vw": {name: float(np.median(values)) for name, values in peers.items()},
        "garbage_collector": f"on, thresholds {gc.get_threshold()}" if gc.isenabled() else "off",
    }


def one_round(folder: Path, scene: Scene, number: int, singles: int, batches: int) -> Figures:
    """Return a round's figures, in microseconds a decision, under names such as `single.cold.p50_us`."""
    policy, other = (_policy(folder, scene) for _ in range(2))
    first: dict[str, DecisionRequest] = {}
    warm = []
    for request in distinct_requests(scene, singles + batches * BATCH + KNOWN_PRODUCTS, number):
        if first.setdefault(request.product_id, request) is not request:
            warm.append(request)
    cards, groups = [[request] for request in first.values()], [[request] for request in warm[:singles]]
    together = [warm[singles + start : singles + start + BATCH] for start in range(0, batches * BATCH, BATCH)]
    gc.collect()
    again = [[replace(request, seed=-1) for request in group] for group in groups]
    return {
        **_told("single.cold", _times(policy, cards)),
        **_told("batch64.cold", _times(other, [list(first.values())])),
        **_told("single", _times(policy, groups)),
        **_told("single.repeated", _times(policy, again)),
        **_told("batch64", _times(policy, together)),
        **_told("batch64.repeated", _times(policy, together)),
    }


def _policy(folder: Path, scene: Scene) -> Policy:
    snapshot = read_snapshot(folder, scene)
    return Policy.from_snapshot(snapshot.blob, snapshot.manifest)


def _times(policy: Policy, groups: Iterable[Sequence[DecisionRequest]]) -> tuple[list[float], float]:
    """Return the seconds a decision of each group, and of processor time of all."""
    seconds, decided, used = [], 0, time.process_time()
    for group in groups:
        started = time.perf_counter()
        policy.choose(group)
        seconds.append((time.perf_counter() - started) / len(group))
        decided += len(group)
    return seconds, (time.process_time() - used) / decided


def _told(name: str, times: tuple[list[float], float]) -> Figures:
    seconds, used = times
    is_batch = name.startswith("batch")
    return {
        f"{name}.{'per_decision_us' if is_batch else 'p50_us'}": 1e6 * float(np.median(seconds)),
        f"{name}.{'worst_us' if is_batch else 'p99_us'}": 1e6 * float(np.percentile(seconds, 100 if is_batch else 99)),
        f"{name}.processor_us": 1e6 * used,
    }
