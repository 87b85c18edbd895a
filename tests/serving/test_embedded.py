"""The server without HTTP: what it decides and logs, and that it refuses what the server refuses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from genco.services.mock_broker import MockBroker
from genco.services.redis_server import RedisServer
from serving.client import ClientError
from serving.embedded import Embedded
from streams.contracts.events import Click, Impression
from streams.contracts.settings import ServeSettings, load
from streams.contracts.topics import partition_counts
from tests.serving.test_main import read_topic

REQUEST = {"product_id": "p1", "context": {"device": "ios"}, "candidates": {"title": ["t1", "t2"]}}
PAGE = Path(__file__).parents[2] / "docs" / "embedded.md"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    for name, value in {
        "GENCO_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1",
        "GENCO_REDIS_URL": "redis://127.0.0.1:1/0",
        "GENCO_SIGNING_KEY": "k" * 32,
        "GENCO_LAST_GOOD_DIR": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def embedded(environment: pytest.MonkeyPatch) -> Iterator[Embedded]:
    made = Embedded()
    yield made
    made.close(0.5)


def test_example_of_the_docs_runs_and_its_events_reach_kafka(
    environment: pytest.MonkeyPatch, redis_server: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    with MockBroker(partition_counts(2)) as broker:
        for name, value in (broker.client_settings() | redis_server.client_settings()).items():
            environment.setenv(name, value)
        found: dict[str, Any] = {}
        exec(compile(example, str(PAGE), "exec"), found)  # noqa: S102
        settings = load(ServeSettings)
        [(partition, impression)] = read_topic(settings, "impressions", Impression, 1)
        [click] = read_topic(settings, "clicks", Click, 1)
    assert found["waiting"] == 0
    assert impression.decision_id == found["decision"]["decision_id"]
    assert impression.creative == found["decision"]["creative"]
    assert click[0] == partition
    assert click[1].decision_id == impression.decision_id
    assert "uniform" in capsys.readouterr().out


def test_decisions_are_as_the_server_answers_them(embedded: Embedded) -> None:
    first, second = embedded.decide([REQUEST, REQUEST | {"log_impression": False}])
    assert first["propensity"] == 0.5
    assert "impression_token" not in first
    assert embedded.rendered([second["impression_token"]]) == {"accepted": 1, "rejected": []}
    assert embedded.click([{"decision_id": first["decision_id"]}]) == {"accepted": 1, "rejected": []}
    (fault,) = embedded.click([{"decision_id": "forged"}])["rejected"]
    assert fault["field"] == "decision_id"
    status = embedded.policy()
    assert status["source"] == "uniform"
    assert status["counters"]["decisions"]["uniform"] == 2
    assert status["counters"]["events"]["impressions"]["accepted"] == 2


@pytest.mark.parametrize(
    ("requests", "status", "field"),
    [
        ([], 422, "requests"),
        ([REQUEST] * 257, 422, "requests"),
        ([REQUEST, REQUEST | {"context": {"x": float("nan")}}], 422, "requests[1].context"),
        ([REQUEST | {"candidates": {"title": []}}], 422, "requests[0].candidates"),
        ([{"product_id": "p"}], 422, "requests[0]"),
        ([REQUEST | {"context": {"x": object()}}], 400, None),
        ([REQUEST | {"product_id": "p" * 2_000_000}], 413, None),
    ],
)
def test_what_the_server_refuses_is_refused(
    embedded: Embedded, requests: list[Any], status: int, field: str | None
) -> None:
    with pytest.raises(ClientError) as caught:
        embedded.decide(requests)
    assert caught.value.status == status
    assert (caught.value.faults[0]["field"].startswith(field) if field else caught.value.faults == []) is True
    assert embedded.policy()["counters"]["decisions"]["uniform"] == 0


def test_many_threads_get_decisions_of_their_own(embedded: Embedded) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: embedded.decide([REQUEST] * 10), range(40)))
    assert len({decision["decision_id"] for decisions in found for decision in decisions}) == 400


def test_full_log_refuses_clicks_and_close_tells_what_was_lost(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("GENCO_EVENT_QUEUE_SIZE", "100")
    registry = CollectorRegistry()
    embedded = Embedded(load(ServeSettings), registry)
    (decision,) = embedded.decide([REQUEST])
    click = {"decision_id": decision["decision_id"]}
    assert embedded.click([click] * 200)["accepted"] == 99
    with pytest.raises(ClientError) as caught:
        embedded.click([click])
    assert caught.value.status == 503
    assert embedded.close(0.5) == 100
    lost = registry.get_sample_value("genco_events_dropped_total", {"topic": "clicks", "cause": "shutdown"})
    assert lost == 99
