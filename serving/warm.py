"""`python -m serving.warm`: compile what decisions run, so that no server does it under traffic.

numba keeps the machine code beside the sources, or in `NUMBA_CACHE_DIR`; the first time takes some fifteen seconds of
processor time, the next ones half a second.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from serving.policy import DecisionRequest, Policy, PolicySettings
from streams.contracts.features import FeatureSpec
from streams.contracts.snapshot import SNAPSHOT_TENSORS

SIZES: Final = {"M": 2, "S": 2, "Q": 1, "F": 2, "G": 2, "C": 0, "D": 1, "P": 0, "E": 0, "R": 0, "d": 4, "h": 4}
"""Of the smallest snapshot that has everything in it."""


def warm() -> None:
    """Let a policy that knows nothing decide."""
    sizes: dict[Any, int] = {1: 1, "encoder_mean": 0, "encoder_matrix": 0, **SIZES}
    tensors: dict[str, Any] = {
        name: np.zeros([sizes[dim] for dim in tensor.dims], np.float32)
        for name, tensor in SNAPSHOT_TENSORS.items()
        if tensor.dtype == "F32"
    }
    tensors |= {"pairs": np.empty(0, np.uint8), "encoder.kinds": np.frombuffer(b"[]", np.uint8)}
    spec = FeatureSpec(slots=("a", "b"), context=(), products=(), elements=(), content_size=2, encoder="hash-1:2")
    policy = Policy(spec, tensors, PolicySettings())
    candidates = {slot: tuple(f"{slot}{i}" for i in range(3)) for slot in ("a", "b")}
    request = DecisionRequest("product", {}, candidates)
    creative = policy.choose([request])[0].creative
    policy.expected_ctr(request, creative)
    policy.pointer.log_probabilities(policy.problem(request).asked, np.zeros((1, 2), np.int64))


if __name__ == "__main__":
    warm()
