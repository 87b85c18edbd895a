"""Decision ids: `route . unique . mac`.

    7.0192f3c4a5b67c8d9e0f.1c9f5d41a07be362
    │ │                    └ 64-bit keyed hash over the rest: a click for an id that we never gave is refused
    │ └ 48 bits of milliseconds, 32 random bits: sorts by time, unique without coordination
    └ number in [0, 65536): partition = route modulo the topic's partition count

The route travels inside the id, so an impression and its click land in the same partition number of their topics
whatever client library wrote them.
"""

from __future__ import annotations

import hmac
from hashlib import blake2b
from typing import Final

NUM_ROUTES: Final = 65536
MAC_DIGITS: Final = 16


class InvalidDecisionIdError(ValueError):
    """The id is malformed, or its MAC does not belong to it."""


def _mac(body: str, key: bytes) -> str:
    return blake2b(body.encode(), digest_size=MAC_DIGITS // 2, key=key, person=b"genco-decision").hexdigest()


def make_decision_id(route: int, now_ms: int, random_32: int, key: bytes) -> str:
    """Return a new id.

    Args:
        route: In [0, 65536).
        now_ms: Unix time in milliseconds, in [0, 2^48).
        random_32: In [0, 2^32), fresh for each id.
        key: Secret of at most 64 bytes.
    """
    body = f"{route}.{now_ms:012x}{random_32:08x}"
    return f"{body}.{_mac(body, key)}"


def route_of(decision_id: str) -> int:
    """Return the route of an id, without checking its MAC.

    Raises:
        InvalidDecisionIdError: If the id does not start with a route.
    """
    route = decision_id.partition(".")[0]
    if not (route.isascii() and route.isdigit() and len(route) <= 5 and int(route) < NUM_ROUTES):
        raise InvalidDecisionIdError(f"decision_id {decision_id[:80]!r} has no route; expected <route>.<unique>.<mac>")
    return int(route)


def issued_at_ms(decision_id: str) -> int:
    """Return the time that the id carries, in milliseconds.

    Raises:
        InvalidDecisionIdError: If the id is malformed.
    """
    parts = decision_id.split(".")
    if decision_id.isascii() and len(parts) == 3 and len(parts[1]) == 20:
        try:
            return int(parts[1][:12], 16)
        except ValueError:
            pass
    raise InvalidDecisionIdError(
        f"decision_id {decision_id[:80]!r} is malformed; expected <route>.<20 hex digits>.<mac>"
    )


def verify_decision_id(decision_id: str, key: bytes) -> None:
    """Check that the id was made with this key.

    Raises:
        InvalidDecisionIdError: If it was not.
    """
    route_of(decision_id)
    issued_at_ms(decision_id)
    body, _, mac = decision_id.rpartition(".")
    if not hmac.compare_digest(_mac(body, key).encode(), mac.encode()):
        raise InvalidDecisionIdError(
            f"decision_id {decision_id[:80]!r} was not issued here; send the id exactly as /v1/decide returned it"
        )
