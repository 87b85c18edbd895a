"""A real log through Kafka, joiner and learner, as `genco import obd` and `genco replay` do it."""

from pathlib import Path

import pytest
from rich.console import Console

from genco.loop import KafkaKind
from genco.obd import write_log
from genco.replay import run

SLICE = Path(__file__).parents[1] / "data" / "obd"


def replay(log: Path, kafka: KafkaKind | None = None) -> dict:
    return run(
        log,
        kafka=kafka,
        partitions=4,
        attribution_window_ms=600_000,
        label_wait_ms=60_000,
        timeout_s=60,
        console=Console(quiet=True),
    )


def test_replay_of_a_real_log_labels_every_decision_and_trains_a_policy(tmp_path: Path) -> None:
    (summary,) = write_log(SLICE, tmp_path / "log.ndjson")
    report = replay(tmp_path / "log.ndjson")
    assert report["sent"]["impressions"] == summary.impressions == 1_000
    assert report["ledger"]["impressions"] == {
        "joined": summary.clicks,
        "expired": 1_000 - summary.clicks,
        "pending": 0,
        "duplicate": 0,
        "dead_letter": 0,
    }
    assert report["ledger"]["clicks"]["joined"] == summary.clicks == 2
    assert report["ledger"]["imbalance"] == 0
    assert not report["skipped"]
    assert report["policy"]["metrics"]["num_examples"] == 1_000
    assert report["policy"]["gate"]["accepted"] in (True, False)


def test_replay_leaves_bad_lines_out_and_tells_the_first(tmp_path: Path) -> None:
    write_log(SLICE, tmp_path / "log.ndjson")
    lines = (tmp_path / "log.ndjson").read_text().splitlines()
    (tmp_path / "log.ndjson").write_text("\n".join([*lines[:200], "{not json", '{"type": "view"}', *lines[200:300]]))
    report = replay(tmp_path / "log.ndjson")
    assert sum(report["skipped"].values()) == 2
    assert report["ledger"]["imbalance"] == 0
    assert report["ledger"]["impressions"]["pending"] == 0


@pytest.mark.kafka
def test_replay_on_apache_kafka_labels_every_decision(tmp_path: Path, apache_kafka: KafkaKind) -> None:
    if apache_kafka != "home":
        pytest.skip("replay beside configured servers needs a joiner and a learner that run there")
    (summary,) = write_log(SLICE, tmp_path / "log.ndjson")
    report = replay(tmp_path / "log.ndjson", "home")
    assert report["ledger"]["imbalance"] == 0
    assert report["ledger"]["impressions"]["joined"] == summary.clicks
    assert report["ledger"]["impressions"]["pending"] == 0
