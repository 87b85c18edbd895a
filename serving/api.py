"""The HTTP API: a table of routes, each with its scope and body limit, over the parts that do the work.

A handler takes the bytes of a body and returns a response; one wrapper around all of them checks the token, reads the
body within its limits, turns refusals into JSON with field and reason, and counts. No handler waits for anything: the
request path touches neither Redis nor Kafka, so it runs on the event loop itself. Only what computes for long, such as
explaining a card, runs beside it, one call at a time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serving.admin import (
    DEFAULT_LISTED,
    MAX_LISTED,
    SETTING,
    AdminError,
    Caller,
    HoldRequest,
    PinRequest,
    RegistryAdmin,
    RegistryChange,
    RegistryListing,
    RollbackRequest,
)
from serving.auth import Authenticator, AuthError, Scope
from serving.catalog_view import CatalogView
from serving.credits_answer import PARAMETERS, answer
from serving.decisions import Decider
from serving.event_log import EventLog
from serving.explanation import CardCredits
from serving.limits import BodyLimit
from serving.messages import (
    Accepted,
    ClickMany,
    ClickRequest,
    DecideMany,
    DecideRequest,
    Decision,
    Decisions,
    Fault,
    ImpressionTokens,
    InvalidBodyError,
    Refusal,
    read_decide,
)
from serving.metrics import ServingMetrics
from serving.openapi import add_components, operation
from serving.policy_holder import MAX_SWAPS, PolicyHolder
from serving.refresher import Refresher
from serving.reports import LogFullError, Reports
from serving.status import PolicyStatus, Readiness, policy_status, readiness
from streams.contracts.control import Action

logger = logging.getLogger(__name__)

DECIDE_LIMIT: Final = 1024 * 1024
FEEDBACK_LIMIT: Final = 256 * 1024
ADMIN_LIMIT: Final = 16 * 1024
_HEADERS: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerState:
    """What the routes work with."""

    decider: Decider
    holder: PolicyHolder
    refresher: Refresher
    catalog: CatalogView
    event_log: EventLog
    authenticator: Authenticator
    metrics: ServingMetrics
    signing_key: bytes
    attribution_window_ms: int
    now_ms: Callable[[], int]
    admin: RegistryAdmin | None = None
    """None: this server cannot act on the registry."""
    allow_cold_start: bool = True
    """Ready without any policy: the uniform rung collects the first data."""

    @property
    def reports(self) -> Reports:
        """What takes clicks and rendered cards."""
        return Reports(self.event_log, self.metrics, self.signing_key, self.attribution_window_ms)


Handler = Callable[[ServerState, Request, bytes], Response]


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """One line of the route table."""

    method: str
    path: str
    scope: Scope
    handler: Handler
    summary: str
    body_limit: int = 0
    """Bytes; 0: the route takes no body."""
    takes: Sequence[type] = ()
    gives: Sequence[type] = ()
    status: int = 200
    gives_else: Mapping[str, type] = field(default_factory=dict)
    """Status -> what comes with it in place of a refusal."""
    response_class: type[Response] = JSONResponse
    """Names the media type of a success."""
    refuses: Sequence[str] = ()
    """Statuses of refusals that only few routes have."""
    parameters: Sequence[dict[str, Any]] = ()
    """Of path and query, in OpenAPI's words."""
    is_long: bool = False
    """Computes for so long that it must not hold up the decisions: one call at a time, in a thread."""


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(_encode(content), status, _HEADERS | (headers or {}), "application/json")


def _refusal(status: int, error: str, faults: Sequence[Fault], headers: dict[str, str] | None = None) -> Response:
    return _json(Refusal(error=error, faults=list(faults)), status, headers)


def _decide(state: ServerState, request: Request, body: bytes) -> Response:
    started = time.perf_counter()
    requests, many = read_decide(body)
    decisions = state.decider.decide(requests, state.now_ms(), body_bytes=len(body), many=many)
    response = _json(Decisions(decisions=decisions) if many else decisions[0])
    state.metrics.decision_seconds.observe(time.perf_counter() - started)
    return response


def _clicks(state: ServerState, request: Request, body: bytes) -> Response:
    return _json(state.reports.clicks(body, state.now_ms()), 202)


def _impressions(state: ServerState, request: Request, body: bytes) -> Response:
    return _json(state.reports.impressions(body, state.now_ms()), 202)


def _policy(state: ServerState, request: Request, body: bytes) -> Response:
    return _json(
        policy_status(
            state.holder,
            state.metrics,
            num_swaps=_number(request, "swaps", 20, 0, MAX_SWAPS),
            events_waiting=state.event_log.num_waiting,
            seen=state.refresher.seen,
            registry_fault=state.refresher.fault,
        )
    )


def _number(request: Request, name: str, default: int, least: int, most: int) -> int:
    text = request.query_params.get(name, str(default))
    if text.isascii() and text.isdigit() and len(text) <= 4 and least <= int(text) <= most:
        return int(text)
    reason = f"is {text[:20]!r}; expected a number from {least} to {most}"
    raise InvalidBodyError([Fault(index=None, field=name, reason=reason)])


def _credits(state: ServerState, request: Request, body: bytes) -> Response:
    query = request.query_params.multi_items()
    return _json(answer(state.holder.current, state.catalog.catalog, request.path_params["product_id"], query))


def _registry(state: ServerState, request: Request, body: bytes) -> Response:
    limit = _number(request, "limit", DEFAULT_LISTED, 1, MAX_LISTED)
    return _json(_admin(state).list(limit))


def _act(action: Action) -> Handler:
    def act(state: ServerState, request: Request, body: bytes) -> Response:
        address = request.client.host if request.client else "unknown"
        return _json(_admin(state).act(action, body, Caller(request.state.token, address)))

    return act


def _admin(state: ServerState) -> RegistryAdmin:
    if state.admin is None:
        raise AdminError(501, f"{SETTING} is not set, so this server cannot act on the registry; use genco policy")
    return state.admin


def _healthz(state: ServerState, request: Request, body: bytes) -> Response:
    return _json({"status": "alive"})


def _readyz(state: ServerState, request: Request, body: bytes) -> Response:
    found = readiness(
        rung=state.holder.current.rung,
        allow_cold_start=state.allow_cold_start,
        registry_fault=state.refresher.fault,
        event_log_fault=state.event_log.fault,
        catalog_fault=state.catalog.fault,
    )
    return _json(found, 200 if found.ready else 503)


def _metrics(state: ServerState, request: Request, body: bytes) -> Response:
    return Response(generate_latest(state.metrics.registry), 200, _HEADERS, CONTENT_TYPE_LATEST)


ROUTES: Final = (
    Route(
        method="POST",
        path="/v1/decide",
        scope="decide",
        handler=_decide,
        summary="Choose creatives for one card or up to 256",
        body_limit=DECIDE_LIMIT,
        takes=(DecideRequest, DecideMany),
        gives=(Decision, Decisions),
    ),
    Route(
        method="POST",
        path="/v1/clicks",
        scope="feedback",
        handler=_clicks,
        summary="Report one click or up to 1024",
        body_limit=FEEDBACK_LIMIT,
        takes=(ClickRequest, ClickMany),
        gives=(Accepted,),
        status=202,
    ),
    Route(
        method="POST",
        path="/v1/impressions",
        scope="feedback",
        handler=_impressions,
        summary="Report cards that were rendered, by the tokens that came with their decisions",
        # A token holds a whole impression.
        body_limit=DECIDE_LIMIT,
        takes=(ImpressionTokens,),
        gives=(Accepted,),
        status=202,
    ),
    Route(
        method="GET",
        path="/v1/policy",
        scope="admin",
        handler=_policy,
        summary="What serves, since when, and what became of the events; ?swaps=N last swaps",
        gives=(PolicyStatus,),
    ),
    Route(
        method="GET",
        path="/v1/credits/{product_id}",
        scope="admin",
        handler=_credits,
        summary="Which candidate of a card earns what, for whom, how sure that is, and which pairs work together",
        gives=(CardCredits,),
        parameters=PARAMETERS,
        is_long=True,
    ),
    Route(
        method="GET",
        path="/v1/registry",
        scope="admin",
        handler=_registry,
        summary="Stored versions, what is current, pinned and frozen, and the last actions; ?limit=N of each",
        gives=(RegistryListing,),
        refuses=("501",),
        is_long=True,
    ),
    *(
        Route(
            method="POST",
            path=f"/v1/registry/{action.value}",
            scope="admin",
            handler=_act(action),
            summary=summary,
            body_limit=ADMIN_LIMIT,
            takes=(takes,),
            gives=(RegistryChange,),
            refuses=("409", "501"),
            is_long=True,
        )
        for action, takes, summary in (
            (Action.PIN, PinRequest, "Serve this version and stay with it"),
            (Action.UNPIN, HoldRequest, "Remove the pin; the next publication is served"),
            (Action.FREEZE, HoldRequest, "Stay with the version that serves now; learning goes on"),
            (Action.UNFREEZE, HoldRequest, "Remove the freeze; the next publication is served"),
            (Action.ROLLBACK, RollbackRequest, "Serve an older version, and freeze"),
        )
    ),
    Route(method="GET", path="/healthz", scope="public", handler=_healthz, summary="The process is alive"),
    Route(
        method="GET",
        path="/readyz",
        scope="public",
        handler=_readyz,
        summary="Whether traffic should come here; 503 says what is missing",
        gives=(Readiness,),
        gives_else={"503": Readiness},
    ),
    Route(
        method="GET",
        path="/metrics",
        scope="admin",
        handler=_metrics,
        summary="Prometheus metrics",
        response_class=PlainTextResponse,
    ),
)


class _Api(FastAPI):
    """FastAPI whose document holds the schemas of our msgspec structs."""

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document."""
        if self.openapi_schema is None:
            types = [kind for route in ROUTES for kind in (*route.takes, *route.gives)]
            self.openapi_schema = add_components(super().openapi(), [*types, Refusal])
        return self.openapi_schema


def create_app(state: ServerState) -> FastAPI:
    """Return the application over these parts. It starts and stops none of them."""
    # No /docs: its page loads scripts from elsewhere. /openapi.json, which is public, opens in any viewer.
    app = _Api(
        title="GenCO Online",
        version="1",
        summary="Chooses creatives, learns from clicks on whole cards.",
        docs_url=None,
        redoc_url=None,
        exception_handlers={HTTPException: _on_http_exception},
    )
    for route in ROUTES:
        app.add_api_route(
            route.path,
            _endpoint(state, route),
            methods=[route.method],
            summary=route.summary,
            name=route.path,
            response_model=None,
            response_class=route.response_class,
            openapi_extra=operation(
                route.takes, route.gives, route.status, route.scope, route.parameters, route.gives_else, route.refuses
            ),
        )
    app.add_middleware(BodyLimit, limits={route.path: route.body_limit for route in ROUTES if route.body_limit})
    return app


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Answer what no route takes: unknown paths and methods."""
    status, detail = (error.status_code, str(error.detail)) if isinstance(error, HTTPException) else (500, "error")
    return _refusal(status, detail, [])


def _endpoint(state: ServerState, route: Route) -> Callable[[Request], Any]:
    handle = route.handler
    turn = asyncio.Lock()

    async def endpoint(request: Request) -> Response:
        try:
            request.state.token = state.authenticator.check(request.headers.get("authorization"), route.scope)
            body = b""
            if route.body_limit:
                _require_json(request)
                body = await request.body()
            if not route.is_long:
                response = handle(state, request, body)
            elif turn.locked():
                response = _refusal(503, "another call of this kind is under way", [], {"Retry-After": "1"})
            else:
                async with turn:
                    response = await asyncio.to_thread(handle, state, request, body)
        except InvalidBodyError as error:
            response = _refusal(error.status, "invalid request", error.faults)
        except LogFullError as error:
            response = _refusal(503, str(error), error.faults, {"Retry-After": "1"})
        except AdminError as error:
            response = _refusal(error.status, str(error), [])
        except AuthError as error:
            headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
            response = _refusal(error.status, str(error), [], headers)
        except HTTPException as error:
            response = _refusal(error.status_code, str(error.detail), [], dict(error.headers or {}))
        except ClientDisconnect:
            raise
        except Exception:
            logger.exception("request failed", extra={"route": route.path})
            state.metrics.http_errors.labels(route.path).inc()
            response = _refusal(500, "internal error; it has been logged", [])
        state.metrics.http_requests.labels(route.path, str(response.status_code)).inc()
        return response

    return endpoint


def _require_json(request: Request) -> None:
    # A web page may send other types to any address without asking; JSON it may not.
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, f"content type is {kind[:80]!r}; expected application/json")
