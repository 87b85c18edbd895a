"""`genco bench decide` on small cards: what it asks, how its load is timed, and what it tells."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.decide import command, in_process, load, scene, served
from benchmarks.search.scene import KNOWN_PRODUCTS, Scene

CARD, LARGE = (2, 4), (3, 5)
DECISION = b'{"source":"policy"}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decide")
    scene.train(path, Scene(*CARD), impressions=1_000, num_snapshots=2)
    return path


def test_requests_are_all_different_and_the_same_again() -> None:
    asked = scene.distinct_requests(Scene(*CARD), 500, seed=1)
    assert len({(r.product_id, json.dumps(r.context)) for r in asked}) == len({r.seed for r in asked}) == 500
    assert {r.product_id for r in asked} == {f"p{p}" for p in range(KNOWN_PRODUCTS)}
    assert asked == scene.distinct_requests(Scene(*CARD), 500, seed=1)
    assert asked != scene.distinct_requests(Scene(*CARD), 500, seed=2)
    assert [len(ids) for ids in asked[0].candidates.values()] == [CARD[1]] * CARD[0]


def test_snapshots_differ_and_can_be_played(folder: Path) -> None:
    first, second = (scene.read_snapshot(folder, Scene(*CARD), number) for number in range(2))
    assert first.manifest.sha256 != second.manifest.sha256
    assert in_process._policy(folder, Scene(*CARD)).choose(scene.distinct_requests(Scene(*CARD), 2, 0))


def test_figures_in_process_are_those_of_the_report(folder: Path) -> None:
    pytest.importorskip("vowpalwabbit")
    found = in_process.measure(folder, [CARD, CARD], rounds=1, singles=20, batches=1)
    result = json.loads(json.dumps(command._named(found)))
    for group, name in (("single", "p50_us"), ("batch64", "per_decision_us")):
        for kind in (result[group], result[group]["cold"], result[group]["repeated"], result["large"][group]):
            assert kind[name] > 0
            assert kind["processor_us"] > 0
        # What was decided before is looked up, not searched.
        assert result[group]["repeated"][name] < 0.5 * result[group][name]
        assert result[group][name] < result[group]["cold"][name]
    assert result["single"]["p99_us"] >= result["single"]["p50_us"]
    assert set(result["vw"]) == {"slates_us", "ccb_us"}
    assert min(result["vw"].values()) > 0
    assert result["large_ratio"] == result["large"]["single"]["p50_us"] / result["single"]["p50_us"]
    measured = {name for name in command.LIMITS if name.split(".")[0] not in ("http", "swap", "blackhole")}
    assert measured <= set(command._flat(result))


def test_vowpal_wabbit_gives_each_slot_probabilities_of_its_own_candidates() -> None:
    pytest.importorskip("vowpalwabbit")
    from benchmarks.decide.peers import REDUCTIONS, VowpalWabbit

    asked = scene.distinct_requests(Scene(*CARD), 1, 0)
    for name in REDUCTIONS:
        ((slots,), _) = VowpalWabbit(name, Scene(*CARD), 50).decide(asked)
        assert len(slots) == CARD[0]
        for s, slot in enumerate(slots):
            first = 0 if name == "slates" else s * CARD[1]
            assert sorted(action for action, _ in slot) == list(range(first, first + CARD[1]))
            assert sum(probability for _, probability in slot) == pytest.approx(1.0, abs=1e-5)


# -- load -------------------------------------------------------------------------------------------------------------


class Stub:
    """Answers decisions over HTTP in a thread for each connection; one request takes long, or is refused."""

    def __init__(self, stall_at: int = -1, refuse_at: int = -1) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self._stall_at, self._refuse_at, self._asked = stall_at, refuse_at, 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(65536):
                assert data.endswith(b"{}")
                number, self._asked = self._asked, self._asked + 1
                if number == self._stall_at:
                    time.sleep(0.5)
                status = b"503 Busy" if number == self._refuse_at else b"200 OK"
                connection.sendall(b"HTTP/1.1 %b\r\ncontent-length: %d\r\n\r\n" % (status, len(DECISION)) + DECISION)


@pytest.fixture
def stub() -> Iterator[type[Stub]]:
    made: list[Stub] = []

    class Made(Stub):
        def __init__(self, **options: int) -> None:
            super().__init__(**options)
            made.append(self)

    yield Made
    for each in made:
        each.listener.close()


def run(port: int, count: int, rate: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return load.run("127.0.0.1", port, rate, [b"{}"] * count, time.monotonic() + 0.1)


def test_requests_behind_a_stalled_one_are_charged_for_their_wait(
    stub: type[Stub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "CONNECTIONS", 1)
    sent = run(stub(stall_at=10).port, 60, 100.0)
    assert sent[:, 2].all()
    np.testing.assert_allclose(np.diff(sent[:, 0]), 0.01)
    # The stall takes 500 ms; what was due 10 ms later waits 490, and so on.
    assert sent[10, 1] > 0.45
    assert sent[11, 1] > 0.45
    assert sent[30, 1] > 0.25
    assert np.median(sent[:10, 1]) < 0.2


def test_refusals_and_lost_connections_are_errors(stub: type[Stub]) -> None:
    assert run(stub(refuse_at=3).port, 20, 200.0)[:, 2].sum() == 19
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert not run(port, 5, 200.0)[:, 2].any()


def test_medians_over_windows_and_all_errors_are_told() -> None:
    quick, slow = (np.array([[i * 0.01, latency, 1.0] for i in range(100)]) for latency in (0.001, 0.009))
    slow[0, 2] = 0.0
    told = served._told([quick, quick, slow])
    assert told["errors"] == 1
    assert told["p50_ms"] == told["p99_ms"] == pytest.approx(1.0)
    assert told["per_second"] == pytest.approx(100 / 0.99)


@pytest.mark.long
def test_server_is_measured_under_swaps_and_silence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WINDOW_S": 1.5, "WARM_UP_S": 1.0, "SWAP_EVERY_S": 0.4}.items():
        monkeypatch.setattr(served, name, value)
    result = served.measure(folder, CARD, num_snapshots=2, seconds=3.0, rate=50.0)
    assert result["http"]["errors"] == result["swap"]["errors"] == result["blackhole"]["errors"] == 0
    assert result["swap"]["swaps"] >= 4
    assert result["http"]["per_second"] == pytest.approx(50.0, rel=0.2)
    limits = {name for name in command.LIMITS if name.split(".")[0] in ("http", "swap", "blackhole")}
    assert limits <= set(command._flat(result))
    for part in ("swap", "blackhole"):
        assert result[part]["p99_ms"] > 0 < result[part]["plain_p99_ms"]


@pytest.mark.long
def test_command_writes_its_figures(tmp_path: Path) -> None:
    pytest.importorskip("vowpalwabbit")
    result = command.compare(1, None, print, sizes=(CARD, LARGE), impressions=1_000, singles=20, batches=1)
    assert {"single", "batch64", "large", "large_ratio", "vw", "threads", "rounds", "garbage_collector"} <= set(result)
    assert "http" not in result
    assert command._table(result).row_count == len(command._flat(result))
