"""A client renames a field: its events become dead letters, are mended, replayed and learned from."""

import json
import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from genco.follow import Follower
from genco.loop import KafkaKind, Loop, LoopOptions
from streams.clients import assign_whole_topic, kafka_consumer, kafka_producer
from streams.contracts.codec import MAX_LINE_BYTES, encode_event
from streams.contracts.events import Click, Impression
from streams.contracts.examples import decode_examples
from streams.contracts.settings import KafkaSettings
from streams.contracts.topics import CLICKS, EXAMPLES, IMPRESSIONS

NUM_RENAMED = 20
NUM_IMPRESSIONS = NUM_RENAMED + 2  # one that is too long besides, and one from before the attribution window
NUM_LETTERS = NUM_IMPRESSIONS + 2  # the click of the latter, and a line that is hopeless
HOUR_MS = 3_600_000

EDIT = """
import json, sys
for line in sys.stdin:
    try:
        event = json.loads(line)
    except ValueError:
        print(line.strip())
        continue
    event.pop("padding", None)
    renamed = {"product": "product_id", "at": "occurred_at_ms"}
    print(json.dumps({renamed.get(name, name): value for name, value in event.items()}))
"""


def impression(number: int, now_ms: int) -> bytes:
    event = Impression(
        schema_version=1, decision_id=f"0.{number}", occurred_at_ms=now_ms, product_id="p", context={},
        candidates={"title": ["t1"]}, creative={"title": "t1"}, slot_propensities={"title": 1.0}, propensity=1.0,
        model_id="default", epoch=0, policy_version=0, source="policy", holdout=False, seed=2**63 - 1,
        survival_probability=1.0,
    )  # fmt: skip
    return encode_event(event).replace(b'"product_id"', b'"product"')


def click(number: int, time_ms: int) -> bytes:
    return encode_event(Click(schema_version=1, decision_id=f"0.{number}", occurred_at_ms=time_ms))


def write_incident(settings: KafkaSettings) -> None:
    now_ms = int(time.time() * 1000)
    padded = impression(NUM_RENAMED, now_ms)[:-1] + b',"padding":"' + b"x" * MAX_LINE_BYTES + b'"}'
    old = impression(NUM_RENAMED + 1, now_ms - HOUR_MS)
    old_click = click(NUM_RENAMED + 1, now_ms - HOUR_MS).replace(b'"occurred_at_ms"', b'"at"')
    impressions = [impression(number, now_ms) for number in range(NUM_RENAMED)]
    clicks = [click(number, now_ms) for number in range(NUM_RENAMED + 1)]
    producer = kafka_producer(settings)
    producer.send(IMPRESSIONS, value=b"\n".join([*impressions, padded, old]), partition=0)
    producer.send(CLICKS, value=b"\n".join([*clicks, old_click, b"hopeless"]), partition=0)
    producer.flush()
    producer.close()


def dead_letters(env: dict[str, str], *arguments: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GENCO_")}
    result = subprocess.run(
        [sys.executable, "-m", "genco", "dead-letters", *arguments],
        env=clean | env, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, ""), result.stdout + result.stderr
    return result.stdout


def letters(env: dict[str, str], loop: Loop) -> list[dict[str, Any]]:
    """Return all letters once the joiner has written them."""
    deadline = time.monotonic() + 60
    rows: list[dict[str, Any]] = []
    while len(rows) < NUM_LETTERS:
        assert time.monotonic() < deadline, (len(rows), loop.supervisor.last_lines("join"))
        rows = [json.loads(line) for line in dead_letters(env, "list", "--json").splitlines()]
    return rows


def strongest_examples(settings: KafkaSettings, loop: Loop) -> list[tuple[str, int, str, int]]:
    """Return (decision_id, label, product_id, seed) of each decision, once all are positive."""
    strongest: dict[str, tuple[str, int, str, int]] = {}
    deadline = time.monotonic() + 40
    with closing(kafka_consumer(settings)) as consumer:
        places = assign_whole_topic(consumer, EXAMPLES)
        while sum(label for _, label, *_ in strongest.values()) < NUM_IMPRESSIONS:
            told = (strongest, consumer.end_offsets(places), loop.supervisor.last_lines("join"))
            assert time.monotonic() < deadline, told
            for records in consumer.poll(timeout_ms=500).values():
                for batch in (decode_examples(record.value) for record in records):
                    columns = (batch.decision_id, batch.label.tolist(), batch.product_id, batch.seed.tolist())
                    for row in zip(*columns, strict=True):
                        strongest[row[0]] = max(row, strongest.get(row[0], row))
    return sorted(strongest.values())


def drained_ledger(follower: Follower) -> dict[str, Any]:
    """Return the ledger once the audit has read everything."""
    deadline = time.monotonic() + 20
    while True:
        with follower.lock:
            ledger = follower.audit.ledger(drained=True)
        if ledger["imbalance"] == 0 or time.monotonic() > deadline:
            assert follower.failure is None
            return ledger
        time.sleep(0.2)


def run_and_check(tmp_path: Path, kafka: KafkaKind) -> None:
    script = tmp_path / "edit.py"
    script.write_text(EDIT)
    options = LoopOptions(roles=["join"], kafka=kafka, partitions=2, attribution_window_ms=600_000, label_wait_ms=1_000)
    with Loop(options) as loop, closing(Follower(loop.join_settings(), from_beginning=True)) as follower:
        mend_and_check(loop, f"'{sys.executable}' '{script}'")
        # The audit sees the marks too, and every event has its place.
        ledger = drained_ledger(follower)
    assert ledger["imbalance"] == 0, ledger
    assert ledger["impressions"]["dead_letter"] == ledger["impressions"]["joined"] == NUM_IMPRESSIONS
    assert ledger["clicks"] | {"joined": NUM_IMPRESSIONS, "dead_letter": 2} == ledger["clicks"]


def mend_and_check(loop: Loop, edit: str) -> None:
    env = {n: v for n, v in os.environ.items() if n.startswith("GENCO_")} | loop.env
    settings = loop.join_settings()
    write_incident(settings)
    rows = [row for row in letters(env, loop) if row["topic"] == IMPRESSIONS]
    assert [(row["offset"], row["index"]) for row in rows] == [(0, index) for index in range(NUM_IMPRESSIONS)]
    assert [row["index"] for row in rows if row["cut"]] == [NUM_RENAMED]
    table = dead_letters(env, "list").splitlines()
    assert table[1].split()[:3] == ["impressions", str(NUM_RENAMED + 1), "0"]
    assert table[1].endswith("event: Object missing required field `product_id`")

    said = dead_letters(env, "replay", "--since", "1h", "--edit", edit).splitlines()
    assert said[0] == f"of {NUM_LETTERS} letters {NUM_LETTERS - 1} can be sent: {NUM_IMPRESSIONS} impressions, 1 clicks"
    assert said[1].startswith("left out: 1 of clicks")
    assert said[2].startswith("late: 2 are older than the attribution window (600 s)")
    assert said[3:] == [f"sent and marked as replayed: {NUM_IMPRESSIONS} impressions, 1 clicks"]
    made = strongest_examples(settings, loop)
    assert made == sorted((f"0.{number}", 1, "p", 2**63 - 1) for number in range(NUM_IMPRESSIONS))
    assert sum(row["replayed"] for row in letters(env, loop)) == NUM_LETTERS - 1
    assert "no dead letters to replay" in dead_letters(env, "replay", "--topic", "impressions", "--edit", edit)


def test_incident_is_mended_and_joined(tmp_path: Path) -> None:
    run_and_check(tmp_path, "embedded")


@pytest.mark.kafka
@pytest.mark.long
def test_incident_on_apache_kafka_is_mended_and_joined(tmp_path: Path, apache_kafka: KafkaKind) -> None:
    run_and_check(tmp_path, apache_kafka)
