"""The learner as a process on a real Kafka, killed at every crash point: its weights are those of one never killed."""

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from genco.services import RedisServer
from genco.services.process import ManagedProcess
from learner.checkpoint import CheckpointStore
from learner.crash_points import CrashPoint
from learner.online import LearnerSettings, OnlineLearner
from learner.update_log import recorded_updates
from learner.updates import effective, in_order
from streams.clients import kafka_producer
from streams.contracts.examples import ExampleBatch, decode_examples
from streams.contracts.settings import PREFIX, LearnSettings
from streams.contracts.topics import EXAMPLES
from tests.learner.scene import record, state_of

SIZE = 25
RECORDS_A_LIFE = 6
"""In each partition; an update takes four at most, so every life makes several."""


@pytest.fixture
def settings(kafka_servers: dict[str, str], tmp_path: Path) -> Iterator[LearnSettings]:
    names = {f"{PREFIX}{name.upper()}": name for name in LearnSettings.model_fields}
    with RedisServer() as redis_server:
        yield LearnSettings(
            **{names[variable]: value for variable, value in kafka_servers.items()},
            redis_url=redis_server.url,
            signing_key="k" * 32,
            checkpoint_dir=tmp_path / "checkpoints",
            checkpoint_interval_ms=500,
            update_interval_ms=100,
            update_max_examples=4 * SIZE,
            lease_ms=1_000,
            # A member that was killed keeps its partitions for so long.
            kafka_session_timeout_ms=6_000,
            particles=2,
        )


def environment(settings: LearnSettings) -> dict[str, str]:
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    shown = {name: v.get_secret_value() if hasattr(v, "get_secret_value") else str(v) for name, v in given.items()}
    return {f"{PREFIX}{name.upper()}": text for name, text in shown.items()}


class Log:
    """What has been written to `examples`: the same record at the same place in every run."""

    def __init__(self, settings: LearnSettings) -> None:
        self._settings = settings
        self.length = 0

    def grow(self) -> None:
        producer = kafka_producer(self._settings)
        for offset in range(self.length, self.length + RECORDS_A_LIFE):
            for partition in range(self._settings.partitions):
                producer.send(EXAMPLES, record(partition, offset, SIZE), partition=partition)
        producer.flush(timeout=20)
        producer.close(timeout=5)
        self.length += RECORDS_A_LIFE

    def ends(self) -> dict[str, int]:
        return {str(p): self.length for p in range(self._settings.partitions)}


def learned_until(settings: LearnSettings) -> dict[str, int]:
    checkpoint = CheckpointStore(settings.checkpoint_dir).load_newest()
    return {} if checkpoint is None else checkpoint.state["learned_until"]


def without_crash(settings: LearnSettings) -> OnlineLearner:
    """Apply the updates that the topic holds to a learner in this process."""
    learner, done = OnlineLearner(LearnerSettings.from_settings(settings)), dict.fromkeys(range(settings.partitions), 0)
    for update in effective(recorded_updates(settings, 0)[0]):
        places = [(p, o) for p, until in sorted(update.until.items()) for o in range(done[p], until)]
        learner.update(in_order(ExampleBatch.concat([decode_examples(record(p, o, SIZE)) for p, o in places])))
        done |= update.until
    return learner


@pytest.mark.kafka
@pytest.mark.long
@pytest.mark.timeout(480)
def test_learner_killed_at_every_crash_point_equals_the_one_that_was_not(
    settings: LearnSettings, tmp_path: Path
) -> None:
    env = environment(settings) | {"OMP_NUM_THREADS": "1"}
    log = Log(settings)
    for visit, point in enumerate(CrashPoint):
        log.grow()
        command = [sys.executable, "-m", "tests.e2e.crashing_learner", point, str(1 + visit % 2)]
        process = ManagedProcess(point, command, log_path=tmp_path / f"{point}.log", env=env)
        process.start()
        assert process.wait(60) == -signal.SIGKILL, (point, process.said())
    log.grow()
    last = ManagedProcess("last", [sys.executable, "-m", "genco", "learn"], log_path=tmp_path / "last.log", env=env)
    last.start()
    try:
        deadline = time.monotonic() + 60
        while learned_until(settings) != log.ends():
            assert last.running, last.said()
            assert time.monotonic() < deadline, (learned_until(settings), log.ends())
            time.sleep(0.5)
        last.send_signal(signal.SIGTERM)
        assert last.wait(20) == 0, last.said()
    finally:
        last.kill()

    checkpoint = CheckpointStore(settings.checkpoint_dir).load_newest()
    assert checkpoint is not None
    found = OnlineLearner(LearnerSettings.from_settings(settings))
    found.restore(checkpoint.tensors, checkpoint.state["learner"])
    torch.set_num_threads(1)
    expected = without_crash(settings)
    assert expected.reward_model.num_examples == log.length * settings.partitions * SIZE
    assert state_of(found) == state_of(expected)
