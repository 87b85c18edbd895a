"""The users of the shipped Redis can do what their processes do, and nothing else."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from prometheus_client import CollectorRegistry

from genco.services import RedisServer
from genco.services.redis_server import find_redis_server
from learner.publisher import Fence, Outcome, Publisher
from serving.metrics import ServingMetrics
from serving.policy_holder import PolicyHolder
from serving.refresher import Refresher
from serving.snapshot_store import LastGood, SnapshotStore
from streams.clients import redis_client, require_redis
from streams.contracts.registry import HISTORY_LENGTH, Version
from streams.contracts.settings import RedisSettings
from streams.registry import Registry
from streams.registry_actions import Operator, Order
from tests.snapshots import KEY, NOW_MS, snapshot

START = Path(__file__).resolve().parents[2] / "docker" / "redis" / "start.sh"
USERS = ("learner", "server", "operator")
MODEL = "default"
CONNECTING = {"auth", "hello", "ping", "select", "client"}


def password(user: str) -> str:
    return f"password-of-the-{user}"


class ShippedRedis:
    """Redis as docker/redis/start.sh starts it."""

    def __init__(self, directory: Path) -> None:
        self.users = directory / "users.acl"
        self.secrets = directory / "secrets"
        self.secrets.mkdir()
        self.server = RedisServer(binary=START)
        self.put("default", self.server._password)
        for user in USERS:
            self.put(user, password(user))
        self.environment = {
            "REDIS_SECRETS_DIR": str(self.secrets),
            "REDIS_USERS_FILE": str(self.users),
            "REDIS_SERVER": str(find_redis_server()),
        }

    def put(self, user: str, *passwords: str) -> None:
        (self.secrets / f"redis_{user}_password").write_text("\n".join(passwords))

    def client(self, user: str, secret: str | None = None) -> redis.Redis:
        """As the processes make theirs."""
        _, _, place = self.server.url.rpartition("@")
        url = f"redis://{user}:{password(user) if secret is None else secret}@{place}"
        return redis_client(RedisSettings(redis_url=url), timeout_s=5.0, retries=0)  # type: ignore[arg-type]

    def write_users(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run([START, "--users"], env=self.environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShippedRedis]:
    made = ShippedRedis(tmp_path_factory.mktemp("redis"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in made.environment.items():
            patch.setenv(name, value)
        with made.server:
            yield made


@pytest.fixture
def root(shipped: ShippedRedis) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(shipped.server.url, socket_timeout=5.0) as client:
        client.flushall()
        yield client


def publisher(client: redis.Redis) -> Publisher:
    made = Publisher(client, MODEL, 60_000, Fence())
    assert made.acquire()
    return made


def learn(client: redis.Redis) -> None:
    """All that a learner sends, also to a history that is full."""
    require_redis(client)
    learner = publisher(client)
    for version in range(1, HISTORY_LENGTH + 2):
        assert learner.publish(snapshot(version)) is Outcome.PUBLISHED
    learner.show(snapshot(1).manifest)
    assert learner.renew()
    assert not learner.learning_is_frozen()
    learner.release()


def serve(client: redis.Redis) -> None:
    """All that a server sends."""
    store = SnapshotStore(client, MODEL, KEY)
    fetched = store.fetch_current(None)
    assert fetched is not None
    assert fetched.manifest.version == 3
    assert store.exploration() == 1.0
    with client.pubsub() as pubsub:
        pubsub.subscribe(f"published:{MODEL}")
        message = pubsub.get_message(timeout=5.0)
        assert message is not None
        assert message["type"] == "subscribe"
        pubsub.unsubscribe()
        pubsub.get_message(timeout=5.0)


def operate(client: redis.Redis) -> None:
    """All that `genco policy` sends."""
    registry = Registry(client, MODEL)
    operator = Operator(registry, client, lambda record: None)
    order = Order(who="ann", when_ms=NOW_MS)
    versions = registry.history()
    assert [version.number for version in versions] == [3, 2, 1]
    assert None not in registry.manifests(versions).values()
    registry.candidate()
    assert registry.state().current == versions[0]
    assert not registry.is_empty()
    assert SnapshotStore(client, MODEL, KEY).fetch_current(None) is not None
    assert operator.pin(Version(1, 1), order).after.pin == "1:1"
    assert operator.unpin(order).after.pin is None
    assert operator.freeze(order).after.frozen
    assert not operator.unfreeze(order).after.frozen
    assert operator.explore(0.25, order).after.exploration == 0.25
    operator.pin(Version(1, 3), order)
    operator.unpin(order)
    assert operator.rollback(None, order).after.current == Version(1, 2)
    assert [record.what for record in registry.audit(1)] == ["rollback"]


@pytest.mark.parametrize(("user", "work"), [("learner", learn), ("server", serve), ("operator", operate)])
def test_user_can_do_its_work_and_has_no_command_that_it_does_not_need(
    shipped: ShippedRedis, root: redis.Redis, user: str, work: Callable[[redis.Redis], None]
) -> None:
    if user != "learner":
        learner = publisher(root)
        for version in (1, 2, 3):
            learner.publish(snapshot(version))
    root.script_flush()
    root.config_resetstat()
    with shipped.client(user) as client:
        work(client)
    # Redis before 7 counts no subcommands.
    sent = {name.removeprefix("cmdstat_").partition("|")[0] for name in root.info("commandstats")}
    line = next(line for line in shipped.users.read_text().splitlines() if line.startswith(f"user {user} "))
    granted = {word[1:].partition("|")[0] for word in line.split() if word.startswith("+")}
    assert granted - CONNECTING == sent - CONNECTING - {"info", "config"}


ELSEWHERE = [("SET", "other", "1"), ("GET", "other"), ("GET", "session:7"), ("PUBLISH", "other", "1")]
ADMINISTRATION = [
    ("FLUSHALL",),
    ("FLUSHDB",),
    ("KEYS", "*"),
    ("SCAN", "0"),
    ("CONFIG", "GET", "*"),
    ("CONFIG", "SET", "maxmemory", "1"),
    ("ACL", "LIST"),
    ("ACL", "SETUSER", "learner", "+@all"),
    ("REPLICAOF", "NO", "ONE"),
    ("SHUTDOWN", "NOSAVE"),
    ("DEBUG", "SLEEP", "0"),
    ("MONITOR",),
    ("CLIENT", "LIST"),
    ("EVAL", "return 1", "0"),
    ("SCRIPT", "FLUSH"),
    ("MODULE", "LIST"),
    ("SAVE",),
]
REFUSED = {
    "learner": [
        ("SUBSCRIBE", "published:default"),
        ("SETRANGE", "blob:default:1:1", "0", "x"),
        ("INCR", "sequence:default"),
    ],
    "server": [
        ("SET", "blob:default:1:1", "x"),
        ("SET", "current:default", "x"),
        ("HSET", "current:default", "revision", "9"),
        ("DEL", "current:default"),
        ("UNLINK", "blob:default:1:1"),
        ("EXPIRE", "current:default", "1"),
        ("RENAME", "current:default", "blob:default:1:1"),
        ("PUBLISH", "published:default", "9"),
        ("EVALSHA", "0" * 40, "0"),
        ("GET", "lease:default"),
        ("GET", "audit:default"),
        ("SUBSCRIBE", "other"),
        ("PSUBSCRIBE", "*"),
    ],
    "operator": [
        ("GET", "lease:default"),
        ("SET", "lease:default", "mine"),
        ("DEL", "lease:default"),
        ("UNLINK", "blob:default:1:1"),
        ("LREM", "history:default", "0", "1:1"),
        ("PEXPIRE", "current:default", "1"),
    ],
}


@pytest.mark.parametrize("user", USERS)
def test_what_is_not_a_users_work_is_refused(shipped: ShippedRedis, root: redis.Redis, user: str) -> None:
    allowed = []
    with shipped.client(user) as client:
        for command in (*REFUSED[user], *ELSEWHERE, *ADMINISTRATION):
            try:
                client.execute_command(*command)
            except redis.exceptions.NoPermissionError:
                continue
            except redis.RedisError:  # refused for another reason, which may not last
                pass
            allowed.append(command)
    assert not allowed


@pytest.mark.parametrize(("user", "secret"), [("default", ""), ("server", ""), ("server", "wrong"), ("nobody", "x")])
def test_nobody_comes_in_without_a_password(shipped: ShippedRedis, user: str, secret: str) -> None:
    with shipped.client(user, secret) as client, pytest.raises(redis.exceptions.AuthenticationError):
        client.get("current:default")


def test_password_is_rotated_and_a_server_that_missed_it_says_so_and_serves_on(
    shipped: ShippedRedis, root: redis.Redis, tmp_path: Path
) -> None:
    learner = publisher(root)
    learner.publish(snapshot(1))
    old, new = password("server"), "another-password-of-the-server"
    holder = PolicyHolder()
    policy: Any = object()
    client = shipped.client("server")
    refresher = Refresher(
        store=SnapshotStore(client, MODEL, KEY),
        holder=holder,
        last_good=LastGood(tmp_path, MODEL, KEY),
        listen_client=None,
        model_id=MODEL,
        interval_s=60.0,
        metrics=ServingMetrics(CollectorRegistry()),
        now_ms=lambda: NOW_MS,
        build=lambda blob, manifest: policy,
        describe=lambda blob: {},
    )

    def accepts(secret: str) -> bool:
        with shipped.client("server", secret) as tried:
            try:
                return tried.strlen("current:default") == 0
            except redis.exceptions.AuthenticationError:
                return False
            except redis.exceptions.ResponseError:  # it is a hash, and the user may ask
                return True

    try:
        assert refresher.refresh()
        for passwords, accepted in (((old, new), (True, True)), ((new,), (False, True))):
            shipped.put("server", *passwords)
            assert shipped.write_users().returncode == 0
            root.execute_command("ACL", "LOAD")
            assert (accepts(old), accepts(new)) == accepted
        root.client_kill_filter(user="server")
        learner.publish(snapshot(2))
        refresher.refresh()  # the connection that was cut
        assert not refresher.refresh()
        assert "AuthenticationError" in (refresher.fault or "")
        assert holder.current.policy is policy
        assert holder.current.manifest is not None
        assert holder.current.manifest.version == 1
    finally:
        client.close()
        shipped.put("server", old)
        shipped.write_users()
        root.execute_command("ACL", "LOAD")


@pytest.mark.parametrize(("passwords", "reason"), [((), "missing or empty"), (("short",), "less than 16 characters")])
def test_bad_password_stops_the_start_with_one_line(tmp_path: Path, passwords: tuple[str, ...], reason: str) -> None:
    made = ShippedRedis(tmp_path)
    made.put("operator", *passwords)
    found = made.write_users()
    assert found.returncode == 78
    assert reason in found.stderr
    assert "operator" in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert not made.users.exists()


def test_users_file_holds_hashes_and_is_the_owners_alone(shipped: ShippedRedis) -> None:
    text = shipped.users.read_text()
    assert not [user for user in USERS if password(user) in text]
    assert shipped.server._password not in text
    assert hashlib.sha256(password("learner").encode()).hexdigest() in text
    assert shipped.users.stat().st_mode & 0o077 == 0
    assert [line.split()[:2] for line in text.splitlines()] == [["user", user] for user in ("default", *USERS)]
