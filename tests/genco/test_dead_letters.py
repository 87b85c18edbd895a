"""`genco dead-letters` as a process, on the embedded broker: what it prints, sends and marks, and how it fails."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genco.dead_letters import printable, table
from genco.services import MockBroker
from streams.clients import assign_whole_topic, kafka_consumer, kafka_producer
from streams.contracts.codec import encode_event
from streams.contracts.dead_letters import DeadLetter
from streams.contracts.events import Click
from streams.contracts.settings import KafkaSettings
from streams.contracts.topics import CLICKS, DEAD_LETTERS, IMPRESSIONS, partition_counts
from streams.dead_letters import Group, Scan, Selection

PARTITIONS = 2
MISSING = "event: Object missing required field `occurred_at_ms`"
SED = """sed 's/"at"/"occurred_at_ms"/'"""


def genco(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("GENCO_")}
    command = [sys.executable, "-m", "genco", "dead-letters", *arguments]
    return subprocess.run(command, env=env | settings, capture_output=True, text=True, timeout=60, check=False)


def only_line(result: subprocess.CompletedProcess[str]) -> str:
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


class Broker:
    """The embedded broker with dead letters in it."""

    def __init__(self, broker: MockBroker) -> None:
        self.env = broker.client_settings()
        values = {name.removeprefix("GENCO_").lower(): value for name, value in self.env.items()}
        self.settings = KafkaSettings.model_validate(values)

    def write(self, *letters: DeadLetter) -> None:
        producer = kafka_producer(self.settings)
        for letter in letters:
            value, headers = letter.encode()
            producer.send(DEAD_LETTERS, value=value, headers=headers, partition=letter.partition)
        producer.send(DEAD_LETTERS, value=b"stranger", partition=0)
        producer.flush()
        producer.close()

    def put(self, topic: str, value: bytes) -> int:
        producer = kafka_producer(self.settings)
        offset: int = producer.send(topic, value=value, partition=0).get(timeout=10).offset
        producer.close()
        return offset

    def lines(self, topic: str) -> dict[int, list[bytes]]:
        found: dict[int, list[bytes]] = {}
        with closing(kafka_consumer(self.settings)) as consumer:
            ends = consumer.end_offsets(assign_whole_topic(consumer, topic))
            while any(consumer.position(place) < end for place, end in ends.items()):
                for place, records in consumer.poll(timeout_ms=500).items():
                    for record in records:
                        found.setdefault(place.partition, []).extend(record.value.split(b"\n"))
        return found

    def replayed(self) -> list[tuple[int, int]]:
        with closing(kafka_consumer(self.settings)) as consumer:
            return [(f.letter.partition, f.offset) for f in Scan(consumer).letters(Selection(is_replayed=True))]


@pytest.fixture
def broker() -> Iterator[Broker]:
    with MockBroker(partition_counts(PARTITIONS)) as started:
        yield Broker(started)


def renamed(number: int, partition: int) -> tuple[bytes, DeadLetter]:
    """Return a click as it should be, and the dead letter of one whose field a client has renamed."""
    event = Click(schema_version=1, decision_id=f"{partition}.{number}", occurred_at_ms=int(time.time() * 1000))
    good = encode_event(event)
    bad = good.replace(b'"occurred_at_ms"', b'"at"')
    return good, DeadLetter(CLICKS, partition, number, 0, MISSING, bad, len(bad))


def test_incident_is_listed_mended_and_replayed_once(broker: Broker) -> None:
    incident = [renamed(number, number % PARTITIONS) for number in range(6)]
    noise = DeadLetter(IMPRESSIONS, 1, 9, 0, "event: JSON is malformed: invalid character (byte 3)", b"\xff\x1b[2J", 5)
    broker.write(*(letter for _, letter in incident), noise)

    listed = genco("list", **broker.env)
    assert listed.returncode == 0
    assert "1 records are no dead letters" in only_line(listed)
    head, clicks, example, impressions, escaped = listed.stdout.splitlines()
    assert head.split() == ["topic", "letters", "replayed", "first", "last", "cause"]
    assert (*clicks.split()[:3], clicks.endswith(MISSING)) == ("clicks", "6", "0", True)
    assert example.startswith('    such as: {"schema_version":1')
    assert impressions.split()[:3] == ["impressions", "1", "0"]
    assert escaped == "    such as: \\xff\\x1b[2J"

    dry = genco("replay", "--topic", "clicks", "--edit", SED, "--dry-run", **broker.env)
    assert dry.stdout.splitlines() == [
        "of 6 letters 6 can be sent: 0 impressions, 6 clicks",
        "dry run: nothing was sent",
    ]
    assert broker.lines(CLICKS) == {}

    done = genco("replay", "--all", "--edit", SED, **broker.env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "of 7 letters 6 can be sent: 0 impressions, 6 clicks",
        "left out: 1 of impressions, the first at partition 1 offset 3: "
        "event: JSON is malformed: invalid character (byte N)",
        "sent and marked as replayed: 0 impressions, 6 clicks",
    ]
    assert broker.lines(CLICKS) == {p: [good for good, _ in incident[p::PARTITIONS]] for p in range(PARTITIONS)}
    assert len(broker.replayed()) == 6
    assert genco("list", **broker.env).stdout.splitlines()[1].split()[:3] == ["clicks", "6", "6"]

    again = genco("replay", "--topic", "clicks", "--edit", SED, **broker.env)
    assert again.returncode == 0
    assert again.stdout.splitlines()[0].startswith("6 were replayed before and are passed over; --again")
    assert again.stdout.splitlines()[1] == "no dead letters to replay"
    forced = genco("replay", "--topic", "clicks", "--partition", "1", "--edit", SED, "--again", **broker.env)
    assert forced.stdout.splitlines()[-1] == "sent and marked as replayed: 0 impressions, 3 clicks", forced.stderr
    assert [len(lines) for _, lines in sorted(broker.lines(CLICKS).items())] == [3, 6]


def test_letters_as_json_hold_everything(broker: Broker) -> None:
    _, click = renamed(4, 1)
    cut = DeadLetter(IMPRESSIONS, 0, 7, 2, "r", b"\xff", 99)
    broker.write(click, cut)
    rows = [json.loads(line) for line in genco("list", "--json", **broker.env).stdout.splitlines()]
    assert rows[0].pop("written_at")[-1] == "Z"
    assert rows[0] == {
        "topic": "impressions", "partition": 0, "offset": 7, "index": 2, "reason": "r", "length": 99, "cut": True,
        "letter_offset": 0, "replayed": False, "line_base64": "/w==",
    }  # fmt: skip
    assert (rows[1]["line"], rows[1]["length"], rows[1]["cut"]) == (click.line.decode(), click.length, False)
    assert [r["partition"] for r in rows] == [0, 1]
    assert len(genco("list", "--json", "--limit", "1", **broker.env).stdout.splitlines()) == 1
    assert genco("list", "--until", "1h", **broker.env).stdout == "no dead letters\n"
    assert len(genco("list", "--since", "1h", "--reason", "missing", **broker.env).stdout.splitlines()) == 3


def test_cut_letter_is_fetched_from_its_origin_and_mended(broker: Broker) -> None:
    good, _ = renamed(1, 0)
    whole = good[:-1] + b',"padding":"' + b"x" * 300_000 + b'"}'
    offset = broker.put(CLICKS, b"first\n" + whole)
    here = DeadLetter(CLICKS, 0, offset, 1, "event: 300084 bytes; at most 262144", whole, len(whole))
    gone = DeadLetter(CLICKS, 0, offset + 5, 1, "event: 300084 bytes; at most 262144", whole, len(whole))
    broker.write(here, gone)
    sed = """sed 's/,"padding":"x*"//'"""
    done = genco("replay", "--reason", "bytes", "--edit", sed, **broker.env)
    assert done.stdout.splitlines() == [
        "of 2 letters 1 can be sent: 0 impressions, 1 clicks",
        "left out: 1 of clicks, the first at partition 0 offset 1: line: cut, and its record is no longer in clicks",
        "sent and marked as replayed: 0 impressions, 1 clicks",
    ]
    assert broker.lines(CLICKS)[0][2:] == [good]


def test_event_beyond_the_window_is_told(broker: Broker) -> None:
    line = encode_event(Click(schema_version=1, decision_id="0.1", occurred_at_ms=int(time.time() * 1000) - 700_000))
    broker.write(DeadLetter(CLICKS, 0, 0, 0, "batch: more than 10000 events", line, len(line)))
    assert "late: 1 are older than the attribution window (600 s)" in genco("replay", "--all", **broker.env).stdout


def test_forced_lines_are_told_and_sent(broker: Broker) -> None:
    broker.write(DeadLetter(CLICKS, 0, 0, 0, "event: x", b"{", 1))
    refused = genco("replay", "--all", **broker.env)
    assert refused.returncode == 1
    assert "none of 1 letters can be sent" in refused.stderr.splitlines()[-1]
    assert broker.lines(CLICKS) == {}
    assert "forced: 1 will be dead letters again" in genco("replay", "--all", "--force", **broker.env).stdout
    assert broker.lines(CLICKS) == {0: [b"{"]}


def test_no_letters_are_no_failure(broker: Broker) -> None:
    for arguments, said in ((["list"], "no dead letters\n"), (["replay", "--all"], "no dead letters to replay\n")):
        result = genco(*arguments, **broker.env)
        assert (result.returncode, result.stdout, result.stderr) == (0, said, "")
    assert genco("list", "--json", **broker.env).stdout == ""
    result = genco("list", "--partition", "2", **broker.env)
    assert (result.returncode, only_line(result)) == (
        1,
        "genco dead-letters: partition 2: dead_letters has 2, 0 to 1",
    )


def test_failed_edit_sends_nothing(broker: Broker) -> None:
    broker.write(renamed(0, 0)[1], renamed(2, 0)[1])
    result = genco("replay", "--all", "--edit", "sed -n 1p", **broker.env)
    assert result.returncode == 1
    assert "got 2 lines and printed 1" in only_line(result)
    assert broker.lines(CLICKS) == {}
    assert broker.replayed() == []


@pytest.mark.parametrize("action", [["list"], ["replay", "--all"]])
def test_broker_or_topic_that_is_not_there_is_one_line(action: list[str]) -> None:
    unreachable = genco(*action, GENCO_KAFKA_BOOTSTRAP_SERVERS="127.0.0.1:1")
    assert unreachable.returncode == 1
    assert "no Kafka broker answers" in only_line(unreachable)
    with MockBroker({"impressions": 1}) as empty:
        missing = genco(*action, **empty.client_settings())
    assert missing.returncode == 78
    assert "topic dead_letters does not exist; create the topics with: genco topics" in only_line(missing)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["replay"], "nothing is selected; expected --all"),
        (["replay", "--dry-run", "--edit", "cat"], "nothing is selected"),
        (["list", "--since", "yesterday"], "'yesterday' is no time"),
        (["list", "--limit", "-1"], "--limit"),
        (["list", "--topic", "examples"], "--topic"),
        ([], "ACTION"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], said: str) -> None:
    result = genco(*arguments)
    assert result.returncode == 2
    assert said in result.stderr


def test_reader_that_has_enough_is_no_failure(broker: Broker) -> None:
    broker.write(*(renamed(number, 0)[1] for number in range(2_000)))
    env = {**os.environ, **broker.env}
    command = f"{sys.executable} -m genco dead-letters list --json | head -n 1"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["topic"] == "clicks"


@given(st.text(max_size=50))
def test_nothing_printed_can_steer_a_terminal(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(text + "\x1b[31m\u202e").endswith("\\x1b[31m\\u202e")


def test_long_example_is_cut_and_columns_align() -> None:
    def group(topic: str, **counts: Any) -> Group:
        return Group(topic, "event: bad", first_ms=0, last_ms=1_764_000_000_000, example=b"x" * 1_000, **counts)

    lines = list(table([group("clicks", num_letters=12_345), group("impressions", num_letters=1, num_replayed=1)]))
    heads = [line.split("\n")[0] for line in lines]
    assert [head.index("event: bad") for head in heads[1:]] == [heads[0].index("cause")] * 2
    assert lines[1].split("\n")[1] == "    such as: " + "x" * 100 + "..."
