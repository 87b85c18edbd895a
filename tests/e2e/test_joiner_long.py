"""`genco join` against processes that die for minutes: itself twenty times, its broker five times, and its clock."""

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from kafka import TopicPartition

from genco.services import ChildCommand, KafkaBroker, Supervisor, find_kafka_home
from streams.clients import create_topics
from streams.contracts.settings import KafkaSettings
from streams.contracts.topics import IMPRESSIONS
from tests.builders import shown
from tests.e2e.join_scene import JOIN, SESSION_MS, Scene, say
from tests.e2e.join_traffic import Mix, Traffic, write_log

pytestmark = [pytest.mark.kafka, pytest.mark.long, pytest.mark.timeout(900)]

NUM_KILLS = 20
NUM_CRASHES = 5


def test_twenty_kills_of_two_joiners_under_load_lose_nothing(tmp_path: Path, kafka_servers: dict[str, str]) -> None:
    """Each kill is a rebalance too, and each return another one."""
    seed = 11
    say(f"seed {seed}")
    draw = random.Random(seed)
    # Nothing of the labels depends on how long a joiner is away: the topics are there.
    with (
        Scene(kafka_servers, tmp_path, attribution_window_ms=20_000, label_wait_ms=3_000) as scene,
        Traffic(scene.settings, "twenty", seed=seed, mix=Mix(rate=1_200)) as traffic,
    ):
        alive = ["one-0", "two-0"]
        for name in alive:
            scene.start(name)
        scene.wait_ready(*alive)
        for life in range(1, NUM_KILLS + 1):
            time.sleep(draw.uniform(0.2, 6))
            place = draw.randrange(2)
            killed = alive[place]
            scene.processes.pop(killed).kill()
            begun = time.monotonic()
            time.sleep(draw.uniform(0, 3))
            alive[place] = f"{killed.partition('-')[0]}-{life}"
            scene.start(alive[place])
            # Half of them are killed before they have recovered.
            if draw.random() < 0.5:
                scene.wait_ready(alive[place])
                again_s = time.monotonic() - begun
                say(
                    f"kill {life}: joined again {again_s:.1f} s later, recovery {scene.recoveries_s(alive[place])[0]} s"
                )
        scene.wait_ready(*alive)
        ledger = scene.check_all(traffic.close())
        seconds = sorted(s for path in tmp_path.glob("*.log") for s in scene.recoveries_s(path.stem))
        say(f"{len(seconds)} recoveries: median {seconds[len(seconds) // 2]} s, longest {seconds[-1]} s; {ledger}")
    assert ledger["clicks"]["late"] > 0


@pytest.mark.skipif(find_kafka_home() is None, reason="kills the broker: needs one at KAFKA_HOME or ../shared/kafka")
def test_broker_killed_five_times_is_joined_from_again_within_90_seconds(tmp_path: Path) -> None:
    seed = 12
    say(f"seed {seed}")
    draw = random.Random(seed)
    with KafkaBroker() as broker:
        create_topics(KafkaSettings(kafka_bootstrap_servers=broker.bootstrap_servers))
        # Clicks that wait for the broker to come back still count.
        settings = {"attribution_window_ms": 120_000, "label_wait_ms": 3_000}
        mix = Mix(rate=500, slow_until=0.1, outside=0, repeated=0, early=0.005)
        with (
            Scene(broker.client_settings(), tmp_path, **settings) as scene,
            Traffic(scene.settings, "broker", seed=seed, mix=mix) as traffic,
            Supervisor([ChildCommand(name="join", argv=JOIN, env=scene.env)], log_directory=tmp_path) as supervisor,
        ):
            scene.wait_ready("join")
            for crash in range(1, NUM_CRASHES + 1):
                time.sleep(draw.uniform(5, 10))
                broker.kill()
                time.sleep(draw.uniform(0, 4))
                broker.start()
                begun = time.monotonic()
                begun_ms = int(time.time() * 1000)
                scene.wait_until(lambda t=begun_ms: scene.newest_example_ms() > t, "examples of new impressions", 90)
                say(
                    f"crash {crash}: examples of new impressions {time.monotonic() - begun:.1f} s after the broker's "
                    f"return, {supervisor.restarts['join']} restarts of the joiner so far"
                )
            ledger = scene.check_all(traffic.close(timeout_s=120), timeout_s=120)
            say(ledger)


def test_joiner_that_was_stopped_longer_than_its_session_changes_nothing(
    tmp_path: Path, kafka_servers: dict[str, str]
) -> None:
    seed = 13
    say(f"seed {seed}")
    with (
        Scene(kafka_servers, tmp_path, attribution_window_ms=20_000, label_wait_ms=3_000) as scene,
        Traffic(scene.settings, "zombie", seed=seed, mix=Mix(rate=800)) as traffic,
    ):
        zombie = scene.start("one")
        scene.wait_ready("one")
        time.sleep(5)
        zombie.send_signal(signal.SIGSTOP)
        scene.start("two")
        scene.wait_ready("two")
        time.sleep(SESSION_MS / 1000 + 4)
        zombie.send_signal(signal.SIGCONT)
        back = "partitions assigned"
        scene.wait_until(lambda: len(scene.said("one", back)) >= 2 or zombie.poll() is not None, "back, or ended")
        say(f"exit code {zombie.poll()}, assigned {[line['partitions'] for line in scene.said('one', back)]}")
        time.sleep(5)
        say(scene.check_all(traffic.close()))


@pytest.mark.skipif(find_kafka_home() is None, reason="cuts a log: needs a Kafka at KAFKA_HOME or ../shared/kafka")
def test_joiner_ends_when_the_broker_has_lost_its_log(tmp_path: Path) -> None:
    log = tmp_path / "kafka"
    with KafkaBroker(data_directory=log) as broker:
        create_topics(KafkaSettings(kafka_bootstrap_servers=broker.bootstrap_servers))
        with Scene(broker.client_settings(), tmp_path, attribution_window_ms=2_000, label_wait_ms=500) as scene:
            first = scene.start("one")
            write_log(scene.settings, some_impressions("before", 40))
            place = TopicPartition(IMPRESSIONS, 0)
            scene.wait_until(lambda: scene.committed().get(place) == 10, "commits")
            broker.kill()
            for path in log.glob(f"{IMPRESSIONS}-*/0000*"):
                path.unlink()
            broker.start()
            write_log(scene.settings, some_impressions("after", 12))
            begun = time.monotonic()
            code = first.wait(90)
            say(f"exit code {code} {time.monotonic() - begun:.1f} s after the first new records")
            assert code == 1, first.last_lines(5)
            assert "the broker has lost records" in (tmp_path / "one.log").read_text()
            second = scene.start("two")
            assert second.wait(30) == 1, second.last_lines(5)
            assert "the broker has lost records" in (tmp_path / "two.log").read_text()
            assert not any(decision_id.startswith("after") for decision_id in scene.labels())


def some_impressions(prefix: str, num_records: int) -> list[tuple[str, int, list[Any]]]:
    now_ms = int(time.time() * 1000)
    return [(IMPRESSIONS, r % 4, [shown(f"{prefix}-{r}-{i}", now_ms) for i in range(20)]) for r in range(num_records)]
