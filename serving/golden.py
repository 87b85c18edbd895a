"""The golden batch: a few requests, and what the learner's policy says of them.

It travels in the signed manifest. A server asks the policy that it has built of the blob the same questions before it
serves it: bytes that are right are no use to a release, or a library beneath it, that reads them otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np

from serving.policy import DecisionRequest, Policy
from streams.contracts.snapshot import GoldenAnswer, SnapshotError, SnapshotManifest

TOLERANCE: Final = 1e-3
"""Of a logarithm. Sums of 32-bit floats come out in another order on another processor, and differ by 1e-5 at most."""


def answer(policy: Policy, request: DecisionRequest, creative: Mapping[str, str]) -> GoldenAnswer:
    """Return what a policy says of a creative.

    Raises:
        ValueError: If the creative does not fill each slot with one of its candidates.
    """
    candidates = {slot: tuple(ids) for slot, ids in request.candidates.items()}
    expected_ctr = policy.expected_ctr(request, creative)
    places = [ids.index(creative[slot]) for slot, ids in candidates.items()]
    log_pi_RT = policy.pointer.log_probabilities(policy.problem(request).asked, np.array([places]))
    return GoldenAnswer(
        product_id=request.product_id,
        context=dict(request.context),
        candidates=candidates,
        creative=dict(creative),
        expected_ctr=expected_ctr,
        log_probability=float(log_pi_RT.sum()),
    )


def again(policy: Policy, golden: GoldenAnswer) -> GoldenAnswer:
    """Return what another policy says of the same creative."""
    return answer(policy, DecisionRequest(golden.product_id, golden.context, golden.candidates), golden.creative)


def check(policy: object, manifest: SnapshotManifest) -> None:
    """Compare a policy with what its manifest says that it says; without a golden batch there is nothing to compare.

    Raises:
        SnapshotError: With reason `golden`.
    """
    if not manifest.golden:
        return
    if not isinstance(policy, Policy):
        raise SnapshotError("golden", f"a {type(policy).__name__} cannot answer a golden batch; expected a Policy")
    for place, golden in enumerate(manifest.golden):
        found = again(policy, golden)
        for name, got, want in (
            ("logarithm of the click rate", math.log(found.expected_ctr), math.log(golden.expected_ctr)),
            ("log-probability of the generator", found.log_probability, golden.log_probability),
        ):
            # Written so that NaN is refused.
            if not abs(got - want) <= TOLERANCE:
                raise SnapshotError(
                    "golden",
                    f"golden request {place} (product {golden.product_id[:80]!r}): {name} is {got:.6g} here and "
                    f"{want:.6g} in the learner; do server and learner have the same release and libraries?",
                )


def shift(policy: Policy, before: tuple[GoldenAnswer, ...]) -> float:
    """Return by how much a policy differs from what another said: the mean absolute log ratio of the click rates."""
    if not before:
        return 0.0
    ratios = [math.log(again(policy, golden).expected_ctr / golden.expected_ctr) for golden in before]
    return float(np.mean(np.abs(ratios)))
