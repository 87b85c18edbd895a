"""Ends a process that no longer gets anywhere, so that its supervisor starts it anew from the log.

Faust and its client can stop without an error: a coordinator task that died, a fetcher that waits for ever, a loop
that is blocked. Their own detectors only write to the log. So whoever does the work gives signs of life, and when one
of them is overdue a thread of its own ends the process, whatever the event loop is doing.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Final

logger = logging.getLogger(__name__)

EXIT_STALLED: Final = 70
"""Exit code of a process that the watchdog has ended (EX_SOFTWARE of sysexits.h)."""
_LOOK_EVERY_S: Final = 1.0


class Watchdog:
    """Expects each named sign at least every `timeout_s` once it has come for the first time.

    Args:
        timeout_s: Silence that is too long.
        end: Ends the process; replaced in tests.
        clock: A clock that only goes forward, in seconds.
    """

    def __init__(
        self,
        timeout_s: float,
        *,
        end: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timeout_s = timeout_s
        self._end = end
        self._clock = clock
        self._signs: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def sign(self, name: str) -> None:
        """Give a sign of life."""
        self._signs[name] = self._clock()

    def overdue(self) -> dict[str, float]:
        """Return the signs that are overdue, with the seconds since they last came."""
        now = self._clock()
        return {name: now - at for name, at in list(self._signs.items()) if now - at > self._timeout_s}

    def look(self) -> None:
        """End the process if a sign is overdue."""
        if overdue := self.overdue():
            logger.critical(
                "no progress: ending the process for its supervisor to start it anew",
                extra={"overdue_seconds": {name: round(seconds, 1) for name, seconds in overdue.items()}},
            )
            self._end(EXIT_STALLED)

    def start(self) -> None:
        """Watch from a thread."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(_LOOK_EVERY_S):
            self.look()
