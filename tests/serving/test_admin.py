"""Acting on the registry over HTTP: what is done, written down, refused, and who may."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from learner.publisher import Fence, Publisher
from serving.admin import RegistryAdmin
from serving.auth import Authenticator
from serving.main import build
from streams.clients import UnreachableError
from streams.contracts.control import ControlRecord
from streams.contracts.settings import ConfigurationError, ServeSettings
from streams.registry import Registry
from tests.serving.conftest import KEY, NOW_MS
from tests.snapshots import snapshot

TOKEN = "token-of-ann"
DIGEST = hashlib.sha256(TOKEN.encode()).hexdigest()
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
ACTIONS = ("pin", "unpin", "freeze", "unfreeze", "rollback")


class Scene:
    """A registry with versions 1.1 to 1.3, and a server that acts on it."""

    def __init__(self, client: redis.Redis, make_api: Callable[..., Any]) -> None:
        self.registry = Registry(client, "default")
        self.publisher = Publisher(client, "default", 60_000, Fence())
        assert self.publisher.acquire()
        for version in (1, 2, 3):
            self.publisher.publish(snapshot("default", 1, version))
        self.records: list[ControlRecord] = []
        self.kafka_is_up = True
        admin = RegistryAdmin(client, "default", self.record, KEY, lambda: NOW_MS)
        self.api = make_api(admin=admin, authenticator=Authenticator(f"admin:{DIGEST}"))

    def record(self, record: ControlRecord) -> None:
        if not self.kafka_is_up:
            raise UnreachableError("no Kafka broker answers")
        self.records.append(record)

    def act(self, action: str, **body: Any) -> Any:
        return self.api.post(f"/v1/registry/{action}", body, headers=HEADERS)


@pytest.fixture
def scene(redis_db: redis.Redis, make_api: Callable[..., Any]) -> Scene:
    return Scene(redis_db, make_api)


def test_every_action_does_what_the_command_line_does_and_is_written_down(scene: Scene) -> None:
    steps = [
        ("pin", {"version": "1.1"}, "1.1", "1:1", False),
        ("unpin", {}, "1.1", None, False),
        ("pin", {"version": "1.3"}, "1.3", "1:3", False),
        ("unpin", {}, "1.3", None, False),
        ("freeze", {}, "1.3", None, True),
        ("unfreeze", {}, "1.3", None, False),
        ("rollback", {"freeze": False}, "1.2", None, False),
        ("rollback", {"version": "1.1"}, "1.1", None, True),
    ]
    for action, body, current, pin, frozen in steps:
        answer = scene.act(action, reason="drill", who="ann", **body)
        assert answer.status_code == 200, answer.text
        state = scene.registry.state()
        assert (str(state.current), state.pin, state.frozen) == (current, pin, frozen)
        found = answer.json()
        assert (found["changed"], found["recorded"], found["warning"]) == (True, True, None)
        assert found["after"] == state.model_dump(mode="json")
        assert found["audit"]["what"] == action
        (audit,) = scene.registry.audit(1)
        assert (audit.what, audit.reason, audit.when_ms) == (action, "drill", NOW_MS)
        assert audit.who == f"ann (token {DIGEST[:8]}, 127.0.0.1)"
        assert (scene.records[-1].audit, scene.records[-1].state) == (audit, state)


def test_name_that_the_caller_does_not_give_is_the_token(scene: Scene) -> None:
    scene.act("freeze")
    assert scene.registry.audit(1)[0].who == f"token {DIGEST[:8]}, 127.0.0.1"


def test_repeated_action_changes_nothing(scene: Scene) -> None:
    assert scene.act("freeze").json()["changed"]
    answer = scene.act("freeze").json()
    assert (answer["changed"], answer["audit"]) == (False, None)
    assert answer["before"] == answer["after"]


def test_list_shows_versions_state_and_actions(scene: Scene) -> None:
    scene.act("pin", version="1.2")
    found = scene.api.get("/v1/registry?limit=2", headers=HEADERS).json()
    assert [(row["version"], row["marks"]) for row in found["versions"]] == [
        ("1.3", []),
        ("1.2", ["current", "pinned"]),
    ]
    assert (found["model_id"], found["stored"], found["state"]["pin"]) == ("default", 3, "1:2")
    assert [record["what"] for record in found["audit"]] == ["pin"]


@pytest.mark.parametrize("limit", ["0", "101", "x", "-1"])
def test_list_refuses_other_limits(scene: Scene, limit: str) -> None:
    assert scene.api.get("/v1/registry", params={"limit": limit}, headers=HEADERS).status_code == 422


def test_action_that_kafka_does_not_take_holds_and_says_so(scene: Scene) -> None:
    scene.kafka_is_up = False
    answer = scene.act("freeze")
    assert answer.status_code == 200
    assert (answer.json()["changed"], answer.json()["recorded"]) == (True, False)
    assert "no Kafka broker answers" in answer.json()["warning"]
    assert scene.registry.state().frozen


@pytest.mark.parametrize(
    ("action", "body", "status", "cause"),
    [
        ("pin", {"version": "1.9"}, 409, "not stored"),
        ("rollback", {"version": "9.9"}, 409, "newer"),
        ("pin", {}, 422, "version"),
        ("pin", {"version": "current"}, 422, "version"),
        ("pin", {"version": "1.1\n"}, 422, "version"),
        ("freeze", {"version": "1.1"}, 422, "version"),
        ("rollback", {"freeze": "yes"}, 422, "freeze"),
        ("freeze", {"reason": "x" * 1001}, 422, "reason"),
        ("freeze", {"who": ""}, 422, "who"),
        ("freeze", {"who": "x" * 65}, 422, "who"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(
    scene: Scene, action: str, body: dict[str, Any], status: int, cause: str
) -> None:
    before = scene.registry.state()
    answer = scene.act(action, **body)
    assert answer.status_code == status
    assert cause in answer.text
    assert scene.registry.state() == before
    assert scene.records == []


def test_key_that_stands_twice_is_refused(scene: Scene) -> None:
    body = b'{"version": "1.1", "version": "1.2"}'
    headers = HEADERS | {"Content-Type": "application/json"}
    answer = scene.api.post("/v1/registry/pin", body, headers=headers)
    assert (answer.status_code, answer.json()["faults"][0]["field"]) == (422, "version")


def test_redis_that_does_not_answer_is_told(make_api: Callable[..., Any]) -> None:
    with redis.Redis(port=1, socket_timeout=0.1, retry=Retry(NoBackoff(), 0)) as nowhere:
        api = make_api(admin=RegistryAdmin(nowhere, "default", lambda _: None, KEY, lambda: NOW_MS))
        answers = [api.post(f"/v1/registry/{action}", {"version": "1.1"}) for action in ("pin", "rollback")]
        answers += [api.post("/v1/registry/freeze", {}), api.get("/v1/registry")]
    assert [answer.status_code for answer in answers] == [503] * 4
    assert all("registry cannot be" in answer.json()["error"] for answer in answers)


def test_server_without_the_operators_url_says_what_is_missing(api: Any) -> None:
    answers = [api.post(f"/v1/registry/{action}", {"version": "1.1"}) for action in ACTIONS]
    answers.append(api.get("/v1/registry"))
    assert {answer.status_code for answer in answers} == {501}
    assert all("GENCO_OPERATOR_REDIS_URL" in answer.json()["error"] for answer in answers)


@pytest.mark.parametrize("tokens", [None, f"decide:{DIGEST}"])
def test_operators_url_without_an_admin_token_stops_the_start(tokens: str | None, tmp_path: Path) -> None:
    settings = ServeSettings(
        kafka_bootstrap_servers="127.0.0.1:1",
        redis_url="redis://127.0.0.1:1/0",  # type: ignore[arg-type]
        operator_redis_url="redis://operator:secret@127.0.0.1:1/0",  # type: ignore[arg-type]
        signing_key="k" * 32,  # type: ignore[arg-type]
        api_tokens=tokens,  # type: ignore[arg-type]
        last_good_dir=tmp_path,
    )
    with pytest.raises(ConfigurationError, match="GENCO_OPERATOR_REDIS_URL"):
        build(settings)
