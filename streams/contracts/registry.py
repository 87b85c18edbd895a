"""Key names of the snapshot registry in Redis, shared by the learner that writes and the servers that read.

    blob:{model}:{epoch}:{version}      safetensors bytes, immutable
    manifest:{model}:{epoch}:{version}  signed JSON manifest of that blob, immutable
    current:{model}                     hash: epoch, version, revision, sha256; moved by scripts only
    pin:{model}                         present: the pointer does not move by itself
    lease:{model}, epoch:{model}        who may publish, and the fencing epoch
    history:{model}                     list, newest first, of published epoch:version
    candidate:{model}                   manifest of the newest snapshot made, published or refused by the gate
    published:{model}                   channel: a message for each move of the pointer

Redis is a cache: everything in it can be published again.
"""

from __future__ import annotations

from typing import Final

HISTORY_LENGTH: Final = 100


def blob_key(model_id: str, epoch: int, version: int) -> str:
    """Return the key of the immutable weights."""
    return f"blob:{model_id}:{epoch}:{version}"


def manifest_key(model_id: str, epoch: int, version: int) -> str:
    """Return the key of the immutable manifest."""
    return f"manifest:{model_id}:{epoch}:{version}"


def current_key(model_id: str) -> str:
    """Return the key of the pointer."""
    return f"current:{model_id}"


def pin_key(model_id: str) -> str:
    """Return the key of the pin."""
    return f"pin:{model_id}"


def lease_key(model_id: str) -> str:
    """Return the key of the publishing lease."""
    return f"lease:{model_id}"


def epoch_key(model_id: str) -> str:
    """Return the key of the fencing epoch counter."""
    return f"epoch:{model_id}"


def history_key(model_id: str) -> str:
    """Return the key of the list of published versions."""
    return f"history:{model_id}"


def candidate_key(model_id: str) -> str:
    """Return the key of the newest manifest, whatever its verdict."""
    return f"candidate:{model_id}"


def published_channel(model_id: str) -> str:
    """Return the channel that announces a moved pointer."""
    return f"published:{model_id}"
