"""The server without HTTP, for ad servers written in Python: the same policy, checks and event log, in this process.

It has the calls of `serving.client.Client`, takes what they take and raises what they raise, so one can stand for the
other. No call waits for Redis or Kafka: a thread fetches snapshots, another one writes the events. Each process that
embeds it needs a range of `GENCO_ROUTES` and a `GENCO_LAST_GOOD_DIR` of its own, like any server. An example that runs:
docs/embedded.md.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Self

import msgspec
from prometheus_client import CollectorRegistry

from serving.client import ClientError
from serving.messages import InvalidBodyError, read_decide
from serving.parts import build
from serving.reports import LogFullError, Reports
from serving.status import policy_status
from streams.contracts.settings import ServeSettings, load
from streams.telemetry import now_ms

MAX_BODY_BYTES: Final = 1024 * 1024
CLOSE_S: Final = 7.0


class Embedded:
    """Decides in this process. For any number of threads.

    Args:
        settings: As of `genco serve`; None: those of the environment. Those of HTTP are not read.
        registry: Where the metrics of a server go; None: nowhere.
    """

    def __init__(self, settings: ServeSettings | None = None, registry: CollectorRegistry | None = None) -> None:
        """Start the threads; returns at once, whether or not anything answers.

        Raises:
            ConfigurationError: If the settings are wrong.
        """
        self._parts = parts = build(settings or load(ServeSettings), registry or CollectorRegistry())
        self._reports = Reports(parts.event_log, parts.metrics, parts.signing_key, parts.attribution_window_ms)
        # Seeds come from one generator, which is not for several threads at once.
        self._lock = threading.Lock()
        parts.start()

    def decide(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return a decision for each request, and log the impressions.

        Raises:
            ClientError: If one of them is refused.
        """
        body = _body({"requests": list(requests)})
        with self._lock:
            decisions: list[dict[str, Any]] = self._answer(
                lambda: self._parts.decider.decide(read_decide(body)[0], now_ms(), body_bytes=len(body))
            )
        return decisions

    def click(self, clicks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Report clicks; return how many were accepted, and which were rejected and why.

        Raises:
            ClientError: If the call is refused, or no click has room.
        """
        body = _body({"clicks": list(clicks)})
        answer: dict[str, Any] = self._answer(lambda: self._reports.clicks(body, now_ms()))
        return answer

    def rendered(self, tokens: Sequence[str]) -> dict[str, Any]:
        """Report cards that were rendered, by their impression tokens; answers as `click`.

        Raises:
            ClientError: If the call is refused.
        """
        body = _body({"tokens": list(tokens)})
        answer: dict[str, Any] = self._answer(lambda: self._reports.impressions(body, now_ms()))
        return answer

    def policy(self, swaps: int = 20) -> dict[str, Any]:
        """Return what serves, its last swaps, and the counters."""
        parts = self._parts
        status: dict[str, Any] = self._answer(
            lambda: policy_status(
                parts.holder,
                parts.metrics,
                num_swaps=swaps,
                events_waiting=parts.event_log.num_waiting,
                seen=parts.refresher.seen,
                registry_fault=parts.refresher.fault,
            )
        )
        return status

    def flush(self, timeout_s: float = CLOSE_S) -> int:
        """Wait until Kafka has acknowledged every event; return how many still wait."""
        return self._parts.event_log.flush(timeout_s)

    def close(self, timeout_s: float = CLOSE_S) -> int:
        """Deliver what waits and end the threads; return how many events were lost. Decide no more after it."""
        return self._parts.stop(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, call: Callable[[], Any]) -> Any:
        """Return what a call answers as HTTP would bring it, or raise what the HTTP client would."""
        try:
            return msgspec.to_builtins(call())
        except InvalidBodyError as error:
            faults = [msgspec.to_builtins(fault) for fault in error.faults]
            raise ClientError(f"invalid request ({error})", error.status, faults) from None
        except LogFullError as error:
            raise ClientError(str(error), 503, [msgspec.to_builtins(fault) for fault in error.faults]) from None


def _body(content: Mapping[str, Any]) -> bytes:
    """Return what would travel: the checks then are those of the server, byte for byte."""
    try:
        body = msgspec.json.encode(content)
    except (TypeError, ValueError, OverflowError) as error:
        raise ClientError(f"this is no JSON ({error})", 400) from None
    if len(body) > MAX_BODY_BYTES:
        raise ClientError(f"the call has {len(body)} bytes; at most {MAX_BODY_BYTES}", 413)
    return body
