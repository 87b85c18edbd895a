"""An emptied Redis gets pin, freeze, epoch and revision back from the topic `control`, before anybody can publish."""

import uuid
from collections.abc import Iterator

import pytest
import redis

from genco.services import RedisServer
from learner.lease import LeaseKeeper
from learner.publisher import Fence, Outcome, Publisher
from streams.clients import UnreachableError
from streams.contracts.control import Action, ControlRecord, newest
from streams.contracts.registry import Version
from streams.registry import Registry
from streams.registry_actions import Operator, Order
from tests.learner.test_publisher import LEASE_MS, current, snapshot

NOW_MS = 1_764_000_000_000


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as started:
        yield started


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_server.url, socket_timeout=5.0) as connected:
        yield connected


@pytest.fixture
def model() -> str:
    return f"model-{uuid.uuid4().hex[:8]}"


class Topic:
    """Stands for the topic `control`."""

    def __init__(self) -> None:
        self.records: list[ControlRecord] = []
        self.is_up = True

    def append(self, record: ControlRecord) -> None:
        self._require()
        self.records.append(record)

    def newest(self, model_id: str) -> ControlRecord | None:
        self._require()
        return newest(record for record in self.records if record.model_id == model_id)

    def _require(self) -> None:
        if not self.is_up:
            raise UnreachableError("no Kafka broker answers")


def controlled(client: redis.Redis, model: str, topic: Topic, fence: Fence | None = None) -> Publisher:
    return Publisher(client, model, LEASE_MS, fence or Fence(), control=topic, now_ms=lambda: NOW_MS)


def act(
    client: redis.Redis, model: str, topic: Topic, action: Action, *version: Version, when_ms: int = NOW_MS
) -> None:
    operator = Operator(Registry(client, model), client, topic.append)
    getattr(operator, action.value)(*version, Order(who="ann", when_ms=when_ms))


def test_pin_survives_flushall_with_larger_numbers(
    client: redis.Redis, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    topic = Topic()
    owner = controlled(client, model, topic)
    assert owner.acquire()
    for version in range(1, 6):
        owner.publish(snapshot(model, 1, version))
    act(client, model, topic, Action.PIN, Version(1, 3))
    client.flushall()
    assert owner.publish(snapshot(model, 1, 6)) is Outcome.NOT_HOLDER
    assert owner.acquire()
    assert "the registry was empty" in caplog.text
    (warning,) = (record for record in caplog.records if "pin or freeze was restored" in record.message)
    assert (warning.pinned, warning.command) == ("1.3", "genco policy unpin")  # type: ignore[attr-defined]
    state = Registry(client, model).state()
    assert (state.pinned, state.pointer, state.epoch, state.sequence) == (Version(1, 3), None, 2, 1)
    (audit,) = Registry(client, model).audit(10)
    assert (audit.who, audit.what) == ("ann", Action.PIN), "who pinned is still known"
    assert state.revision >= 6
    # Its blob is gone: what is learned is stored and not served, until somebody decides.
    assert owner.publish(snapshot(model, 2, 7)) is Outcome.PINNED
    assert current(client, model) == {}
    act(client, model, topic, Action.PIN, Version(2, 7))
    assert current(client, model)["revision"] > 6, "servers go on from revision 6"
    act(client, model, topic, Action.UNPIN)
    assert owner.publish(snapshot(model, 2, 8)) is Outcome.PUBLISHED


def test_switches_survive_flushall(client: redis.Redis, model: str) -> None:
    topic = Topic()
    owner = controlled(client, model, topic)
    assert owner.acquire()
    operator, order = Operator(Registry(client, model), client, topic.append), Order(who="ann", when_ms=77)
    operator.freeze_learning(order)
    operator.explore(0.25, order)
    operator.accept_clicks(order)
    client.flushall()
    assert owner.acquire()
    state = Registry(client, model).state()
    assert (state.learning_frozen, state.exploration, state.clicks_accepted_ms) == (True, 0.25, 77)
    assert owner.learning_is_frozen()
    operator.explore(1.0, order)
    operator.unfreeze_learning(order)
    client.flushall()
    assert owner.acquire()
    state = Registry(client, model).state()
    assert (state.learning_frozen, state.exploration, state.clicks_accepted_ms) == (False, None, 77)


def test_new_learner_without_a_checkpoint_goes_on_from_the_topic(client: redis.Redis, model: str) -> None:
    topic = Topic()
    owner = controlled(client, model, topic)
    assert owner.acquire()
    owner.publish(snapshot(model, 1, 1))
    act(client, model, topic, Action.FREEZE, when_ms=NOW_MS - 5_000)
    act(client, model, topic, Action.UNFREEZE, when_ms=NOW_MS - 5_000)
    act(client, model, topic, Action.FREEZE, when_ms=NOW_MS - 5_000)
    client.flushall()
    successor = controlled(client, model, topic)
    assert successor.acquire()
    assert successor.fence.epoch == 2
    state = Registry(client, model).state()
    assert (state.frozen, state.pin, state.sequence) == (True, None, 3)
    # Of the publications in the five seconds since, the topic knows nothing.
    assert state.revision == 1 + 500
    act(client, model, topic, Action.UNFREEZE)
    assert successor.publish(snapshot(model, 2, 1)) is Outcome.PUBLISHED
    assert current(client, model)["revision"] == 502


def test_registry_that_is_not_empty_is_left_as_it_is(client: redis.Redis, model: str) -> None:
    topic = Topic()
    owner = controlled(client, model, topic)
    assert owner.acquire()
    act(client, model, topic, Action.FREEZE)
    act(client, model, Topic(), Action.UNFREEZE)  # Kafka did not get it
    owner.release()
    assert owner.acquire()
    assert not Registry(client, model).state().frozen
    assert topic.newest(model).state.frozen is False, "the learner has written it"  # type: ignore[union-attr]


def test_empty_registry_is_not_taken_while_kafka_is_silent(client: redis.Redis, model: str) -> None:
    topic = Topic()
    owner = controlled(client, model, topic)
    assert owner.acquire()
    owner.publish(snapshot(model, 1, 1))
    act(client, model, topic, Action.PIN, Version(1, 1))
    client.flushall()
    topic.is_up = False
    with pytest.raises(UnreachableError):
        owner.acquire()
    assert client.keys(f"*{model}*") == [], "nobody may publish before the pin is back"
    topic.is_up = True
    assert owner.acquire()
    assert Registry(client, model).state().pinned == Version(1, 1)


def test_learner_writes_down_what_kafka_lacks_when_it_prolongs_its_lease(client: redis.Redis, model: str) -> None:
    topic = Topic()
    owner = controlled(client, model, topic)
    assert owner.acquire()
    assert [(record.state.epoch, record.state.sequence) for record in topic.records] == [(1, 0)]
    act(client, model, Topic(), Action.FREEZE)
    topic.is_up = False
    assert owner.renew()
    topic.is_up = True
    for _ in range(2):
        assert owner.renew()
    assert [record.state.frozen for record in topic.records] == [False, True]
    assert topic.records[-1].audit is not None
    assert topic.records[-1].audit.what is Action.FREEZE


def test_lease_keeper_waits_for_kafka_when_redis_was_emptied(client: redis.Redis, model: str) -> None:
    topic = Topic()
    now_s = 0.0
    owner = controlled(client, model, topic)
    keeper = LeaseKeeper(owner, model_id=model, lease_ms=LEASE_MS, clock=lambda: now_s)
    assert keeper.keep()
    client.flushall()
    topic.is_up = False
    now_s += LEASE_MS / 1000
    assert keeper.keep(), "training goes on"
    assert not owner.holds_lease
    topic.is_up = True
    now_s += LEASE_MS / 1000
    assert keeper.keep()
    assert owner.holds_lease


def test_lease_that_a_publication_found_gone_is_taken_again_at_once(client: redis.Redis, model: str) -> None:
    owner = controlled(client, model, Topic())
    keeper = LeaseKeeper(owner, model_id=model, lease_ms=LEASE_MS, clock=lambda: 0.0)
    assert keeper.keep()
    client.flushall()
    assert owner.publish(snapshot(model, 1, 1)) is Outcome.NOT_HOLDER
    assert keeper.keep()
    assert owner.publish(snapshot(model, owner.fence.epoch, 2)) is Outcome.PUBLISHED


def test_lease_that_cannot_be_taken_again_is_not_asked_for_at_every_turn(client: redis.Redis, model: str) -> None:
    """Each try may wait for Kafka for seconds, in which nothing is learned."""
    topic = Topic()
    owner = controlled(client, model, topic)
    keeper = LeaseKeeper(owner, model_id=model, lease_ms=LEASE_MS, clock=lambda: 0.0)
    assert keeper.keep()
    client.flushall()
    owner.publish(snapshot(model, 1, 1))
    topic.is_up = False
    assert keeper.keep(), "training goes on"
    topic.is_up = True
    assert keeper.keep()
    assert not owner.holds_lease
