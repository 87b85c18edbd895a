"""What the registry holds besides snapshots, and who changed it: the records of the topic `control`.

Each record has the whole state, so the newest one is enough to fill an empty Redis. Which one is the newest is told by
the state's `sequence` and not by the order in Kafka: two operators write to Redis first, in one order, and then to
Kafka in any. Of equal ones the later counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from streams.contracts.registry import Version

LEAST_MS_BETWEEN_MOVES: Final = 10
"""No learner moves the pointer more often, so it bounds the revisions that no record tells of."""
Count = Annotated[int, Field(ge=0)]
VersionKey = Annotated[str, Field(pattern=r"^\d{1,15}:\d{1,15}$")]
Sha256 = Annotated[str, Field(max_length=64)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class PointerState(_Frozen):
    """The snapshot that is current."""

    epoch: Count
    version: Count
    revision: Count
    sha256: Sha256

    @property
    def name(self) -> Version:
        """Which snapshot it is."""
        return Version(self.epoch, self.version)


class RegistryState(_Frozen):
    """The registry of a model, without its snapshots."""

    pointer: PointerState | None = None
    """None: nothing is current, as before the first publication."""
    pin: VersionKey | None = None
    """The version that the pointer does not leave by itself, as epoch:version."""
    frozen: bool = False
    """Whether the pointer stays wherever it is."""
    learning_frozen: bool = False
    """Whether the learner waits with what it has not learned yet."""
    exploration: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Share of the traffic beside the uniform one that explores; the rest plays what is believed best. None: all."""
    clicks_accepted_ms: Count = 0
    """The newest moment at which an operator said that clicks are as rare as the world wants them."""
    epoch: Count = 0
    """Fencing epoch of the newest learner."""
    revision: Count = 0
    """The largest that was given out."""
    sequence: Count = 0
    """How many operator actions have changed something."""

    @property
    def current(self) -> Version | None:
        """The version that is served."""
        return None if self.pointer is None else self.pointer.name

    @property
    def pinned(self) -> Version | None:
        """The pinned version."""
        return None if self.pin is None else Version.parse(self.pin)


class Action(StrEnum):
    """What an operator can do."""

    PIN = "pin"
    UNPIN = "unpin"
    FREEZE = "freeze"
    UNFREEZE = "unfreeze"
    ROLLBACK = "rollback"
    FREEZE_LEARNING = "freeze-learning"
    UNFREEZE_LEARNING = "unfreeze-learning"
    EXPLORE = "explore"
    ACCEPT_CLICKS = "accept-clicks"


class AuditRecord(_Frozen):
    """An operator action that changed something."""

    what: Action
    who: str
    when_ms: Count
    reason: str = ""
    before: RegistryState
    after: RegistryState


class ControlRecord(_Frozen):
    """One record of the topic `control`; its key is the model id."""

    schema_version: Literal[1] = 1
    model_id: str
    written_at_ms: Count
    state: RegistryState
    audit: AuditRecord | None = None
    """The newest action; None: there was none yet."""

    @classmethod
    def from_bytes(cls, value: bytes) -> ControlRecord:
        """Read a record.

        Raises:
            ValueError: If it is none, or of another schema version.
        """
        try:
            return cls.model_validate_json(value)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            field = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"not a record of the topic control: {field}: {first['msg']}") from None

    def revision_floor(self, now_ms: int) -> int:
        """Return a revision that no server can have seen a larger one than.

        Publications after this record are not recorded here; there were at most as many as time allowed.
        """
        return self.state.revision + max(0, now_ms - self.written_at_ms) // LEAST_MS_BETWEEN_MOVES


def newest(records: Iterable[ControlRecord]) -> ControlRecord | None:
    """Return the record that counts, of those of one model in the order of the topic."""
    best: ControlRecord | None = None
    for record in records:
        if best is None or record.state.sequence >= best.state.sequence:
            best = record
    return best
