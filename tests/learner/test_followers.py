"""Several processes learn what one learns, stay equal bit for bit, and end together."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.checkpoint import pack, unpack
from learner.followers import LeadingLearner, dismiss, follow
from learner.online import OnlineLearner
from learner.recent import RecentImpressions
from learner.workers import own_device
from streams.contracts.settings import ConfigurationError
from tests.learner.group_rank import SLOTS, batch, catalog, scenario, settings
from tests.learner.scene import Kafka, Scene, record, state_of

ROOT = Path(__file__).resolve().parents[2]
RANK = ROOT / "tests/learner/group_rank.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
POISON = "poison"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums over several threads differ in their last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- processes --------------------------------------------------------------------------------------------------------


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*command, str(RANK), "learn", str(tmp_path)], env=ENVIRONMENT, check=True, timeout=60)
    leader, follower = ((tmp_path / f"rank{rank}.safetensors").read_bytes() for rank in range(2))
    assert leader == follower
    tensors, state = unpack(leader)
    alone = scenario(lambda: OnlineLearner(settings()))
    expected, expected_state = unpack(pack(*alone.state()))
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        size = max(1.0, float(tensor.double().abs().max())) if tensor.numel() else 1.0
        torch.testing.assert_close(tensors[name].double(), tensor.double(), rtol=0, atol=1e-4 * size, msg=name)
    rounded = {"metrics", "validation", "reward_model"}
    assert {name: state[name] for name in state.keys() - rounded} == {
        name: expected_state[name] for name in expected_state.keys() - rounded
    }


@contextmanager
def two_processes(folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Start a leader and a follower without torchrun, which would end the others itself when one has died."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = []
    for rank in range(2):
        group = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, str(RANK), "go_on_for_ever", str(folder)]
        processes.append(subprocess.Popen(command, env=ENVIRONMENT | group, stderr=subprocess.PIPE, text=True))
    try:
        wait_until((folder / "learned").exists, 30)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_until(is_so: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.05)


@pytest.mark.long
@pytest.mark.parametrize("rank", [1, 0], ids=["follower", "leader"])
def test_process_that_is_killed_ends_the_other_with_an_error(tmp_path: Path, rank: int) -> None:
    with two_processes(tmp_path) as processes:
        processes[rank].send_signal(signal.SIGKILL)
        _, error = processes[1 - rank].communicate(timeout=30)
        assert processes[1 - rank].returncode != 0  # 1, or -6 where gloo aborts while Python ends
        assert "RuntimeError" in error, error


# -- calls ------------------------------------------------------------------------------------------------------------


class Recorded:
    """Stands for a group of one: what the leader sends is received later."""

    rank, size, device = 0, 1, "cpu"

    def __init__(self) -> None:
        self.messages: list[tuple[int, bytes]] = []

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def send(self, kind: int, data: bytes = b"") -> None:
        self.messages.append((kind, data))

    def receive(self) -> tuple[int, bytes]:
        return self.messages.pop(0)

    def leave(self) -> None:
        pass


@pytest.fixture
def group() -> Any:
    return Recorded()


def test_follower_repeats_every_call(group: Any) -> None:
    leader = scenario(lambda: LeadingLearner(settings(), group))
    dismiss(group)
    follower = follow(group)
    assert follower is not None
    assert state_of(follower) == state_of(leader)
    assert follower.settings == leader.settings
    assert not group.messages


def test_leader_that_stops_at_once_leaves_no_learner(group: Any) -> None:
    dismiss(group)
    assert follow(group) is None


def test_update_that_spoils_the_model_is_undone_in_the_followers_too(
    tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_on_poison(monkeypatch)
    kafka = Kafka.filled(6, 20)
    kafka.add_element("t0", 1.0, 0.5)
    kafka.examples[1][3] = record(1, 3, 20, product_id=[POISON] * 20)
    scene = Scene(tmp_path, kafka, update_max_examples=40)
    own = scene.learner().settings
    made: list[OnlineLearner] = []

    def make() -> OnlineLearner:
        made.append(LeadingLearner(own, group))
        return made[-1]

    scene.make_learner = make
    scene.run()
    assert len(made) == 2, "one update had to be undone"
    dismiss(group)
    follower = follow(group)
    assert follower is not None
    assert state_of(follower) == state_of(made[-1])
    assert POISON not in follower.features.freeze().products


def fail_on_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one product fail an update, in every process, after the reward model has learned it."""
    add = RecentImpressions.add

    def fail(self: RecentImpressions, examples: Any, *arguments: Any) -> None:
        if POISON in examples.product_id:
            raise FloatingPointError("numbers that are not finite")
        add(self, examples, *arguments)

    monkeypatch.setattr(RecentImpressions, "add", fail)


def test_leader_must_not_go_on_after_a_call_that_failed_in_a_follower(
    group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    leader = LeadingLearner(settings(), group)
    leader.apply_catalog(*catalog(0, SLOTS))
    leader.update(batch(0, 20))
    leader.update(batch(1, 20))

    def fail(*_: Any) -> None:
        raise ValueError("a bad example")

    monkeypatch.setattr(RecentImpressions, "add", fail)
    with pytest.raises(RuntimeError, match="UPDATE came after a call that failed here and not on the leader") as caught:
        follow(group)
    assert isinstance(caught.value.__cause__, ValueError)


def test_call_before_any_learner_is_refused(group: Any) -> None:
    LeadingLearner(settings(), group).apply_catalog({}, {})
    group.messages.pop(0)
    with pytest.raises(RuntimeError, match="before BEGIN"):
        follow(group)


# -- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "device", "expected"),
    [("1", "cuda:1", "cuda:1"), ("2", "cpu", "cpu"), ("2", "cuda", "cuda:3")],
)
def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch, size: str, device: str, expected: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device(device) == expected


def test_one_gpu_for_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="'cuda:1', and several processes learn; expected cpu, or cuda"):
        own_device("cuda:1")
