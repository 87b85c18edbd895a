"""An open-loop load generator over persistent connections.

    python -m benchmarks.decide.load HOST PORT RATE BODIES OUT

The requests are sent at a constant rate, whether or not the answers to earlier ones have come, and a latency runs from
the moment when its request was due: a server that stalls is charged for all that should have been sent meanwhile. Each
connection has a thread, and sends every so many-th request; it sleeps until one is due. OUT is an array with a row for
each request: when it was due on the monotonic clock of the machine, the latency in seconds, whether it went well.

It is light (no HTTP library), because it shares the machine's cores with the server.
"""

from __future__ import annotations

import re
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

CONNECTIONS: Final = 16
TIMEOUT_S: Final = 5.0
LEAD_S: Final = 0.5
"""Before the first request is due."""
GOOD: Final = b'"source":"policy"'
"""A decision of any other rung counts as an error: the policy was there before the load began."""
_LENGTH: Final = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


class Connection:
    """A connection that is opened anew after an error."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._socket: socket.socket | None = None

    def decide(self, body: bytes) -> bool:
        """Send a request and read its answer; return whether it is a decision of the policy."""
        head = f"POST /v1/decide HTTP/1.1\r\nHost: {self._address[0]}\r\nContent-Type: application/json\r\n"
        try:
            if self._socket is None:
                self._socket = socket.create_connection(self._address, TIMEOUT_S)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            status, answer = _read(self._socket)
        except OSError:
            self.close()
            return False
        return status == b"200" and GOOD in answer

    def close(self) -> None:
        """Close it; the next request opens it again."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _read(connection: socket.socket) -> tuple[bytes, bytes]:
    """Return status and body of an answer.

    Raises:
        OSError: If the server hangs up or answers without a length.
    """
    data = b""
    while True:
        part = connection.recv(65536)
        if not part:
            raise ConnectionResetError("the server closed the connection")
        data += part
        head, end, body = data.partition(b"\r\n\r\n")
        if not end:
            continue
        length = _LENGTH.search(head)
        if length is None:
            raise ConnectionError("answer without a length")
        if len(body) >= int(length[1]):
            return head.split(b" ", 2)[1], body


def run(host: str, port: int, rate: float, bodies: Sequence[bytes], start_s: float) -> NDArray[np.float64]:
    """Send each body once and return (N, 3): when it was due, its latency, 1.0 if it went well.

    Args:
        host: Of the server.
        port: Of the server.
        rate: Requests a second.
        bodies: What is sent.
        start_s: When the first is due, on the monotonic clock.
    """
    out_N3 = np.zeros((len(bodies), 3))
    out_N3[:, 0] = start_s + np.arange(len(bodies)) / rate
    due_N = out_N3[:, 0].tolist()

    def work(first: int) -> None:
        connection = Connection(host, port)
        for number in range(first, len(bodies), CONNECTIONS):
            time.sleep(max(0.0, due_N[number] - time.monotonic()))
            good = connection.decide(bodies[number])
            out_N3[number, 1:] = time.monotonic() - due_N[number], good
        connection.close()

    threads = [threading.Thread(target=work, args=(first,)) for first in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out_N3


def main(host: str, port: str, rate: str, bodies: str, out: str) -> None:
    """Send the lines of a file."""
    lines = Path(bodies).read_bytes().splitlines()
    np.save(out, run(host, int(port), float(rate), lines, time.monotonic() + LEAD_S))


if __name__ == "__main__":
    main(*sys.argv[1:])
