"""uvicorn's HTTP protocol for clients that may be hostile: headers must come in time, and end.

uvicorn bounds neither. Connections that say nothing would take its places for connections until nobody else gets one,
and a header without end would take all memory.
"""

from __future__ import annotations

import asyncio
from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_TIMEOUT_S: Final = 10.0
"""From the opening of a connection, or the first byte of a further request, to the end of its headers."""
MAX_HEADER_BYTES: Final = 64 * 1024


class GuardedProtocol(HttpToolsProtocol):
    """One connection."""

    header_timeout_s = HEADER_TIMEOUT_S
    _timer: asyncio.TimerHandle | None = None
    """Runs while headers are awaited."""
    _num_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start waiting for the first request."""
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what comes before headers end."""
        super().data_received(data)
        if self._timer is not None:
            self._num_bytes += len(data)
            if self._num_bytes > MAX_HEADER_BYTES:
                self._give_up()

    def on_message_begin(self) -> None:
        """Start waiting for the headers of a further request."""
        super().on_message_begin()
        if self._timer is None:
            self._await_headers()

    def on_headers_complete(self) -> None:
        """Hand the request on."""
        self._stop_waiting()
        super().on_headers_complete()

    def _await_headers(self) -> None:
        self._num_bytes = 0
        self._timer = self.loop.call_later(self.header_timeout_s, self._give_up)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._stop_waiting()
        # Not an orderly end: that would wait until the client takes what it was sent.
        self.transport.abort()
