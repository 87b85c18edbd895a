"""What an operator, or an alert, does to the registry: pin, freeze, roll back, and what undoes it.

Each action is one Lua script, so the learner's publications and other operators come before it or after it, never in
between. It changes Redis first and is then written to the topic `control`. Only Redis can tell whether an action is
possible and what it changes, so the other order would record pins that never were, to be restored one day. When Kafka
does not take the record, the action holds all the same, and the learner writes it when it next prolongs its lease.

    pin       the pointer moves to a stored version and stays; what is published is stored
    unpin     the pointer may move again; it stays until the next publication
    freeze    the pointer stays where it is; learning goes on, what is published is stored
    unfreeze  the pointer may move again; it stays until the next publication
    rollback  the pointer moves to an older version; a freeze keeps the next publication from undoing it

    freeze-learning    the learner makes no more updates; what it has not learned waits in Kafka
    unfreeze-learning  it goes on where it stopped
    explore            servers play what is believed best to all but a share of the traffic; 1: to nobody, as ever
    accept-clicks      the joiner takes the clicks that come for all there are, and ends its holds

Pin and rollback always give a new revision, by which servers know that they may go back. An action that would change
nothing changes nothing: no revision, no audit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import redis

from streams.contracts.control import Action, AuditRecord, ControlRecord, RegistryState
from streams.contracts.registry import (
    AUDIT_LENGTH,
    Version,
    audit_key,
    blob_prefix,
    current_key,
    epoch_key,
    freeze_key,
    history_key,
    manifest_prefix,
    pin_key,
    published_channel,
    revision_key,
    sequence_key,
    switches_key,
)
from streams.contracts.snapshot import FORMAT
from streams.registry import Registry

MAX_WHO: Final = 128
MAX_REASON: Final = 1_000

# KEYS[1] current, KEYS[2] pin, KEYS[3] freeze, KEYS[4] epoch, KEYS[5] revision, KEYS[6] sequence, KEYS[7] history,
# KEYS[8] audit; ARGV[1] what, ARGV[2] who, ARGV[3] when in ms, ARGV[4] reason, ARGV[5] length of the audit,
# ARGV[6] channel, ARGV[7] and ARGV[8] what the keys of blobs and manifests begin with, ARGV[9] version or '',
# ARGV[10] '1' if a rollback freezes, ARGV[11] format of snapshots that servers read; KEYS[9] switches, ARGV[12] value.
# Returns {'changed', audit record} or {refusal or 'unchanged', ''}.
_BEGIN: Final = """
if redis.call('EXISTS', KEYS[4]) == 0 then return {'empty', ''} end
local function number(key) return tonumber(redis.call('GET', key) or '0') end
local function state()
  local now = redis.call('HMGET', KEYS[1], 'epoch', 'version', 'revision', 'sha256')
  local revision = math.max(tonumber(now[3] or '0'), number(KEYS[5]))
  local pointer = cjson.null
  if now[1] then
    pointer = {epoch = tonumber(now[1]), version = tonumber(now[2]), revision = tonumber(now[3]), sha256 = now[4]}
  end
  local switches = redis.call('HMGET', KEYS[9], 'learning_frozen', 'exploration', 'clicks_accepted_ms')
  return {pointer = pointer, pin = redis.call('GET', KEYS[2]) or cjson.null, revision = revision,
          learning_frozen = switches[1] == '1', exploration = tonumber(switches[2] or '') or cjson.null,
          clicks_accepted_ms = tonumber(switches[3] or '') or 0,
          frozen = redis.call('EXISTS', KEYS[3]) == 1, epoch = number(KEYS[4]), sequence = number(KEYS[6])}
end
local function parts(name)
  local epoch, version = string.match(name, '^(%d+):(%d+)$')
  return tonumber(epoch), tonumber(version)
end
local before = state()
local current = before.pointer ~= cjson.null and before.pointer.epoch .. ':' .. before.pointer.version or ''
-- Moves the pointer; returns why it cannot.
local function point_at(name)
  local manifest, size = redis.call('GET', ARGV[8] .. name), redis.call('STRLEN', ARGV[7] .. name)
  if not manifest or size == 0 then return 'missing' end
  local ok, parsed = pcall(cjson.decode, manifest)
  if not ok or type(parsed) ~= 'table' or parsed.num_bytes ~= size or type(parsed.sha256) ~= 'string' then
    return 'damaged'
  end
  if parsed.format ~= ARGV[11] then return 'format' end
  local epoch, version = parts(name)
  redis.call('HSET', KEYS[1], 'epoch', epoch, 'version', version, 'sha256', parsed.sha256,
             'revision', before.revision + 1)
  redis.call('PUBLISH', ARGV[6], before.revision + 1)
end
local changed = false
-- Sets a switch; returns whether it was another.
local function switch(name, value)
  local is_new = (redis.call('HMGET', KEYS[9], name)[1] or '') ~= value
  if is_new then redis.call('HSET', KEYS[9], name, value) end
  return is_new
end
"""

_END: Final = """
if not changed then return {'unchanged', ''} end
redis.call('INCR', KEYS[6])
local audit = cjson.encode({what = ARGV[1], who = ARGV[2], when_ms = tonumber(ARGV[3]), reason = ARGV[4],
                            before = before, after = state()})
redis.call('LPUSH', KEYS[8], audit)
redis.call('LTRIM', KEYS[8], 0, ARGV[5] - 1)
return {'changed', audit}
"""

_BODIES: Final = {
    Action.PIN: """
if before.pin ~= ARGV[9] or current ~= ARGV[9] then
  local cause = point_at(ARGV[9])
  if cause then return {cause, ''} end
  redis.call('SET', KEYS[2], ARGV[9])
  changed = true
end
""",
    Action.UNPIN: "changed = redis.call('DEL', KEYS[2]) == 1\n",
    Action.FREEZE: "changed = redis.call('SETNX', KEYS[3], '1') == 1\n",
    Action.UNFREEZE: "changed = redis.call('DEL', KEYS[3]) == 1\n",
    Action.FREEZE_LEARNING: "changed = switch('learning_frozen', '1')\n",
    Action.UNFREEZE_LEARNING: "changed = switch('learning_frozen', '')\n",
    Action.EXPLORE: "changed = switch('exploration', ARGV[12])\n",
    Action.ACCEPT_CLICKS: "changed = switch('clicks_accepted_ms', ARGV[3])\n",
    Action.ROLLBACK: """
if before.pin ~= cjson.null then return {'pinned', ''} end
if current == '' then return {'no_pointer', ''} end
local target = ARGV[9]
if target == '' then
  local names = redis.call('LRANGE', KEYS[7], 0, -1)
  for i, name in ipairs(names) do
    if name == current then target = names[i + 1] or '' end
  end
  if target == '' then return {'nothing_before', ''} end
end
local epoch, version = parts(target)
if epoch > before.pointer.epoch or (epoch == before.pointer.epoch and version > before.pointer.version) then
  return {'not_older', ''}
end
if target ~= current or (ARGV[10] == '1' and not before.frozen) then
  local cause = point_at(target)
  if cause then return {cause, ''} end
  if ARGV[10] == '1' then redis.call('SET', KEYS[3], '1') end
  changed = true
end
""",
}


class Refusal(StrEnum):
    """Why an action was not done."""

    EMPTY = "empty"
    MISSING = "missing"
    DAMAGED = "damaged"
    FORMAT = "format"
    PINNED = "pinned"
    NO_POINTER = "no_pointer"
    NOTHING_BEFORE = "nothing_before"
    NOT_OLDER = "not_older"


class ActionRefusedError(ValueError):
    """The registry is not so that the action could be done; nothing has changed."""

    def __init__(self, refusal: Refusal, message: str) -> None:
        super().__init__(message)
        self.refusal = refusal


@dataclass(frozen=True, slots=True)
class Change:
    """What an action has done."""

    before: RegistryState
    after: RegistryState
    audit: AuditRecord | None
    """None: there was nothing to do."""


class NotRecordedError(ConnectionError):
    """Redis has the action, the topic `control` not (yet)."""

    def __init__(self, change: Change, message: str) -> None:
        super().__init__(message)
        self.change = change


@dataclass(frozen=True, slots=True)
class Order:
    """Who wants it, when and why: what the audit says."""

    who: str
    """At most 128 characters."""
    when_ms: int
    reason: str = ""
    """At most 1,000 characters."""

    def __post_init__(self) -> None:
        """Refuse what an audit should not hold."""
        if not 1 <= len(self.who) <= MAX_WHO:
            raise ValueError(f"who acts has {len(self.who)} characters; expected 1 to {MAX_WHO}")
        if len(self.reason) > MAX_REASON:
            raise ValueError(f"the reason has {len(self.reason)} characters; expected at most {MAX_REASON}")


class Operator:
    """Acts on the registry of one model.

    Every action may raise `redis.RedisError`. Whether it was done is then unknown, and doing it again does no harm,
    except for a rollback without a version.

    Args:
        registry: Of the model.
        client: Of the same Redis, without retries.
        record: Writes to the topic `control`; raises OSError when it cannot.
    """

    def __init__(self, registry: Registry, client: redis.Redis, record: Callable[[ControlRecord], None]) -> None:
        self._registry = registry
        self._model_id = registry.model_id
        self._record = record
        self._scripts: dict[Action, Any] = {
            action: client.register_script(_BEGIN + body + _END) for action, body in _BODIES.items()
        }

    def pin(self, version: Version, order: Order) -> Change:
        """Move the pointer to a stored version and keep it there.

        Raises:
            ActionRefusedError: If the version is not stored, or the registry is empty.
            NotRecordedError: If it is done, but Kafka has no record of it.
        """
        return self._act(Action.PIN, order, version)

    def unpin(self, order: Order) -> Change:
        """Let the pointer move again, from the next publication on; raises as `pin`."""
        return self._act(Action.UNPIN, order)

    def freeze(self, order: Order) -> Change:
        """Keep the pointer where it is, while learning goes on; raises as `pin`."""
        return self._act(Action.FREEZE, order)

    def unfreeze(self, order: Order) -> Change:
        """Let the pointer move again, from the next publication on; raises as `pin`."""
        return self._act(Action.UNFREEZE, order)

    def rollback(self, version: Version | None, order: Order, *, freeze: bool = True) -> Change:
        """Move the pointer back.

        Args:
            version: To which, older than the current one; None: to the one stored before the current one.
            order: Who, when and why.
            freeze: Freeze too; else the next publication moves the pointer on, within about a second.

        Raises:
            ActionRefusedError: If there is no such version, it is not older, or a pin holds the pointer.
            NotRecordedError: If it is done, but Kafka has no record of it.
        """
        return self._act(Action.ROLLBACK, order, version, freeze=freeze)

    def freeze_learning(self, order: Order) -> Change:
        """Let the learner wait: it makes no update that is not recorded yet, and loses nothing; raises as `pin`."""
        return self._act(Action.FREEZE_LEARNING, order)

    def unfreeze_learning(self, order: Order) -> Change:
        """Let the learner go on where it stopped; raises as `pin`."""
        return self._act(Action.UNFREEZE_LEARNING, order)

    def explore(self, share: float, order: Order) -> Change:
        """Let only a share of the traffic beside the uniform one explore; raises as `pin`.

        Args:
            share: In [0, 1]; 1: all of it, as ever.
            order: Who, when and why.
        """
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"the share that explores is {share}; must be in [0, 1]")
        return self._act(Action.EXPLORE, order, value="" if share == 1.0 else f"{share:.6g}")

    def accept_clicks(self, order: Order) -> Change:
        """Let the joiner end its holds and learn the click rate anew; raises as `pin`."""
        return self._act(Action.ACCEPT_CLICKS, order)

    def _act(
        self, action: Action, order: Order, version: Version | None = None, *, freeze: bool = False, value: str = ""
    ) -> Change:
        model = self._model_id
        outcome, audit = self._scripts[action](
            keys=[
                current_key(model),
                pin_key(model),
                freeze_key(model),
                epoch_key(model),
                revision_key(model),
                sequence_key(model),
                history_key(model),
                audit_key(model),
                switches_key(model),
            ],
            args=[
                action.value,
                order.who,
                order.when_ms,
                order.reason,
                AUDIT_LENGTH,
                published_channel(model),
                blob_prefix(model),
                manifest_prefix(model),
                "" if version is None else version.key,
                int(freeze),
                FORMAT,
                value,
            ],
        )
        if outcome not in (b"changed", b"unchanged"):
            refusal = Refusal(outcome.decode())
            raise ActionRefusedError(refusal, _explain(refusal, model, version))
        change = self._changed(AuditRecord.model_validate_json(audit)) if audit else self._unchanged()
        self._write(change, order.when_ms)
        return change

    @staticmethod
    def _changed(audit: AuditRecord) -> Change:
        return Change(audit.before, audit.after, audit)

    def _unchanged(self) -> Change:
        state = self._registry.state()
        return Change(state, state, None)

    def _write(self, change: Change, now_ms: int) -> None:
        """Write the state to Kafka, also when nothing changed: the record of the change before may be missing there."""
        audit = change.audit or next(iter(self._registry.audit(1)), None)
        record = ControlRecord(model_id=self._model_id, written_at_ms=now_ms, state=change.after, audit=audit)
        try:
            self._record(record)
        except OSError as error:
            raise NotRecordedError(
                change,
                f"Redis has done it, but it could not be written to the topic control ({error}). It holds, and would "
                "only be lost with Redis; the learner writes it when it next prolongs its lease, or repeat the command",
            ) from error


def _explain(refusal: Refusal, model: str, version: Version | None) -> str:
    match refusal:
        case Refusal.EMPTY:
            return (
                f"Redis holds nothing of model {model!r}; start genco learn, or, if Redis was just emptied, wait some "
                "seconds until the learner has filled it from the topic control; or name another with --model-id"
            )
        case Refusal.MISSING:
            return (
                f"version {version or 'before the current one'} of model {model!r} is not stored in Redis; "
                "genco policy list shows what is"
            )
        case Refusal.DAMAGED:
            return (
                f"version {version or 'before the current one'} of model {model!r} is damaged in Redis: its manifest "
                "does not describe its blob; choose another (genco policy list)"
            )
        case Refusal.FORMAT:
            return (
                f"version {version or 'before the current one'} of model {model!r} was made by another release: "
                f"servers read the format {FORMAT!r}; choose another (genco policy list)"
            )
        case Refusal.PINNED:
            return f"model {model!r} is pinned; pin the version that you want, or first: genco policy unpin"
        case Refusal.NO_POINTER:
            return f"nothing of model {model!r} is current, so nothing can be rolled back; genco policy pin VERSION"
        case Refusal.NOTHING_BEFORE:
            return (
                f"no version of model {model!r} is stored before the current one; freeze it, or name a version "
                "(genco policy list)"
            )
        case Refusal.NOT_OLDER:
            return (
                f"version {version} of model {model!r} is newer than the current one; to go forward: genco policy "
                f"unfreeze and the next publication, or genco policy pin {version}"
            )
