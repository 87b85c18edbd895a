"""A real Kafka starts, keeps its records over a crash, and says what is missing where it cannot start."""

import sys
from pathlib import Path

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from genco.services import KafkaBroker, ServiceError, find_kafka_home
from genco.services.kafka_home import has_java, read_properties

TOPICS = {"impressions": 4, "clicks": 2}


@pytest.fixture
def real_kafka_home():
    home = find_kafka_home()
    if home is None:
        pytest.skip("no Apache Kafka: set KAFKA_HOME, or put one into ../shared/kafka")
    if not has_java():
        pytest.skip("no Java for Apache Kafka: install a Java 17 runtime")
    return home


@pytest.fixture
def fake_home(tmp_path, monkeypatch):
    """A distribution whose scripts the test writes, and a Java that is never run."""

    def write(path, text, mode=0o755):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    def make(storage_script="#!/bin/sh\n", server_script="#!/bin/sh\n"):
        home = tmp_path / "kafka"
        write(home / "bin" / "kafka-storage.sh", storage_script)
        write(home / "bin" / "kafka-server-start.sh", server_script)
        write(home / "config" / "server.properties", "# comment\nnum.partitions=4\n", 0o644)
        write(tmp_path / "java" / "bin" / "java", "#!/bin/sh\n")
        monkeypatch.setenv("JAVA_HOME", str(tmp_path / "java"))
        return home

    return make


def produce(broker, values):
    producer = KafkaProducer(bootstrap_servers=broker.bootstrap_servers, acks="all", enable_idempotence=True)
    for value in values:
        producer.send("clicks", value, partition=1).get(20)
    producer.close()


def consume(broker, count):
    consumer = KafkaConsumer(
        bootstrap_servers=broker.bootstrap_servers,
        auto_offset_reset="earliest",
        consumer_timeout_ms=10_000,
        group_id="g",
    )
    consumer.assign([TopicPartition("clicks", 1)])
    values = [record.value for _, record in zip(range(count), consumer, strict=False)]
    consumer.close()
    return values


@pytest.mark.kafka
@pytest.mark.long
def test_records_survive_crash_and_restart_and_nothing_is_left_after_stop(real_kafka_home, temporary_root, is_alive):
    broker = KafkaBroker(TOPICS, home=real_kafka_home)
    broker.start()
    first_pid, address = broker.pid, broker.bootstrap_servers
    assert broker.client_settings() == {"GENCO_KAFKA_BOOTSTRAP_SERVERS": address}
    with KafkaConsumer(bootstrap_servers=address) as consumer:
        assert {topic: len(consumer.partitions_for_topic(topic)) for topic in TOPICS} == TOPICS
    produce(broker, [b"before"])

    broker.kill()
    assert not is_alive(first_pid)
    broker.start()
    assert broker.bootstrap_servers == address
    assert broker.pid != first_pid
    produce(broker, [b"after the crash"])

    broker.restart()
    assert consume(broker, 2) == [b"before", b"after the crash"]
    last_pid = broker.pid
    broker.stop()
    assert not is_alive(last_pid)
    assert list(temporary_root.iterdir()) == []


@pytest.mark.kafka
@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_kafka_dies_when_its_parent_is_killed(real_kafka_home, start_parent, wait_until, is_alive, tmp_path):
    data = tmp_path / "data"
    parent = start_parent(f"""
import time
from pathlib import Path
from genco.services import KafkaBroker
broker = KafkaBroker({TOPICS!r}, home=Path({str(real_kafka_home)!r}), data_directory=Path({str(data)!r}))
broker.start()
print(broker.pid, flush=True)
time.sleep(600)
""")
    child = int(parent.stdout.readline())
    assert is_alive(child)
    parent.kill()
    wait_until(lambda: not is_alive(child))

    # Another broker object, at other ports, takes over the data of the dead one, and stop() leaves it.
    with KafkaBroker(TOPICS, home=real_kafka_home, data_directory=data) as broker:
        produce(broker, [b"taken over"])
        assert consume(broker, 1) == [b"taken over"]
    assert (data / "meta.properties").exists()


def test_home_without_kafka_is_refused_rather_than_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("KAFKA_HOME", str(tmp_path))
    with pytest.raises(ServiceError, match=r"KAFKA_HOME is .*which holds no bin/kafka-server-start\.sh"):
        find_kafka_home()


def test_home_is_found_by_variable_then_beside_the_working_directory(monkeypatch, tmp_path, fake_home):
    home = fake_home()
    monkeypatch.setenv("KAFKA_HOME", str(home))
    assert find_kafka_home() == home
    monkeypatch.delenv("KAFKA_HOME")
    shared = tmp_path / "shared"
    shared.mkdir()
    home.rename(shared / "kafka")
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")
    assert find_kafka_home() == shared / "kafka"


def test_no_kafka_tells_to_set_kafka_home(monkeypatch, temporary_root):
    monkeypatch.setattr("genco.services.kafka_home.find_kafka_home", lambda: None)
    with pytest.raises(ServiceError, match="set KAFKA_HOME"):
        KafkaBroker(TOPICS).start()
    assert list(temporary_root.iterdir()) == []


def test_no_java_tells_to_install_one(monkeypatch, fake_home, tmp_path, temporary_root):
    home = fake_home()
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(ServiceError, match="install a Java 17 runtime"):
        KafkaBroker(TOPICS, home=home).start()
    assert list(temporary_root.iterdir()) == []


def test_incomplete_home_names_the_missing_part(tmp_path):
    with pytest.raises(ServiceError, match=r"holds no bin/kafka-server-start\.sh"):
        KafkaBroker(TOPICS, home=Path(tmp_path)).start()


def test_failing_format_is_told_with_its_output(fake_home, temporary_root):
    home = fake_home(storage_script="#!/bin/sh\necho 'disk full' >&2; exit 5\n")
    with pytest.raises(ServiceError, match="storage ended with code 5; it said: disk full"):
        KafkaBroker(TOPICS, home=home).start()
    assert list(temporary_root.iterdir()) == []


def test_failing_server_is_told_with_its_last_lines(fake_home, temporary_root):
    home = fake_home(server_script="#!/bin/sh\necho 'FATAL no heap'; echo '\tat kafka.Kafka.main'; exit 1\n")
    with pytest.raises(ServiceError, match=r"Kafka ended with code 1 before it was ready; it said: FATAL no heap$"):
        KafkaBroker(TOPICS, home=home).start()
    assert list(temporary_root.iterdir()) == []


def test_configuration_keeps_the_homes_settings_and_one_kind_of_controller(fake_home, tmp_path):
    home = fake_home()
    (home / "config" / "server.properties").write_text(
        "num.partitions=7\ncontroller.quorum.bootstrap.servers=localhost:9093\nlisteners=PLAINTEXT://:9092\n"
    )
    broker = KafkaBroker(home=home)
    broker._broker_port, broker._controller_port = 21000, 21001
    written = tmp_path / "server.properties"
    written.write_text(broker._configuration(home, tmp_path / "data"))
    settings = read_properties(written)
    assert settings["num.partitions"] == "7"
    assert settings["listeners"] == "PLAINTEXT://127.0.0.1:21000,CONTROLLER://127.0.0.1:21001"
    assert "controller.quorum.bootstrap.servers" not in settings
