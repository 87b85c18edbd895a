"""A partition's hold: up to where its watermark may decide, and which impressions leave with an unknown label.

While clicks do not come, deciding would make negatives of impressions that were clicked. So the watermark stays where
it was when that was noticed, and reading goes on. In the end there are three ways: the missing clicks have come, and
everything leaves with its true label; they are lost, and what was shown until their return leaves as `unknown`, which
nobody learns; or it has lasted too long, and everything leaves as `unknown` until they return. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

FOR_EVER_MS: Final = 2**60


@dataclass(frozen=True, slots=True)
class Hold:
    """One partition's share in an outage. Times are of events unless they say otherwise."""

    alert_id: str
    is_shared: bool
    """Of all partitions of a process together; else of this one by itself."""
    since_ms: int
    """When clicks ceased to come."""
    at_ms: int
    """The watermark from which on nothing is decided as usual."""
    began_at_ms: int
    """By the wall clock."""
    unknown_until_ms: int | None = None
    """None: nothing is decided. Else what was to leave since the hold and was shown before this leaves as unknown;
    `FOR_EVER_MS`: until clicks come again."""

    @property
    def is_holding(self) -> bool:
        """Whether the watermark stands still."""
        return self.unknown_until_ms is None

    @property
    def is_over(self) -> bool:
        """Whether clicks have come again; impressions shown before that may still have to leave."""
        return self.unknown_until_ms not in (None, FOR_EVER_MS)

    def unknown_until(self, time_ms: int) -> Hold:
        """Return the hold that lets everything go, what was shown before `time_ms` as unknown."""
        return replace(self, unknown_until_ms=time_ms)

    def to_json(self) -> dict[str, Any]:
        """Return it JSON-able."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Any) -> Hold | None:
        """Return a hold that `to_json` has made, None if it is none."""
        try:
            return cls(**fields)
        except TypeError:
            return None


class Gate:
    """Lets the watermark of one partition through, as far as a hold allows.

    Args:
        window_ms: Attribution window.
        wait_ms: Label wait.
    """

    def __init__(self, window_ms: int, wait_ms: int) -> None:
        self._window_ms = window_ms
        self._wait_ms = wait_ms
        self.hold: Hold | None = None

    def steps(self, watermark_ms: int) -> Iterator[tuple[int, bool]]:
        """Yield watermarks in increasing order up to which to decide, and whether labels are known as usual.

        After a restart, when everything is read again from before the hold, it gives the same steps again.
        """
        hold = self.hold
        if hold is None:
            yield watermark_ms, True
            return
        yield min(watermark_ms, hold.at_ms), True
        if hold.unknown_until_ms is None or watermark_ms <= hold.at_ms:
            return
        last_ms = max(hold.at_ms, hold.unknown_until_ms + self._wait_ms)
        yield min(watermark_ms, last_ms), False
        if watermark_ms > last_ms:
            yield watermark_ms, True
        # Until here the next owner might have to begin again before it.
        if watermark_ms > last_ms + self._window_ms:
            self.hold = None


def saved_state(learned: dict[str, Any], hold: Hold | None) -> str:
    """Return what a partition's next owner needs, as text that travels with a committed offset."""
    return json.dumps({"rate": learned, "hold": hold and hold.to_json()}, separators=(",", ":"))


def read_state(text: str) -> tuple[dict[str, Any], Hold | None]:
    """Return what `saved_state` has saved; what cannot be read counts as nothing."""
    try:
        fields = json.loads(text or "{}")
        learned, hold = fields.get("rate"), fields.get("hold")
    except (ValueError, AttributeError):
        return {}, None
    return learned if isinstance(learned, dict) else {}, None if hold is None else Hold.from_json(hold)
