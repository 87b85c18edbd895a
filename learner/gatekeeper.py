"""Brings the gate its numbers: asks the candidate about recent impressions, and compares it with what was published.

It remembers the last candidate and the last published version, in this process only: after a restart, the first version
has nothing to be compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from learner.gate import GateSettings, Logged, Validation, judge, norms, probe
from learner.recent import RecentImpressions
from learner.value_watch import ValueWatch
from serving.golden import answer, shift
from serving.policy import Policy
from streams.contracts.snapshot import GateVerdict, GoldenAnswer

MAX_GOLDEN_CANDIDATES: Final = 200
"""An impression with more candidates is no golden request: the manifest stays small."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A version that was judged."""

    sha256: str
    policy: Policy
    norms: dict[str, float]
    golden: tuple[GoldenAnswer, ...]
    num_updates: int


class Gatekeeper:
    """Judges one version after the other."""

    def __init__(self, settings: GateSettings, seed: int) -> None:
        self._settings = settings
        self._seed = seed
        self._watch = ValueWatch(1.0 - settings.max_loss, settings.min_effective_size)
        self._last: Candidate | None = None
        self._published: Candidate | None = None
        self._num_seen = 0

    def judge(
        self,
        policy: Policy,
        tensors: Mapping[str, NDArray[Any]],
        *,
        sha256: str,
        parent_sha256: str | None,
        recent: RecentImpressions,
        validation: Validation,
        num_updates: int,
    ) -> tuple[GateVerdict, tuple[GoldenAnswer, ...]]:
        """Return the verdict on a version, and its golden batch.

        Args:
            policy: The version.
            tensors: Its tensors.
            sha256: Of its blob.
            parent_sha256: Of the version that was published last.
            recent: The impressions that were learned last.
            validation: Progressive validation over the last examples.
            num_updates: How many the version has learned.
        """
        if self._last is not None and self._last.sha256 == parent_sha256:
            self._published = self._last
        rng = np.random.default_rng([self._seed, num_updates, 1])
        asked = [recent[i].logged for i in rng.permutation(len(recent))[: self._settings.probes]]
        self._watch_new(recent, rng)
        golden = self._golden(policy, asked)
        before = self._published
        # What differs for so long is what the data say; and the gate must not stay shut for ever.
        is_close = before is not None and num_updates - before.num_updates <= self._settings.golden_updates
        verdict = judge(
            tensors,
            before=before.norms if before else None,
            validation=validation,
            probed=probe(policy, asked),
            golden_shift=shift(policy, before.golden) if before and is_close else None,
            watch=self._watch,
            settings=self._settings,
        )
        self._last = Candidate(sha256, policy, norms(tensors), golden, num_updates)
        return verdict, golden

    def _watch_new(self, recent: RecentImpressions, rng: np.random.Generator) -> None:
        """Weigh impressions that came since the last version by that version, which had not learned them."""
        num_new = min(recent.num_added - self._num_seen, len(recent))
        self._num_seen = recent.num_added
        if self._last is None or not num_new:
            return
        new = [recent[-1 - i].logged for i in rng.permutation(num_new)[: self._settings.probes].tolist()]
        joint = self._last.policy.propensities([each.request for each in new], [each.creative for each in new])
        weight_N = np.array([p for _, p in joint]) / np.array([each.propensity for each in new])
        self._watch.add(weight_N, np.array([each.label for each in new], np.float64))

    def _golden(self, policy: Policy, asked: list[Logged]) -> tuple[GoldenAnswer, ...]:
        fit = [e for e in asked if sum(map(len, e.request.candidates.values())) <= MAX_GOLDEN_CANDIDATES]
        return tuple(answer(policy, each.request, each.creative) for each in fit[: self._settings.golden])
