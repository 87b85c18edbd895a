"""A small client of the API, on the standard library alone.

One connection, kept alive. Calls that may be repeated without harm (`click`, `rendered`, `policy`) are sent once more
when the connection breaks. `decide` is not: each answer has been logged as an impression, and a second one would count
as shown although nobody saw it. Instead, a connection that the server may have closed meanwhile is not used again.

Example:
    >>> client = Client("http://127.0.0.1:8080")
    >>> [decision] = client.decide([{"product_id": "p1", "context": {}}])  # doctest: +SKIP
    >>> client.click([{"decision_id": decision["decision_id"]}])  # doctest: +SKIP
    {'accepted': 1, 'rejected': []}
"""

from __future__ import annotations

import http.client
import json
import select
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Self
from urllib.parse import urlsplit

MAX_IDLE_S: Final = 30.0
"""A connection that rested for longer is not used again; the server closes it after 75 s."""


class ClientError(RuntimeError):
    """The server refused a call, or could not be reached."""

    def __init__(self, message: str, status: int | None = None, faults: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status; None: no answer came."""
        self.faults = list(faults)
        """What was wrong: index, field, reason."""


class Client:
    """Calls one server. For one thread; make another one for the next.

    Args:
        url: http://host:port or https://host:port.
        token: Bearer token, if the server wants one.
        timeout_s: For connecting, and for each wait for the answer.
    """

    def __init__(self, url: str, token: str | None = None, timeout_s: float = 2.0) -> None:
        """Prepare; connects with the first call.

        Raises:
            ValueError: If the address is not of that form.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url is {url!r}; expected http://host:port")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.hostname, parts.port, timeout=timeout_s)
        self._prefix = parts.path.rstrip("/")
        self._url = url
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._last_used = 0.0

    def decide(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return a decision for each request.

        Raises:
            ClientError: If the server refuses one of them, or cannot be reached.
        """
        answer = self._call("POST", "/v1/decide", {"requests": list(requests)}, repeat=False)
        decisions: list[dict[str, Any]] = answer["decisions"]
        return decisions

    def click(self, clicks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Report clicks; return how many were accepted, and which were rejected and why.

        Raises:
            ClientError: If the server refuses the call, or cannot be reached.
        """
        return self._call("POST", "/v1/clicks", {"clicks": list(clicks)}, repeat=True)

    def rendered(self, tokens: Sequence[str]) -> dict[str, Any]:
        """Report cards that were rendered, by their impression tokens; answers as `click`.

        Raises:
            ClientError: If the server refuses the call, or cannot be reached.
        """
        return self._call("POST", "/v1/impressions", {"tokens": list(tokens)}, repeat=True)

    def policy(self, swaps: int = 20) -> dict[str, Any]:
        """Return what serves, its last swaps, and the counters.

        Raises:
            ClientError: If the server refuses the call, or cannot be reached.
        """
        return self._call("GET", f"/v1/policy?swaps={swaps}", None, repeat=True)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None, *, repeat: bool) -> dict[str, Any]:
        payload = None if body is None else json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
        self._drop_stale_connection()
        try:
            status, raw = self._send(method, path, payload)
        except (http.client.HTTPException, OSError) as error:
            # A timeout may mean a busy server: a second request would not help it.
            if not repeat or isinstance(error, TimeoutError):
                raise self._unreachable(error) from error
            try:
                status, raw = self._send(method, path, payload)
            except (http.client.HTTPException, OSError) as second:
                raise self._unreachable(second) from second
        return self._answer(status, raw)

    def _send(self, method: str, path: str, payload: bytes | None) -> tuple[int, bytes]:
        try:
            self._connection.request(method, self._prefix + path, payload, self._headers)
            response = self._connection.getresponse()
            raw = response.read()
        except BaseException:
            # Whatever comes on this connection now belongs to a call that nobody waits for.
            self._connection.close()
            raise
        self._last_used = time.monotonic()
        return response.status, raw

    def _drop_stale_connection(self) -> None:
        """Close a connection that the server has closed, or soon will: its answer to nothing is its end."""
        sock = self._connection.sock
        if sock is None:
            return
        if time.monotonic() - self._last_used > MAX_IDLE_S or select.select([sock], [], [], 0)[0]:
            self._connection.close()

    def _answer(self, status: int, raw: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(raw)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ClientError(f"{self._url} answered {status} without a JSON object; is it a GenCO server?", status)
        if status >= 300:
            faults = answer.get("faults") or []
            reasons = "; ".join(f"{fault['field']}: {fault['reason']}" for fault in faults[:3])
            message = f"{answer.get('error', 'refused')}" + (f" ({reasons})" if reasons else "")
            raise ClientError(f"{self._url} answered {status}: {message}", status, faults)
        return answer

    def _unreachable(self, error: Exception) -> ClientError:
        return ClientError(f"no answer from {self._url} ({type(error).__name__}: {error}); is the server running?")
