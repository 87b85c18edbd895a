"""The server keeps to its OpenAPI document, whatever is sent to it."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.api import ROUTES, Route
from tests.server_process import NOWHERE, environment, server

schemathesis = pytest.importorskip("schemathesis")
TOKEN = "token-of-everybody"
REDIS_PASSWORD = "password-of-redis"
OPERATOR_PASSWORD = "password-of-the-operator"
SIGNING_KEY = "signing-key-" * 3
FORGERY = 'x\n{"level": "ERROR", "message": "forged"}\r\x1b[31m%s'


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address and log of a server without Redis and Kafka."""
    directory = tmp_path_factory.mktemp("server")
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    secrets = {
        "GENCO_API_TOKENS": ",".join(f"{scope}:{digest}" for scope in ("decide", "feedback", "admin")),
        "GENCO_REDIS_URL": f"redis://server:{REDIS_PASSWORD}@127.0.0.1:1/0",
        "GENCO_OPERATOR_REDIS_URL": f"redis://operator:{OPERATOR_PASSWORD}@127.0.0.1:1/0",
        "GENCO_SIGNING_KEY": SIGNING_KEY,
    }
    log = directory / "log"
    with server(environment(directory, **NOWHERE | secrets, GENCO_LOG_LEVEL="DEBUG"), log) as (_, url):
        yield url, log


@pytest.fixture(scope="module")
def schema(served: tuple[str, Path]) -> Any:
    return schemathesis.openapi.from_url(f"{served[0]}/openapi.json")


def conform(schema: Any, route: Route, **options: Any) -> None:
    """Send what the document allows and what it does not, and compare the answers with it."""
    operation = schema[route.path][route.method]
    modes = schemathesis.GenerationMode
    cases = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in (modes.POSITIVE, modes.NEGATIVE)))
    # No schema tells that a product must be in the catalog, or how old a click may be; and 503 is an answer, as 500 is
    # not.
    left_out = [schemathesis.checks.positive_data_acceptance, schemathesis.checks.not_a_server_error]
    if_too_large = [schemathesis.checks.negative_data_rejection]  # which does not know 413

    @settings(suppress_health_check=list(HealthCheck), database=None, **options)
    @given(cases)
    def check(case: Any) -> None:
        answer = case.call(headers={"Authorization": f"Bearer {TOKEN}"})
        assert answer.status_code != 500
        case.validate_response(answer, excluded_checks=left_out + (if_too_large if answer.status_code == 413 else []))

    check()


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_answers_are_those_of_the_document(schema: Any, route: Route) -> None:
    conform(schema, route, max_examples=10, derandomize=True)


@pytest.mark.long
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_answers_to_thousands_of_calls_are_those_of_the_document(schema: Any, route: Route) -> None:
    conform(schema, route, max_examples=2000)


def test_log_is_json_that_nobody_forges_and_no_secret_is_told(served: tuple[str, Path]) -> None:
    url, log = served
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        bodies = {"/v1/clicks": {"decision_id": FORGERY}, "/v1/decide": {"product_id": FORGERY, FORGERY: 1}}
        answers = [client.post(path, json=body) for path, body in bodies.items()]
        answers += [client.get(path) for path in ("/readyz", "/v1/policy", "/metrics", "/openapi.json", "/config", "/")]
        answers += [client.get("/v1/registry"), client.post("/v1/registry/freeze", json={"reason": FORGERY})]
        answers.append(client.get("/v1/policy", headers={"Authorization": f"Bearer {SIGNING_KEY}"}))
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(FORGERY.encode())
        assert raw.recv(65536).startswith(b"HTTP/1.1 400")
    text = log.read_text("utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert "Invalid HTTP request received." in [line["message"] for line in lines]
    assert "Redis cannot be read; the policy in memory goes on serving" in [line["message"] for line in lines]
    assert "forged" not in [line["message"] for line in lines]
    for secret in (TOKEN, REDIS_PASSWORD, OPERATOR_PASSWORD, SIGNING_KEY):
        assert secret not in text
        assert not [answer.url for answer in answers if secret in answer.text]
