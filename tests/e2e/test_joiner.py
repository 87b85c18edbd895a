"""`genco join` as processes on Apache Kafka: killed, ended, starved, and given what no client should send.

The long runs are in `test_joiner_long.py`.
"""

import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from genco.services import EXIT_CONFIGURATION, ManagedProcess, MockBroker, free_port
from streams.contracts.codec import encode_event
from streams.contracts.topics import CLICKS, IMPRESSIONS, partition_counts
from tests.builders import clicked, shown
from tests.e2e.join_scene import CHECKOUT, JOIN, Scene, metrics, rss_mib, say
from tests.e2e.join_traffic import Mix, Sent, Traffic, old_schema, write_log

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(150)]

WINDOW_MS = 7_000
WAIT_MS = 2_000
HOUR_MS = 3_600_000


def scene_of(servers: dict[str, str], directory: Path, **settings: object) -> Scene:
    short = {"attribution_window_ms": WINDOW_MS, "label_wait_ms": WAIT_MS}
    return Scene(servers, directory, **short | settings)


def test_two_joiners_killed_under_load_lose_nothing(tmp_path: Path, kafka_servers: dict[str, str]) -> None:
    seed = 1
    draw = random.Random(seed)
    with scene_of(kafka_servers, tmp_path) as scene, Traffic(scene.settings, "killed", seed=seed) as traffic:
        for name in ("one", "two"):
            scene.start(name)
        scene.wait_ready("one", "two")
        for name in ("one", "two"):
            time.sleep(draw.uniform(1, 3))
            scene.processes[name].kill()
            time.sleep(draw.uniform(0, 1))
            scene.start(f"{name}-again")
            scene.wait_ready(f"{name}-again")
        ledger = scene.check_all(traffic.close())
        say({name: scene.recoveries_s(name) for name in scene.processes})
    assert ledger["clicks"]["late"] > 0
    assert ledger["clicks"]["orphan"] > 0


def test_joiner_ends_within_seconds_of_sigterm_with_impressions_open(
    tmp_path: Path, kafka_servers: dict[str, str]
) -> None:
    with (
        scene_of(kafka_servers, tmp_path, attribution_window_ms=60_000) as scene,
        Traffic(scene.settings, "ended", seed=2, mix=Mix(slow=0, outside=0, repeated=0)) as traffic,
    ):
        process = scene.start("one")
        scene.wait_ready("one")
        scene.wait_until(lambda: scene.num_written() > 20, "examples")
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code = process.wait(10)
        say(f"ended {time.monotonic() - begun:.1f} s after SIGTERM")
        assert code == 0, process.last_lines(10)
        scene.start("two")
        scene.wait_ready("two")
        scene.check_all(traffic.close(timeout_s=60))


def test_schema_incident_opens_the_breaker_and_nothing_is_lost(tmp_path: Path, kafka_servers: dict[str, str]) -> None:
    port = free_port()
    with scene_of(kafka_servers, tmp_path, attribution_window_ms=1_000, label_wait_ms=200) as scene:
        process = scene.start("one", metrics_port=port)
        now_ms = int(time.time() * 1000)
        good = [[shown(f"incident-{r}-{i}", now_ms) for i in range(50)] for r in range(30)]
        sent = write_log(scene.settings, [(IMPRESSIONS, r % 4, events) for r, events in enumerate(good[:20])])
        read_before = {p: scene.begin[p] + 5 for p in scene.begin if p.topic == IMPRESSIONS}
        scene.wait_until(lambda: read_before.items() <= scene.committed().items(), "commits of what is finished")

        now_ms = int(time.time() * 1000)
        good = [[shown(f"incident-later-{r}-{i}", now_ms) for i in range(50)] for r in range(8)]
        renamed = [[old_schema(encode_event(event)) for event in events] for events in good]
        changed = [
            (IMPRESSIONS, r % 4, [*events, *bad]) for r, (events, bad) in enumerate(zip(good, renamed, strict=True))
        ]
        sent = sent.plus(write_log(scene.settings, changed * 2))
        scene.wait_until(lambda: metrics(port)["genco_join_breaker_open"] == 1, "the breaker")
        time.sleep(4)  # two rounds of commits
        assert process.running, process.last_lines(5)
        after = scene.committed()
        assert all(after[place] == offset for place, offset in read_before.items()), (after, read_before)
        [line] = scene.said("one", "nothing more is read, and nothing is acknowledged")
        assert "GENCO_DEAD_LETTER_MAX_SHARE=1" in line["message"]
        assert "events are bad" in line["cause"]
        assert "occurred_at_ms" in line["cause"]
        assert metrics(port)["genco_join_held_partitions"] == 8

        assert process.stop(10) == 0
        scene.start("two", dead_letter_max_share=1)
        ledger = scene.check_all(sent)
        assert ledger["impressions"]["dead_letter"] == sent.num_bad == 800
        scene.wait_until(lambda: all(scene.committed()[p] > o for p, o in read_before.items()), "commits afterwards")


@pytest.mark.long
def test_memory_limit_stops_the_reading_and_nothing_else(tmp_path: Path, kafka_servers: dict[str, str]) -> None:
    port, limit_mib = free_port(), 16
    settings = {"attribution_window_ms": 600_000, "label_wait_ms": 1_000, "stall_timeout_ms": 10_000}
    with scene_of(kafka_servers, tmp_path, **settings) as scene:
        process = scene.start("small", metrics_port=port, join_memory_mb=limit_mib)
        scene.wait_ready("small")
        base = rss_mib(process)
        now_ms = int(time.time() * 1000)
        records = [(IMPRESSIONS, r % 4, [shown(f"full-{r}-{i}", now_ms) for i in range(100)]) for r in range(700)]
        sent = write_log(scene.settings, records)
        scene.wait_until(lambda: metrics(port)["genco_join_pending_bytes"] >= limit_mib * 2**20, "a full memory")
        most_rss = most_bytes = 0.0
        begun = time.monotonic()
        while time.monotonic() - begun < 13:
            assert process.running, process.last_lines(5)
            now = metrics(port)
            most_bytes = max(most_bytes, now["genco_join_pending_bytes"])
            most_rss = max(most_rss, rss_mib(process))
            time.sleep(0.5)
        say(f"limit {limit_mib} MiB: {most_bytes / 2**20:.1f} MiB counted, RSS {base:.0f} -> {most_rss:.0f} MiB")
        assert now["genco_join_held_partitions"] >= 4
        assert most_bytes < (limit_mib + 16) * 2**20
        assert most_rss < base + 2.5 * limit_mib + 150
        assert scene.num_members() == 1, "out of the group"
        assert len(scene.said("small", "partitions assigned")) == 1
        [line] = scene.said("small", "nothing more is read")
        assert "GENCO_JOIN_MEMORY_MB" in line["message"]
        assert process.stop(10) == 0
        scene.start("large", join_memory_mb=1_024)
        scene.check_all(sent)


@pytest.mark.parametrize("first", [CLICKS, pytest.param(IMPRESSIONS, marks=pytest.mark.long)])
def test_backlog_of_a_day_is_joined_in_little_memory(tmp_path: Path, kafka_servers: dict[str, str], first: str) -> None:
    """One window fits the limit, a day does not, and neither do all clicks, which come in few records."""
    port, limit_mib = free_port(), 16
    settings = {"attribution_window_ms": HOUR_MS, "label_wait_ms": HOUR_MS // 10, "join_memory_mb": limit_mib}
    with scene_of(kafka_servers, tmp_path, **settings) as scene:
        sent = write_log(scene.settings, day_of_records(f"day-{first}", first))
        process = scene.start("one", metrics_port=port)
        begun = time.monotonic()
        most_rss = most_bytes = most_held = 0.0
        while not scene.said("one", "recovered in"):
            assert process.running, process.last_lines(5)
            now = metrics(port)
            most_held = max(most_held, now["genco_join_held_partitions"])
            most_bytes = max(most_bytes, now["genco_join_pending_bytes"])
            most_rss = max(most_rss, rss_mib(process))
            assert time.monotonic() - begun < 40, process.last_lines(3)
            time.sleep(0.2)
        say(
            f"{len(sent.expected)} in {time.monotonic() - begun:.1f} s; limit {limit_mib} MiB, "
            f"{most_bytes / 2**20:.1f} counted, RSS {most_rss:.0f} MiB, {most_held:.0f} held at most"
        )
        assert most_held > 0
        # A poll brings so many at once.
        assert most_bytes < (limit_mib + 32) * 2**20
        scene.check_all(sent)


def day_of_records(prefix: str, first: str) -> list[tuple[str, int, list[Any]]]:
    """Return a day's events, in which four clicks of ten impressions, one topic before the other."""
    draw = random.Random(3)
    num, partitions = 100_000, 4
    begin_ms = int(time.time() * 1000) - 25 * HOUR_MS
    events: dict[tuple[str, int], list[Any]] = {(t, p): [] for t in (IMPRESSIONS, CLICKS) for p in range(partitions)}
    for number in range(num):
        at_ms = begin_ms + number * 24 * HOUR_MS // num
        events[IMPRESSIONS, number % partitions].append(shown(f"{prefix}-{number}", at_ms))
        if draw.random() < 0.4:
            after_ms = int(draw.random() * 0.9 * HOUR_MS)
            events[CLICKS, number % partitions].append(clicked(f"{prefix}-{number}", at_ms + after_ms))
    records = []
    for (topic, partition), found in events.items():
        found.sort(key=lambda event: event.occurred_at_ms)
        records += [(topic, partition, found[i : i + 200]) for i in range(0, len(found), 200)]
    return sorted(records, key=lambda record: record[0] != first)


def test_joiner_refuses_a_log_that_ends_before_what_was_read(tmp_path: Path, kafka_servers: dict[str, str]) -> None:
    with scene_of(kafka_servers, tmp_path) as scene:
        place, end = next((place, end) for place, end in scene.begin.items() if place.topic == CLICKS)
        scene.set_committed({place: end + 7})
        process = scene.start("one")
        assert process.wait(30) == 1, process.last_lines(5)
        text = (tmp_path / "one.log").read_text()
    # It is seen from the offsets, or from the first record that comes, whichever is first.
    assert f"clicks partition {place.partition}" in text
    assert "the broker has lost records, or the topic was made anew" in text
    assert "GENCO_JOINER_GROUP" in text


def test_joiner_refuses_topics_of_unequal_partition_counts(tmp_path: Path) -> None:
    with MockBroker(partition_counts(4) | {CLICKS: 2}) as broker:
        env = broker.client_settings() | {"PYTHONPATH": str(CHECKOUT)}
        with ManagedProcess("join", JOIN, log_path=tmp_path / "join.log", env=env, cwd=tmp_path) as process:
            assert process.wait(30) == EXIT_CONFIGURATION
            told = process.said()
    assert "partition counts differ" in told
    assert f"kafka-topics.sh --bootstrap-server {broker_of(env)} --alter --topic clicks --partitions 4" in told


def broker_of(env: dict[str, str]) -> str:
    return env["GENCO_KAFKA_BOOTSTRAP_SERVERS"]


@pytest.mark.long
def test_joiner_with_a_name_is_restarted_without_a_rebalance(tmp_path: Path, kafka_servers: dict[str, str]) -> None:
    with (
        scene_of(kafka_servers, tmp_path, kafka_session_timeout_ms=20_000) as scene,
        Traffic(scene.settings, "static", seed=4, mix=Mix(rate=400, outside=0, slow_until=0.5)) as traffic,
    ):
        for name in ("one", "two"):
            scene.start(name, joiner_instance_id=name)
            scene.wait_ready(name)
        scene.wait_until(lambda: len(scene.said("one", "partitions assigned")) == 2, "the partitions shared out")
        scene.wait_ready("one", count=2)
        scene.processes["one"].kill()
        scene.start("one-again", joiner_instance_id="one")
        scene.wait_ready("one-again", timeout_s=15)
        scene.check_all(traffic.close())
        assert len(scene.said("two", "partitions assigned")) == 1, scene.said("two", "partitions assigned")
        assert len(scene.said("one-again", "partitions assigned")) == 1


@pytest.mark.long
def test_gaps_that_transactions_leave_in_the_offsets_lose_nothing(
    tmp_path: Path, kafka_servers: dict[str, str]
) -> None:
    """What an aborted transaction wrote is read too: the joiner takes everything that stands in the log."""
    with scene_of(kafka_servers, tmp_path, attribution_window_ms=2_000, label_wait_ms=500) as scene:
        producer = Producer({"bootstrap.servers": broker_of(scene.env), "transactional.id": scene.group})
        producer.init_transactions(20)
        sent = Sent()
        for number in range(6):
            now_ms = int(time.time() * 1000)
            ids = [f"gap-{number}-{i}" for i in range(40)]
            producer.begin_transaction()
            for start in range(0, 40, 10):
                lines = [encode_event(shown(i, now_ms)) for i in ids[start : start + 10]]
                producer.produce(IMPRESSIONS, b"\n".join(lines), partition=0)
            producer.produce(CLICKS, encode_event(clicked(ids[0], now_ms + 1)), partition=0)
            producer.flush(20)
            (producer.abort_transaction if number % 3 == 1 else producer.commit_transaction)(20)
            sent = sent.plus(Sent({i: int(i == ids[0]) for i in ids}, Counter({IMPRESSIONS: 40, CLICKS: 1})))
            if number == 2:
                scene.start("one")
                scene.wait_until(lambda: scene.num_written() > 0, "examples")
                scene.processes["one"].kill()
                scene.start("two")
        # The last offsets are those of the transaction's mark, which nobody delivers.
        scene.wait_ready("two")
        scene.check_all(sent, timeout_s=20)
        ends = {place: end for place, end in scene.begin.items() if place.topic == IMPRESSIONS and place.partition == 0}
        scene.wait_until(lambda: all(scene.committed()[p] >= end + 28 for p, end in ends.items()), "commits of it all")
