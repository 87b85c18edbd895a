"""Connections that say nothing, little by little, or too much, are closed; the others are served."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import uvicorn

from serving.connections import MAX_HEADER_BYTES, GuardedProtocol
from serving.main import configure
from tests.server_process import wait_until

TIMEOUT_S = 0.5
PLACES = 20
GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def port(api: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(GuardedProtocol, "header_timeout_s", TIMEOUT_S)
    monkeypatch.setattr("serving.main._MAX_CONNECTIONS", PLACES)
    server = uvicorn.Server(configure(api.app))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        wait_until(lambda: server.started)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(10)


def connect(port: int) -> closing[socket.socket]:
    return closing(socket.create_connection(("127.0.0.1", port), timeout=10))


def is_answered(connection: socket.socket) -> bool:
    """Read one whole answer, and tell whether it is that of GET /healthz."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return (answer.status, answer.read()) == (200, b'{"status":"alive"}')


def is_closed(connection: socket.socket) -> bool:
    """Wait for what comes next, and tell whether it is the end."""
    try:
        return connection.recv(65536) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize("said", [b"", b"G", b"GET /healthz HTTP/1.1\r\nX: "])
def test_connection_without_whole_headers_is_closed(port: int, said: bytes) -> None:
    started = time.monotonic()
    with connect(port) as connection:
        connection.sendall(said)
        assert is_closed(connection)
    assert TIMEOUT_S - 0.1 < time.monotonic() - started < 5


def say(connection: socket.socket, piece: bytes, *, times: int, pause_s: float = 0.0) -> bool:
    """Say the same again and again; return whether all of it was taken."""
    try:
        for _ in range(times):
            connection.sendall(piece)
            time.sleep(pause_s)
    except ConnectionError:
        return False
    return True


def test_headers_that_drip_are_given_up(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert not say(connection, b"X: 1\r\n", times=100, pause_s=0.05)


def test_headers_without_end_are_cut_off(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nX: ")
        assert not say(connection, b"x" * MAX_HEADER_BYTES, times=100)


def test_connection_that_rests_between_its_requests_is_kept(port: int) -> None:
    with connect(port) as connection:
        for _ in range(2):
            connection.sendall(GET)
            assert is_answered(connection)
            time.sleep(1.2 * TIMEOUT_S)
        connection.sendall(GET[:10])
        assert is_closed(connection), "a further request has no more time than the first"


def test_long_headers_that_end_are_served(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(GET[:-2] + b"X: " + b"x" * (MAX_HEADER_BYTES - 1024) + b"\r\n\r\n")
        assert is_answered(connection)


def test_others_are_served_while_many_say_nothing(port: int) -> None:
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(2 * PLACES)]

    def is_served() -> bool:
        with connect(port) as connection:
            connection.sendall(GET)
            return is_answered(connection)

    try:
        wait_until(is_served, timeout_s=10.0)
    finally:
        for connection in silent:
            connection.close()
