"""What alerts set off, by the scripts in a real Redis: done once, kept in the audit, undone by whom it is due."""

import itertools
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from genco.services import RedisServer
from learner.publisher import Fence, Publisher
from streams.actions import UNDO, AutomaticAction, Responder, parse_table, try_to_respond
from streams.contracts.alerts import Alert, Cause, Severity
from streams.contracts.control import Action
from streams.contracts.registry import Version
from streams.contracts.snapshot import GateVerdict, PolicySnapshot, SnapshotManifest
from streams.registry import Registry
from streams.registry_actions import Operator, Order


def alert(name: str = "JoinRateDrop", state: Any = "firing", model: str = "m", id_: str = "a-1") -> Alert:
    return Alert(
        alert_id=id_,
        name=name,
        cause=Cause.JOIN_BROKEN,
        severity=Severity.PAGE,
        model_id=model,
        state=state,
        since_ms=250,
        occurred_at_ms=300,
        summary="clicks have ceased",
        actions=["held the watermark"],
    )


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as started:
        yield started


class Scene:
    def __init__(self, client: redis.Redis, table: str) -> None:
        self.client = client
        self.model = f"model-{uuid.uuid4().hex[:8]}"
        self.publisher = Publisher(client, self.model, 60_000, Fence())
        assert self.publisher.acquire()
        for version, created_at_ms in ((1, 100), (2, 200), (3, 300)):
            self.publisher.publish(self.snapshot(version, created_at_ms))
        self.registry = Registry(client, self.model)
        self.operator = Operator(self.registry, client, lambda _: None)
        self.table = parse_table(table)
        self.ticks = itertools.count(400)
        self.responder = self.process("genco monitor")

    def process(self, who: str) -> Responder:
        return Responder(
            self.registry, self.operator, self.table, exploration=0.25, who=who, now_ms=lambda: next(self.ticks)
        )

    def snapshot(self, version: int, created_at_ms: int) -> PolicySnapshot:
        manifest = SnapshotManifest(
            model_id=self.model,
            epoch=1,
            version=version,
            sha256=str(version),
            num_bytes=1,
            feature_spec_hash="f",
            gate=GateVerdict(accepted=True),
            created_at_ms=created_at_ms,
        )
        return PolicySnapshot(manifest, b"x")

    def actions(self) -> list[Action]:
        """Return what the audit holds, oldest first."""
        return [record.what for record in reversed(self.registry.audit(100))]


ALL = "JoinRateDrop=freeze-learning, Broken = freeze-publication+rollback+shrink-exploration"


@pytest.fixture
def scene(server: RedisServer) -> Iterator[Scene]:
    with redis.Redis.from_url(server.url, socket_timeout=5.0) as client:
        yield Scene(client, ALL)


def test_everything_in_the_table_is_done_in_its_order_and_told_with_what_undoes_it(scene: Scene) -> None:
    told = scene.responder.respond(alert("Broken", model=scene.model)).actions
    assert told[0] == "held the watermark"
    assert told[1:] == [f"{action}; undo: {UNDO[action]}" for action in scene.table["Broken"]]
    assert scene.actions() == [Action.FREEZE, Action.ROLLBACK, Action.EXPLORE]
    state = scene.registry.state()
    assert state.current == Version(1, 2), "the newest made before it fired"
    assert (state.frozen, state.exploration, state.learning_frozen) == (True, 0.25, False)
    record = scene.registry.audit(1)[0]
    assert record.who == "genco monitor"
    assert "a-1" in record.reason
    assert "clicks have ceased" in record.reason


def test_an_alert_that_is_told_again_is_answered_once_whoever_answers(scene: Scene) -> None:
    first = scene.responder.respond(alert("Broken", model=scene.model))
    again = scene.process("genco join").respond(alert("Broken", model=scene.model))
    assert again.actions == first.actions
    assert len(scene.actions()) == 3
    # Also when somebody has undone it meanwhile: he knows better.
    scene.operator.unfreeze(Order(who="ann", when_ms=500))
    scene.responder.respond(alert("Broken", model=scene.model))
    assert not scene.registry.state().frozen
    scene.responder.respond(alert("Broken", model=scene.model, id_="a-2"))
    assert scene.registry.state().frozen


def test_learning_goes_on_when_the_alert_that_froze_it_is_resolved(scene: Scene) -> None:
    scene.responder.respond(alert(model=scene.model))
    assert scene.publisher.learning_is_frozen()
    # By another process, as after a restart.
    told = scene.process("genco join").respond(alert(model=scene.model, state="resolved"))
    assert told.actions[-1] == "unfreeze-learning"
    assert not scene.publisher.learning_is_frozen()
    scene.responder.respond(alert(model=scene.model, state="resolved"))
    assert scene.actions() == [Action.FREEZE_LEARNING, Action.UNFREEZE_LEARNING]


@pytest.mark.parametrize("by", ["an operator before", "an operator since", "another alert"])
def test_learning_that_somebody_else_has_frozen_stays_frozen(scene: Scene, by: str) -> None:
    mine, theirs = alert(model=scene.model), Order(who="ann", when_ms=1)
    if by == "an operator before":
        scene.operator.freeze_learning(theirs)
        assert scene.responder.respond(mine).actions == mine.actions
    elif by == "an operator since":
        scene.responder.respond(mine)
        scene.operator.unfreeze_learning(theirs)
        scene.operator.freeze_learning(theirs)
    else:
        scene.responder.respond(alert(model=scene.model, id_="other"))
        scene.responder.respond(mine)
    scene.responder.respond(alert(model=scene.model, state="resolved"))
    assert scene.publisher.learning_is_frozen()


def test_what_concerns_another_model_or_stands_in_no_table_is_left_alone(scene: Scene) -> None:
    for other in (alert("Broken", model="other"), alert("Unknown", model=scene.model)):
        assert scene.responder.respond(other) is other
    assert scene.actions() == []


def test_a_refused_action_is_told_and_the_others_are_done(scene: Scene) -> None:
    scene.operator.pin(Version(1, 3), Order(who="ann", when_ms=1))
    told = scene.responder.respond(alert("Broken", model=scene.model)).actions
    assert told[2] == "rollback: refused (pinned)"
    assert scene.registry.state().exploration == 0.25


def test_without_redis_the_alert_says_that_nothing_was_done() -> None:
    client = redis.Redis(port=1, socket_timeout=0.2)
    registry = Registry(client, "m")
    operator = Operator(registry, client, lambda _: None)
    table = parse_table(ALL)
    responder = Responder(registry, operator, table, exploration=0.25, who="x", now_ms=lambda: 1)
    assert "not done" in try_to_respond(responder, alert()).actions[-1]


@pytest.mark.parametrize("text", ["JoinRateDrop", "A=sleep", "=rollback", "A=rollback,A=freeze-learning", "A="])
def test_a_table_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no ALERT=|no name"):
        parse_table(text)


def test_an_empty_table_does_nothing() -> None:
    assert parse_table("") == {}
    assert set(AutomaticAction) == set(UNDO)
