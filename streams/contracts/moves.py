"""Moves of the pointer that an operator makes, signed, so that servers know that they may go back.

A snapshot is signed by itself, but an old one stays genuine for ever: whoever may write to Redis could lead servers
back to it. So a server that has seen a newer version goes to an older one only by a move that says from where, and that
the owner of the key has signed, its revision included. A revision serves once, so a move that was written down cannot
be played again.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Final, NamedTuple

from streams.contracts.registry import Version

# No manifest begins so: what is signed as one cannot be shown as the other.
_DOMAIN: Final = b"genco-move-1\n"
NOWHERE: Final = "0:0"
"""What a move goes back from when nothing was current."""


class Move(NamedTuple):
    """The pointer goes to a version because an operator says so."""

    model_id: str
    to: Version
    sha256: str
    revision: int
    rollback_of: str
    """epoch:version that was current before."""


def sign_move(move: Move, key: bytes) -> str:
    """Return the HMAC-SHA256 (hex) of a move.

    Raises:
        ValueError: If the key is empty.
    """
    if not key:
        raise ValueError("signing key is empty; expected at least one byte")
    fields = [move.model_id, move.to.key, move.sha256, move.revision, move.rollback_of]
    return hmac.new(key, _DOMAIN + json.dumps(fields).encode(), hashlib.sha256).hexdigest()


def is_signed(move: Move, signature: str, key: bytes) -> bool:
    """Return whether the owner of the key made this move."""
    return hmac.compare_digest(sign_move(move, key).encode(), signature.encode("utf-8", "replace"))
