"""The HTTP API: what it answers, what it refuses and why, and what reaches the event log."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from serving.api import DECIDE_LIMIT, FEEDBACK_LIMIT, ROUTES
from serving.catalog_view import CatalogView
from serving.decisions import MAX_CALL_CANDIDATES
from serving.feedback import TOKEN_LIFETIME_MS, make_token, read_token
from serving.limits import BodyLimit
from serving.policy_holder import Loaded
from serving.refresher import Seen
from serving.snapshot_store import Pointer, Sight
from streams.contracts.catalog import Element, Product
from streams.contracts.decision_ids import issued_at_ms, make_decision_id, route_of, verify_decision_id
from streams.contracts.events import Click, Impression, impression_fault

NOW_MS = 1_764_000_000_000
REQUEST: dict[str, Any] = {
    "product_id": "p1",
    "context": {"device": "ios", "hour": 13},
    "candidates": {"title": ["t1", "t2", "t3"], "image": ["i1", "i2"]},
}


def queued(api: Any, kind: type) -> list[Any]:
    return [event for event in api.state.event_log._events if isinstance(event, kind)]


def put(catalog: CatalogView, *records: Element | Product) -> None:
    for record in records:
        kind = catalog.catalog.elements if isinstance(record, Element) else catalog.catalog.products
        kind[record.element_id if isinstance(record, Element) else record.product_id] = record  # type: ignore[assignment]


# -- decide ----------------------------------------------------------------------------------------


def test_decide_answers_and_logs_the_same_decision(api: Any, signing_key: bytes) -> None:
    answer = api.post("/v1/decide", REQUEST)
    assert answer.status_code == 200
    decision = answer.json()
    [impression] = queued(api, Impression)
    assert impression_fault(impression) is None
    logged = msgspec.to_builtins(impression)
    assert {name: logged[name] for name in logged.keys() & decision.keys()} | {"expected_ctr": None} == decision
    assert logged["candidates"] == REQUEST["candidates"]
    assert logged["context"] == REQUEST["context"]
    assert (logged["occurred_at_ms"], logged["survival_probability"]) == (NOW_MS, 1.0)
    assert decision["source"] == "uniform"
    assert decision["slot_propensities"] == pytest.approx({"title": 1 / 3, "image": 1 / 2})
    assert decision["propensity"] == pytest.approx(1 / 6)
    verify_decision_id(decision["decision_id"], signing_key)
    assert issued_at_ms(decision["decision_id"]) == NOW_MS
    # It is written as the readers expect it.
    assert msgspec.json.decode(msgspec.json.encode(impression), type=Impression) == impression


def test_decide_many_answers_in_order_with_one_route(api: Any) -> None:
    requests = [REQUEST | {"product_id": f"p{n}"} for n in range(256)]
    decisions = api.post("/v1/decide", {"requests": requests}).json()["decisions"]
    assert [e.product_id for e in queued(api, Impression)] == [f"p{n}" for n in range(256)]
    assert [e.decision_id for e in queued(api, Impression)] == [d["decision_id"] for d in decisions]
    assert len({d["decision_id"] for d in decisions}) == 256
    assert len({route_of(d["decision_id"]) for d in decisions}) == 1
    assert len({e.seed for e in queued(api, Impression)}) == 256


def test_decide_without_candidates_takes_those_of_the_catalog(api: Any) -> None:
    put(api.state.catalog, Product(product_id="p1", slots={"title": ("t1", "t2")}))
    decision = api.post("/v1/decide", {"product_id": "p1", "context": {}}).json()
    assert decision["creative"]["title"] in ("t1", "t2")
    assert queued(api, Impression)[0].candidates == {"title": ["t1", "t2"]}


def test_new_elements_are_published_and_reach_the_policy(api: Any) -> None:
    asked: list[Any] = []

    class Policy:
        def choose(self, requests: Any) -> list[Any]:
            asked.extend(requests)
            return api.state.holder.uniform.choose(requests)

    put(api.state.catalog, Element(element_id="t1", slot="title", text="known"), Element(element_id="t2", slot="title"))
    described = {"title": frozenset({"t2"})}
    api.state.holder.current = Loaded(Policy(), "uniform", described=described)
    new = [{"element_id": f"t{n}", "slot": "title", "text": f"new {n}", "features": [1, 2.5]} for n in (1, 3)]
    assert api.post("/v1/decide", {"requests": [REQUEST | {"elements": new}] * 2}).status_code == 200
    expected = Element(element_id="t3", slot="title", text="new 3", features=(1.0, 2.5))
    assert list(api.state.event_log._elements) == [expected]
    # The catalog's content wins; what the snapshot knows is left out.
    assert asked[0].content == {"t1": Element(element_id="t1", slot="title", text="known"), "t3": expected}


def test_seeded_server_repeats_its_decisions(make_api: Any) -> None:
    bodies = [make_api().post("/v1/decide", {"requests": [REQUEST] * 20}).json()["decisions"] for _ in range(2)]
    assert [d["creative"] for d in bodies[0]] == [d["creative"] for d in bodies[1]]
    assert len({json.dumps(d["creative"]) for d in bodies[0]}) > 1


def test_failing_policy_falls_to_uniform_and_is_counted(api: Any, make_snapshot: Any) -> None:
    class Broken:
        def choose(self, requests: Any) -> list[Any]:
            raise RuntimeError("a bug")

    api.state.holder.swap(Loaded(Broken(), "policy", make_snapshot(3)[0], 1), NOW_MS)
    decision = api.post("/v1/decide", REQUEST).json()
    assert (decision["source"], decision["policy_version"]) == ("uniform", 0)
    assert api.get("/v1/policy").json()["counters"]["policy_errors"] == 1


def test_rung_and_version_stand_on_the_decision(api: Any, make_snapshot: Any) -> None:
    uniform = api.state.holder.uniform
    api.state.holder.swap(Loaded(uniform, "last_good", make_snapshot(3, epoch=2)[0], 1), NOW_MS)
    decision = api.post("/v1/decide", REQUEST).json()
    assert (decision["source"], decision["epoch"], decision["policy_version"]) == ("last_good", 2, 3)
    [impression] = queued(api, Impression)
    assert (impression.source, impression.epoch, impression.policy_version) == ("last_good", 2, 3)


# -- hostile bodies --------------------------------------------------------------------------------


def _body(**changes: Any) -> bytes:
    return json.dumps(REQUEST | changes).encode()


@pytest.mark.parametrize(
    ("body", "status", "field", "reason"),
    [
        (b"", 400, "body", "truncated"),
        (b"{", 400, "body", "truncated"),
        (b"\xff\xfe", 400, "body", "malformed"),
        (b'{"product_id": "\xff"}', 400, "body", "UTF-8"),
        (b"[" * 100_000, 422, "body", "object"),
        (b"null", 422, "body", "object"),
        (b"{}", 422, "body", "product_id"),
        (_body(context={"x": [[[[[[]]]]]]}), 422, "context.x", "array"),
        (_body(product_id="p", unknown=b"[".decode() * 50), 422, "body", "unknown"),
        (b'{"product_id":"p","context":{"x":NaN}}', 400, "body", "malformed"),
        (b'{"product_id":"p","context":{"x":1e999}}', 422, "context", "range"),
        (b'{"product_id":"p","context":{"x":Infinity}}', 400, "body", "malformed"),
        (b'{"product_id":"p","product_id":"q","context":{}}', 422, "product_id", "twice"),
        (b'{"product_id":"p","context":{"a":1,"a":2}}', 422, "a", "twice"),
        (b'{"product_id" :"p","product_id":"q","context":{}}', 422, "product_id", "twice"),
        (b'{"product_id":"a:b","context":{"c:d":1,"c:d":2}}', 422, "c:d", "twice"),
        (_body(product_id=5), 422, "product_id", "str"),
        (_body(product_id=""), 422, "product_id", "length"),
        (_body(product_id="x" * 129), 422, "product_id", "length"),
        (_body(product_id=None), 422, "product_id", "null"),
        (_body(context={str(n): 1 for n in range(65)}), 422, "context", "length"),
        (_body(context={"x": "y" * 257}), 422, "context.x", "length"),
        (_body(candidates={}), 422, "candidates", "length"),
        (_body(candidates={"title": []}), 422, "candidates.title", "length"),
        (_body(candidates={"title": ["t1"], "image": [7]}), 422, "candidates.image", "str"),
        (_body(candidates={"title": ["t1", "t1"]}), 422, "candidates.title", "twice"),
        (_body(candidates={"title": [str(n) for n in range(1025)]}), 422, "candidates.title", "length"),
        (_body(candidates={f"s{n}": ["e"] for n in range(33)}), 422, "candidates", "length"),
        (_body(candidates={"title": "t1"}), 422, "candidates.title", "array"),
        (_body(candidates={f"s{n}": [f"{k:0120}" for k in range(200)] for n in range(8)}), 422, "candidates", "bytes"),
        (_body(elements=[{"element_id": "x", "slot": "nowhere"}]), 422, "elements[0].slot", "not a slot"),
        (_body(elements=[{"element_id": "x", "slot": "title", "features": [1e9]}]), 422, "elements[0]", "1000000"),
        (_body(elements=[{"element_id": "x", "slot": "title", "colour": 1}]), 422, "elements[0]", "colour"),
        (_body(log_impression="no"), 422, "log_impression", "bool"),
        (b'{"product_id":"unknown","context":{}}', 422, "product_id", "catalog"),
        (b'{"product_id":"known","context":{},"candidates":{"titel":["t1"]}}', 422, "candidates.titel", "title"),
        (b'{"requests":[]}', 422, "requests", "length"),
        (b'{"requests":[],"product_id":"p"}', 422, "", ""),
    ],
)
def test_hostile_decide_is_refused_with_field_and_reason(
    api: Any, body: bytes, status: int, field: str, reason: str
) -> None:
    put(api.state.catalog, Product(product_id="known", slots={"title": ("t1",)}))
    answer = api.post("/v1/decide", body)
    assert answer.status_code == status, answer.text
    [fault] = answer.json()["faults"]
    assert fault["field"].startswith(field)
    assert reason in fault["reason"] or reason in fault["field"]
    assert not queued(api, Impression)


def test_texts_with_colons_are_no_duplicates(api: Any) -> None:
    request = {"product_id": 'sku":1', "context": {"a:b": 'x":', " : ": " :"}, "candidates": {'t":': ["a:b", '" :']}}
    assert api.post("/v1/decide", request).status_code == 200
    assert api.post("/v1/decide", json.dumps({"requests": [request]}, indent=2).encode()).status_code == 200


def test_one_bad_request_refuses_the_call_and_is_named(api: Any) -> None:
    bad = REQUEST | {"candidates": {"title": ["t1", "t1"]}}
    answer = api.post("/v1/decide", {"requests": [REQUEST, bad, REQUEST, bad]})
    assert answer.status_code == 422
    assert [(f["index"], f["field"]) for f in answer.json()["faults"]] == [
        (1, "requests[1].candidates.title"),
        (3, "requests[3].candidates.title"),
    ]
    wrong_type = api.post("/v1/decide", {"requests": [REQUEST, REQUEST | {"context": {"a": 1, "b": []}}]}).json()
    assert [(f["index"], f["field"]) for f in wrong_type["faults"]] == [(1, "requests[1].context.b")]
    assert not queued(api, Impression)


def test_more_than_256_requests_are_refused(api: Any) -> None:
    answer = api.post("/v1/decide", {"requests": [{"product_id": "p", "context": {}}] * 257})
    assert answer.status_code == 422
    assert "256" in answer.json()["faults"][0]["reason"]


def test_candidates_of_a_call_are_bounded_also_when_the_catalog_brings_them(api: Any) -> None:
    slots = {f"s{n}": tuple(f"{n}-{k}" for k in range(1024)) for n in range(8)}
    put(api.state.catalog, Product(product_id="wide", slots=slots))
    number = MAX_CALL_CANDIDATES // (8 * 1024) + 1
    answer = api.post("/v1/decide", {"requests": [{"product_id": "wide", "context": {}}] * number})
    assert answer.status_code == 422
    assert str(MAX_CALL_CANDIDATES) in answer.json()["faults"][-1]["reason"]


def test_million_candidates_are_too_large(api: Any) -> None:
    body = json.dumps(REQUEST | {"candidates": {"title": [f"t{n}" for n in range(1_000_000)]}}).encode()
    assert api.post("/v1/decide", body).status_code == 413


@pytest.mark.parametrize(("path", "limit"), [("/v1/decide", DECIDE_LIMIT), ("/v1/clicks", FEEDBACK_LIMIT)])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_bytes_of_a_body_are_limited(api: Any, path: str, limit: int, is_chunked: bool) -> None:
    async def chunks(number: int) -> AsyncIterator[bytes]:
        for _ in range(number // 1024):
            yield b" " * 1024
        yield b" " * (number % 1024)

    headers = {"Content-Type": "application/json"}
    for number, status in ((limit, 400), (limit + 1, 413)):
        content = chunks(number) if is_chunked else b" " * number
        answer = api.request("POST", path, content=content, headers=headers)
        assert answer.status_code == status
    assert answer.headers["connection"] == "close"
    assert str(limit) in answer.json()["error"]


def test_lying_content_length_does_not_help(api: Any) -> None:
    headers = {"Content-Type": "application/json", "Content-Length": "5"}
    answer = api.request("POST", "/v1/decide", content=b" " * (DECIDE_LIMIT + 1), headers=headers)
    assert answer.status_code == 413


@pytest.mark.parametrize("pause_s", [60.0, 0.01])
def test_silent_or_dripping_client_is_given_up(pause_s: float) -> None:
    async def read_all(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass

    async def drip() -> Any:
        await asyncio.sleep(pause_s)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def send(_: Any) -> None: ...

    limited = BodyLimit(read_all, {"/": 1000}, timeout_s=0.1)
    with pytest.raises(Exception, match="did not come within") as caught:
        asyncio.run(limited({"type": "http", "path": "/", "headers": []}, drip, send))
    assert caught.value.status_code == 408  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_other_content_types_are_refused(api: Any, kind: str) -> None:
    answer = api.request("POST", "/v1/decide", content=_body(), headers={"Content-Type": kind})
    assert answer.status_code == 415


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/", 404), ("GET", "/docs", 404), ("GET", "/v1/decide", 405)]
)
def test_unknown_routes_answer_json(api: Any, method: str, path: str, status: int) -> None:
    answer = api.request(method, path)
    assert answer.status_code == status
    assert answer.json()["faults"] == []


def test_bug_answers_500_without_internals(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(api.state.decider, "decide", fail)
    answer = api.post("/v1/decide", REQUEST)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    metrics = api.get("/metrics").text
    assert 'genco_http_errors_total{route="/v1/decide"} 1.0' in metrics
    assert 'genco_http_requests_total{code="500",route="/v1/decide"} 1.0' in metrics


# -- clicks ----------------------------------------------------------------------------------------


def test_clicks_of_our_decisions_are_logged(api: Any) -> None:
    decision_id = api.post("/v1/decide", REQUEST).json()["decision_id"]
    single = api.post("/v1/clicks", {"decision_id": decision_id})
    assert (single.status_code, single.json()) == (202, {"accepted": 1, "rejected": []})
    many = [{"decision_id": decision_id, "occurred_at_ms": NOW_MS + 5, "reward": 2.5, "schema_version": 1}]
    assert api.post("/v1/clicks", {"clicks": many}).json()["accepted"] == 1
    assert queued(api, Click) == [
        Click(schema_version=1, decision_id=decision_id, occurred_at_ms=NOW_MS, reward=1.0),
        Click(schema_version=1, decision_id=decision_id, occurred_at_ms=NOW_MS + 5, reward=2.5),
    ]


def test_forged_and_impossible_clicks_are_rejected_one_by_one(api: Any, signing_key: bytes) -> None:
    good = make_decision_id(3, NOW_MS - 1000, 1, signing_key)
    forged = make_decision_id(3, NOW_MS - 1000, 1, b"x" * 32)
    future = make_decision_id(3, NOW_MS + 3_600_000, 1, signing_key)
    lifetime_ms = TOKEN_LIFETIME_MS + 600_000 + 60_000
    expired, nearly = (make_decision_id(3, NOW_MS - lifetime_ms - over, 1, signing_key) for over in (1, 0))
    clicks = [
        {"decision_id": forged},
        {"decision_id": good, "occurred_at_ms": NOW_MS + 60_001},
        {"decision_id": good, "occurred_at_ms": NOW_MS - 1000 - 60_001},
        {"decision_id": good, "occurred_at_ms": NOW_MS + 60_000},
        {"decision_id": good, "occurred_at_ms": NOW_MS - 1000 - 60_000},
        {"decision_id": good.replace("3.", "4.", 1)},
        {"decision_id": "nonsense\n\x1b[31m"},
        {"decision_id": future},
        {"decision_id": expired},
        {"decision_id": nearly},
    ]
    answer = api.post("/v1/clicks", {"clicks": clicks})
    assert answer.status_code == 202
    assert answer.json()["accepted"] == 3
    assert [(f["index"], f["field"]) for f in answer.json()["rejected"]] == [
        (0, "decision_id"),
        (1, "occurred_at_ms"),
        (2, "occurred_at_ms"),
        (5, "decision_id"),
        (6, "decision_id"),
        (7, "occurred_at_ms"),
        (8, "occurred_at_ms"),
    ]
    assert len(queued(api, Click)) == 3
    assert 'genco_events_rejected_total{field="decision_id",topic="clicks"} 3.0' in api.get("/metrics").text


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"clicks":[{"decision_id":"x"},{"decision_id":5}]}', "clicks[1].decision_id"),
        (b'{"decision_id":"x","reward":-1}', "reward"),
        (b'{"decision_id":"x","reward":1e300}', "reward"),
        (b'{"decision_id":"x","occurred_at_ms":1764000000000000}', "occurred_at_ms"),
        (b'{"decision_id":"x","occurred_at_ms":1764000000000.5}', "occurred_at_ms"),
        (b'{"decision_id":"x","decision_id":"y"}', "decision_id"),
        (b'{"decision_id":"x","schema_version":2}', "schema_version"),
        (b'{"clicks":[]}', "clicks"),
    ],
)
def test_malformed_clicks_are_refused_as_a_whole(api: Any, body: bytes, field: str) -> None:
    answer = api.post("/v1/clicks", body)
    assert answer.status_code == 422
    assert answer.json()["faults"][0]["field"] == field
    assert not queued(api, Click)


def test_full_log_is_no_success(make_api: Any, make_event_log: Any, signing_key: bytes) -> None:
    log = make_event_log(queue_size=100)
    api = make_api(event_log=log)
    log._num_waiting = 99
    click = {"decision_id": make_decision_id(3, NOW_MS, 1, signing_key)}
    partly = api.post("/v1/clicks", {"clicks": [click, click]})
    assert (partly.status_code, partly.json()["accepted"]) == (202, 1)
    assert partly.json()["rejected"][0]["field"] == "event_log"
    nothing = api.post("/v1/clicks", click)
    assert (nothing.status_code, nothing.headers["retry-after"]) == (503, "1")


# -- impressions logged later ----------------------------------------------------------------------


def test_token_logs_the_impression_when_it_is_rendered(make_api: Any) -> None:
    clock = [NOW_MS]
    api = make_api(now_ms=lambda: clock[0])
    decision = api.post("/v1/decide", REQUEST | {"log_impression": False}).json()
    assert not queued(api, Impression)
    clock[0] += 5_000
    answer = api.post("/v1/impressions", {"tokens": [decision["impression_token"]]})
    assert (answer.status_code, answer.json()) == (202, {"accepted": 1, "rejected": []})
    [impression] = queued(api, Impression)
    assert impression.occurred_at_ms == NOW_MS + 5_000
    assert impression.decision_id == decision["decision_id"]
    assert impression.propensity == decision["propensity"]


def test_logged_impression_brings_no_token(api: Any) -> None:
    assert "impression_token" not in api.post("/v1/decide", REQUEST | {"log_impression": True}).json()


def test_forged_or_old_tokens_are_rejected(make_api: Any) -> None:
    clock = [NOW_MS]
    api = make_api(now_ms=lambda: clock[0])
    token = api.post("/v1/decide", REQUEST | {"log_impression": False}).json()["impression_token"]
    body, _, mac = token.rpartition(".")
    other_digit = "1" if mac[-1] == "0" else "0"
    tokens = [f"A{body[1:]}.{mac}", f"{body}.{mac[:-1]}{other_digit}", "", "..", "\ud7ff.é"]
    answer = api.post("/v1/impressions", {"tokens": tokens})
    assert answer.json()["accepted"] == 0
    assert [f["index"] for f in answer.json()["rejected"]] == [0, 1, 2, 3, 4]
    clock[0] += TOKEN_LIFETIME_MS + 1
    assert "old" in api.post("/v1/impressions", {"tokens": [token]}).json()["rejected"][0]["reason"]
    assert not queued(api, Impression)


def test_token_round_trip(api: Any, signing_key: bytes) -> None:
    api.post("/v1/decide", REQUEST)
    [impression] = queued(api, Impression)
    assert read_token(make_token(impression, signing_key), signing_key, NOW_MS) == impression
    with pytest.raises(ValueError, match="not issued here"):
        read_token(make_token(impression, b"x" * 32), signing_key, NOW_MS)


# -- state -----------------------------------------------------------------------------------------


def test_policy_tells_what_serves_without_the_signature(api: Any, make_snapshot: Any) -> None:
    for version in (1, 2, 3):
        loaded = Loaded(api.state.holder.uniform, "policy", make_snapshot(version)[0], version)
        api.state.holder.swap(loaded, NOW_MS + version)
    api.post("/v1/decide", REQUEST)
    answer = api.get("/v1/policy?swaps=2").json()
    assert (answer["source"], answer["revision"], answer["manifest"]["version"]) == ("policy", 3, 3)
    assert "hmac" not in answer["manifest"]
    assert answer["gate"]["accepted"] is True
    assert answer["swaps"] == [
        {
            "version": version,
            "epoch": 1,
            "revision": version,
            "trained_through": {"0": 10 * version},
            "swapped_at_ms": NOW_MS + version,
            "rung": "policy",
        }
        for version in (2, 3)
    ]
    assert answer["counters"]["decisions"] == {"policy": 1, "last_good": 0, "uniform": 0}
    assert answer["counters"]["events"]["impressions"] == {"accepted": 1, "acknowledged": 0, "dropped": {}}


def test_policy_tells_what_the_registry_showed_last(api: Any) -> None:
    assert api.get("/v1/policy").json()["registry"] is None
    api.state.refresher.seen = Seen(Sight(Pointer(3, 42, 7, "0"), "3.40", True), NOW_MS)
    assert api.get("/v1/policy").json()["registry"] == {
        "current": "3.42",
        "revision": 7,
        "pin": "3.40",
        "frozen": True,
        "read_at_ms": NOW_MS,
    }


@pytest.mark.parametrize("swaps", ["-1", "501", "x", "1e2", "", "٣"])
def test_policy_refuses_other_numbers_of_swaps(api: Any, swaps: str) -> None:
    answer = api.get("/v1/policy", params={"swaps": swaps})
    assert answer.status_code == 422
    assert answer.json()["faults"][0]["field"] == "swaps"


def test_ready_only_with_all_parts(make_api: Any, make_event_log: Any) -> None:
    log = make_event_log()
    api = make_api(event_log=log)
    answer = api.get("/readyz")
    assert (answer.status_code, answer.json()["missing"]) == (503, ["event_log", "catalog"])
    log.start()
    assert log.flush(1.0) == 0
    deadline = 500
    while log.fault is not None and deadline:
        log._wake.wait(0.01)
        deadline -= 1
    assert api.get("/readyz").json()["missing"] == ["catalog"]
    api.state.catalog.fault = None
    answer = api.get("/readyz")
    assert (answer.status_code, answer.json()["ready"]) == (200, True)
    assert api.get("/healthz").json() == {"status": "alive"}


def test_server_that_must_not_start_cold_waits_for_a_policy(make_api: Any, make_snapshot: Any) -> None:
    api = make_api(allow_cold_start=False)
    assert "policy" in api.get("/readyz").json()["missing"]
    api.state.holder.swap(Loaded(api.state.holder.uniform, "last_good", make_snapshot(1)[0], 1), NOW_MS)
    assert "policy" not in api.get("/readyz").json()["missing"]


def test_openapi_documents_every_route_with_schemas_that_exist(api: Any) -> None:
    document = api.get("/openapi.json").json()
    assert set(document["paths"]) == {route.path for route in ROUTES}
    schemas = document["components"]["schemas"]
    text = json.dumps(document)
    for reference in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert reference in schemas
    assert schemas["DecideRequest"]["properties"]["product_id"]["examples"] == ["p123"]
    decide = document["paths"]["/v1/decide"]["post"]
    assert decide["x-scope"] == "decide"
    assert {"200", "401", "413", "422"} <= decide["responses"].keys()


def test_metrics_are_prometheus_text(api: Any) -> None:
    api.post("/v1/decide", REQUEST)
    text = api.get("/metrics").text
    assert 'genco_decisions_total{source="uniform"} 1.0' in text
    assert "genco_event_queue_events 1.0" in text
    assert "genco_decision_duration_seconds_count 1.0" in text
