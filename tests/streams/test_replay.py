"""A log goes through Kafka in order, every line counted, an impression and its click to the same partition."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from streams.contracts.catalog import Catalog, Element, Product
from streams.contracts.codec import END_OF_LOG_MS, EventDecoder, mark_of
from streams.contracts.decision_ids import make_decision_id
from streams.contracts.events import Click, Impression
from streams.contracts.topics import CATALOG, CLICKS, IMPRESSIONS
from streams.replay import BATCH, CHUNK, ReplaySummary, log_files, read_log, send_log

PARTITIONS = 3
DECODERS: dict[str, EventDecoder[Any]] = {IMPRESSIONS: EventDecoder(Impression), CLICKS: EventDecoder(Click)}


class Delivery:
    def __init__(self, error: Exception | None) -> None:
        self._error = error

    def get(self, timeout: float | None = None) -> None:
        if self._error is not None:
            raise self._error


class FakeProducer:
    """Keeps what was sent; fails for the topic named."""

    def __init__(self, broken: str | None = None) -> None:
        self.sent: list[dict[str, Any]] = []
        self._broken = broken

    def send(self, topic: str, **record: Any) -> Delivery:
        assert isinstance(record["value"], bytes)
        self.sent.append({"topic": topic, "mark": mark_of(record.get("headers"))} | record)
        return Delivery(RuntimeError("the broker refused") if topic == self._broken else None)

    def flush(self, timeout: float | None = None) -> None:
        pass

    def events(self, topic: str, partition: int | None = None) -> list[Any]:
        found = []
        for record in self.sent:
            wanted = record["topic"] == topic and partition in (None, record["partition"])
            if wanted and record["mark"] is None:
                decoded = DECODERS[topic].decode_batch(record["value"])
                assert decoded.bad == []
                found += decoded.events
        return found

    def marks(self, topic: str, partition: int) -> list[int]:
        return [r["mark"] for r in self.sent if (r["topic"], r["partition"]) == (topic, partition) and r["mark"]]


def impression(decision_id: str, time_ms: int) -> dict[str, Any]:
    return {
        "type": "impression", "schema_version": 1, "decision_id": decision_id, "occurred_at_ms": time_ms,
        "product_id": "p1", "context": {"hour": 3}, "candidates": {"title": ["t1", "t2"]},
        "creative": {"title": "t1"}, "slot_propensities": {"title": 0.5}, "propensity": 0.5,
        "model_id": "default", "epoch": 0, "policy_version": 0, "source": "policy", "holdout": False,
        "seed": 1, "survival_probability": 1.0,
    }  # fmt: skip


def click(decision_id: str, time_ms: int) -> dict[str, Any]:
    return {"type": "click", "schema_version": 1, "decision_id": decision_id, "occurred_at_ms": time_ms}


ELEMENT = {"type": "element", "element_id": "t1", "slot": "title", "text": "x"}
PRODUCT = {"type": "product", "product_id": "p1", "slots": {"title": ["t1", "t2"]}}


def write(path: Path, *lines: dict[str, Any] | bytes) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


@pytest.fixture
def producer() -> FakeProducer:
    return FakeProducer()


def send(path: Path, producer: FakeProducer, **options: Any) -> ReplaySummary:
    return send_log(path, producer, PARTITIONS, **options)  # type: ignore[arg-type]


def test_every_record_goes_to_its_topic(tmp_path: Path, producer: FakeProducer) -> None:
    log = write(tmp_path / "log.ndjson", ELEMENT, PRODUCT, impression("a", 1000), click("a", 1100))
    summary = send(log, producer)
    assert (summary.catalog, summary.impressions, summary.clicks) == (2, 1, 1)
    assert (summary.skipped, summary.first_skipped) == (Counter(), "")
    assert [e.decision_id for e in producer.events(IMPRESSIONS)] == ["a"]
    assert producer.events(CLICKS) == [Click(schema_version=1, decision_id="a", occurred_at_ms=1100)]
    catalog = Catalog()
    for record in producer.sent:
        if record["topic"] == CATALOG:
            assert record["partition"] == 0
            catalog.apply(record["key"], record["value"])
    assert catalog.elements["t1"] == Element(element_id="t1", slot="title", text="x")
    assert catalog.products["p1"] == Product(product_id="p1", slots={"title": ("t1", "t2")})


def test_impression_and_click_go_to_the_same_partition_whoever_made_the_id(
    tmp_path: Path, producer: FakeProducer
) -> None:
    ids = [make_decision_id(route, 1000, route, b"k" * 32) for route in (0, 1, 2, 3, 65535)]
    ids += [f"another system's {n}" for n in range(40)] + ["70000.x.y", "é"]
    log = write(
        tmp_path / "log.ndjson", *(impression(i, 1000) for i in ids), *(click(i, 1001) for i in reversed(ids))
    )  # fmt: skip
    send(log, producer)
    places: dict[str, set[int]] = {}
    for topic in (IMPRESSIONS, CLICKS):
        for partition in range(PARTITIONS):
            for event in producer.events(topic, partition):
                places.setdefault(event.decision_id, set()).add(partition)
    assert places.keys() == set(ids)
    assert all(len(partitions) == 1 for partitions in places.values())
    for route, decision_id in zip((0, 1, 2, 3, 65535), ids, strict=False):
        assert places[decision_id] == {route % PARTITIONS}
    assert set.union(*places.values()) == set(range(PARTITIONS))


def test_order_of_a_partition_is_that_of_the_log(tmp_path: Path, producer: FakeProducer) -> None:
    num = 2 * CHUNK + BATCH + 7
    log = write(tmp_path / "log.ndjson", *(impression(f"{n % PARTITIONS}.x.{n}", 1000 + n) for n in range(num)))
    summary = send(log, producer)
    assert summary.impressions == num == len(producer.events(IMPRESSIONS))
    for partition in range(PARTITIONS):
        times = [event.occurred_at_ms for event in producer.events(IMPRESSIONS, partition)]
        assert times == [1000 + n for n in range(num) if n % PARTITIONS == partition]
    assert max(r["value"].count(b"\n") for r in producer.sent) <= BATCH


def test_every_partition_gets_marks_after_each_chunk_and_an_end(tmp_path: Path, producer: FakeProducer) -> None:
    # All events in one partition: the clocks of the others must go on all the same.
    log = write(tmp_path / "log.ndjson", *(impression(f"1.x.{n}", 1000 + n) for n in range(CHUNK + 5)))
    send(log, producer)
    for topic in (IMPRESSIONS, CLICKS):
        for partition in range(PARTITIONS):
            assert producer.marks(topic, partition) == [1000 + CHUNK - 1, 1000 + CHUNK + 4, END_OF_LOG_MS]


def test_no_event_older_than_a_mark_follows_it(tmp_path: Path, producer: FakeProducer) -> None:
    lines = [impression(f"{n % 3}.x.{n}", 1000 + n // 2) for n in range(3 * CHUNK)]
    send(write(tmp_path / "log.ndjson", *lines), producer)
    complete: Counter[tuple[str, int]] = Counter()
    for record in producer.sent:
        place = (record["topic"], record["partition"])
        if record["mark"] is not None:
            complete[place] = record["mark"]
        else:
            events = DECODERS[record["topic"]].decode_batch(record["value"]).events
            assert min(event.occurred_at_ms for event in events) >= complete[place]


def test_after_chunk_sees_what_was_sent_so_far(tmp_path: Path, producer: FakeProducer) -> None:
    log = write(tmp_path / "log.ndjson", *(impression(f"{n}.x.y", 1000 + n) for n in range(CHUNK + 5)))
    seen: list[tuple[int, int]] = []
    send(log, producer, after_chunk=lambda s: seen.append((s.impressions, len(producer.events(IMPRESSIONS)))))
    assert seen == [(CHUNK, CHUNK), (CHUNK + 5, CHUNK + 5)]


BAD_LINES = {
    b"{": "line",
    b"[1]": "line",
    b"\xff": "line",
    b'{"type":5}': "line",
    b"[" * 5000: "line",
    b'{"no":"type"}': "type",
    b'{"type":"sale"}': "type",
    b'{"type":"click","schema_version":1,"occurred_at_ms":5}': "event",
    b'{"type":"click","schema_version":2,"decision_id":"a","occurred_at_ms":5}': "schema_version",
    b'{"type":"element","element_id":"e"}': "element.slot",
    b'{"type":"product","product_id":"p","slots":{}}': "product.slots",
    json.dumps(impression("a", 5) | {"propensity": 0.4}).encode(): "propensity",
    b'{"type":"click","x":"' + b"y" * 300_000 + b'"}': "line",
}


def test_bad_lines_are_counted_by_reason_and_the_first_is_named(tmp_path: Path, producer: FakeProducer) -> None:
    lines: list[Any] = [impression("a", 1000), b"", b"  "]
    for bad in BAD_LINES:
        lines += [bad, click("a", 1001)]
    summary = send(write(tmp_path / "log.ndjson", *lines), producer)
    assert summary.skipped == Counter(BAD_LINES.values())
    assert summary.first_skipped.startswith("log.ndjson line 4: line: not a JSON object")
    assert (summary.impressions, summary.clicks) == (1, len(BAD_LINES))
    assert len(producer.events(CLICKS)) == len(BAD_LINES)


@pytest.mark.parametrize("bad", BAD_LINES)
def test_bad_line_is_named_with_its_number(tmp_path: Path, bad: bytes) -> None:
    summary = ReplaySummary()
    records = list(read_log(write(tmp_path / "x.ndjson", click("a", 1), bad, click("b", 2)), summary))
    assert [record.decision_id for record in records] == ["a", "b"]  # type: ignore[union-attr]
    assert summary.first_skipped.startswith("x.ndjson line 2: ")
    assert summary.skipped.total() == 1


def test_last_line_needs_no_newline(tmp_path: Path, producer: FakeProducer) -> None:
    path = tmp_path / "log.ndjson"
    path.write_bytes(json.dumps(click("a", 1)).encode())
    assert send(path, producer).clicks == 1


def test_folder_is_sent_file_by_file_each_a_log_of_its_own(tmp_path: Path, producer: FakeProducer) -> None:
    write(tmp_path / "b.ndjson", impression("0.x.2", 500))
    write(tmp_path / "a.ndjson", impression("0.x.1", 9000), b"bad")
    write(tmp_path / "notes.txt", b"bad")
    summary = send(tmp_path, producer)
    assert (summary.impressions, summary.skipped.total()) == (2, 1)
    assert summary.first_skipped.startswith("a.ndjson line 2")
    assert [event.decision_id for event in producer.events(IMPRESSIONS)] == ["0.x.1", "0.x.2"]
    for topic in (IMPRESSIONS, CLICKS):
        for partition in range(PARTITIONS):
            assert producer.marks(topic, partition) == [9000, END_OF_LOG_MS, 500, END_OF_LOG_MS]


def test_empty_file_is_a_log_of_nothing_that_ends(tmp_path: Path, producer: FakeProducer) -> None:
    summary = send(write(tmp_path / "log.ndjson"), producer)
    assert summary == ReplaySummary()
    assert [r["mark"] for r in producer.sent] == [END_OF_LOG_MS] * 2 * PARTITIONS


def test_missing_log_is_refused_with_what_to_do(tmp_path: Path, producer: FakeProducer) -> None:
    for path in (tmp_path / "none.ndjson", tmp_path):
        with pytest.raises(ValueError, match="no such log; expected"):
            send(path, producer)
    assert log_files(write(tmp_path / "any.name")) == [tmp_path / "any.name"]


@pytest.mark.parametrize("topic", [IMPRESSIONS, CLICKS])
def test_refused_record_ends_the_replay(tmp_path: Path, topic: str) -> None:
    log = write(tmp_path / "log.ndjson", impression("a", 1), click("a", 2))
    with pytest.raises(RuntimeError, match="the broker refused"):
        send(log, FakeProducer(broken=topic))


def test_refused_catalog_record_ends_the_replay(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the broker refused"):
        send(write(tmp_path / "log.ndjson", ELEMENT), FakeProducer(broken=CATALOG))


def test_record_fits_what_the_producer_may_send(tmp_path: Path, producer: FakeProducer) -> None:
    large = impression("0.x.y", 1000)
    large["candidates"]["title"] += [f"{n:0128}" for n in range(1000)]
    send(write(tmp_path / "log.ndjson", *(large | {"decision_id": f"0.x.{n}"} for n in range(64))), producer)
    assert len(producer.events(IMPRESSIONS)) == 64
    assert max(len(r["value"]) for r in producer.sent) <= 4 * 2**20
