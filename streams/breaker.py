"""Stops the joiner when too many events of a topic go to the dead letters.

One bad line in ten thousand is poison: it is set aside and the rest goes on. One in ten is another schema, or a client
that sends nonsense: going on would throw the traffic away line by line. Pure: nothing here stops anything by itself.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Final

_VARYING: Final = re.compile(r"\d+(\.\d+)?|'[^']*'")
MIN_EVENTS: Final = 500
"""Below so many, a share says nothing."""


class Breaker:
    """Watches the share of bad events among the newest of one topic; once open it stays open.

    Args:
        max_share: Open when more than this share is bad; 1: never.
        min_events: Look back over so many events, and up to twice as many.
    """

    def __init__(self, max_share: float, min_events: int = MIN_EVENTS) -> None:
        self._max_share = max_share
        self._min_events = min_events
        self._older: Counter[str] = Counter()
        self._newer: Counter[str] = Counter()
        self.is_open = False
        self.cause = ""
        """Why it opened, for a person."""

    def observe(self, num_good: int, reasons: list[str]) -> None:
        """Note a record.

        Args:
            num_good: Good events in it.
            reasons: Of each bad one, why it is bad.
        """
        self._newer[""] += num_good
        # Numbers and names differ from event to event; the cause does not.
        self._newer.update(_VARYING.sub("…", reason) or "?" for reason in reasons)
        if self._newer.total() >= self._min_events:
            self._judge(self._older + self._newer)
            self._older, self._newer = self._newer, Counter()

    def _judge(self, seen: Counter[str]) -> None:
        total = seen.total()
        num_bad = total - seen[""]
        if self.is_open or num_bad <= self._max_share * total:
            return
        self.is_open = True
        seen.pop("", None)
        [(reason, number)] = seen.most_common(1)
        self.cause = f"{num_bad} of the last {total} events are bad, {number} of them for: {reason}"
