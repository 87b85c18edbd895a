"""A password of Redis that is changed in its file is used by the next connection, without a restart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from genco.services import RedisServer
from streams.clients import redis_client
from streams.contracts.settings import RedisSettings, load


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as started:
        yield started


@pytest.fixture
def root(server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url, socket_timeout=5.0) as client:
        yield client


def set_password(root: redis.Redis, password: str) -> None:
    """As ACL LOAD does: who is connected with another one is cut off."""
    root.acl_setuser("rotated", enabled=True, reset=True, passwords=[f"+{password}"], keys=["*"], commands=["+@all"])
    root.client_kill_filter(user="rotated")


def test_next_connection_has_the_new_password(
    server: RedisServer, root: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "url"
    place = server.url.rpartition("@")[2].removeprefix("redis://")
    file.write_text(f"redis://rotated:one%20two@{place}")
    monkeypatch.setenv("GENCO_REDIS_URL_FILE", str(file))
    set_password(root, "one two")
    with redis_client(load(RedisSettings), timeout_s=5.0, retries=0) as client:
        assert client.ping()
        set_password(root, "three")
        for _ in range(2):  # the connection that was cut, and a new one with the password of before
            with pytest.raises(redis.ConnectionError) as caught:
                client.ping()
        assert isinstance(caught.value, redis.AuthenticationError), "loud, and says why"
        file.write_text(f"redis://rotated:three@{place}")
        assert client.ping()
        file.unlink()
        root.client_kill_filter(user="rotated")
        for _ in range(2):
            with pytest.raises(redis.ConnectionError) as caught:
                client.ping()
        assert "cannot be read" in str(caught.value)
    assert "three" not in repr(client)
