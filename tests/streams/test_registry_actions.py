"""What operators do, by the scripts in a real Redis, while a learner publishes."""

import hashlib
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from genco.services import RedisServer
from learner.publisher import Fence, Outcome, Publisher
from streams.clients import UnreachableError
from streams.contracts.control import Action, ControlRecord, RegistryState
from streams.contracts.registry import (
    AUDIT_LENGTH,
    Version,
    audit_key,
    blob_key,
    current_key,
    freeze_key,
    history_key,
    manifest_key,
    pin_key,
    published_channel,
)
from streams.contracts.snapshot import GateVerdict, PolicySnapshot, SnapshotManifest
from streams.registry import Registry
from streams.registry_actions import ActionRefusedError, NotRecordedError, Operator, Order, Refusal

ORDER = Order(who="ann@host", when_ms=5, reason="drill")


def snapshot(model: str, epoch: int, version: int) -> PolicySnapshot:
    blob = f"weights {epoch}:{version}".encode()
    manifest = SnapshotManifest(
        model_id=model,
        epoch=epoch,
        version=version,
        sha256=hashlib.sha256(blob).hexdigest(),
        num_bytes=len(blob),
        feature_spec_hash="f",
        gate=GateVerdict(accepted=True),
        metrics={"log_loss": 0.0625},
        created_at_ms=0,
    )
    return PolicySnapshot(manifest, blob)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as started:
        yield started


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url, socket_timeout=5.0) as connected:
        yield connected


class Scene:
    """A model of its own with a learner and an operator."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.model = f"model-{uuid.uuid4().hex[:8]}"
        self.publisher = Publisher(client, self.model, 60_000, Fence())
        self.registry = Registry(client, self.model)
        self.records: list[ControlRecord] = []
        self.operator = Operator(self.registry, client, self.records.append)

    def learn(self, *versions: int, epoch: int = 1) -> list[Outcome]:
        if not self.publisher.holds_lease:
            assert self.publisher.acquire()
        return [self.publisher.publish(snapshot(self.model, epoch, version)) for version in versions]

    def refused(self, call: Callable[[], Any]) -> Refusal:
        before = self.registry.state(), self.registry.audit(AUDIT_LENGTH)
        with pytest.raises(ActionRefusedError) as caught:
            call()
        assert (self.registry.state(), self.registry.audit(AUDIT_LENGTH)) == before, "a refusal changes nothing"
        assert "genco" in str(caught.value), "it says what to do"
        return caught.value.refusal

    @property
    def current(self) -> tuple[str, int]:
        pointer = self.registry.state().pointer
        assert pointer is not None
        assert pointer.sha256 == snapshot(self.model, *pointer.name).manifest.sha256
        return str(pointer.name), pointer.revision


@pytest.fixture
def scene(client: redis.Redis) -> Scene:
    return Scene(client)


# -- pin ---------------------------------------------------------------------------------------------------------------


def test_pin_moves_the_pointer_and_holds_it_until_unpin(scene: Scene) -> None:
    scene.learn(1, 2, 3)
    change = scene.operator.pin(Version(1, 1), ORDER)
    assert scene.current == ("1.1", 4)
    assert (change.before.current, change.before.pin) == (Version(1, 3), None)
    assert change.after == scene.registry.state()
    assert change.after.pinned == Version(1, 1)
    assert scene.learn(4, 5) == [Outcome.PINNED] * 2
    assert scene.current == ("1.1", 4)
    assert [str(v) for v in scene.registry.history()] == ["1.5", "1.4", "1.3", "1.2", "1.1"]
    scene.operator.pin(Version(1, 5), ORDER)  # forward, to what was stored meanwhile
    assert scene.current == ("1.5", 5)
    scene.operator.unpin(ORDER)
    assert scene.current == ("1.5", 5), "it moves with the next publication"
    assert scene.learn(6) == [Outcome.PUBLISHED]
    assert scene.current == ("1.6", 6)
    assert scene.publisher.fence.revision == 6


def test_pin_where_the_pointer_stands_still_gives_a_new_revision(scene: Scene) -> None:
    scene.learn(1)
    scene.operator.pin(Version(1, 1), ORDER)
    assert scene.current == ("1.1", 2)


@pytest.mark.parametrize("broken", ["never", "blob", "manifest", "truncated", "no json", "format"])
def test_pin_of_a_version_that_is_not_whole_is_refused(scene: Scene, broken: str) -> None:
    scene.learn(1, 2)
    version = Version(1, 9 if broken == "never" else 1)
    if broken == "blob":
        scene.client.delete(blob_key(scene.model, 1, 1))
    elif broken == "manifest":
        scene.client.delete(manifest_key(scene.model, 1, 1))
    elif broken == "truncated":
        scene.client.setrange(blob_key(scene.model, 1, 1), 0, "xx")
        scene.client.append(blob_key(scene.model, 1, 1), "x")
    elif broken == "no json":
        scene.client.set(manifest_key(scene.model, 1, 1), "{")
    elif broken == "format":
        old = snapshot(scene.model, 1, 1).manifest.model_copy(update={"format": "genco-snapshot-1"})
        scene.client.set(manifest_key(scene.model, 1, 1), old.model_dump_json())
    expected = {"truncated": Refusal.DAMAGED, "no json": Refusal.DAMAGED, "format": Refusal.FORMAT}.get(
        broken, Refusal.MISSING
    )
    assert scene.refused(lambda: scene.operator.pin(version, ORDER)) is expected
    assert scene.refused(lambda: scene.operator.rollback(Version(1, 1) if version[1] == 1 else Version(0, 1), ORDER))
    assert scene.records == []


# -- freeze ------------------------------------------------------------------------------------------------------------


def test_freeze_keeps_whatever_is_current(scene: Scene) -> None:
    scene.learn(1, 2)
    change = scene.operator.freeze(ORDER)
    assert (change.before.frozen, change.after.frozen) == (False, True)
    assert scene.learn(3) == [Outcome.FROZEN]
    assert scene.current == ("1.2", 2), "a freeze moves nothing, so it gives no revision"
    scene.operator.unfreeze(ORDER)
    assert scene.current == ("1.2", 2)
    assert scene.learn(4) == [Outcome.PUBLISHED]
    assert scene.current == ("1.4", 3)


def test_freeze_before_the_first_publication_holds_it(scene: Scene) -> None:
    scene.publisher.acquire()
    scene.operator.freeze(ORDER)
    assert scene.learn(1) == [Outcome.FROZEN]
    assert scene.registry.state().pointer is None
    scene.operator.pin(Version(1, 1), ORDER)
    assert scene.current == ("1.1", 1)


def test_pin_and_freeze_hold_each_for_itself(scene: Scene) -> None:
    scene.learn(1, 2)
    scene.operator.freeze(ORDER)
    scene.operator.pin(Version(1, 1), ORDER)
    assert scene.learn(3) == [Outcome.PINNED]
    scene.operator.unpin(ORDER)
    assert scene.learn(4) == [Outcome.FROZEN]
    scene.operator.unfreeze(ORDER)
    assert scene.learn(5) == [Outcome.PUBLISHED]


# -- rollback ----------------------------------------------------------------------------------------------------------


def test_rollback_goes_back_with_a_new_revision_and_freezes(scene: Scene) -> None:
    scene.learn(1, 2, 3)
    change = scene.operator.rollback(None, ORDER)
    assert scene.current == ("1.2", 4)
    assert change.after.frozen
    assert scene.learn(4) == [Outcome.FROZEN], "stored, and not refused as older than something"
    assert scene.current == ("1.2", 4)
    scene.operator.rollback(None, ORDER)
    assert scene.current == ("1.1", 5)
    assert scene.refused(lambda: scene.operator.rollback(None, ORDER)) is Refusal.NOTHING_BEFORE
    scene.operator.unfreeze(ORDER)
    assert scene.learn(5) == [Outcome.PUBLISHED]
    assert scene.current == ("1.5", 6)


def test_rollback_without_a_freeze_lasts_until_the_next_publication(scene: Scene) -> None:
    scene.learn(1, 2, 3)
    change = scene.operator.rollback(Version(1, 1), ORDER, freeze=False)
    assert scene.current == ("1.1", 4)
    assert not change.after.frozen
    assert scene.learn(4) == [Outcome.PUBLISHED]
    assert scene.current == ("1.4", 5)


@pytest.mark.parametrize("freeze", [True, False])
def test_publication_whose_answer_was_lost_does_not_undo_a_rollback(scene: Scene, freeze: bool) -> None:
    scene.learn(1, 2)
    scene.operator.rollback(None, ORDER, freeze=freeze)
    # redis-py sends the script of version 2 again.
    assert scene.learn(2) == [Outcome.FROZEN if freeze else Outcome.NOT_NEWER]
    assert scene.current == ("1.1", 3)


def test_rollback_across_learners(scene: Scene) -> None:
    scene.learn(7)
    scene.publisher.release()
    assert scene.publisher.acquire()
    scene.learn(3, epoch=2)
    scene.operator.rollback(None, ORDER)
    assert scene.current == ("1.7", 3)
    assert scene.learn(4, epoch=2) == [Outcome.FROZEN]


def test_rollback_is_refused_where_it_makes_no_sense(scene: Scene) -> None:
    scene.publisher.acquire()
    assert scene.refused(lambda: scene.operator.rollback(None, ORDER)) is Refusal.NO_POINTER
    scene.learn(1)
    assert scene.refused(lambda: scene.operator.rollback(None, ORDER)) is Refusal.NOTHING_BEFORE
    scene.learn(2, 3)
    scene.operator.rollback(Version(1, 1), ORDER)
    assert scene.refused(lambda: scene.operator.rollback(Version(1, 3), ORDER)) is Refusal.NOT_OLDER
    scene.operator.pin(Version(1, 2), ORDER)
    assert scene.refused(lambda: scene.operator.rollback(Version(1, 1), ORDER)) is Refusal.PINNED


# -- switches ----------------------------------------------------------------------------------------------------------


def test_switches_are_set_and_undone(scene: Scene) -> None:
    scene.learn(1)
    assert scene.operator.freeze_learning(ORDER).after.learning_frozen
    assert scene.publisher.learning_is_frozen()
    assert scene.operator.explore(0.25, ORDER).after.exploration == 0.25
    assert scene.operator.explore(0.0, ORDER).after.exploration == 0.0
    after = scene.operator.explore(1.0, ORDER).after
    assert (after.exploration, after.learning_frozen) == (None, True)
    assert not scene.operator.unfreeze_learning(ORDER).after.learning_frozen
    assert not scene.publisher.learning_is_frozen()
    assert scene.current == ("1.1", 1), "the pointer has nothing to do with it"
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        scene.operator.explore(1.5, ORDER)


def test_accepted_clicks_say_when(scene: Scene) -> None:
    scene.learn(1)
    for when_ms in (7, 9):
        after = scene.operator.accept_clicks(Order(who="ann", when_ms=when_ms)).after
        assert after.clicks_accepted_ms == when_ms
    assert scene.registry.state().clicks_accepted_ms == 9


# -- what holds for all ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", [action for action in Action if action is not Action.ACCEPT_CLICKS])
def test_action_done_twice_changes_nothing_the_second_time(scene: Scene, action: Action) -> None:
    scene.learn(1, 2)
    if action is Action.UNPIN:
        scene.operator.pin(Version(1, 1), ORDER)
    if action is Action.UNFREEZE:
        scene.operator.freeze(ORDER)
    if action is Action.UNFREEZE_LEARNING:
        scene.operator.freeze_learning(ORDER)
    scene.records.clear()

    def act(when_ms: int) -> Any:
        order = Order(who="ann", when_ms=when_ms)
        version = (Version(1, 1),) if action in (Action.PIN, Action.ROLLBACK) else ()
        share = (0.25,) if action is Action.EXPLORE else ()
        return getattr(scene.operator, action.value.replace("-", "_"))(*version, *share, order)

    first, second = act(1), act(2)
    assert first.audit is not None
    assert (first.audit.what, first.audit.when_ms) == (action, 1)
    assert second.audit is None
    assert second.before == second.after == first.after == scene.registry.state()
    assert scene.registry.audit(AUDIT_LENGTH)[0] == first.audit
    # Kafka gets it again all the same: the first record may not have reached it.
    assert [(r.state, r.audit) for r in scene.records] == [(first.after, first.audit)] * 2


def test_audit_says_who_when_what_why_before_and_after(scene: Scene) -> None:
    scene.learn(1, 2)
    order = Order(who='ann "the op"\n@höst', when_ms=1_764_000_000_123, reason="CTR −5 % \\ \x1b[31m")
    scene.operator.rollback(None, order)
    (audit,) = scene.registry.audit(10)
    assert (audit.what, audit.who, audit.when_ms, audit.reason) == (
        Action.ROLLBACK,
        order.who,
        order.when_ms,
        order.reason,
    )
    assert (audit.before.current, audit.after.current) == (Version(1, 2), Version(1, 1))
    assert (audit.before.sequence, audit.after.sequence) == (0, 1)
    assert scene.records == [
        ControlRecord(model_id=scene.model, written_at_ms=order.when_ms, state=audit.after, audit=audit)
    ]


def test_audit_is_capped(scene: Scene, client: redis.Redis) -> None:
    scene.learn(1)
    client.rpush(audit_key(scene.model), *(["{}"] * AUDIT_LENGTH))
    scene.operator.freeze(ORDER)
    assert client.llen(audit_key(scene.model)) == AUDIT_LENGTH
    assert [record.what for record in scene.registry.audit(AUDIT_LENGTH)] == [Action.FREEZE], "the others are none"


@pytest.mark.parametrize(("who", "reason"), [("", ""), ("x" * 129, ""), ("x", "y" * 1_001)])
def test_order_of_nobody_or_of_too_many_words_is_refused(who: str, reason: str) -> None:
    with pytest.raises(ValueError, match="characters; expected"):
        Order(who=who, when_ms=0, reason=reason)


def test_empty_registry_takes_no_action(scene: Scene) -> None:
    operator = scene.operator
    for call in (
        lambda: operator.pin(Version(1, 1), ORDER),
        lambda: operator.unpin(ORDER),
        lambda: operator.freeze(ORDER),
        lambda: operator.unfreeze(ORDER),
        lambda: operator.rollback(None, ORDER),
    ):
        assert scene.refused(call) is Refusal.EMPTY
    assert scene.client.keys(f"*{scene.model}*") == []


def test_action_that_kafka_does_not_take_holds_and_says_so(scene: Scene) -> None:
    def no_kafka(_: ControlRecord) -> None:
        raise UnreachableError("no Kafka broker answers")

    scene.learn(1, 2)
    operator = Operator(scene.registry, scene.client, no_kafka)
    with pytest.raises(NotRecordedError, match=r"could not be written to the topic control \(no Kafka") as caught:
        operator.freeze(ORDER)
    assert caught.value.change.after.frozen
    assert scene.learn(3) == [Outcome.FROZEN]
    change = scene.operator.freeze(ORDER)  # again, Kafka being back
    assert change.audit is None
    assert [record.audit and record.audit.what for record in scene.records] == [Action.FREEZE]


def test_moves_are_announced_and_holds_are_not(scene: Scene) -> None:
    scene.learn(1, 2)
    pubsub = scene.client.pubsub(ignore_subscribe_messages=True)
    pubsub.subscribe(published_channel(scene.model))
    pubsub.get_message(timeout=2)
    try:
        scene.operator.freeze(ORDER)
        scene.operator.rollback(None, ORDER)
        scene.operator.pin(Version(1, 2), ORDER)
        scene.operator.unpin(ORDER)
        messages = [pubsub.get_message(timeout=2), pubsub.get_message(timeout=2), pubsub.get_message(timeout=0.1)]
        assert [message and message["data"] for message in messages] == [b"3", b"4", None]
    finally:
        pubsub.close()


def test_models_do_not_meet(scene: Scene, client: redis.Redis) -> None:
    other = Scene(client)
    scene.learn(1, 2)
    other.learn(1, 2)
    scene.operator.rollback(None, ORDER)
    assert other.registry.state().frozen is False
    assert other.current == ("1.2", 2)


def test_hand_written_nonsense_is_told_and_not_followed(scene: Scene) -> None:
    scene.learn(1)
    scene.client.set(pin_key(scene.model), "nonsense")
    with pytest.raises(ValueError, match="is damaged: pin"):
        scene.registry.state()
    assert scene.publisher.renew(), "the learner goes on"
    assert scene.learn(2) == [Outcome.PINNED]


# -- races -------------------------------------------------------------------------------------------------------------


def test_publication_between_looking_and_acting_is_seen_by_the_action(scene: Scene) -> None:
    scene.learn(1, 2)
    looked = scene.registry.state()
    scene.learn(3)
    change = scene.operator.rollback(None, ORDER)
    assert (looked.current, change.before.current, change.after.current) == (
        Version(1, 2),
        Version(1, 3),
        Version(1, 2),
    )


def test_nothing_moves_the_pointer_between_a_hold_and_its_end(scene: Scene, server: RedisServer) -> None:
    """A learner publishes without a pause while operators pin, roll back and freeze."""
    scene.learn(1)
    stop, published, failures = threading.Event(), [1], []

    def learn() -> None:
        try:
            while not stop.is_set():
                published.append(published[-1] + 1)
                (outcome,) = scene.learn(published[-1])
                assert outcome.is_stored
        except Exception as error:  # noqa: BLE001 - the test tells
            failures.append(error)

    thread = threading.Thread(target=learn)
    with redis.Redis.from_url(server.url, socket_timeout=5.0) as second:
        operator = Operator(Registry(second, scene.model), second, scene.records.append)
        thread.start()
        states: list[tuple[RegistryState, RegistryState]] = []

        def await_publications(number: int) -> None:
            until = published[-1] + number
            while published[-1] < until:
                assert not failures

        for turn in range(16):
            await_publications(2)
            if turn % 2:
                held = operator.rollback(None, ORDER).after
                await_publications(2)
                states.append((held, operator.unfreeze(ORDER).before))
            else:
                held = operator.pin(operator._registry.history()[1], ORDER).after
                await_publications(2)
                states.append((held, operator.unpin(ORDER).before))
        stop.set()
        thread.join()
    assert not failures
    assert all(held.pointer == before.pointer for held, before in states)
    revisions = [held.pointer.revision for held, _ in states if held.pointer]
    assert revisions == sorted(set(revisions))
    assert [record.state.sequence for record in scene.records] == list(range(1, 33))


def test_clean_up_spares_what_is_pinned_or_current_and_takes_it_afterwards(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learner.publisher.HISTORY_LENGTH", 4)
    scene.learn(1, 2, 3)
    scene.operator.rollback(Version(1, 2), ORDER)
    scene.learn(*range(4, 10))
    stored = [str(version) for version in scene.registry.history()]
    assert len(stored) == 4
    assert {"1.9", "1.2"} < set(stored)
    assert sorted(key.decode() for key in scene.client.keys(f"blob:{scene.model}:*")) == sorted(
        blob_key(scene.model, *Version.parse(name)) for name in stored
    )
    scene.learn(10)
    scene.operator.pin(Version(1, 10), ORDER)
    scene.operator.unfreeze(ORDER)
    scene.learn(*range(11, 60))
    assert "1.10" in map(str, scene.registry.history())
    scene.operator.unpin(ORDER)
    scene.learn(*range(60, 150))
    assert "1.10" not in map(str, scene.registry.history())
    assert len(scene.client.keys(f"blob:{scene.model}:*")) == len(scene.client.keys(f"manifest:{scene.model}:*")) == 4


def test_keys_are_where_the_registry_says(scene: Scene) -> None:
    scene.learn(1, 2)
    scene.operator.rollback(None, ORDER)
    scene.operator.pin(Version(1, 1), ORDER)
    get = scene.client.get
    assert (get(pin_key(scene.model)), get(freeze_key(scene.model))) == (b"1:1", b"1")
    assert scene.client.hget(current_key(scene.model), "revision") == b"4"
    assert scene.client.lindex(history_key(scene.model), 0) == b"1:2"
