"""What `genco monitor` learns from the registry: the policy that serves, and whether logged propensities are its own.

The monitor is part of `streams`, which knows neither policies nor snapshots; here they are put together.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import redis
from kafka import KafkaConsumer
from kafka.errors import KafkaError

from serving.policy import DecisionRequest, Policy
from serving.predictor import Predictor
from serving.snapshot_store import Fetched, SnapshotStore
from streams.clients import UnreachableError, assign_whole_topic, kafka_consumer, redis_client
from streams.contracts.control import RegistryState
from streams.contracts.examples import ExampleBatch, LabelKind
from streams.contracts.registry import Version
from streams.contracts.settings import MonitorSettings
from streams.contracts.snapshot import SnapshotError, SnapshotManifest, unpack_tensors
from streams.contracts.topics import DEAD_LETTERS
from streams.monitor.agent import Look
from streams.monitor.models import Model
from streams.registry import Registry

logger = logging.getLogger(__name__)

REDIS_TIMEOUT_S: Final = 2.0
MAX_POLICIES: Final = 16
MAX_RECOMPUTED: Final = 16
"""Decisions that are repeated at each look; each is a search."""
TOLERANCE: Final = 1e-6
MAX_ACTIONS: Final = 100
"""Newest operator actions in which is sought how much of the traffic has explored."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A policy that served, and which of its elements have content."""

    policy: Policy
    has_content: frozenset[tuple[int, str]]


class RegistryOutlook:
    """Asks Redis for the policy, and Kafka how many dead letters there are."""

    def __init__(self, settings: MonitorSettings) -> None:
        self._settings = settings
        client = redis_client(settings, timeout_s=REDIS_TIMEOUT_S, retries=0)
        self._store = SnapshotStore(client, settings.model_id, settings.signing_key_bytes())
        self._registry = Registry(client, settings.model_id)
        self._revision: int | None = None
        self._served: Version | None = None
        self._state = RegistryState()
        self._shares: list[float] = []
        self._policies: OrderedDict[Version, _Known] = OrderedDict()
        self._letters: KafkaConsumer | None = None
        self._num_letters: int | None = None

    def look(self, now_ms: int, recent: Sequence[ExampleBatch]) -> Look:
        """Return what the registry says; what does not answer is left out, and logged."""
        model, refused = None, ""
        num_mismatched = num_recomputed = 0
        try:
            model = self._newest(now_ms)
            self._note_state(self._registry.state())
            refused = self._refusal(self._registry.candidate())
            num_mismatched, num_recomputed = self._audit(recent)
        except (redis.RedisError, SnapshotError, ValueError) as error:
            logger.warning("the registry tells nothing", extra={"cause": f"{type(error).__name__}: {error}"[:200]})
        state = self._state
        return Look(
            model=model,
            is_held=state.frozen or state.pin is not None or state.learning_frozen,
            exploration=_share(state),
            refused=refused,
            num_mismatched=num_mismatched,
            num_recomputed=num_recomputed,
            num_dead_letters=self._new_letters(),
        )

    def _note_state(self, state: RegistryState) -> None:
        """Keep the state until the next one, and how much has explored since a while ago, the newest first."""
        if not self._shares or state.sequence != self._state.sequence:
            actions = self._registry.audit(MAX_ACTIONS)
            states = [state, *(each for action in actions for each in (action.after, action.before))]
            # 1 is what a server does before it has asked.
            self._shares = list(dict.fromkeys([*map(_share, states), 1.0]))
        self._state = state

    def _newest(self, now_ms: int) -> Model | None:
        """Return the policy that serves, if it is another than at the last look."""
        fetched = self._store.fetch_current(self._revision)
        if fetched is None:
            return None
        self._revision = fetched.revision
        return self._model(fetched, now_ms)

    def _model(self, fetched: Fetched, now_ms: int) -> Model:
        manifest = fetched.manifest
        self._served = version = Version(manifest.epoch, manifest.version)
        policy = Policy.from_snapshot(fetched.blob, manifest)
        tensors = unpack_tensors(fetched.blob)
        content_EF = tensors["element_content"]
        elements = policy.spec.element_index.items()
        self._policies[version] = _Known(policy, frozenset(key for key, row in elements if content_EF[row].any()))
        while len(self._policies) > MAX_POLICIES:
            self._policies.popitem(last=False)
        numbers = manifest.gate.numbers
        return Model(
            version,
            since_ms=now_ms,
            trained_to_ms=manifest.max_event_time_ms,
            predictor=Predictor(policy.spec, tensors),
            norms={name: norm for name, norm in numbers.items() if name.startswith("norm_")},
            epsilon=policy.settings.epsilon,
        )

    def _refusal(self, candidate: SnapshotManifest | None) -> str:
        """Return why the gate refused the newest snapshot, if it did."""
        if candidate is None or candidate.gate.accepted:
            return ""
        if self._served is not None and Version(candidate.epoch, candidate.version) <= self._served:
            return ""
        return "; ".join(candidate.gate.reasons) or "no reason given"

    def _audit(self, recent: Sequence[ExampleBatch]) -> tuple[int, int]:
        """Repeat some of the newest decisions; return how many differ, and how many were repeated."""
        num_mismatched = num_recomputed = 0
        for batch in reversed(recent):
            for version, known in self._policies.items():
                is_its = (batch.epoch == version.epoch) & (batch.policy_version == version.number)
                is_its &= ~batch.has_kind(LabelKind.UNKNOWN)
                rows = np.flatnonzero(is_its)[: MAX_RECOMPUTED - num_recomputed]
                if not len(rows):
                    continue
                differing, repeated = _repeat(known, batch.take(rows), self._shares)
                num_mismatched += differing
                num_recomputed += repeated
        return num_mismatched, num_recomputed

    def _new_letters(self) -> int:
        """Return how many records came to the topic `dead_letters` since the last look."""
        try:
            if self._letters is None:
                self._letters = kafka_consumer(self._settings)
            ends = self._letters.end_offsets(assign_whole_topic(self._letters, DEAD_LETTERS))
        except (KafkaError, UnreachableError) as error:
            logger.warning("dead letters not counted", extra={"cause": f"{type(error).__name__}: {error}"[:200]})
            return 0
        before, self._num_letters = self._num_letters, sum(ends.values())
        return 0 if before is None else max(0, self._num_letters - before)


def _share(state: RegistryState) -> float:
    return 1.0 if state.exploration is None else state.exploration


def _repeat(known: _Known, batch: ExampleBatch, shares: Sequence[float]) -> tuple[int, int]:
    """Compare logged propensities with those of their snapshot; return how many differ, and how many were compared.

    A propensity is right if it is that of one of the `shares` of the traffic that have explored: which of them a server
    knew when it decided is not logged.
    Decisions with elements whose content the snapshot lacks are left out: it may have come with the request.
    """
    spec = known.policy.spec
    num_mismatched = num_repeated = 0
    shown = zip(
        batch.source, batch.product_id, batch.context, batch.candidates, batch.creative, batch.propensity, strict=True
    )
    for source, product_id, context, candidates, creative, logged in shown:
        wanted = {(spec.slot_index.get(slot, -1), e) for slot, ids in candidates.items() for e in ids}
        if source != "policy" or not wanted <= known.has_content:
            continue
        request = DecisionRequest(product_id, context, candidates)
        repeated = (known.policy.exploring(share).propensity(request, creative)[1] for share in shares)
        num_repeated += 1
        num_mismatched += not any(math.isclose(each, float(logged), rel_tol=TOLERANCE) for each in repeated)
    return num_mismatched, num_repeated
