"""Logs and metrics, the same in every process.

One line of JSON for each log record, control characters escaped and long values cut, so that no event can forge a line.
Metrics are Prometheus', prefix `genco_`. Nothing here is called at import.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final
from wsgiref.simple_server import WSGIServer

import prometheus_client

from streams.contracts.settings import ConfigurationError

MAX_FIELD: Final = 256
_PLAIN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON: time, level, logger, message, and what came in `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": _short(record.getMessage(), 4 * MAX_FIELD),
        }
        line |= {k: _short(v) for k, v in vars(record).items() if k not in _PLAIN}
        if record.exc_info:
            line["exception"] = _short(self.formatException(record.exc_info), 32 * MAX_FIELD)
        return json.dumps(line, default=str)


def _short(value: Any, limit: int = MAX_FIELD) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no NaN and no infinity
    if isinstance(value, int | float | bool | None):
        return value
    if isinstance(value, Mapping):
        return {str(k)[:MAX_FIELD]: _short(v) for k, v in list(value.items())[:64]}
    text = str(value)
    return text if len(text) <= limit else text[:limit] + f"... ({len(text)} characters)"


def configure_logging(level: str) -> None:
    """Send the records of all loggers to stderr. Called once, by the command line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # Their INFO is a line for each connection or fetch.
    for noisy in ("kafka", "aiokafka", "faust", "mode", "httpx"):
        logging.getLogger(noisy).setLevel("WARNING" if level != "DEBUG" else "INFO")


class MetricsServer:
    """Serves /metrics of this process from a thread of its own."""

    def __init__(self, host: str, port: int) -> None:
        """Open the port.

        Raises:
            ConfigurationError: If it cannot be opened.
        """
        self._server: WSGIServer
        self._thread: threading.Thread
        try:
            self._server, self._thread = prometheus_client.start_http_server(port, host)
        except OSError as error:
            raise ConfigurationError(
                f"cannot open {host}:{port} for metrics ({error.strerror}); set GENCO_METRICS_PORT (0: none)"
            ) from None
        self.port = self._server.server_port

    def close(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def now_ms() -> int:
    """Return the wall clock in Unix milliseconds. The one place where it is read."""
    return time.time_ns() // 1_000_000


def monotonic_ms() -> int:
    """Return a clock that only goes forward, in milliseconds, for how long something takes."""
    return time.monotonic_ns() // 1_000_000
