"""Keeps the policy fresh: a thread that polls the registry and listens to its announcements.

Whatever goes wrong (Redis gone, slow or older; a blob missing, flipped, hostile; a full disk) the policy that serves
goes on serving, and the reason is counted. Listening only shortens the wait; polling alone is enough.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import redis

from serving.metrics import ServingMetrics
from serving.policy import Policy
from serving.policy_holder import Chooser, Loaded, PolicyHolder
from serving.snapshot_store import Fetched, LastGood, Pointer, SnapshotStore
from streams.contracts.events import Source
from streams.contracts.features import FeatureSpec
from streams.contracts.registry import published_channel
from streams.contracts.snapshot import SnapshotError, SnapshotManifest, unpack_tensors

logger = logging.getLogger(__name__)

_SLICE_S: Final = 0.1
"""Longest wait for a message, so that stopping takes no longer."""
_MAX_BACKOFF_S: Final = 5.0
"""Between two tries of a snapshot that was refused: it may be mended under the same name, but is large."""

Builder = Callable[[bytes, SnapshotManifest], Chooser]
Describer = Callable[[bytes], Mapping[str, frozenset[str]]]


def described_elements(blob: bytes) -> dict[str, frozenset[str]]:
    """Return slot -> ids of the elements whose content a snapshot holds.

    Raises:
        SnapshotError: If the blob is not of the format.
    """
    tensors = unpack_tensors(blob)
    spec = FeatureSpec.from_json(tensors["vocabulary"].tobytes())
    has_content = np.any(tensors["element_content"], axis=1)
    found: dict[str, set[str]] = {}
    names = {index: name for name, index in spec.slot_index.items()}
    for (slot, element_id), row in spec.element_index.items():
        if has_content[row]:
            found.setdefault(names[slot], set()).add(element_id)
    return {slot: frozenset(ids) for slot, ids in found.items()}


class Refresher:
    """Swaps the newest verified snapshot in.

    Args:
        store: The registry.
        holder: Gets the policies.
        last_good: Keeps a copy for a start without Redis.
        listen_client: For the announcements, in a connection of its own; None: polling only.
        model_id: Whose announcements.
        interval_s: Between two polls, give or take a fifth, so that servers do not ask in step.
        metrics: Counts what was refused.
        now_ms: The clock.
        build: Makes a policy of a blob.
        describe: Says which elements a blob knows.
    """

    def __init__(
        self,
        *,
        store: SnapshotStore,
        holder: PolicyHolder,
        last_good: LastGood,
        listen_client: redis.Redis | None,
        model_id: str,
        interval_s: float,
        metrics: ServingMetrics,
        now_ms: Callable[[], int],
        build: Builder = Policy.from_snapshot,
        describe: Describer = described_elements,
    ) -> None:
        self._store = store
        self._holder = holder
        self._last_good = last_good
        self._listen_client = listen_client
        self._channel = published_channel(model_id)
        self._interval_s = interval_s
        self._metrics = metrics
        self._now_ms = now_ms
        self._build = build
        self._describe = describe
        self._jitter = np.random.default_rng()
        self._pubsub: Any = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="genco-refresher", daemon=True)
        self._refused: tuple[Pointer | None, str] | None = None
        self._refusals = 0
        self._retry_at = 0.0
        self._older: tuple[int | None, int] | None = None
        self._outage: str | None = None
        self._exploration = 1.0
        self.fault: str | None = "Redis was not asked yet"
        """Why the registry could not be read last time, or None."""

    def start(self) -> None:
        """Load the last good snapshot, then ask Redis from a thread."""
        self.load_last_good()
        self._thread.start()

    def stop(self, timeout_s: float = 2.0) -> None:
        """End the thread."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def load_last_good(self) -> bool:
        """Serve the snapshot on disk until Redis is heard; return whether there is a usable one."""
        try:
            fetched = self._last_good.load()
            if fetched is not None:
                self._swap(fetched, "last_good")
            return fetched is not None
        except Exception as error:  # noqa: BLE001 - whatever the file holds, the server must come up
            self._reject(error, None)
            return False

    def refresh(self) -> bool:
        """Ask Redis once; return whether a newer snapshot serves now."""
        try:
            self._explore()
            pointer = self._store.pointer()
        except redis.RedisError as error:
            self._note_outage(error)
            return False
        except SnapshotError as error:
            self._reject(error, None)
            return False
        current = self._holder.current
        if pointer is None or pointer.revision < current.revision:
            self._note_older(None if pointer is None else pointer.revision)
            return False
        if pointer.revision == current.revision:
            self._clear_fault()
            if current.rung == "last_good" and current.manifest and current.manifest.sha256 == pointer.sha256:
                self._holder.confirm()
            return False
        return self._load(pointer)

    def _explore(self) -> None:
        """Ask how much is to be explored, and let the policy that serves do so; raises RedisError."""
        try:
            share = self._exploration = self._store.exploration()
        except SnapshotError as error:
            self._metrics.model_rejected.labels(error.reason).inc()
            logger.debug("another share of the traffic was to explore", extra={"cause": str(error)})
            return
        policy = self._holder.current.policy
        if isinstance(policy, Policy) and self._holder.current.exploration != share:
            self._holder.explore(policy.exploring(share), share)
            logger.warning("another share of the traffic explores", extra={"share": share})

    def _load(self, pointer: Pointer) -> bool:
        if self._refused is not None and self._refused[0] == pointer and time.monotonic() < self._retry_at:
            return False
        try:
            fetched = self._store.fetch(pointer)
            self._swap(fetched, "policy")
        except redis.RedisError as error:
            self._note_outage(error)
            return False
        except Exception as error:  # noqa: BLE001 - a snapshot that breaks what reads it must not end this thread
            self._reject(error, pointer)
            return False
        self._clear_fault()
        try:
            self._last_good.save(fetched)
        except OSError as error:
            logger.warning("cannot keep the last good snapshot", extra={"cause": str(error)})
        return True

    def _swap(self, fetched: Fetched, rung: Source) -> None:
        manifest = fetched.manifest
        policy, share = self._build(fetched.blob, manifest), 1.0
        if isinstance(policy, Policy) and self._exploration != 1.0:
            policy, share = policy.exploring(self._exploration), self._exploration
        loaded = Loaded(policy, rung, manifest, fetched.revision, share, self._describe(fetched.blob))
        before = self._holder.current.manifest
        swapped_at_ms = self._now_ms()
        self._holder.swap(loaded, swapped_at_ms)
        self._refused = None
        self._metrics.model_revision.set(fetched.revision)
        self._metrics.model_max_event.set(manifest.max_event_time_ms / 1000)
        is_newer = before is None or (manifest.epoch, manifest.version) > (before.epoch, before.version)
        # A rollback or a start from disk brings nothing fresh, so it says nothing about freshness.
        if rung == "policy" and is_newer:
            for due_ms in manifest.due_ms_quantiles:
                self._metrics.freshness.observe(max(0.0, (swapped_at_ms - due_ms) / 1000))
        logger.info(
            "policy swapped",
            extra={
                "epoch": manifest.epoch,
                "version": manifest.version,
                "revision": fetched.revision,
                "rung": rung,
            },
        )

    def _note_outage(self, error: redis.RedisError) -> None:
        """Count a poll that failed; log the first of an outage, and when its cause changes."""
        cause = type(error).__name__
        self.fault = f"{cause}: {error}"
        self._metrics.registry_errors.labels(cause).inc()
        if self._outage != cause:
            self._outage = cause
            logger.warning("Redis cannot be read; the policy in memory goes on serving", extra={"cause": self.fault})

    def _clear_fault(self) -> None:
        self.fault = None
        if self._outage is not None:
            self._outage = None
            logger.info("Redis can be read again")

    def _note_older(self, revision: int | None) -> None:
        """Say once that Redis is behind us: after a flush or a failover this is expected, and mends itself."""
        self._clear_fault()
        ours = self._holder.current.revision
        if ours == 0 or self._older == (revision, ours):
            return
        self._older = revision, ours
        self._metrics.model_rejected.labels("older_revision").inc()
        logger.warning(
            "Redis has no pointer or an older one; the policy in memory goes on serving. "
            "If the registry was reset on purpose, stop the server and delete the file",
            extra={"revision": revision, "ours": ours, "file": str(self._last_good.path)},
        )

    def _reject(self, error: Exception, pointer: Pointer | None) -> None:
        """Count a refusal; log it once for each pointer and reason, and try that pointer again less and less often."""
        reason = error.reason if isinstance(error, SnapshotError) else "error"
        self.fault = f"snapshot refused ({reason}): {error}"
        self._metrics.model_rejected.labels(reason).inc()
        if self._refused == (pointer, reason):
            self._refusals += 1
        else:
            self._refused, self._refusals = (pointer, reason), 1
            known = isinstance(error, SnapshotError)
            logger.error(
                "snapshot refused", extra={"reason": reason, "cause": str(error)}, exc_info=None if known else error
            )
        self._retry_at = time.monotonic() + min(_MAX_BACKOFF_S, self._interval_s * 2 ** min(self._refusals, 10))

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.refresh()
            self._wait(self._interval_s * self._jitter.uniform(0.8, 1.2))
        self._unsubscribe()

    def _wait(self, seconds: float) -> None:
        """Return after that time, or as soon as a snapshot is announced."""
        deadline = time.monotonic() + seconds
        try:
            if self._listen_client is not None and self._pubsub is None:
                pubsub = self._listen_client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
                self._pubsub = pubsub
                pubsub.subscribe(self._channel)
            while self._pubsub is not None and not self._stopping.is_set():
                left = deadline - time.monotonic()
                if left <= 0 or self._pubsub.get_message(timeout=min(left, _SLICE_S)) is not None:
                    return
        except Exception as error:
            # Redis itself, or its library on a broken connection: polling finds out what is wrong.
            logger.debug("announcements are not heard", extra={"cause": str(error)}, exc_info=True)
            self._unsubscribe()
        self._stopping.wait(max(0.0, deadline - time.monotonic()))

    def _unsubscribe(self) -> None:
        if self._pubsub is not None:
            try:
                self._pubsub.close()
            except (redis.RedisError, OSError):
                logger.debug("closing the subscription failed", exc_info=True)
            self._pubsub = None
