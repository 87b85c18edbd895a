"""Publishes snapshots to the registry in Redis, and holds the right to.

Blobs and manifests are immutable; one script stores them and moves the pointer to them, and accepts only a larger
(epoch, version) and a caller that holds the lease; under a pin or a freeze it stores and does not move. Each holder of
the lease gets a new, larger epoch, so a learner that was paused and wakes up can no longer publish. Every move
increments `revision`.

Redis is a cache: after a `FLUSHALL` the next publication starts from the epoch and revision that the learner or the
topic `control` remembers, whichever is larger, and a pin or a freeze is restored from there.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Protocol

import redis

from streams.clients import UnreachableError
from streams.contracts.control import ControlRecord, RegistryState
from streams.contracts.registry import (
    CANDIDATE_TTL_S,
    HISTORY_LENGTH,
    audit_key,
    blob_key,
    blob_prefix,
    candidate_key,
    current_key,
    epoch_key,
    freeze_key,
    history_key,
    lease_key,
    manifest_key,
    manifest_prefix,
    pin_key,
    published_channel,
    revision_key,
    sequence_key,
    switches_key,
)
from streams.contracts.snapshot import PolicySnapshot, SnapshotManifest
from streams.registry import Registry
from streams.telemetry import now_ms

logger = logging.getLogger(__name__)

# KEYS[1] lease, KEYS[2] epoch, KEYS[3] pin, KEYS[4] freeze, KEYS[5] revision, KEYS[6] sequence, KEYS[7] audit;
# ARGV[1] owner, ARGV[2] lease in ms, ARGV[3] smallest epoch allowed - 1, ARGV[4] smallest revision allowed - 1,
# ARGV[5] '1' if what an empty registry is filled with is known: ARGV[6] pin or '', ARGV[7] '1' if frozen,
# ARGV[8] sequence, ARGV[9] newest audit record or ''; KEYS[8] switches, ARGV[10] and further their values.
# Returns the new epoch, 0 if somebody else holds the lease, or -1 if the registry is empty and nothing is known.
_ACQUIRE: Final = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
if redis.call('EXISTS', KEYS[2]) == 0 then
  if ARGV[5] ~= '1' then return -1 end
  if ARGV[6] ~= '' then redis.call('SET', KEYS[3], ARGV[6]) end
  if ARGV[7] == '1' then redis.call('SET', KEYS[4], '1') end
  redis.call('SET', KEYS[6], ARGV[8])
  redis.call('HSET', KEYS[8], 'learning_frozen', ARGV[10], 'exploration', ARGV[11], 'clicks_accepted_ms', ARGV[12])
  if ARGV[9] ~= '' then redis.call('LPUSH', KEYS[7], ARGV[9]) end
end
local epoch = math.max(tonumber(redis.call('GET', KEYS[2]) or '0'), tonumber(ARGV[3])) + 1
redis.call('SET', KEYS[2], epoch)
redis.call('SET', KEYS[5], math.max(tonumber(redis.call('GET', KEYS[5]) or '0'), tonumber(ARGV[4])))
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return epoch
"""

# KEYS[1] lease; ARGV[1] owner, ARGV[2] lease in ms. Returns 1 if the lease is still the caller's, else 0.
_RENEW: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""

# KEYS[1] lease; ARGV[1] owner. Returns 1 if it was the caller's and is free now, else 0.
_RELEASE: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""

# KEYS[1] current, KEYS[2] blob, KEYS[3] manifest, KEYS[4] pin, KEYS[5] lease, KEYS[6] history, KEYS[7] freeze;
# ARGV[1] epoch, ARGV[2] version, ARGV[3] sha256, ARGV[4] owner, ARGV[5] smallest revision allowed - 1, ARGV[6] channel,
# ARGV[7] length of the history, ARGV[8] blob, ARGV[9] manifest, ARGV[10] and ARGV[11] what the keys of blobs and
# manifests begin with. Returns {outcome, revision}.
# Newer means newer than everything stored, not than the pointer: a rollback leaves the pointer behind, and what it went
# back from must not come again when the script is sent twice because the answer was lost.
# What leaves the history is deleted here and not by the caller, who could delete what was pinned just now.
_PUBLISH: Final = """
if redis.call('GET', KEYS[5]) ~= ARGV[4] then return {'not_holder', 0} end
local function parts(name)
  local epoch, version = string.match(name or '', '^(%d+):(%d+)$')
  return tonumber(epoch or '-1'), tonumber(version or '-1')
end
local function is_newer(epoch, version, than_epoch, than_version)
  return epoch > than_epoch or (epoch == than_epoch and version > than_version)
end
local now = redis.call('HMGET', KEYS[1], 'epoch', 'version', 'revision', 'sha256')
local new_epoch, new_version = tonumber(ARGV[1]), tonumber(ARGV[2])
local name, head = ARGV[1] .. ':' .. ARGV[2], redis.call('LINDEX', KEYS[6], 0)
local pin = redis.call('GET', KEYS[4])
local hold = pin and 'pinned' or redis.call('EXISTS', KEYS[7]) == 1 and 'frozen'
local current = now[1] and now[1] .. ':' .. now[2]
if name == current and now[4] == ARGV[3] then return {'published', tonumber(now[3])} end
if name == head and hold then return {hold, 0} end
local epoch, version = parts(current)
if not is_newer(new_epoch, new_version, epoch, version) then return {'not_newer', 0} end
epoch, version = parts(head)
if not is_newer(new_epoch, new_version, epoch, version) then return {'not_newer', 0} end
redis.call('SET', KEYS[2], ARGV[8], 'NX')
redis.call('SET', KEYS[3], ARGV[9], 'NX')
redis.call('LPUSH', KEYS[6], name)
local revision = 0
if not hold then
  revision = math.max(tonumber(now[3] or '0'), tonumber(ARGV[5])) + 1
  redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'version', ARGV[2], 'sha256', ARGV[3], 'revision', revision)
  redis.call('PUBLISH', ARGV[6], revision)
  current = name
end
local names = redis.call('LRANGE', KEYS[6], 0, -1)
if #names > tonumber(ARGV[7]) then
  -- The one whose neighbors are nearest to each other for its age, counted in versions. Where numbers begin anew, and
  -- behind the oldest, a version is as far from the one before as from 0.
  local gone, least, age, before = nil, math.huge, 0, 0
  local _, at = parts(names[1])
  for place = 1, #names do
    local _, earlier = parts(names[place + 1])
    local behind = earlier >= 0 and earlier < at and at - earlier or at
    local share = (before + behind) / age
    if place > 1 and share <= least and names[place] ~= current and names[place] ~= pin then
      gone, least = names[place], share
    end
    before, age, at = behind, age + behind, earlier
  end
  redis.call('LREM', KEYS[6], -1, gone)
  redis.call('UNLINK', ARGV[10] .. gone, ARGV[11] .. gone)
end
return {hold or 'published', revision}
"""


class Outcome(StrEnum):
    """What became of a publication."""

    PUBLISHED = "published"
    PINNED = "pinned"
    """Stored, but a pin holds the pointer."""
    FROZEN = "frozen"
    """Stored, but a freeze holds the pointer."""
    NOT_HOLDER = "not_holder"
    """Somebody else publishes for this model now."""
    NOT_NEWER = "not_newer"

    @property
    def is_stored(self) -> bool:
        """Whether the registry has the snapshot now, served or not."""
        return self in (Outcome.PUBLISHED, Outcome.PINNED, Outcome.FROZEN)


@dataclass(slots=True)
class Fence:
    """The largest epoch and revision ever seen, so that an emptied Redis does not start again from 1."""

    epoch: int = 0
    revision: int = 0


class Control(Protocol):
    """The topic `control`, as `streams.control_log` reads and writes it."""

    def append(self, record: ControlRecord) -> None:
        """Write a record; raises UnreachableError."""
        ...

    def newest(self, model_id: str) -> ControlRecord | None:
        """Return the record that counts; raises UnreachableError."""
        ...


class Publisher:
    """Writes the snapshots of one model. Every method may raise `redis.RedisError`; nothing is lost then.

    Args:
        client: Of the registry.
        model_id: Whose snapshots.
        lease_ms: How long the lease lasts without being prolonged.
        fence: What a checkpoint remembers.
        control: What an empty registry is filled from; None: nothing is known of the time before.
        now_ms: The clock.
    """

    def __init__(
        self,
        client: redis.Redis,
        model_id: str,
        lease_ms: int,
        fence: Fence,
        *,
        control: Control | None = None,
        now_ms: Callable[[], int] = now_ms,
    ) -> None:
        self._client = client
        self._model_id = model_id
        self._lease_ms = lease_ms
        self._owner = uuid.uuid4().hex
        self.fence = fence
        self.holds_lease = False
        self._control = control
        self._now_ms = now_ms
        self._registry = Registry(client, model_id)
        self._noted: tuple[int, int] | None = None
        self._learning_frozen = False
        self._acquire: Any = client.register_script(_ACQUIRE)
        self._renew: Any = client.register_script(_RENEW)
        self._release: Any = client.register_script(_RELEASE)
        self._publish: Any = client.register_script(_PUBLISH)

    def acquire(self) -> bool:
        """Take the lease if it is free; the epoch of the fence is then ours alone.

        An empty registry gets back its pin, its freeze, and numbers larger than those before, in the same step: nobody
        can publish in between.

        Raises:
            UnreachableError: If the registry is empty and the topic `control` cannot be read.
        """
        epoch = self._take_lease(None)
        if epoch < 0:
            known = self._control and self._control.newest(self._model_id)
            known = known or ControlRecord(model_id=self._model_id, written_at_ms=0, state=RegistryState())
            epoch = self._take_lease(known)
            if epoch > 0:
                _tell(known)
        self.holds_lease = epoch > 0
        if self.holds_lease:
            self.fence.epoch = epoch
            self._learn_state()
        return self.holds_lease

    def _take_lease(self, known: ControlRecord | None) -> int:
        state = RegistryState() if known is None else known.state
        if known is not None and known.written_at_ms:
            self.fence.revision = max(self.fence.revision, known.revision_floor(self._now_ms()))
        model = self._model_id
        return int(
            self._acquire(
                keys=[
                    lease_key(model),
                    epoch_key(model),
                    pin_key(model),
                    freeze_key(model),
                    revision_key(model),
                    sequence_key(model),
                    audit_key(model),
                    switches_key(model),
                ],
                args=[
                    self._owner,
                    self._lease_ms,
                    max(self.fence.epoch, state.epoch),
                    self.fence.revision,
                    int(known is not None),
                    state.pin or "",
                    int(state.frozen),
                    state.sequence,
                    known.audit.model_dump_json() if known is not None and known.audit is not None else "",
                    "1" if state.learning_frozen else "",
                    "" if state.exploration is None else f"{state.exploration:.6g}",
                    state.clicks_accepted_ms or "",
                ],
            )
        )

    def renew(self) -> bool:
        """Prolong the lease; False if it was lost."""
        self.holds_lease = bool(self._renew(keys=[lease_key(self._model_id)], args=[self._owner, self._lease_ms]))
        if self.holds_lease:
            self._learn_state()
        return self.holds_lease

    def _learn_state(self) -> None:
        """Remember the revision, for a rollback increments it without us, and write to Kafka what it does not have."""
        try:
            state = self._registry.state()
        except ValueError as error:
            logger.error("what somebody wrote into the registry cannot be read", extra={"error": str(error)})
            return
        self.fence.revision = max(self.fence.revision, state.revision)
        if self._control is None or self._noted == (state.epoch, state.sequence):
            return
        audit = next(iter(self._registry.audit(1)), None)
        record = ControlRecord(model_id=self._model_id, written_at_ms=self._now_ms(), state=state, audit=audit)
        try:
            self._control.append(record)
            self._noted = state.epoch, state.sequence
        except UnreachableError as error:
            logger.warning("the topic control lacks the newest state; tried again", extra={"error": str(error)})

    def learning_is_frozen(self) -> bool:
        """Ask whether somebody has frozen learning; while Redis does not answer, it is as it was."""
        try:
            values: Any = self._client.hmget(switches_key(self._model_id), ["learning_frozen"])
            self._learning_frozen = values[0] == b"1"
        except redis.RedisError as error:
            logger.debug("whether learning is frozen is unknown", extra={"error": str(error)})
        return self._learning_frozen

    def release(self) -> None:
        """Give the lease back, so that a successor need not wait for it."""
        self._release(keys=[lease_key(self._model_id)], args=[self._owner])
        self.holds_lease = False

    def show(self, manifest: SnapshotManifest) -> None:
        """Let people see the newest snapshot's manifest and verdict, also when the gate refused it."""
        self._client.set(candidate_key(self._model_id), manifest.model_dump_json(), ex=CANDIDATE_TTL_S)

    def publish(self, snapshot: PolicySnapshot) -> Outcome:
        """Store a snapshot and, unless a pin or a freeze holds it, move the pointer to it."""
        manifest = snapshot.manifest
        model, epoch, version = manifest.model_id, manifest.epoch, manifest.version
        outcome, revision = self._publish(
            keys=[
                current_key(model),
                blob_key(model, epoch, version),
                manifest_key(model, epoch, version),
                pin_key(model),
                lease_key(model),
                history_key(model),
                freeze_key(model),
            ],
            args=[
                epoch,
                version,
                manifest.sha256,
                self._owner,
                self.fence.revision,
                published_channel(model),
                HISTORY_LENGTH,
                snapshot.blob,
                manifest.model_dump_json(),
                blob_prefix(model),
                manifest_prefix(model),
            ],
        )
        result = Outcome(outcome.decode())
        if result is Outcome.NOT_HOLDER:
            self.holds_lease = False
        self.fence.revision = max(self.fence.revision, int(revision))
        return result


def _tell(known: ControlRecord) -> None:
    """Say what an empty registry was filled with, and what to do: snapshots are not in Kafka."""
    pinned = known.state.pinned
    command = "genco policy unpin" if pinned else "genco policy unfreeze" if known.state.frozen else None
    if command is None:
        logger.info("the registry was empty", extra={"epoch": known.state.epoch, "revision": known.state.revision})
        return
    logger.warning(
        "the registry was empty; its pin or freeze was restored from the topic control, but the snapshots are gone. "
        "Servers keep the copy that they have; what is published is stored and not served until the command is given, "
        "or a version that is stored is pinned (genco policy list)",
        extra={"pinned": pinned and str(pinned), "frozen": known.state.frozen, "command": command},
    )
