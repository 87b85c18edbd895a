"""Feedback: which clicks and impression tokens are believed. Pure: keys and times are arguments.

A click counts when its decision id carries our MAC and its time is possible. An impression token is the impression
itself, signed, for a client that logs impressions only when they are rendered: `base64url(JSON).mac`.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

import msgspec
from msgspec import UNSET

from serving.messages import ClickRequest, Fault
from streams.contracts.decision_ids import InvalidDecisionIdError, issued_at_ms, verify_decision_id
from streams.contracts.events import Click, Impression

CLOCK_SKEW_MS: Final = 60_000
"""Client clocks may be wrong by this much."""
TOKEN_LIFETIME_MS: Final = 3_600_000
"""A card that is rendered later than this after its decision is no longer believed."""
_MAC_BYTES: Final = 16

_decode_impression = msgspec.json.Decoder(Impression).decode
_encode = msgspec.json.Encoder().encode


def _mac(body: bytes, key: bytes) -> str:
    return blake2b(body, digest_size=_MAC_BYTES, key=key, person=b"genco-token").hexdigest()


def make_token(impression: Impression, key: bytes) -> str:
    """Return the impression as a signed text."""
    body = base64.urlsafe_b64encode(_encode(impression)).rstrip(b"=")
    return f"{body.decode()}.{_mac(body, key)}"


def read_token(token: str, key: bytes, now_ms: int) -> Impression:
    """Return the impression of a token, as rendered now.

    Raises:
        ValueError: If the token was not made with this key, or is too old.
    """
    body, _, mac = token.rpartition(".")
    raw = body.encode("utf-8", "replace")
    if not hmac.compare_digest(_mac(raw, key).encode(), mac.encode("utf-8", "replace")):
        raise ValueError("was not issued here; send it exactly as /v1/decide returned it")
    try:
        impression = _decode_impression(base64.urlsafe_b64decode(raw + b"=" * (-len(raw) % 4)))
    except (binascii.Error, msgspec.MsgspecError) as error:  # signed by us, but by another release
        raise ValueError(f"cannot be read by this release: {error}") from None
    age_ms = now_ms - impression.occurred_at_ms
    if age_ms > TOKEN_LIFETIME_MS:
        raise ValueError(f"is {age_ms // 1000} s old; at most {TOKEN_LIFETIME_MS // 1000} s")
    return msgspec.structs.replace(impression, occurred_at_ms=max(now_ms, impression.occurred_at_ms))


def check_clicks(
    clicks: Sequence[ClickRequest], key: bytes, now_ms: int, window_ms: int
) -> tuple[list[tuple[int, Click]], list[Fault]]:
    """Sort clicks into believed ones, with their place, and faults.

    `window_ms` is the attribution window: a click on a card that was decided longer ago than a card may wait to be
    rendered, and then to be clicked, can count for nothing.
    """
    good: list[tuple[int, Click]] = []
    faults: list[Fault] = []
    for index, click in enumerate(clicks):
        occurred_at_ms = now_ms if click.occurred_at_ms is UNSET else click.occurred_at_ms
        try:
            verify_decision_id(click.decision_id, key)
        except InvalidDecisionIdError as error:
            faults.append(Fault(index=index, field="decision_id", reason=str(error)))
            continue
        if reason := _impossible_time(occurred_at_ms, issued_at_ms(click.decision_id), now_ms, window_ms):
            faults.append(Fault(index=index, field="occurred_at_ms", reason=reason))
            continue
        reward = 1.0 if click.reward is UNSET else click.reward
        event = Click(schema_version=1, decision_id=click.decision_id, occurred_at_ms=occurred_at_ms, reward=reward)
        good.append((index, event))
    return good, faults


def _impossible_time(occurred_at_ms: int, decided_at_ms: int, now_ms: int, window_ms: int) -> str | None:
    if occurred_at_ms > now_ms + CLOCK_SKEW_MS:
        return (
            f"is {occurred_at_ms - now_ms} ms in the future; expected Unix milliseconds, at most {CLOCK_SKEW_MS} ahead"
        )
    if occurred_at_ms < decided_at_ms - CLOCK_SKEW_MS:
        return f"is {decided_at_ms - occurred_at_ms} ms before its decision; at most {CLOCK_SKEW_MS} are believed"
    lifetime_ms = TOKEN_LIFETIME_MS + window_ms + CLOCK_SKEW_MS
    if occurred_at_ms > decided_at_ms + lifetime_ms:
        return (
            f"is {(occurred_at_ms - decided_at_ms) // 1000} s after its decision; at most {lifetime_ms // 1000} s count"
        )
    return None
