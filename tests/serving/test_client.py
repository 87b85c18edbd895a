"""The client against a real uvicorn on a socket."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import uvicorn

from serving.api import ServerState, create_app
from serving.client import Client, ClientError

REQUEST = {"product_id": "p1", "context": {"device": "ios"}, "candidates": {"title": ["t1", "t2"]}}


@contextmanager
def served(state: ServerState, **options: object) -> Iterator[tuple[str, uvicorn.Server]]:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(state), log_config=None, lifespan="off", **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.started
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def test_client_decides_clicks_and_reads_the_policy(make_state: Callable[..., ServerState]) -> None:
    with served(make_state()) as (url, _), Client(url) as client:
        decisions = client.decide([REQUEST, REQUEST])
        assert [set(d["creative"]) for d in decisions] == [{"title"}, {"title"}]
        assert client.click([{"decision_id": d["decision_id"]} for d in decisions]) == {"accepted": 2, "rejected": []}
        assert client.policy()["counters"]["decisions"]["uniform"] == 2


def test_client_keeps_its_connection_alive(make_state: Callable[..., ServerState]) -> None:
    with served(make_state()) as (url, _), Client(url) as client:
        client.decide([REQUEST])
        first = client._connection.sock.getsockname()
        client.decide([REQUEST])
        assert client._connection.sock.getsockname() == first


def test_client_reports_rendered_cards(make_state: Callable[..., ServerState]) -> None:
    state = make_state()
    with served(state) as (url, _), Client(url) as client:
        [decision] = client.decide([REQUEST | {"log_impression": False}])
        assert state.event_log.num_waiting == 0
        assert client.rendered([decision["impression_token"]])["accepted"] == 1
        assert state.event_log.num_waiting == 1


def test_client_tells_the_servers_reason(make_state: Callable[..., ServerState]) -> None:
    with served(make_state()) as (url, _), Client(url) as client:
        with pytest.raises(ClientError, match=r"requests\[0\]\.candidates\.title") as caught:
            client.decide([REQUEST | {"candidates": {"title": []}}])
        assert caught.value.status == 422
        assert caught.value.faults[0]["index"] == 0


def test_client_opens_a_new_connection_after_the_server_closed_it(make_state: Callable[..., ServerState]) -> None:
    with served(make_state(), timeout_keep_alive=0) as (url, _), Client(url) as client:
        for _ in range(3):
            client.decide([REQUEST])
            time.sleep(0.2)  # uvicorn closes the idle connection; decide is never sent twice, so it must notice


def test_client_repeats_only_what_may_be_repeated() -> None:
    calls: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def hang_up() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            calls.append(connection.recv(65536).split(b" ", 2)[1])
            connection.close()

    thread = threading.Thread(target=hang_up, daemon=True)
    thread.start()
    client = Client(f"http://127.0.0.1:{listener.getsockname()[1]}")
    with pytest.raises(ClientError, match="is the server running"):
        client.decide([REQUEST])
    assert calls == [b"/v1/decide"]
    with pytest.raises(ClientError):
        client.click([{"decision_id": "x"}])
    assert calls[1:] == [b"/v1/clicks", b"/v1/clicks"]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


def test_client_without_a_server_says_so_quickly() -> None:
    with pytest.raises(ClientError, match="no answer from"):
        Client("http://127.0.0.1:1", timeout_s=0.5).policy()


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://a", "http://"])
def test_client_refuses_a_malformed_address(url: str) -> None:
    with pytest.raises(ValueError, match="expected http"):
        Client(url)
