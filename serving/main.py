"""`genco serve`: wires the parts of a server together, starts them, and stops them in order.

The server starts and decides without Redis and without Kafka; `/readyz` tells what is missing while it connects.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import sys
from types import FrameType
from typing import Final

import uvicorn
from prometheus_client import REGISTRY, CollectorRegistry
from starlette.types import ASGIApp

from serving.admin import RegistryAdmin
from serving.api import ServerState, create_app
from serving.auth import Authenticator, require_admin_token, require_tokens_beyond_loopback
from serving.connections import GuardedProtocol
from serving.parts import Parts
from serving.parts import build as parts_of
from streams.clients import redis_client
from streams.contracts.settings import EX_CONFIG, ConfigurationError, ServeSettings, load
from streams.control_log import ControlLog
from streams.telemetry import MetricsServer, configure_logging, now_ms

logger = logging.getLogger(__name__)

ADMIN_TIMEOUT_S: Final = 5.0
SHUTDOWN_S: Final = 10.0
_REQUESTS_S: Final = 3
"""Of the shutdown's time, what requests under way get; the flush of the event log gets the most of the rest."""
_MAX_CONNECTIONS: Final = 1024


def build(settings: ServeSettings, registry: CollectorRegistry = REGISTRY) -> tuple[Parts, ServerState]:
    """Make the parts of a server, and what its routes work with; connects to nothing.

    Raises:
        ConfigurationError: If the tokens are malformed, or missing where others can reach the port.
    """
    tokens = settings.api_tokens
    authenticator = Authenticator(None if tokens is None else tokens.get_secret_value(), settings.file_of("api_tokens"))
    require_tokens_beyond_loopback(settings.http_host, authenticator)
    if settings.operator_redis_url is not None:
        require_admin_token(authenticator)
    parts = parts_of(settings, registry)
    return parts, ServerState(
        decider=parts.decider,
        holder=parts.holder,
        refresher=parts.refresher,
        catalog=parts.catalog,
        event_log=parts.event_log,
        authenticator=authenticator,
        metrics=parts.metrics,
        signing_key=parts.signing_key,
        attribution_window_ms=parts.attribution_window_ms,
        now_ms=now_ms,
        admin=_admin(settings, parts.signing_key),
    )


def _admin(settings: ServeSettings, key: bytes) -> RegistryAdmin | None:
    if settings.operator_redis_url is None:
        return None
    client = redis_client(settings, timeout_s=ADMIN_TIMEOUT_S, retries=0, name="operator_redis_url")
    return RegistryAdmin(client, settings.model_id, ControlLog(settings).append, key, now_ms)


class _Server(uvicorn.Server):
    """uvicorn that says on stdout where it listens, once it does."""

    def __init__(self, config: uvicorn.Config, url: str) -> None:
        super().__init__(config)
        self._url = url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then tell whoever started us."""
        await super().startup(sockets)
        if self.started:
            sys.stdout.write(json.dumps({"url": self._url}) + "\n")
            sys.stdout.flush()


def configure(app: ASGIApp) -> uvicorn.Config:
    """Return how the application is served."""
    return uvicorn.Config(
        app,
        http=GuardedProtocol,
        ws="none",
        access_log=False,
        log_config=None,
        lifespan="off",
        server_header=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=_REQUESTS_S,
    )


def run(settings: ServeSettings) -> int:
    """Serve until SIGTERM or SIGINT; return 0 if every event was delivered, else 1.

    Raises:
        ConfigurationError: If the settings do not fit together, or the port cannot be opened.
    """
    parts, state = build(settings)
    listener = _listen(settings.http_host, settings.http_port)
    metrics_server = _serve_metrics(settings)
    server = _Server(configure(create_app(state)), _url(settings.http_host, listener.getsockname()[1]))
    # uvicorn raises the signal again when it has stopped; without a handler that would end us before the flush.
    previous = {number: signal.signal(number, _ignore) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        parts.start()
        asyncio.run(server.serve(sockets=[listener]))
        return 0 if parts.stop(SHUTDOWN_S - _REQUESTS_S) == 0 else 1
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        listener.close()
        if metrics_server is not None:
            metrics_server.close()


def _ignore(number: int, frame: FrameType | None) -> None:
    logger.info("stopping", extra={"signal": number})


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named: asyncio turns Nagle's algorithm off only then, and every answer would wait 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
        return listener
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"cannot listen on {host}:{port} ({error.strerror}); "
            "set GENCO_HTTP_HOST and GENCO_HTTP_PORT (0: any free port)"
        ) from None


def _serve_metrics(settings: ServeSettings) -> MetricsServer | None:
    if settings.metrics_port == 0:
        return None
    try:
        return MetricsServer(settings.metrics_host, settings.metrics_port)
    except OSError as error:
        raise ConfigurationError(
            f"cannot open metrics on {settings.metrics_host}:{settings.metrics_port} ({error.strerror}); "
            "set GENCO_METRICS_PORT, or 0 for none"
        ) from None


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def main() -> int:
    """Run with the settings of the environment; return the exit code."""
    try:
        settings = load(ServeSettings)
        configure_logging(settings.log_level)
        return run(settings)
    except ConfigurationError as error:
        sys.stderr.write(f"genco serve: {error}\n")
        return EX_CONFIG


if __name__ == "__main__":
    sys.exit(main())
