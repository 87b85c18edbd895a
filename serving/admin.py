"""What `genco policy` does, over HTTP: lists the registry, pins, freezes, rolls back.

The user of the server in Redis can change nothing, so this takes the operator's: without `GENCO_OPERATOR_REDIS_URL` the
routes answer 501. Who acted is written as the caller says, and after it what the caller cannot choose: the beginning
of the token's hash and the address. Nothing here is on the way of a decision: each call runs in a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgspec
import redis
from msgspec import UNSET, Meta, Struct, UnsetType

from serving.messages import Fault, InvalidBodyError, read_flat
from streams.contracts.control import Action, ControlRecord
from streams.contracts.registry import Version
from streams.registry import Registry
from streams.registry_actions import MAX_REASON, MAX_WHO, ActionRefusedError, Change, NotRecordedError, Operator, Order
from streams.registry_listing import listing

MAX_NAME: Final = 64
MAX_LISTED: Final = 100
DEFAULT_LISTED: Final = 20
SETTING: Final = "GENCO_OPERATOR_REDIS_URL"

Who = Annotated[str, Meta(min_length=1, max_length=MAX_NAME, examples=["ann"], description="default: the token alone")]
Reason = Annotated[str, Meta(max_length=MAX_REASON, examples=["click rate fell at 14:10"], description="kept with it")]
VersionName = Annotated[
    str, Meta(pattern=r"^[0-9]{1,15}\.[0-9]{1,15}$", examples=["3.40"], description="EPOCH.VERSION, as listed")
]


class HoldRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Unpin, freeze or unfreeze."""

    reason: Reason = ""
    who: Who | UnsetType = UNSET


class PinRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Serve a version and stay with it."""

    version: VersionName
    reason: Reason = ""
    who: Who | UnsetType = UNSET


class RollbackRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Serve an older version."""

    version: Annotated[VersionName, Meta(description="default: the one stored before the current one")] | UnsetType = (
        UNSET
    )
    freeze: Annotated[bool, Meta(description="false: the next publication moves the pointer on")] = True
    reason: Reason = ""
    who: Who | UnsetType = UNSET


class RegistryChange(Struct, frozen=True, kw_only=True):
    """What an action has done."""

    changed: bool
    """False: there was nothing to do."""
    recorded: bool
    """Whether the topic control has it; it holds in any case."""
    warning: str | None
    """What to do when it is not recorded."""
    before: dict[str, Any]
    """State of the registry: pointer, pin, frozen, epoch, revision, sequence."""
    after: dict[str, Any]
    audit: dict[str, Any] | None
    """Null: nothing changed."""


class RegistryListing(Struct, frozen=True, kw_only=True):
    """What is stored, what is current, and who changed it."""

    model_id: Annotated[str, Meta(examples=["default"])]
    state: dict[str, Any]
    stored: Annotated[int, Meta(examples=[100])]
    """Versions that are stored, listed or not."""
    versions: list[dict[str, Any]]
    """Newest first: version, marks, gate, sha256, metrics."""
    audit: list[dict[str, Any]]
    """Actions, newest first."""


class AdminError(RuntimeError):
    """An admin call that was not answered as asked; `status` is that of the answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a call, as the server knows it."""

    token: str | None
    """Beginning of the hash of the token; None: there are no tokens."""
    address: str

    def signed(self, name: str | UnsetType) -> str:
        """Return what the audit says: the name that the caller gave, and what the caller cannot choose."""
        known = f"token {self.token or 'none'}, {self.address}"
        return (known if name is UNSET else f"{name} ({known})")[:MAX_WHO]


class RegistryAdmin:
    """Acts on the registry of one model as the operator.

    Args:
        client: Of Redis, as the user `operator`, without retries.
        model_id: Whose registry.
        record: Writes to the topic `control`; raises OSError when it cannot.
        signing_key: Signs the moves of the pointer, by which servers know that they may go back.
        now_ms: The clock.
    """

    def __init__(
        self,
        client: redis.Redis,
        model_id: str,
        record: Callable[[ControlRecord], None],
        signing_key: bytes,
        now_ms: Callable[[], int],
    ) -> None:
        self._registry = Registry(client, model_id)
        self._operator = Operator(self._registry, client, record, signing_key=signing_key)
        self._now_ms = now_ms

    def list(self, limit: int) -> RegistryListing:
        """Return the newest versions and actions.

        Raises:
            AdminError: If Redis does not answer, or somebody else wrote there.
        """
        try:
            return RegistryListing(**listing(self._registry, limit))
        except (redis.RedisError, ValueError) as error:
            raise AdminError(503, f"the registry cannot be read ({error})") from error

    def act(self, action: Action, body: bytes, caller: Caller) -> RegistryChange:
        """Do what a body asks for.

        Raises:
            InvalidBodyError: If the body asks for nothing that this action does.
            AdminError: 409 if the registry refuses; 503 if Redis does not answer.
        """
        asked = read_flat(body, _DECODERS[action])
        order = Order(caller.signed(asked.who), self._now_ms(), asked.reason)
        try:
            return _told(self._done(action, asked, order), None)
        except NotRecordedError as error:
            return _told(error.change, str(error))
        except ActionRefusedError as error:
            raise AdminError(409, str(error)) from error
        except redis.TimeoutError as error:
            raise AdminError(503, "Redis did not answer in time, so whether it was done is unknown; list it") from error
        except InvalidBodyError:
            raise
        except (redis.RedisError, ValueError) as error:
            raise AdminError(503, f"the registry cannot be changed ({error})") from error

    def _done(self, action: Action, asked: HoldRequest | PinRequest | RollbackRequest, order: Order) -> Change:
        match asked:
            case PinRequest():
                return self._operator.pin(_version(asked.version), order)
            case RollbackRequest():
                version = None if asked.version is UNSET else _version(asked.version)
                return self._operator.rollback(version, order, freeze=asked.freeze)
            case _:
                hold = {Action.UNPIN: self._operator.unpin, Action.FREEZE: self._operator.freeze}
                return hold.get(action, self._operator.unfreeze)(order)


_decode_hold = msgspec.json.Decoder(HoldRequest).decode
_DECODERS: Final[dict[Action, Callable[[bytes], HoldRequest | PinRequest | RollbackRequest]]] = {
    Action.PIN: msgspec.json.Decoder(PinRequest).decode,
    Action.ROLLBACK: msgspec.json.Decoder(RollbackRequest).decode,
    Action.UNPIN: _decode_hold,
    Action.FREEZE: _decode_hold,
    Action.UNFREEZE: _decode_hold,
}


def _version(text: str) -> Version:
    try:
        return Version.parse(text)
    except ValueError as error:  # a line break at its end, which the pattern lets pass
        raise InvalidBodyError([Fault(index=None, field="version", reason=str(error))]) from None


def _told(change: Change, warning: str | None) -> RegistryChange:
    return RegistryChange(
        changed=change.audit is not None,
        recorded=warning is None,
        warning=warning,
        before=change.before.model_dump(mode="json"),
        after=change.after.model_dump(mode="json"),
        audit=None if change.audit is None else change.audit.model_dump(mode="json"),
    )
