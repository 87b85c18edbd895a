"""What went wrong, and why: the records of the topic `alerts`, by which monitor, server and command line agree.

An alert is an episode with an id of its own. Each record is its whole state at one moment, so the newest record of an
id is enough to show it; `firing` is followed by `resolved`, and by further `firing` ones when its evidence or what was
done about it has changed.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_EVIDENCE = 32
HEARTBEAT = "DeadMan"
"""Name of the alert that the monitor writes every minute while it works: whoever misses it shall be alarmed."""
JOIN_RATE_DROP = "JoinRateDrop"
"""Name of the joiner's own alert: while it fires, labels are known to be wrong, and the monitor judges none."""
Count = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1, max_length=64)]


class Cause(StrEnum):
    """What an on-call engineer has to mend."""

    WORLD_CHANGED = "world changed"
    """Shoppers answer otherwise than before, whoever chose the creative."""
    LEARNER_BROKE = "learner broke"
    """Predictions are wrong where the world is as it was."""
    JOIN_BROKEN = "join broken"
    """Clicks, or events of either kind, do not arrive or do not meet."""
    MIX_MOVED = "traffic mix moved"
    """Other products or contexts than before are asked for."""
    POLICY_COLLAPSED = "policy collapsed"
    """The policy shows too little else than its favorites."""
    PIPELINE_LATE = "pipeline late"
    """Everything is right, but old."""


class Severity(StrEnum):
    """Whom it is for."""

    PAGE = "page"
    """Somebody gets up for it."""
    TICKET = "ticket"
    """Somebody looks at it in working hours."""


class Alert(BaseModel):
    """One record of the topic `alerts`; its key is the model id."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    schema_version: Literal[1] = 1
    alert_id: Name
    """The same in every record of an episode."""
    name: Name
    """Which alert it is; its page is `docs/runbook/{name}.md`."""
    cause: Cause
    severity: Severity
    model_id: str
    state: Literal["firing", "resolved"]
    since_ms: Count
    """When it began to fire, milliseconds since 1970."""
    occurred_at_ms: Count
    """When this record was made."""
    summary: Annotated[str, Field(max_length=500)]
    """What happened, in a sentence with its numbers."""
    evidence: Annotated[dict[str, float | str], Field(max_length=MAX_EVIDENCE)] = {}
    """The numbers that led to it, by name; ratios as fractions, times in seconds."""
    actions: Annotated[list[str], Field(max_length=16)] = []
    """What was done by itself, and the command that undoes each."""

    @property
    def is_heartbeat(self) -> bool:
        """Whether it says that the monitor lives, and no more."""
        return self.name == HEARTBEAT

    @classmethod
    def from_bytes(cls, value: bytes) -> Alert:
        """Read a record.

        Raises:
            ValueError: If it is none, or of another schema version.
        """
        try:
            return cls.model_validate_json(value)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            field = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"not a record of the topic alerts: {field}: {first['msg']}") from None

    def to_bytes(self) -> bytes:
        """Return the record's bytes."""
        return self.model_dump_json().encode()
