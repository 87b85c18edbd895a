"""What the command line says and returns when something is wrong, as a process."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from genco.services import MockBroker, RedisServer
from streams.contracts.settings import document
from streams.contracts.topics import partition_counts

KEY = "0123456789abcdef0123456789abcdef"


def genco(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("GENCO_")}
    return subprocess.run(
        [sys.executable, "-m", "genco", *arguments],
        env=env | settings,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def only_line(result: subprocess.CompletedProcess[str]) -> str:
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def broker() -> Iterator[MockBroker]:
    with MockBroker(partition_counts(4)) as started:
        yield started


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as started:
        yield started


@pytest.fixture
def taken_port() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield str(listener.getsockname()[1])


@pytest.mark.parametrize("verb", ["join", "learn", "serve", "archive", "monitor"])
def test_missing_settings_are_named_and_exit_with_78(verb: str) -> None:
    result = genco(verb)
    assert result.returncode == 78
    assert "GENCO_KAFKA_BOOTSTRAP_SERVERS: not set" in only_line(result)


def test_misspelled_setting_is_refused_with_the_right_name() -> None:
    result = genco("join", GENCO_KAFKA_BOOTSTRAP_SERVER="127.0.0.1:1")
    assert result.returncode == 78
    assert "did you mean GENCO_KAFKA_BOOTSTRAP_SERVERS?" in only_line(result)


def test_unreachable_broker_is_one_line_and_not_a_configuration_error() -> None:
    result = genco("join", GENCO_KAFKA_BOOTSTRAP_SERVERS="127.0.0.1:1")
    assert result.returncode == 1
    assert "127.0.0.1:1: Connection refused" in only_line(result)


def test_unreachable_redis_is_one_line(broker: MockBroker, tmp_path: Path) -> None:
    result = genco(
        "learn",
        **broker.client_settings(),
        GENCO_REDIS_URL="redis://127.0.0.1:1",
        GENCO_SIGNING_KEY=KEY,
        GENCO_CHECKPOINT_DIR=str(tmp_path),
    )
    assert result.returncode == 1
    assert "Redis at 127.0.0.1:1 does not answer" in only_line(result)


def test_wrong_redis_password_is_one_line_without_the_password(
    broker: MockBroker, redis_server: RedisServer, tmp_path: Path
) -> None:
    port = redis_server.url.rsplit(":", 1)[1]
    result = genco(
        "learn",
        **broker.client_settings(),
        GENCO_REDIS_URL=f"redis://:not-the-password@127.0.0.1:{port}",
        GENCO_SIGNING_KEY=KEY,
        GENCO_CHECKPOINT_DIR=str(tmp_path),
    )
    assert result.returncode == 78
    assert "refuses the password" in only_line(result)
    assert "not-the-password" not in result.stderr


def test_taken_metrics_port_is_one_line(broker: MockBroker, taken_port: str) -> None:
    result = genco("join", **broker.client_settings(), GENCO_METRICS_PORT=taken_port)
    assert result.returncode == 78
    assert f"127.0.0.1:{taken_port}" in only_line(result)


def test_taken_api_port_is_one_line(
    broker: MockBroker, redis_server: RedisServer, taken_port: str, tmp_path: Path
) -> None:
    result = genco(
        "serve",
        **broker.client_settings(),
        **redis_server.client_settings(),
        GENCO_HTTP_PORT=taken_port,
        GENCO_SIGNING_KEY=KEY,
        GENCO_LAST_GOOD_DIR=str(tmp_path),
    )
    assert result.returncode == 78
    assert f"127.0.0.1:{taken_port}" in only_line(result)


def test_topics_with_different_partition_counts_are_refused_with_the_mending_command() -> None:
    with MockBroker({**partition_counts(4), "clicks": 3}) as broker:
        result = genco("join", **broker.client_settings())
    assert result.returncode == 78
    assert "--alter --topic clicks --partitions 4" in only_line(result)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://bucket/examples", "gcsfs"),
        ("/dev/null/archive", "cannot write to the archive at GENCO_ARCHIVE_URL"),
    ],
)
def test_archive_that_cannot_be_written_is_one_line(url: str, message: str, broker: MockBroker) -> None:
    result = genco("archive", **broker.client_settings(), GENCO_ARCHIVE_URL=url)
    assert result.returncode == 78
    assert message in only_line(result)


def test_archive_of_topics_that_do_not_exist_is_refused(tmp_path: Path) -> None:
    with MockBroker({"examples": 2}) as broker:
        result = genco("archive", **broker.client_settings(), GENCO_ARCHIVE_URL=str(tmp_path))
    assert result.returncode == 78
    assert "create them with: genco topics" in only_line(result)


def test_missing_java_is_one_line(tmp_path: Path) -> None:
    home = tmp_path / "kafka"
    (home / "bin").mkdir(parents=True)
    (home / "config").mkdir()
    for script in ("kafka-server-start.sh", "kafka-storage.sh"):
        (home / "bin" / script).write_text("#!/bin/sh\n")
    (home / "config" / "server.properties").write_text("")
    env = {"KAFKA_HOME": str(home), "JAVA_HOME": "", "PATH": str(tmp_path)}
    result = genco("demo", "--kafka", "home", "--seconds", "1", **env)
    assert result.returncode == 1
    assert "Java" in only_line(result)


def test_window_that_cannot_fit_the_embedded_broker_is_refused() -> None:
    result = genco("demo", "--seconds", "1", "--rate", "100000")
    assert result.returncode == 78
    assert "embedded broker" in only_line(result)


def test_log_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    result = genco("replay", str(tmp_path / "none.ndjson"))
    assert result.returncode == 1
    assert "no such log" in only_line(result)


def test_check_with_everything_in_place_succeeds(broker: MockBroker, redis_server: RedisServer) -> None:
    result = genco("check", **broker.client_settings(), **redis_server.client_settings(), GENCO_SIGNING_KEY=KEY)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAIL" not in result.stdout
    assert "4 partitions" in result.stdout
    assert "model default: nothing published yet" in result.stdout


def test_check_shows_what_is_current_pinned_and_frozen(broker: MockBroker, redis_server: RedisServer) -> None:
    with redis.Redis.from_url(redis_server.url, socket_timeout=5.0) as client:
        client.hset("current:shown", mapping={"epoch": 3, "version": 42, "revision": 7, "sha256": "0"})
        client.set("pin:shown", "3:42")
        client.set("freeze:shown", "1")
    settings = broker.client_settings() | redis_server.client_settings()
    result = genco("check", **settings, GENCO_SIGNING_KEY=KEY, GENCO_MODEL_ID="shown")
    assert "model shown: current 3.42, revision 7, pinned to 3.42, frozen" in result.stdout


def test_check_names_what_is_wrong(broker: MockBroker) -> None:
    result = genco("check", **broker.client_settings(), GENCO_REDIS_URL="redis://127.0.0.1:1", GENCO_SIGNING_KEY=KEY)
    assert result.returncode == 78
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 1
    assert "127.0.0.1:1" in failed[0]


def test_check_refuses_a_redis_that_evicts(broker: MockBroker, redis_server: RedisServer) -> None:
    with redis.Redis.from_url(redis_server.url, socket_timeout=5.0) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            result = genco("check", **broker.client_settings(), **redis_server.client_settings(), GENCO_SIGNING_KEY=KEY)
        finally:
            client.config_set("maxmemory-policy", "noeviction")
    assert result.returncode == 78
    (failed,) = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert "CONFIG SET maxmemory-policy noeviction" in failed


def test_device_that_does_not_exist_is_named(broker: MockBroker, redis_server: RedisServer, tmp_path: Path) -> None:
    result = genco(
        "learn",
        **broker.client_settings(),
        **redis_server.client_settings(),
        GENCO_SIGNING_KEY=KEY,
        GENCO_CHECKPOINT_DIR=str(tmp_path),
        GENCO_DEVICE="abacus",
    )
    assert result.returncode == 78
    assert "GENCO_DEVICE is 'abacus'" in only_line(result)


def test_log_without_a_readable_impression_fails_with_its_first_line(tmp_path: Path) -> None:
    (tmp_path / "log.ndjson").write_text("not json\n")
    result = genco("replay", str(tmp_path / "log.ndjson"))
    assert result.returncode == 1
    assert "log.ndjson line 1" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("verb", ["demo --seconds 1 --report", "replay x.ndjson --json"])
def test_output_folder_that_does_not_exist_is_told_before_the_work(verb: str, tmp_path: Path) -> None:
    result = genco(*verb.split(), str(tmp_path / "none" / "out.json"))
    assert result.returncode == 1
    assert "existing folder" in only_line(result)


def test_simulation_without_a_server_fails() -> None:
    result = genco("simulate", "--url", "http://127.0.0.1:1", "--seconds", "1")
    assert result.returncode == 1
    assert "genco serve" in result.stderr


def test_replay_into_topics_with_records_is_refused() -> None:
    from kafka import KafkaProducer

    with MockBroker(partition_counts(2)) as used:
        producer = KafkaProducer(bootstrap_servers=used.bootstrap_servers, api_version=(2, 1))
        producer.send("clicks", b"{}", partition=0).get(timeout=10)
        producer.close()
        log = Path(__file__).parents[1] / "data" / "v1" / "impressions.ndjson"
        result = genco("replay", str(log), "--kafka", "configured", **used.client_settings())
    assert result.returncode == 78
    assert "clicks" in only_line(result)


def test_settings_page_is_what_the_settings_are() -> None:
    page = Path(__file__).parents[2] / "docs" / "settings.md"
    assert page.read_text("utf-8") == document(), (
        "write docs/settings.md anew from streams.contracts.settings.document()"
    )
