"""`torchrun genco learn` on the embedded services: a process is killed, all start again, and nothing is lost."""

import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from genco.services import MockBroker, RedisServer
from genco.services.process import ManagedProcess
from learner.checkpoint import CheckpointStore
from streams.contracts.settings import PREFIX, LearnSettings
from tests.e2e.test_learner_crashes import SIZE, Log, environment, learned_until

PARTITIONED = dict.fromkeys(("impressions", "clicks", "examples", "dead_letters"), 4)
TOPICS = PARTITIONED | dict.fromkeys(("catalog", "updates", "alerts", "control"), 1)


@pytest.mark.long
@pytest.mark.parametrize("rank", ["0", "1"])
def test_group_goes_on_from_its_checkpoint_when_a_process_was_killed(tmp_path: Path, rank: str) -> None:
    names = {f"{PREFIX}{name.upper()}": name for name in LearnSettings.model_fields}
    with RedisServer() as redis_server, MockBroker(TOPICS) as broker:
        settings = LearnSettings(
            **{names[variable]: value for variable, value in broker.client_settings().items()},
            redis_url=redis_server.url,
            signing_key="k" * 32,
            checkpoint_dir=tmp_path / "checkpoints",
            checkpoint_interval_ms=500,
            update_interval_ms=100,
            update_max_examples=4 * SIZE,
            lease_ms=1_000,
            kafka_session_timeout_ms=6_000,
            particles=2,
        )
        log = Log(settings)
        log.grow()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["--max-restarts", "1", "-m", "genco", "learn"]
        env = environment(settings) | {"OMP_NUM_THREADS": "1"}
        group = ManagedProcess("group", command, log_path=tmp_path / "group.log", env=env)
        group.start()
        try:
            wait_until_learned(settings, log, group)
            (process,) = (p for p in psutil.Process(group.pid).children(True) if p.environ().get("RANK") == rank)
            process.kill()
            log.grow()
            wait_until_learned(settings, log, group)
            group.send_signal(signal.SIGTERM)
            assert group.wait(30) is not None, group.said()
        finally:
            group.kill()
        checkpoint = CheckpointStore(settings.checkpoint_dir).load_newest()
    assert checkpoint is not None
    num_examples = checkpoint.state["learner"]["reward_model"]["num_examples"]
    assert num_examples == log.length * settings.partitions * SIZE


def wait_until_learned(settings: LearnSettings, log: Log, group: ManagedProcess) -> None:
    deadline = time.monotonic() + 60
    while learned_until(settings) != log.ends():
        assert group.running, group.said()
        assert time.monotonic() < deadline, (learned_until(settings), log.ends(), group.said())
        time.sleep(0.3)
