"""A way to a local server that can be slow, or lead nowhere."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Self


class TcpProxy:
    """Passes bytes on between clients and a port of this machine.

    `delay_s` holds up every answer; while `is_open` is cleared, connections are taken and nothing passes.
    """

    def __init__(self, target_port: int) -> None:
        self.delay_s = 0.0
        self.is_open = threading.Event()
        self.is_open.set()
        self._target = ("127.0.0.1", target_port)
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_open.set()
        for each in (self._listener, *self._sockets):
            _end(each)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(self._target)
                except OSError:
                    _end(client)
                    continue
                self._sockets += [client, server]
                for pump in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._pump, args=pump, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        try:
            with contextlib.suppress(OSError):
                while data := source.recv(65536):
                    self.is_open.wait()
                    if is_answer:
                        time.sleep(self.delay_s)
                    sink.sendall(data)
        finally:
            _end(source)
            _end(sink)


def _end(each: socket.socket) -> None:
    # Shut down first: another thread may be reading, and would hold a closed one open.
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
    each.close()
