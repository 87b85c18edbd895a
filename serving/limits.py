"""Limits on what a client may send, as pure ASGI: bytes are counted as they arrive, whatever Content-Length says."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BODY_TIMEOUT_S: Final = 10.0
"""For a whole body: a slower client holds memory and a connection for nothing."""
SMALL_BODY: Final = 4 * 1024
"""Limit where a route has none of its own."""


class BodyLimit:
    """Refuses bodies that are too large (413) or come too slowly (408).

    The oldest FastAPI that we take has no such limit.

    Args:
        app: What is protected.
        limits: Path -> bytes.
        timeout_s: For a body.
    """

    def __init__(self, app: ASGIApp, limits: Mapping[str, int], timeout_s: float = BODY_TIMEOUT_S) -> None:
        self._app = app
        self._limits = limits
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limits.get(scope["path"], SMALL_BODY)
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        received = 0
        deadline = asyncio.get_running_loop().time() + self._timeout_s

        async def counted() -> Message:
            nonlocal received
            if declared.isdigit() and int(declared) > limit:
                raise _too_large(limit)
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, f"the body did not come within {self._timeout_s:g} s", {"Connection": "close"}
                ) from None
            received += len(message.get("body", b""))
            if received > limit:
                raise _too_large(limit)
            return message

        # After the body, receive() is how an application waits for a disconnect; nobody here does.
        await self._app(scope, counted, send)


def _too_large(limit: int) -> HTTPException:
    # Close: the rest of the body would otherwise be read as the next request.
    return HTTPException(413, f"body is larger than {limit} bytes; send fewer items at a time", {"Connection": "close"})
