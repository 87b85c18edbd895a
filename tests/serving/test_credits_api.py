"""GET /v1/credits: what it answers, what it refuses and why, and that it holds up no decision."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx
import msgspec
import pytest

from serving import api as api_module
from serving.credits_answer import unknown_product
from serving.explain import MAX_ROWS, Question, explain
from serving.explanation import CardCredits
from serving.policy_holder import Loaded
from streams.contracts.catalog import Element, Product
from tests.serving.test_policy import SLOTS, policy_of

NOW_MS = 1_764_000_000_000


@pytest.fixture
def explaining(api: Any, make_snapshot: Any) -> Any:
    """A server with a learned policy and one product in its catalog."""
    manifest, _ = make_snapshot(5, epoch=2, max_event_time_ms=NOW_MS - 7)
    api.state.holder.swap(Loaded(policy_of(), "policy", manifest, 1), NOW_MS)
    catalog = api.state.catalog.catalog
    catalog.products["p1"] = Product(product_id="p1", slots=SLOTS)
    catalog.elements["t0"] = Element(element_id="t0", slot="title", text="Free returns")
    return api


def test_answer_is_the_explanation_of_the_catalogs_card(explaining: Any) -> None:
    answer = explaining.get("/v1/credits/p1?context.device=ios")
    assert answer.status_code == 200
    found = msgspec.json.decode(answer.content, type=CardCredits)
    assert msgspec.to_builtins(found.snapshot) == {
        "model_id": "default",
        "epoch": 2,
        "version": 5,
        "max_event_time_ms": NOW_MS - 7,
    }
    question = Question(
        product_id="p1",
        candidates=SLOTS,
        content={"t0": explaining.state.catalog.catalog.elements["t0"]},
        context={"device": "ios"},
    )
    assert found.explanation == explain(policy_of(), question)
    assert found.candidates_from == "catalog"


def test_product_without_a_card_in_the_catalog_gets_every_element_of_the_snapshot(explaining: Any) -> None:
    found = msgspec.json.decode(explaining.get("/v1/credits/p0").content, type=CardCredits)
    assert found.candidates_from == "snapshot"
    assert {s.slot: {e.element_id for e in s.elements} for s in found.explanation.slots} == {
        slot: set(ids) for slot, ids in SLOTS.items()
    }


def test_one_slot_can_be_asked_for(explaining: Any) -> None:
    answer = explaining.get("/v1/credits/p1", params={"slot": "image"}).json()
    assert [slot["slot"] for slot in answer["explanation"]["slots"]] == ["image"]
    assert [context["value"] for context in answer["explanation"]["contexts"]] == ["ios", "web"]


@pytest.mark.parametrize(
    ("path", "status", "field", "reason"),
    [
        ("/v1/credits/p2", 404, "product_id", "did you mean p1, p0?"),
        ("/v1/credits/p1?slot=nope", 422, "slot", "it has title, image, tag"),
        ("/v1/credits/p1?slot=title&slot=image", 422, "slot", "twice"),
        ("/v1/credits/p1?context.device=tv", 422, "context.device", "it knows ios, web"),
        ("/v1/credits/p1?context.planet=mars", 422, "context.planet", "it knows device"),
        ("/v1/credits/p1?context.device=ios&context.device=web", 422, "context.device", "twice"),
        ("/v1/credits/p1?device=ios", 422, "device", "expected slot=NAME and context.FIELD=VALUE"),
        ("/v1/credits/p1?context.=ios", 422, "context.", "is no parameter"),
        ("/v1/credits/p1?" + "&".join(f"context.f{n}=1" for n in range(200)), 422, "context", "at most"),
    ],
)
def test_wrong_questions_are_refused_with_what_is_there(
    explaining: Any, path: str, status: int, field: str, reason: str
) -> None:
    answer = explaining.get(path)
    assert answer.status_code == status
    [fault] = answer.json()["faults"]
    assert fault["field"] == field
    assert reason in fault["reason"]


def test_without_a_learned_policy_there_is_nothing_to_explain(api: Any) -> None:
    api.state.catalog.catalog.products["p1"] = Product(product_id="p1", slots=SLOTS)
    answer = api.get("/v1/credits/p1")
    assert answer.status_code == 503
    assert "nothing was learned yet" in answer.json()["faults"][0]["reason"]


def test_cards_with_too_many_rows_are_refused(explaining: Any) -> None:
    wide = {"title": tuple(f"t{n}" for n in range(1025))}
    explaining.state.catalog.catalog.products["wide"] = Product.model_construct(product_id="wide", slots=wide)
    assert MAX_ROWS > 1024 * 3
    answer = explaining.get("/v1/credits/wide")
    assert answer.status_code == 422
    assert "1025 candidates; at most 1024" in answer.json()["faults"][0]["reason"]


def test_decisions_go_on_while_a_card_is_explained_and_a_second_one_is_told_to_wait(
    explaining: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = threading.Event(), threading.Event()
    real = api_module.answer

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert may_end.wait(10)
        return real(*arguments)

    monkeypatch.setattr(api_module, "answer", slow)
    request = {"product_id": "p1", "context": {}, "candidates": {"title": ["t0", "t1"]}}

    async def calls() -> tuple[httpx.Response, httpx.Response, httpx.Response]:
        transport = httpx.ASGITransport(app=explaining.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            first = asyncio.create_task(client.get("/v1/credits/p1"))
            assert await asyncio.to_thread(begun.wait, 10)
            decided = await client.post("/v1/decide", json=request)
            second = await client.get("/v1/credits/p1")
            may_end.set()
            return await first, decided, second

    first, decided, second = asyncio.run(calls())
    assert (first.status_code, decided.status_code, second.status_code) == (200, 200, 503)
    assert second.headers["Retry-After"] == "1"
    assert explaining.get("/v1/credits/p1").status_code == 200


def test_openapi_names_parameters_answer_and_refusals(api: Any) -> None:
    document = api.get("/openapi.json").json()
    operation = document["paths"]["/v1/credits/{product_id}"]["get"]
    assert [(p["name"], p["in"]) for p in operation["parameters"]] == [
        ("product_id", "path"),
        ("context", "query"),
        ("slot", "query"),
    ]
    assert all("example" in parameter for parameter in operation["parameters"])
    assert operation["responses"].keys() == {"200", "401", "403", "404", "422", "503"}
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/CardCredits"}
    assert document["components"]["schemas"]["Uplift"]["properties"]["clicks"]["examples"] == [0.117]


def test_misspelled_products_get_the_ids_most_like_theirs() -> None:
    few = {"shoe-1": 1, "shoe-2": 1, "hat-1": 1}
    assert "did you mean shoe-1" in unknown_product("sho-1", few)
    assert "there are shoe-1, shoe-2, hat-1" in unknown_product("zzzzz", few)
    many = [f"{kind}-{n}" for kind in ("hat", "shoe") for n in range(4_000)]
    assert "did you mean shoe-77" in unknown_product("shoe-77x", many)
    assert "neither catalog nor snapshot" in unknown_product("p", [])
