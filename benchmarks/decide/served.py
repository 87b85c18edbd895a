"""A server with its services under a constant load: latencies, policy swaps, and Redis and Kafka that fall silent.

The server is the product's process with the embedded Redis and broker, the load generator another one. All runs are cut
into windows, and medians over windows are told, because the machine is shared. Where two states are compared, windows
of them take turns under one load. Silent: the processes are stopped (SIGSTOP), so that connections stand, new ones are
accepted by the system, and nothing is answered; refused connections would be found out at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import redis
from numpy.typing import NDArray

from benchmarks.decide.scene import MODEL, SIGNING_KEY, distinct_requests, read_snapshot
from benchmarks.processes import cpu_seconds
from benchmarks.search.scene import Scene
from genco.services import ManagedProcess, MockBroker, RedisServer, Service, ServiceError
from learner.publisher import Fence, Outcome, Publisher
from serving.client import Client
from streams.contracts.snapshot import PolicySnapshot, sign
from streams.contracts.topics import partition_counts

WINDOW_S: Final = 4.0
WARM_UP_S: Final = 4.0
SWAP_EVERY_S: Final = 1.0
SETTLE_S: Final = 0.2
"""Of the beginning of each window, left out: what is under way then belongs to the state before."""
LEASE_MS: Final = 600_000
_READY_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the server is asked."""

    folder: Path
    """For bodies and latencies."""
    scene: Scene
    rate: float
    """Requests a second."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that decides by a snapshot, and what it needs."""

    url: str
    process: ManagedProcess
    services: Sequence[Service]
    publish: Callable[[], None]
    """Publish the next snapshot."""

    def num_swaps(self) -> int:
        """Return how often the policy was replaced."""
        with Client(self.url) as client:
            return len(client.policy(swaps=500)["swaps"])


def measure(folder: Path, size: tuple[int, int], num_snapshots: int, seconds: float, rate: float) -> dict[str, Any]:
    """Return `http`, `swap` and `blackhole`.

    Args:
        folder: Where the snapshots lie; bodies and latencies go there, too.
        size: Slots and candidates of the cards.
        num_snapshots: How many there are; published in turn.
        seconds: Of the plain load; the two that compare take twice as long and a window.
        rate: Requests a second.
    """
    traffic = Traffic(folder, Scene(*size), rate)
    windows = max(2, round(seconds / WINDOW_S))
    with _server(folder, traffic.scene, num_snapshots) as server:
        _finish(_start_load(server, traffic, 0, WARM_UP_S), folder)
        used = cpu_seconds(server.process.pid)
        plain = _windows(_finish(_start_load(server, traffic, 1, windows * WINDOW_S), folder), windows)
        used_after = cpu_seconds(server.process.pid)
        http = _told(plain)
        if used is not None and used_after is not None:
            http["processor_us"] = 1e6 * (used_after - used) / sum(map(len, plain))
        swap, blackhole = _swaps(server, traffic, windows), _silence(server, traffic, windows)
    return {"http": http, "swap": swap, "blackhole": blackhole}


def _swaps(server: Server, traffic: Traffic, windows: int) -> dict[str, float]:
    before = server.num_swaps()

    def disturb(until_s: float) -> None:
        while time.monotonic() + SWAP_EVERY_S < until_s:
            server.publish()
            time.sleep(SWAP_EVERY_S)

    plain, swapped = _in_turn(server, traffic, 2, windows, disturb)
    with_p99, without_p99 = _told(swapped)["p99_ms"], _told(plain)["p99_ms"]
    return {
        "swaps": server.num_swaps() - before,
        "errors": _told([*plain, *swapped])["errors"],
        "p99_ms": with_p99,
        "plain_p99_ms": without_p99,
        "added_p99_ms": with_p99 - without_p99,
    }


def _silence(server: Server, traffic: Traffic, windows: int) -> dict[str, float]:
    def disturb(until_s: float) -> None:
        try:
            for service in server.services:
                os.kill(service.pid, signal.SIGSTOP)
            time.sleep(max(0.0, until_s - time.monotonic()))
        finally:
            for service in server.services:
                os.kill(service.pid, signal.SIGCONT)

    plain, silent = _in_turn(server, traffic, 3, windows, disturb)
    return {
        "p99_ms": _told(silent)["p99_ms"],
        "plain_p99_ms": _told(plain)["p99_ms"],
        "errors": _told([*plain, *silent])["errors"],
    }


# -- load and its windows ---------------------------------------------------------------------------------------------

Latencies = NDArray[np.float64]
"""(N, 3) as `benchmarks.decide.load` writes them."""


def _start_load(server: Server, traffic: Traffic, number: int, seconds: float) -> subprocess.Popen[bytes]:
    count = round(traffic.rate * seconds)
    requests = distinct_requests(traffic.scene, count, number)
    encode = msgspec.json.encode
    bodies = [
        encode({"product_id": r.product_id, "context": r.context, "candidates": r.candidates})
        for r in (requests[i % len(requests)] for i in range(count))
    ]
    (traffic.folder / "bodies.ndjson").write_bytes(b"\n".join(bodies))
    address = urllib.parse.urlsplit(server.url)
    arguments = [str(address.hostname), str(address.port), str(traffic.rate), "bodies.ndjson", "latencies.npy"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.decide.load", *arguments], cwd=traffic.folder, env=environment
    )


def _finish(load: subprocess.Popen[bytes], folder: Path) -> Latencies:
    if load.wait() != 0:
        raise RuntimeError(f"the load generator ended with code {load.returncode}")
    latencies: Latencies = np.load(folder / "latencies.npy")
    return latencies


def _in_turn(
    server: Server, traffic: Traffic, number: int, windows: int, disturb: Callable[[float], None]
) -> tuple[list[Latencies], list[Latencies]]:
    """Return the windows without and with a disturbance, which take turns under one load; the last one is without.

    `disturb` is told until when on the monotonic clock, and ends by then.
    """
    load = _start_load(server, traffic, number, (2 * windows + 1) * WINDOW_S)
    spans = []
    try:
        for _ in range(windows):
            time.sleep(WINDOW_S)
            start_s = time.monotonic()
            disturb(start_s + WINDOW_S)
            time.sleep(max(0.0, start_s + WINDOW_S - time.monotonic()))
            spans.append((start_s, time.monotonic()))
    except BaseException:
        load.kill()
        load.wait()
        raise
    latencies = _finish(load, traffic.folder)
    due_N = latencies[:, 0]
    edges = [due_N[0], *(edge for span in spans for edge in span), due_N[-1]]
    cut = [latencies[(due_N >= a + SETTLE_S) & (due_N < b)] for a, b in pairwise(edges)]
    return cut[0::2], cut[1::2]


def _windows(latencies: Latencies, windows: int) -> list[Latencies]:
    return np.array_split(latencies, windows)


def _told(windows: Sequence[Latencies]) -> dict[str, float]:
    """Return medians over windows, and errors in all."""
    good = [window[window[:, 2] == 1.0] for window in windows]
    milliseconds = [1e3 * window[:, 1] for window in good]
    answered = [window[:, 0] + window[:, 1] for window in good]
    per_second = [len(at_N) / np.ptp(at_N) for at_N in answered]
    return {
        "p50_ms": float(np.median([np.median(each) for each in milliseconds])),
        "p99_ms": float(np.median([np.percentile(each, 99) for each in milliseconds])),
        "per_second": float(np.median(per_second)),
        "errors": sum(map(len, windows)) - sum(map(len, good)),
    }


# -- the server -------------------------------------------------------------------------------------------------------


@contextmanager
def _server(folder: Path, scene: Scene, num_snapshots: int) -> Iterator[Server]:
    """Yield a server that decides by a snapshot of the registry.

    Raises:
        ServiceError: If it does not get so far.
    """
    with MockBroker(partition_counts(4)) as broker, RedisServer() as store:
        client = redis.Redis.from_url(store.url, socket_timeout=5.0)
        publish = _publisher(client, [read_snapshot(folder, scene, number) for number in range(num_snapshots)])
        environment = {
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            "GENCO_SIGNING_KEY": SIGNING_KEY,
            "GENCO_HTTP_PORT": "0",
            "GENCO_METRICS_PORT": "0",
            "GENCO_LAST_GOOD_DIR": str(folder / "last_good"),
            **broker.client_settings(),
            **store.client_settings(),
        }
        argv = [sys.executable, "-m", "serving.main"]
        with ManagedProcess("genco serve", argv, log_path=folder / "server.log", env=environment) as process:
            process.wait_ready(lambda: _url(process) is not None, _READY_S)
            url = str(_url(process))
            publish()
            process.wait_ready(lambda: _source(url) == "policy", _READY_S)
            yield Server(url, process, (broker, store), publish)
        client.close()


def _url(process: ManagedProcess) -> str | None:
    """Return the address that the server printed."""
    lines = (line for line in process.last_lines(100) if line.startswith('{"url"'))
    return next((str(msgspec.json.decode(line)["url"]) for line in lines), None)


def _source(url: str) -> str:
    with Client(url) as client:
        return str(client.policy()["source"])


def _publisher(client: redis.Redis, snapshots: Sequence[PolicySnapshot]) -> Callable[[], None]:
    """Return what publishes the snapshots in turn, each time as a new version."""
    publisher, version = Publisher(client, MODEL, LEASE_MS, Fence()), 0
    if not publisher.acquire():
        raise ServiceError("the lease of an empty Redis is taken")

    def publish() -> None:
        nonlocal version
        snapshot = snapshots[version % len(snapshots)]
        version += 1
        manifest = snapshot.manifest.model_copy(update={"epoch": publisher.fence.epoch, "version": version})
        outcome = publisher.publish(replace(snapshot, manifest=sign(manifest, SIGNING_KEY.encode())))
        if outcome is not Outcome.PUBLISHED:
            raise ServiceError(f"snapshot {version} was not published: {outcome}")

    return publish
