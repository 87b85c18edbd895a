"""The server keeps to its OpenAPI document, whatever is sent to it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.api import ROUTES, Route
from tests.server_process import NOWHERE, environment, server

schemathesis = pytest.importorskip("schemathesis")
TOKEN = "token-of-everybody"


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The document of a server that runs without Redis and Kafka."""
    directory = tmp_path_factory.mktemp("server")
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    tokens = ",".join(f"{scope}:{digest}" for scope in ("decide", "feedback", "admin"))
    with server(environment(directory, **NOWHERE, GENCO_API_TOKENS=tokens), directory / "log") as (_, url):
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


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
