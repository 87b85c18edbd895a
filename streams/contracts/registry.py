"""Key names of the snapshot registry in Redis, shared by the learner that writes and the servers that read.

    blob:{model}:{epoch}:{version}      safetensors bytes, immutable
    manifest:{model}:{epoch}:{version}  signed JSON manifest of that blob, immutable
    current:{model}                     hash: epoch, version, revision, sha256; moved by scripts only
    pin:{model}                         epoch:version; present: the pointer does not leave it by itself
    freeze:{model}                      present: the pointer does not move by itself
    switches:{model}                    hash: what learner, servers and joiner are told to do otherwise; '': as ever
    lease:{model}, epoch:{model}        who may publish, and the fencing epoch; without an epoch the registry is empty
    revision:{model}                    every revision up to this one was given out before Redis was emptied
    sequence:{model}                    how many operator actions have changed something
    history:{model}                     list, newest first, of the stored epoch:version, sparser with age
    audit:{model}                       list, newest first, of the operator actions that changed something, JSON
    candidate:{model}                   manifest of the newest snapshot made, published or refused by the gate; expires
    published:{model}                   channel: a message for each move of the pointer

Redis is a cache: snapshots can be published again, the rest is in the topic `control` too. The scripts make the names
of the blobs that they delete, so all keys of a model must be in one Redis: no Redis Cluster.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

HISTORY_LENGTH: Final = 100
"""Snapshots that are kept, those under the pointer and the pin included. At one a second a hundred are less than two
minutes, too short to notice that something is wrong; so they get sparser with their age, and reach back most of a
model's life."""
AUDIT_LENGTH: Final = 1_000
CANDIDATE_TTL_S: Final = 7 * 86_400
"""A learner that was stopped on a Friday can still be understood on Monday."""
SWITCHES: Final = ("learning_frozen", "exploration", "clicks_accepted_ms")
"""'1' while the learner waits; share of the traffic that explores; when an operator accepted the click rate."""
_NAME: Final = re.compile(r"(\d{1,15})[.:](\d{1,15})")


class Version(NamedTuple):
    """Which snapshot of a model; the larger is the newer."""

    epoch: int
    number: int

    @classmethod
    def parse(cls, text: str) -> Version:
        """Read `epoch.number`, as people write it, or `epoch:number`, as keys hold it.

        Raises:
            ValueError: If the text is neither.

        Example:
            >>> Version.parse("3.42")
            Version(epoch=3, number=42)
        """
        found = _NAME.fullmatch(text)
        if found is None:
            raise ValueError(f"{text[:64]!r} is no version; expected EPOCH.VERSION, such as 3.42")
        return cls(int(found[1]), int(found[2]))

    @property
    def key(self) -> str:
        """How keys, the history and the pin name it: `epoch:number`."""
        return f"{self.epoch}:{self.number}"

    def __str__(self) -> str:
        """How people read it: `epoch.number`."""
        return f"{self.epoch}.{self.number}"


def blob_prefix(model_id: str) -> str:
    """Return what the keys of a model's weights begin with; `Version.key` follows."""
    return f"blob:{model_id}:"


def manifest_prefix(model_id: str) -> str:
    """Return what the keys of a model's manifests begin with; `Version.key` follows."""
    return f"manifest:{model_id}:"


def blob_key(model_id: str, epoch: int, version: int) -> str:
    """Return the key of the immutable weights."""
    return f"{blob_prefix(model_id)}{epoch}:{version}"


def manifest_key(model_id: str, epoch: int, version: int) -> str:
    """Return the key of the immutable manifest."""
    return f"{manifest_prefix(model_id)}{epoch}:{version}"


def current_key(model_id: str) -> str:
    """Return the key of the pointer."""
    return f"current:{model_id}"


def pin_key(model_id: str) -> str:
    """Return the key of the pin."""
    return f"pin:{model_id}"


def freeze_key(model_id: str) -> str:
    """Return the key of the freeze."""
    return f"freeze:{model_id}"


def switches_key(model_id: str) -> str:
    """Return the key of the hash with the fields `SWITCHES`."""
    return f"switches:{model_id}"


def revision_key(model_id: str) -> str:
    """Return the key of the revisions given out before."""
    return f"revision:{model_id}"


def sequence_key(model_id: str) -> str:
    """Return the key of the counter of operator actions."""
    return f"sequence:{model_id}"


def audit_key(model_id: str) -> str:
    """Return the key of the list of operator actions."""
    return f"audit:{model_id}"


def lease_key(model_id: str) -> str:
    """Return the key of the publishing lease."""
    return f"lease:{model_id}"


def epoch_key(model_id: str) -> str:
    """Return the key of the fencing epoch counter."""
    return f"epoch:{model_id}"


def history_key(model_id: str) -> str:
    """Return the key of the list of stored versions."""
    return f"history:{model_id}"


def candidate_key(model_id: str) -> str:
    """Return the key of the newest manifest, whatever its verdict."""
    return f"candidate:{model_id}"


def published_channel(model_id: str) -> str:
    """Return the channel that announces a moved pointer."""
    return f"published:{model_id}"
