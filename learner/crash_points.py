"""The places in the learner where a crash is tested.

Between two effects that outlive the process (a record in Kafka, a snapshot in Redis, a file, an acknowledgement) stands
one named point. The code calls a hook there, which does nothing by default; a test's hook ends the process. Tests run
over all members, so a point that is added is tested, and one that is never reached fails its test.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum


class CrashPoint(StrEnum):
    """What has just happened when the hook is called."""

    UPDATE_PLANNED = "update_planned"
    """The bounds of an update are decided; nobody knows them yet."""
    UPDATE_RECORDED = "update_recorded"
    """The bounds are in the topic `updates`; nothing is learned from them yet."""
    UPDATE_LEARNED = "update_learned"
    """The model in memory has learned; nothing outside has changed."""
    SNAPSHOT_SHOWN = "snapshot_shown"
    """The newest manifest is in Redis; the policy that is served is still the one before."""
    SNAPSHOT_PUBLISHED = "snapshot_published"
    """Servers may load the new policy; the checkpoint is older."""
    CHECKPOINT_WRITTEN = "checkpoint_written"
    """The checkpoint is on disk under its temporary name."""
    CHECKPOINT_RENAMED = "checkpoint_renamed"
    """The checkpoint has its name; older ones are not removed yet."""
    CHECKPOINT_COMPLETE = "checkpoint_complete"
    """Everything is on disk; no offset has been released."""
    OFFSETS_RELEASED = "offsets_released"
    """The event loop may acknowledge the records; Kafka has committed none of them."""
    OFFSETS_ACKNOWLEDGED = "offsets_acknowledged"
    """The records are acknowledged to the consumer, which commits them later."""


Hook = Callable[[CrashPoint], None]


def go_on(_: CrashPoint) -> None:
    """Do nothing: the hook of every learner outside the tests."""
