"""Tokens, scopes, and the refusal to be open to others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serving.api import ROUTES, Route
from serving.auth import SCOPES, Authenticator, AuthError, is_loopback, require_tokens_beyond_loopback
from streams.contracts.secret_files import SecretFile
from streams.contracts.settings import ConfigurationError


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


TOKENS = f"decide:{_digest('ads')}, feedback:{_digest('ads')},admin:{_digest('oncall')}"


def test_token_with_scope_passes() -> None:
    authenticator = Authenticator(TOKENS)
    authenticator.check("Bearer ads", "decide")
    authenticator.check("bearer ads", "feedback")
    authenticator.check("Bearer oncall", "admin")
    authenticator.check(None, "public")


@pytest.mark.parametrize(
    ("header", "scope", "status"),
    [
        (None, "decide", 401),
        ("", "decide", 401),
        ("Bearer", "decide", 401),
        ("Bearer wrong", "decide", 401),
        ("Basic ads", "decide", 401),
        (f"Bearer {_digest('ads')}", "decide", 401),
        ("Bearer ads", "admin", 403),
        ("Bearer oncall", "decide", 403),
        ("Bearer \udcff", "decide", 401),
    ],
)
def test_token_without_scope_is_refused(header: str | None, scope: str, status: int) -> None:
    with pytest.raises(AuthError) as caught:
        Authenticator(TOKENS).check(header, scope)
    assert caught.value.status == status


def test_both_tokens_pass_during_rotation() -> None:
    authenticator = Authenticator(f"decide:{_digest('old')},decide:{_digest('new')}")
    authenticator.check("Bearer old", "decide")
    authenticator.check("Bearer new", "decide")


@pytest.mark.parametrize(
    "text", ["", "decide", "decide:abc", f"public:{_digest('x')}", f"root:{_digest('x')}", "hunter2"]
)
def test_malformed_tokens_are_refused_without_showing_them(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Authenticator(text)
    assert "hunter2" not in str(caught.value)
    assert "sha256sum" in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])  # noqa: S104
def test_open_server_beyond_loopback_is_refused(host: str) -> None:
    with pytest.raises(ConfigurationError, match="GENCO_API_TOKENS"):
        require_tokens_beyond_loopback(host, Authenticator(None))
    require_tokens_beyond_loopback(host, Authenticator(TOKENS))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.9.1"])
def test_loopback_needs_no_tokens(host: str) -> None:
    assert is_loopback(host)
    require_tokens_beyond_loopback(host, Authenticator(None))


def test_every_route_of_the_application_is_in_the_table_with_a_scope(api: Any) -> None:
    served = {
        (method, route.path)
        for route in api.app.routes
        for method in (getattr(route, "methods", None) or ()) - {"HEAD"}
    }
    # The document describes the API and reveals nothing of this server.
    assert served - {("GET", "/openapi.json")} == {(route.method, route.path) for route in ROUTES}
    assert len(api.app.routes) == len(served), "something is mounted that is no plain route"
    assert {route.path for route in ROUTES if route.scope == "public"} == {"/healthz", "/readyz"}
    assert {route.scope for route in ROUTES} == SCOPES | {"public"}


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_route_asks_for_its_scope(make_api: Callable[..., Any], route: Route) -> None:
    tokens = ",".join(f"{scope}:{_digest(scope)}" for scope in sorted(SCOPES))
    api = make_api(authenticator=Authenticator(tokens))
    for scope in (None, *sorted(SCOPES)):
        headers = {} if scope is None else {"Authorization": f"Bearer {scope}"}
        status = api.request(route.method, route.path, headers=headers).status_code
        if route.scope in ("public", scope):
            assert status not in (401, 403)
        else:
            assert status == (401 if scope is None else 403)


def test_tokens_of_a_file_change_without_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.auth._LOOK_AGAIN_S", 0.0)
    path = tmp_path / "tokens"
    path.write_text(f"decide:{_digest('old')}")
    authenticator = Authenticator(path.read_text(), SecretFile(path))
    authenticator.check("Bearer old", "decide")
    path.write_text(f"decide:{_digest('old')},decide:{_digest('new')}")
    for token in ("old", "new"):
        authenticator.check(f"Bearer {token}", "decide")
    path.write_text(f"decide:{_digest('new')}")
    with pytest.raises(AuthError):
        authenticator.check("Bearer old", "decide")
    authenticator.check("Bearer new", "decide")


@pytest.mark.parametrize("text", ["", "what is no token", None])
def test_tokens_that_cannot_be_read_leave_those_before_and_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, text: str | None
) -> None:
    monkeypatch.setattr("serving.auth._LOOK_AGAIN_S", 0.0)
    path = tmp_path / "tokens"
    path.write_text(TOKENS)
    authenticator = Authenticator(TOKENS, SecretFile(path))
    path.unlink() if text is None else path.write_text(text)
    for _ in range(3):
        authenticator.check("Bearer ads", "decide")
        with pytest.raises(AuthError):
            authenticator.check(None, "decide")
    assert len(caplog.records) == (text is not None)
    assert "no token" not in caplog.text
