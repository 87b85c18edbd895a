"""Publishes snapshots to the registry in Redis, and holds the right to.

Blobs and manifests are immutable; one script stores them and moves the pointer to them, and accepts only a larger
(epoch, version), no pin, and a caller that holds the lease. Each holder of the lease gets a new,
larger epoch, so a learner that was paused and wakes up can no longer publish. Every move increments `revision`.

Redis is a cache: after a `FLUSHALL` the next publication starts from the epoch and revision that the learner remembers.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import redis

from streams.contracts.registry import (
    HISTORY_LENGTH,
    blob_key,
    candidate_key,
    current_key,
    epoch_key,
    history_key,
    lease_key,
    manifest_key,
    pin_key,
    published_channel,
)
from streams.contracts.snapshot import PolicySnapshot, SnapshotManifest

# KEYS[1] lease, KEYS[2] epoch counter; ARGV[1] owner, ARGV[2] lease in ms, ARGV[3] smallest epoch allowed - 1.
# Returns the new epoch, or 0 if somebody else holds the lease.
_ACQUIRE: Final = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
local epoch = math.max(tonumber(redis.call('GET', KEYS[2]) or '0'), tonumber(ARGV[3])) + 1
redis.call('SET', KEYS[2], epoch)
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

# KEYS[1] current, KEYS[2] blob, KEYS[3] manifest, KEYS[4] pin, KEYS[5] lease, KEYS[6] history; ARGV[1] epoch,
# ARGV[2] version, ARGV[3] sha256, ARGV[4] owner, ARGV[5] smallest revision allowed - 1, ARGV[6] channel,
# ARGV[7] length of the history, ARGV[8] blob, ARGV[9] manifest. Returns {outcome, revision}.
# Sent twice, because the answer was lost, it changes nothing the second time.
_PUBLISH: Final = """
if redis.call('GET', KEYS[5]) ~= ARGV[4] then return {'not_holder', 0} end
local now = redis.call('HMGET', KEYS[1], 'epoch', 'version', 'revision', 'sha256')
local epoch, version = tonumber(now[1] or '-1'), tonumber(now[2] or '-1')
local new_epoch, new_version = tonumber(ARGV[1]), tonumber(ARGV[2])
if new_epoch == epoch and new_version == version and now[4] == ARGV[3] then
  return {'published', tonumber(now[3])}
end
if new_epoch < epoch or (new_epoch == epoch and new_version <= version) then return {'not_newer', 0} end
redis.call('SET', KEYS[2], ARGV[8], 'NX')
redis.call('SET', KEYS[3], ARGV[9], 'NX')
local name = ARGV[1] .. ':' .. ARGV[2]
if redis.call('LINDEX', KEYS[6], 0) ~= name then
  redis.call('LPUSH', KEYS[6], name)
  redis.call('LTRIM', KEYS[6], 0, ARGV[7] - 1)
end
if redis.call('EXISTS', KEYS[4]) == 1 then return {'pinned', 0} end
local revision = math.max(tonumber(now[3] or '0'), tonumber(ARGV[5])) + 1
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'version', ARGV[2], 'sha256', ARGV[3], 'revision', revision)
redis.call('PUBLISH', ARGV[6], revision)
return {'published', revision}
"""


class Outcome(StrEnum):
    """What became of a publication."""

    PUBLISHED = "published"
    PINNED = "pinned"
    """Stored, but a pin holds the pointer."""
    NOT_HOLDER = "not_holder"
    """Somebody else publishes for this model now."""
    NOT_NEWER = "not_newer"


@dataclass(slots=True)
class Fence:
    """The largest epoch and revision ever seen, so that an emptied Redis does not start again from 1."""

    epoch: int = 0
    revision: int = 0


class Publisher:
    """Writes the snapshots of one model. Every method may raise `redis.RedisError`; nothing is lost then."""

    def __init__(self, client: redis.Redis, model_id: str, lease_ms: int, fence: Fence) -> None:
        self._client = client
        self._model_id = model_id
        self._lease_ms = lease_ms
        self._owner = uuid.uuid4().hex
        self.fence = fence
        self.holds_lease = False
        self._acquire: Any = client.register_script(_ACQUIRE)
        self._renew: Any = client.register_script(_RENEW)
        self._release: Any = client.register_script(_RELEASE)
        self._publish: Any = client.register_script(_PUBLISH)

    def acquire(self) -> bool:
        """Take the lease if it is free; the epoch of the fence is then ours alone."""
        epoch = int(
            self._acquire(
                keys=[lease_key(self._model_id), epoch_key(self._model_id)],
                args=[self._owner, self._lease_ms, self.fence.epoch],
            )
        )
        self.holds_lease = epoch > 0
        if self.holds_lease:
            self.fence.epoch = epoch
            self._learn_revision()
        return self.holds_lease

    def renew(self) -> bool:
        """Prolong the lease; False if it was lost."""
        self.holds_lease = bool(self._renew(keys=[lease_key(self._model_id)], args=[self._owner, self._lease_ms]))
        if self.holds_lease:
            self._learn_revision()
        return self.holds_lease

    def _learn_revision(self) -> None:
        """Remember the pointer's revision: a rollback increments it without us."""
        revision: Any = self._client.hget(current_key(self._model_id), "revision")
        self.fence.revision = max(self.fence.revision, int(revision or 0))

    def release(self) -> None:
        """Give the lease back, so that a successor need not wait for it."""
        self._release(keys=[lease_key(self._model_id)], args=[self._owner])
        self.holds_lease = False

    def show(self, manifest: SnapshotManifest) -> None:
        """Let people see the newest snapshot's manifest and verdict, also when the gate refused it."""
        self._client.set(candidate_key(self._model_id), manifest.model_dump_json())

    def publish(self, snapshot: PolicySnapshot) -> Outcome:
        """Store a snapshot and move the pointer to it."""
        manifest = snapshot.manifest
        model, epoch, version = manifest.model_id, manifest.epoch, manifest.version
        blob, described = blob_key(model, epoch, version), manifest_key(model, epoch, version)
        outgrown = self._client.lindex(history_key(model), HISTORY_LENGTH - 1)
        outcome, revision = self._publish(
            keys=[
                current_key(model),
                blob,
                described,
                pin_key(model),
                lease_key(model),
                history_key(model),
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
            ],
        )
        result = Outcome(outcome.decode())
        if result is Outcome.NOT_HOLDER:
            self.holds_lease = False
        elif outgrown is not None and result is not Outcome.NOT_NEWER:
            self._forget(model, outgrown)
        self.fence.revision = max(self.fence.revision, int(revision))
        return result

    def _forget(self, model: str, outgrown: Any) -> None:
        """Delete what has left the history, unless the pointer stands on it."""
        epoch, version = (int(part) for part in outgrown.decode().split(":"))
        current = self._client.hmget(current_key(model), "epoch", "version")
        if [value and int(value) for value in current] != [epoch, version]:
            self._client.delete(blob_key(model, epoch, version), manifest_key(model, epoch, version))
